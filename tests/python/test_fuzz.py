"""Random calls of the raw entry points: an error, or the reference's result; never anything else.

A call is drawn that is valid, and half of the time something about it is then changed: a tensor
left out, another dtype, rank, extent or stride, a number far out of range, lengths and tables of
nonsense. Every output lies inside a larger buffer. An error must leave the outputs as they were; a
success must write every element of them, what the reference says, and nothing around them.

FLASH_ATTN_TEST_FUZZ multiplies the number of examples (1 unless set).
"""

import math
import os
import random

import pytest
import raw
import reference
import torch
from checks import BF16, DTYPES, FP16, FP32, assert_close

EXAMPLES = int(60 * float(os.environ.get("FLASH_ATTN_TEST_FUZZ") or 1))
SEEDS = range(6)

SENTINEL = 77.0  # exact in every dtype

LENGTHS = (0, 1, 1, 2, 3, 5, 8, 15, 16, 17, 31, 33, 40, 64, 65, 70)
HEAD_DIMS = (1, 2, 3, 8, 16, 17, 24, 32, 40, 64, 72, 80, 96, 128, 255, 256)
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


def cumulative(lengths):
    return torch.tensor([0, *lengths]).cumsum(0).to(torch.int32)


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


def attempt(function, rng, valid, outputs):
    """Call; whether it succeeded, and with which arguments."""
    broken = rng.random() < 0.5
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


# -------------------------------------------------------------------------------------------------
# Forward and backward


def attention_call(rng, backward):
    """Arguments that forward and backward share."""
    heads_k = rng.choice((1, 1, 2, 3))
    heads = heads_k * rng.choice((1, 1, 2, 3))
    head_dim = rng.choice(HEAD_DIMS)
    dtype = rng.choice(DTYPES)
    batch = rng.choice((0, 1, 1, 2, 3))
    arguments = {
        "softmax_scale": rng.choice((head_dim**-0.5, 0.3, -0.2)),
        "softcap": rng.choice((0.0, 0.0, 3.0)),
        "dropout_p": rng.choice((0.0, 0.0, 0.2)),
        "window_left": rng.choice((-1, -1, 0, 3, 20)),
        "window_right": rng.choice((-1, -1, 0, 3, 20)),
        "causal": rng.choice((0, 1)),
        "num_threads": rng.choice((0, 1, 2, 3)),
    }
    lengths_q = [rng.choice(LENGTHS) for _ in range(batch)]
    lengths_k = [rng.choice(LENGTHS) for _ in range(batch)]
    q_shape = (batch, rng.choice(LENGTHS), heads, head_dim)
    k_shape = (batch, rng.choice(LENGTHS), heads_k, head_dim)
    if rng.random() < 0.6:
        q_shape = (sum(lengths_q) + rng.choice((0, 0, 3)), heads, head_dim)
        arguments["cu_seqlens_q"] = cumulative(lengths_q)
        arguments["max_seqlen_q"] = max([0, *lengths_q]) + rng.choice((0, 0, 9, 2**40))
    else:
        lengths_q = [q_shape[1]] * batch
    paged = not backward and rng.random() < 0.25
    variable_k = rng.random() < (0.5 if paged else 0.6) and "cu_seqlens_q" in arguments
    if variable_k:
        k_shape = (sum(lengths_k) + rng.choice((0, 0, 3)), heads_k, head_dim)
        arguments["cu_seqlens_k"] = cumulative(lengths_k)
        arguments["max_seqlen_k"] = max([0, *lengths_k]) + rng.choice((0, 0, 9, 2**40))
    else:
        lengths_k = [k_shape[1]] * batch
    if paged:
        page_size = rng.choice((1, 4, 16, 33))
        columns = max([0, *(-(-n // page_size) for n in lengths_k)]) + rng.choice((0, 1))
        pages = batch * columns + 2
        k_shape = (pages, page_size, heads_k, head_dim)
        order = rng.sample(range(pages), batch * columns)
        table = torch.tensor(order, dtype=torch.int32).view(batch, columns)
        arguments["block_table"] = table
        if not variable_k:
            lengths_k = [columns * page_size] * batch
    if rng.random() < 0.3:
        lengths_k = [rng.randint(0, n) for n in lengths_k]
        arguments["seqused_k"] = torch.tensor(lengths_k, dtype=torch.int32)
    if not backward and rng.random() < 0.2:
        padding = [rng.randint(0, n) for n in lengths_k]
        arguments["leftpad_k"] = torch.tensor(padding, dtype=torch.int32)
    if rng.random() < 0.3:
        shape = rng.choice(((heads,), (batch, heads)))
        arguments["alibi_slopes"] = strided(rng, (*shape, 2), FP32)[..., 0].abs()
    if rng.random() < 0.3:
        arguments["s_aux"] = torch.randn(heads, 3)[:, 1]
    if arguments["dropout_p"] > 0:
        arguments["rng_state"] = torch.tensor([rng.getrandbits(63), rng.choice((0, -1, 5))])
    arguments["q"] = strided(rng, q_shape, dtype)
    arguments["k"] = strided(rng, k_shape, dtype)
    arguments["v"] = strided(rng, k_shape, dtype)
    row_shape = (heads, q_shape[0]) if len(q_shape) == 3 else (batch, heads, q_shape[1])
    return arguments, row_shape, lengths_q, lengths_k


def expected_attention(arguments, dtype, s_aux=None, tensors=None):
    """out and lse of a call, one sequence at a time."""
    a = arguments
    q, k, v = tensors or (a["q"], a["k"], a["v"])
    s_aux = a.get("s_aux") if s_aux is None else s_aux
    cu_q, cu_k, table = a.get("cu_seqlens_q"), a.get("cu_seqlens_k"), a.get("block_table")
    batch = len(q) if cu_q is None else len(cu_q) - 1
    heads = q.shape[-2]
    outs, lses = [], []
    for i in range(batch):
        q_rows = q[i] if cu_q is None else q[cu_q[i] : cu_q[i + 1]]
        if cu_k is not None:
            length = int(cu_k[i + 1] - cu_k[i])
        else:
            length = k.shape[1] * (1 if table is None else table.shape[1])
        if a.get("seqused_k") is not None:
            length = int(a["seqused_k"][i])
        rows = []
        for x in (k, v):
            if table is not None:
                x = reference.gather_pages(x, table[i], length)
            elif cu_k is not None:
                x = x[int(cu_k[i]) : int(cu_k[i]) + length]
            else:
                x = x[i, :length]
            rows.append(x[int(a["leftpad_k"][i]) if a.get("leftpad_k") is not None else 0 :])
        slopes = a.get("alibi_slopes")
        keep_mask = None
        if a["dropout_p"] > 0:
            keep_mask = reference.dropout_keep_mask(
                a["dropout_p"],
                a["rng_state"].tolist(),
                *(1, heads, len(q_rows), len(rows[0])),
                first_batch=i,
            )
        window_size = [max(-1, min(a[name], 10**6)) for name in ("window_left", "window_right")]
        out, lse = reference.attention(
            q_rows[None],
            *(x[None] for x in rows),
            softmax_scale=a["softmax_scale"],
            causal=bool(a["causal"]),
            window_size=window_size,
            softcap=a["softcap"],
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[i],
            s_aux=s_aux,
            dropout_p=a["dropout_p"],
            keep_mask=keep_mask,
            dtype=dtype,
        )
        outs.append(out)
        lses.append(lse)
    if cu_q is None:
        empty = q[..., 0].transpose(1, 2).to(dtype)
        return (torch.cat(outs), torch.cat(lses)) if batch else (q.to(dtype), empty)
    rest = len(q) - int(cu_q[-1])
    outs = [out[0] for out in outs] + [torch.zeros(rest, *q.shape[1:]).to(dtype)]
    lses = [lse[0] for lse in lses] + [torch.full((heads, rest), math.inf).to(dtype)]
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_forward(seed):
    rng = random.Random(seed)
    torch.manual_seed(seed)
    for _ in range(EXAMPLES):
        arguments, row_shape, lengths_q, lengths_k = attention_call(rng, backward=False)
        q = arguments["q"]
        arguments["num_splits"] = rng.choice((0, 0, 1, 2, 5, 1000))
        outputs = {
            "out": Output(rng, q.shape, q.dtype),
            "softmax_lse": Output(rng, row_shape, FP32),
        }
        wants_mask = arguments["dropout_p"] > 0 and max([0, *lengths_q, *lengths_k]) < 2**20
        if wants_mask and arguments.get("max_seqlen_q", 0) + arguments.get("max_seqlen_k", 0) < 999:
            batch = len(lengths_q)
            rows = max([arguments.get("max_seqlen_q", 0), *lengths_q, q.shape[1]])
            capacity = arguments["k"].shape[1]
            if arguments.get("block_table") is not None:
                capacity *= max(1, arguments["block_table"].shape[1])
            columns = max([arguments.get("max_seqlen_k", 0), *lengths_k, capacity])
            shape = (batch, q.shape[-2], rows + 1, columns + 3)
            outputs["s_dmask"] = Output(rng, shape, q.dtype)
        arguments.update({name: output.tensor for name, output in outputs.items()})
        done, arguments = attempt(raw.forward, rng, arguments, outputs)
        if not done:
            continue
        out, lse = expected_attention(arguments, torch.float64)
        naive_out, _ = expected_attention(arguments, q.dtype)
        _, naive_lse = expected_attention(arguments, FP32)
        assert_close(outputs["out"].tensor, out, naive_out, "out")
        assert_close(outputs["softmax_lse"].tensor, lse, naive_lse, "lse", input_dtype=q.dtype)
        if "s_dmask" in outputs:
            assert outputs["s_dmask"].tensor.isfinite().all()


@pytest.mark.parametrize("seed", SEEDS)
def test_backward(seed):
    rng = random.Random(1000 + seed)
    torch.manual_seed(seed)
    for _ in range(EXAMPLES):
        valid, row_shape, _, _ = attention_call(rng, backward=True)
        dtype = valid["q"].dtype
        valid["dout"] = strided(rng, valid["q"].shape, dtype)
        if rng.random() < 0.4:
            valid["dsoftmax_lse"] = torch.randn(row_shape)
        out, lse = expected_attention(valid, torch.float64)
        valid["out"], valid["softmax_lse"] = out.to(dtype), lse.to(FP32)
        outputs = {
            "dq": Output(rng, valid["q"].shape, dtype),
            "dk": Output(rng, valid["k"].shape, dtype),
            "dv": Output(rng, valid["v"].shape, dtype),
            "softmax_d": Output(rng, row_shape, FP32),
        }
        if "s_aux" in valid:
            outputs["ds_aux"] = Output(rng, valid["s_aux"].shape, FP32)
        valid.update({name: output.tensor for name, output in outputs.items()})
        done, arguments = attempt(raw.backward, rng, valid, outputs)
        changed = [
            name
            for name in ("out", "softmax_lse", "dropout_p", "rng_state", "softcap", "softmax_scale")
            if arguments.get(name) is not valid.get(name)
        ]
        if not done:
            continue
        # A forward that does not belong to the call has no reference; it must be finished, no more.
        same_forward = not changed and all(
            arguments.get(name) is valid.get(name)
            for name in raw.BACKWARD
            if name not in ("dout", "dsoftmax_lse", "num_threads", "deterministic", *outputs)
        )
        if not same_forward:
            continue
        names = ["dq", "dk", "dv"] + (["ds_aux"] if "s_aux" in arguments else [])
        expected, naive = (
            gradients(arguments, computed_in) for computed_in in (torch.float64, dtype)
        )
        # Where dP - D cancels, the rounding of out is what remains; a naive result of a few rows
        # can be free of it by luck.
        rows = (arguments["dout"].double() * arguments["out"].double()).abs().sum(-1)
        rounding = torch.finfo(dtype).eps * abs(arguments["softmax_scale"]) * largest(rows)
        slack = {"dq": rounding * largest(arguments["k"]), "dk": rounding * largest(arguments["q"])}
        for name, want, plain in zip(names, expected, naive, strict=True):
            plain = plain.double() + slack.get(name, 0.0)
            assert_close(outputs[name].tensor, want, plain, name, dtype=dtype)


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


def gradients(arguments, dtype):
    leaves = [arguments[name].detach().to(dtype).requires_grad_() for name in "qkv"]
    s_aux = arguments.get("s_aux")
    if s_aux is not None:
        s_aux = s_aux.detach().to(dtype).requires_grad_()
    out, lse = expected_attention(arguments, dtype, s_aux, leaves)
    total = (out * arguments["dout"].to(dtype)).sum()
    if arguments.get("dsoftmax_lse") is not None:
        dlse = arguments["dsoftmax_lse"].to(lse.dtype)
        total = total + torch.where(lse.isfinite(), lse * dlse, 0.0).sum()
    leaves += [] if s_aux is None else [s_aux]
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


# -------------------------------------------------------------------------------------------------
# The cache


@pytest.mark.parametrize("seed", SEEDS)
def test_kvcache(seed):
    rng = random.Random(2000 + seed)
    torch.manual_seed(seed)
    for _ in range(EXAMPLES):
        valid = cache_call(rng)
        q = valid["q"]
        outputs = {
            "out": Output(rng, q.shape, q.dtype),
            "softmax_lse": Output(rng, (len(q), q.shape[2], q.shape[1]), FP32),
        }
        valid.update({name: output.tensor for name, output in outputs.items()})
        before = {name: valid[name].clone() for name in ("k_cache", "v_cache")}
        done, arguments = attempt(raw.kvcache, rng, valid, outputs)
        if not done:
            for name, copy in before.items():
                assert torch.equal(valid[name], copy), f"{name} was written before an error"
            continue
        places = ("k_cache", "v_cache", "block_table", "cache_batch_idx")
        if any(arguments.get(name) is not valid.get(name) for name in places):
            continue  # what the caches held is not known, or two sequences write to one place
        options = {
            name: arguments.get(name)
            for name in ("rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")
        }
        options["block_table"] = arguments.get("block_table")
        options["rotary_interleaved"] = bool(arguments["rotary_interleaved"])
        window_size = [
            max(-1, min(arguments[name], 10**6)) for name in ("window_left", "window_right")
        ]
        results = [
            reference.kvcache_attention(
                *(arguments["q"], *before.values(), arguments.get("k"), arguments.get("v")),
                **options,
                cache_leftpad=arguments.get("cache_leftpad"),
                causal=bool(arguments["causal"]),
                window_size=window_size,
                softmax_scale=arguments["softmax_scale"],
                softcap=arguments["softcap"],
                alibi_slopes=arguments.get("alibi_slopes"),
                s_aux=arguments.get("s_aux"),
                dtype=dtype,
            )
            for dtype in (torch.float64, q.dtype, FP32)
        ]
        (out, lse), (naive_out, half_lse), (_, naive_lse) = results
        rotated = options["rotary_cos"] is not None
        lse_dtype, naive_lse = (q.dtype, half_lse) if rotated else (FP32, naive_lse)
        assert_close(outputs["out"].tensor, out, naive_out, "out")
        assert_close(
            *(outputs["softmax_lse"].tensor, lse, naive_lse, "lse"),
            dtype=lse_dtype,
            input_dtype=q.dtype,
        )
        if arguments.get("k") is not None:
            expected = reference.kvcache_append(
                *before.values(), arguments["k"], arguments["v"], **options
            )
            assert torch.equal(arguments["v_cache"].double(), expected[1])
            if not rotated:
                assert torch.equal(arguments["k_cache"].double(), expected[0])


def cache_call(rng):
    heads_k = rng.choice((1, 2, 3))
    heads = heads_k * rng.choice((1, 2, 3))
    head_dim = rng.choice(HEAD_DIMS)
    dtype = rng.choice(DTYPES)
    batch, sq = rng.choice((0, 1, 1, 2, 3)), rng.choice((0, 1, 1, 1, 2, 5, 20))
    new = rng.choice((None, None, 0, 1, 1, 3, 20))
    capacity = rng.choice(LENGTHS) + (new or 0)
    lengths = [rng.randint(0, capacity - (new or 0)) for _ in range(batch)]
    arguments = {
        "q": strided(rng, (batch, sq, heads, head_dim), dtype),
        "softmax_scale": rng.choice((head_dim**-0.5, 0.3, -0.2)),
        "softcap": rng.choice((0.0, 0.0, 3.0)),
        "window_left": rng.choice((-1, -1, 0, 3, 20)),
        "window_right": rng.choice((-1, -1, 0, 3, 20)),
        "causal": rng.choice((0, 1)),
        "rotary_interleaved": rng.choice((0, 1)),
        "num_splits": rng.choice((0, 0, 1, 2, 5, 1000)),
        "num_threads": rng.choice((0, 1, 2, 3)),
    }
    if new is not None or rng.random() < 0.7:
        arguments["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    else:
        lengths = [capacity] * batch
    if rng.random() < 0.25:
        padding = [rng.randint(0, n) for n in lengths]
        arguments["cache_leftpad"] = torch.tensor(padding, dtype=torch.int32)
    shape = [batch, capacity, heads_k, head_dim]
    if rng.random() < 0.3:
        page_size = rng.choice((1, 4, 16, 33))
        columns = -(-capacity // page_size)
        shape[:2] = batch * columns + 2, page_size
        order = rng.sample(range(shape[0]), batch * columns)
        arguments["block_table"] = torch.tensor(order, dtype=torch.int32).view(batch, columns)
        if "cache_seqlens" not in arguments:
            lengths = [columns * page_size] * batch
        capacity = columns * page_size
    elif rng.random() < 0.3:
        shape[0] += 2
        arguments["cache_batch_idx"] = torch.tensor(
            rng.sample(range(shape[0]), batch), dtype=torch.int32
        )
    for name in ("k_cache", "v_cache"):
        cache = Output(rng, tuple(shape), dtype).tensor
        arguments[name] = cache.copy_(torch.randn(shape))
    if new is not None:
        for name in ("k", "v"):
            arguments[name] = strided(rng, (batch, new, heads_k, head_dim), dtype)
        if head_dim >= 16 and rng.random() < 0.5:
            half = 8 * rng.randint(1, head_dim // 16)
            angles = torch.rand(capacity + 25, half) * 6
            arguments["rotary_cos"] = angles.cos().to(dtype)
            arguments["rotary_sin"] = angles.sin().to(dtype)
    if rng.random() < 0.3:
        arguments["alibi_slopes"] = torch.rand(rng.choice(((heads,), (batch, heads))))
    if rng.random() < 0.3:
        arguments["s_aux"] = torch.randn(heads)
    return arguments


# -------------------------------------------------------------------------------------------------
# Rotary embedding


@pytest.mark.parametrize("seed", SEEDS)
def test_rotary(seed):
    rng = random.Random(3000 + seed)
    torch.manual_seed(seed)
    for _ in range(EXAMPLES):
        heads, head_dim = rng.choice((1, 2, 3)), rng.choice(HEAD_DIMS)
        dtype = rng.choice(DTYPES)
        batch, length = rng.choice((0, 1, 2, 3)), rng.choice(LENGTHS)
        half = rng.randint(0, head_dim // 2)
        lengths = [length] * batch
        arguments = {
            "interleaved": rng.choice((0, 1)),
            "conjugate": rng.choice((0, 1)),
            "num_threads": rng.choice((0, 1, 2)),
            "seqlen_offset": 0,
        }
        if rng.random() < 0.4:
            lengths = [rng.choice(LENGTHS) for _ in range(batch)]
            arguments["cu_seqlens"] = cumulative(lengths)
            arguments["max_seqlen"] = max([0, *lengths])
            x = strided(rng, (sum(lengths) + rng.choice((0, 2)), heads, head_dim), dtype)
        else:
            x = strided(rng, (batch, length, heads, head_dim), dtype)
        offsets = [rng.choice((0, 0, 1, 9)) for _ in range(batch)]
        if rng.random() < 0.5:
            arguments["seqlen_offsets"] = torch.tensor(offsets).to(
                rng.choice((torch.int32, torch.int64))
            )
        else:
            arguments["seqlen_offset"] = rng.choice((0, 4))
            offsets = [arguments["seqlen_offset"]] * batch
        table_dtype = rng.choice((dtype, FP32))
        angles = torch.rand(90, half) * 6
        arguments["x"], arguments["cos"] = x, angles.cos().to(table_dtype)
        arguments["sin"] = angles.sin().to(table_dtype)
        outputs = {"out": Output(rng, x.shape, dtype)}
        arguments["out"] = outputs["out"].tensor
        done, changed = attempt(raw.rotary, rng, arguments, outputs)
        if not done or any(changed.get(name) is not arguments.get(name) for name in arguments):
            continue
        for computed in ("expected", "naive"):
            computed_in = torch.float64 if computed == "expected" else dtype
            parts = []
            begin = 0
            for i, n in enumerate(lengths):
                rows = x[i] if "cu_seqlens" not in arguments else x[begin : begin + n]
                begin += n
                parts.append(
                    reference.apply_rotary(
                        rows,
                        *(arguments["cos"], arguments["sin"]),
                        positions=torch.arange(n) + offsets[i],
                        interleaved=bool(arguments["interleaved"]),
                        conjugate=bool(arguments["conjugate"]),
                        dtype=computed_in,
                    )
                )
            if "cu_seqlens" in arguments:
                parts.append(x[begin:].to(computed_in))
                result = torch.cat(parts)
            else:
                result = torch.stack(parts) if parts else x.to(computed_in)
            if computed == "expected":
                expected = result
            else:
                naive = result
        rows = slice(None) if "cu_seqlens" not in arguments else slice(0, begin)
        assert_close(outputs["out"].tensor[rows], expected[rows], naive[rows], "rotary")


def test_examples_of_both_kinds():
    """The generator makes calls that succeed and calls that fail, in numbers."""
    rng = random.Random(1)
    torch.manual_seed(1)
    counts = {True: 0, False: 0}
    for _ in range(100):
        arguments, row_shape, _, _ = attention_call(rng, backward=False)
        q = arguments["q"]
        outputs = {
            "out": Output(rng, q.shape, q.dtype),
            "softmax_lse": Output(rng, row_shape, FP32),
        }
        arguments.update({name: output.tensor for name, output in outputs.items()})
        done, _ = attempt(raw.forward, rng, arguments, outputs)
        counts[done] += 1
    assert min(counts.values()) >= 20, counts
    assert {BF16, FP16, FP32} == set(DTYPES)
