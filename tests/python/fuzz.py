"""Random calls of the raw entry points: an error, or the reference's result; never anything else.

A call is drawn that is valid, and half of the time something about it is then changed: a tensor
left out, another dtype, rank, extent or stride, a number far out of range, lengths and tables of
nonsense. Every output lies inside a larger buffer. An error must leave the outputs as they were; a
success must write every element of them, what the reference says, and nothing around them.

Lengths and tables on a GPU are not read before a launch: nonsense there is no error, and nothing
but the surroundings of the outputs is looked at then.

FLASH_ATTN_TEST_FUZZ multiplies the number of examples (1 unless set).
FLASH_ATTN_TEST_HEAD_DIMS=64,128 restricts the head dimensions, and so what a GPU has to compile.
"""

import math
import os

import torch
from checks import DEVICE, DTYPES, FP32

EXAMPLES = int(60 * float(os.environ.get("FLASH_ATTN_TEST_FUZZ") or 1))
SEEDS = range(6)
BROKEN = 0.5  # share of calls that are changed

SENTINEL = 77.0  # exact in every dtype

LENGTHS = (0, 1, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 40, 64, 65, 70)
if DEVICE.type != "cpu":  # whose tiles are larger
    LENGTHS += (100, 127, 128, 129, 160, 200, 257, 300)
HEAD_DIMS = (1, 2, 3, 8, 16, 17, 24, 32, 40, 64, 72, 80, 96, 128, 255, 256)
if chosen := os.environ.get("FLASH_ATTN_TEST_HEAD_DIMS"):
    HEAD_DIMS = tuple(map(int, chosen.split(",")))
EXTREMES = (-(2**63), -(2**31), -1, 0, 1, 2**31 - 1, 2**31, 2**40, 2**62, 2**63 - 1)
STRANGE_FLOATS = (0.0, -1.0, 0.3, 1.0, 2.0, math.nan, math.inf, -math.inf)
FLAGS = ("causal", "rotary_interleaved", "interleaved", "conjugate")
STRANGE_INT32 = (-(2**31), -1, 0, 1, 7, 100, 2**31 - 1)


class Output:
    """A tensor somewhere inside a buffer of sentinels, itself full of NaN."""

    def __init__(self, rng, shape, dtype):
        order = [*rng.sample(range(len(shape) - 1), len(shape) - 1), len(shape) - 1]
        gaps = [rng.choice((0, 0, 1, 2)) for _ in shape]
        sizes = [shape[axis] + gaps[axis] for axis in order]
        strides = [0] * len(shape)
        step = 1
        for axis, size in zip(reversed(order), reversed(sizes), strict=True):
            strides[axis] = step
            step *= max(size, 1)
        self.geometry = shape, strides, 5
        self.buffer = torch.full((step + 10,), SENTINEL, dtype=dtype)
        self.tensor = self.buffer.as_strided(*self.geometry)
        self.tensor.fill_(math.nan)

    def assert_untouched(self):
        assert self.tensor.isnan().all(), "written before an error"
        self.assert_surroundings_untouched()

    def assert_surroundings_untouched(self):
        copy = self.buffer.clone()
        copy.as_strided(*self.geometry).fill_(SENTINEL)
        assert (copy == SENTINEL).all(), "written outside of the tensor"


def strided(rng, shape, dtype):
    """Random numbers in memory in any order but the last dimension, sometimes expanded."""
    order = [*rng.sample(range(len(shape) - 1), len(shape) - 1), len(shape) - 1]
    expand = [rng.random() < 0.05 for _ in shape[:-1]] + [False]
    gaps = [rng.choice((0, 0, 1, 3)) for _ in shape]
    sizes = [1 if e else n + g for n, g, e in zip(shape, gaps, expand, strict=True)]
    whole = torch.randn([sizes[axis] for axis in order]).to(dtype)
    view = whole.permute([order.index(axis) for axis in range(len(shape))])
    return view[tuple(slice(0, 1 if e else n) for n, e in zip(shape, expand, strict=True))].expand(
        shape
    )


# -------------------------------------------------------------------------------------------------
# Making a call invalid, or at least unusual


def changed_tensor(rng, x):
    kind = rng.randrange(8)
    if kind == 0:
        return None
    if kind == 1:
        if x.dtype in (torch.int32, torch.int64):
            return x.to(rng.choice((torch.int32, torch.int64, torch.int16, FP32)))
        return x.to(rng.choice((*DTYPES, torch.float64, torch.int32, torch.bool)))
    if kind == 2:
        return x[0] if x.dim() > 0 and x.shape[0] > 0 and rng.random() < 0.5 else x[None]
    if kind in (3, 4) and x.dim() > 0:
        axis = rng.randrange(x.dim())
        shape = list(x.shape)
        shape[axis] = max(0, shape[axis] + rng.choice((-1, 1, 2, -shape[axis], 257)))
        return (
            torch.randn(shape).to(x.dtype)
            if x.is_floating_point()
            else torch.zeros(shape).to(x.dtype)
        )
    if kind == 5 and x.dim() > 0:
        return torch.stack([x, x], -1)[..., 0]
    if kind == 6 and x.dim() > 0 and x.shape[0] > 1:
        return x[:1].expand(x.shape)
    if not x.is_floating_point() and x.numel() > 0:
        x = x.clone()
        x.view(-1)[rng.randrange(x.numel())] = rng.choice(STRANGE_INT32)
    return x


def change(rng, arguments, outputs):
    """One or two arguments replaced. Outputs are left alone: they are watched."""
    arguments = dict(arguments)
    names = [name for name in arguments if name not in outputs]
    for name in rng.sample(names, rng.choice((1, 1, 2))):
        value = arguments[name]
        if isinstance(value, torch.Tensor):
            arguments[name] = changed_tensor(rng, value)
        elif isinstance(value, float):
            arguments[name] = rng.choice(STRANGE_FLOATS)
        elif name in ("num_threads", "num_splits"):
            arguments[name] = rng.choice((-1, 0, 1, 2, 7))
        elif name in FLAGS:
            arguments[name] = 1 - value
        else:
            arguments[name] = rng.choice(EXTREMES)
    return arguments


def lengths_are_known(arguments, valid):
    """Whether the call has the lengths and tables that it was drawn with, or they were checked.

    On a GPU nobody sees that a length is beyond its bound.
    """
    if DEVICE.type == "cpu":
        return True
    bounds = ("max_seqlen_q", "max_seqlen_k")
    return all(arguments[name] >= valid[name] for name in bounds if name in valid) and all(
        arguments.get(name) is x
        for name, x in valid.items()
        if isinstance(x, torch.Tensor) and x.dtype in (torch.int32, torch.int64)
    )


def attempt(function, rng, valid, outputs):
    """Call; whether it succeeded, and with which arguments."""
    broken = rng.random() < BROKEN
    arguments = change(rng, valid, outputs) if broken else valid
    try:
        function(**arguments)
    except (RuntimeError, TypeError) as error:
        assert broken, f"a valid call was refused: {error}"
        assert str(error), "an error without a message"
        for output in outputs.values():
            output.assert_untouched()
        return False, arguments
    for output in outputs.values():
        output.assert_surroundings_untouched()
    return True, arguments
