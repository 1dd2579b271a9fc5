"""From tensors to the arguments of a kernel, by the conventions of kernels/common.py."""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor

from flash_attn.backends.flaggems import runtime
from flash_attn.backends.flaggems.tiles import Tile

LOG2E = 1.4426950408889634

# Positions are 32-bit numbers in the kernels, and sums of two of them too.
MAX_SEQLEN = 2**30


@functools.cache
def pieces(head_dim: int, unit: int) -> tuple[int, int]:
    """Powers of two D0 and D1 (or 0) that together hold a head with the least waste.

    One piece where elements are moved one by one (`unit_of`), which takes longer than what is
    wasted; and of two of those ptxas 12.8 makes wrong code (tests/triton/uniform_registers.py).
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    if unit == 1:
        return whole, 0
    half = whole // 2
    rest = max(16, 1 << (max(head_dim - half, 1) - 1).bit_length())
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def unit_of(*strides: tuple[int, ...]) -> int:
    """The unit in which the strides of operands are counted, in elements.

    8 where all of them are multiples of it, so that 16 bytes move at once, otherwise 1. The last
    stride of an operand is not looked at: it is 1.
    """
    for of_operand in strides:
        for stride in of_operand[:-1]:
            if stride % 8:
                return 1
    return 8


def leading_strides(strides: tuple[int, ...], unit: int = 1) -> tuple[int, int, int]:
    """Of batch (or page), row and head in `unit`s; a batch stride of 0 for (rows, heads, d)."""
    if len(strides) == 3:
        row, head, _ = strides
        return 0, row // unit, head // unit
    batch, row, head, _ = strides
    return batch // unit, row // unit, head // unit


def operand_unit(*operands: Tensor) -> int:
    """`unit_of` tensors."""
    return unit_of(*(x.stride() for x in operands))


def strides(x: Tensor, unit: int = 1) -> tuple[int, int, int]:
    """`leading_strides` of a tensor."""
    return leading_strides(x.stride(), unit)


def is_describable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor (b, s, h, d) or (s, h, d) can have a descriptor if its memory is aligned to
    16 bytes.
    """
    return all(0 < size < 2**31 for size in shape) and all(
        stride % 8 == 0 and 0 < stride < 2**36
        for size, stride in zip(shape[:-1], strides[:-1], strict=True)
        if size > 1
    )


@functools.cache
def _layout_of_gluon() -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def descriptor(x: Tensor, rows: int, columns: int, gluon: bool = False) -> Any:
    """Of tiles of rows of one head of a tensor (b, s, h, d), as (b, h, s, d), b being 1 without it.

    gluon: for a kernel in Gluon, which says how tiles lie in shared memory.
    """
    if gluon:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    else:
        from triton.tools.tensor_descriptor import TensorDescriptor

    batch, seqlen, num_heads, head_dim = x.shape if x.dim() == 4 else (1, *x.shape)
    # The stride of a dimension of one element is any number, but descriptors take only some.
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape, x.stride(), strict=True)]
    if x.dim() == 3:
        strides = [8, *strides]
    # Without its own checks, which take as long as all else: is_describable has made them.
    made = object.__new__(TensorDescriptor)
    made.base = x
    made.shape = [batch, num_heads, seqlen, head_dim]
    made.strides = [strides[0], strides[2], strides[1], 1]
    made.block_shape = [1, 1, rows, columns]
    if gluon:
        made.layout = _layout_of_gluon()
    return made


def softcap_kind(softcap: float) -> int:
    """0 without softcap; 1; 2 for a large one, of which the error of a plain tanh near 0 counts."""
    return 0 if softcap <= 0 else 1 if softcap <= 100 else 2


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """The threshold below which an entry's number keeps it, and what it is scaled by."""
    if dropout_p == 0:
        return 65536, 1.0
    return int((1.0 - dropout_p) * 65536.0 + 0.5), 1.0 / (1.0 - dropout_p)


def window(options: Any, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Both sides of the window, -1 where infinite. A side that hides nothing is infinite."""
    left, right = options.window_left, options.window_right
    everything = seqlen_q + seqlen_k
    return (
        -1 if left < 0 or left >= everything else left,
        0 if options.causal else -1 if right < 0 or right >= everything else right,
    )


def check_lengths(*lengths: int) -> None:
    """Raises RuntimeError for sequences longer than positions in the kernels can count."""
    if max(lengths) >= MAX_SEQLEN:
        raise RuntimeError(
            f"The FlagGems backend supports sequences of fewer than {MAX_SEQLEN} rows, but got "
            f"{max(lengths)}"
        )


class Constants(dict[str, Any]):
    """A kernel's constexpr parameters, to be kept: what they are known by is made once."""

    @functools.cached_property
    def key(self) -> str:
        return repr(self)


# Kernels that Triton has compiled on NVIDIA GPUs, by all that it specialises on, and the values of
# their constants. Its own search for one takes longer than the rest of a small call.
_compiled: dict[tuple, tuple[Any, tuple]] = {}


def _pointers(arguments: tuple) -> tuple[list, list]:
    """Of the arguments before the numbers: what a kernel is specialised on, and addresses.

    The launcher takes an address as it is, and asks the driver whose memory a tensor's is.
    """
    kinds, addresses = [], []
    for x in arguments:
        if x is None:
            kinds.append(None)
            addresses.append(None)
        elif isinstance(x, Tensor):
            address = x.data_ptr()
            kinds.append(x.dtype if address % 16 == 0 else (x.dtype,))
            addresses.append(address)
        elif isinstance(x, (int, float)):
            break
        else:  # a descriptor
            kinds.append((x.base.dtype, *x.block_shape))
            addresses.append(x)
    return kinds, addresses


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: tuple,
    constants: dict[str, Any],
    tile: Tile,
) -> None:
    """Runs a kernel in so many programs, on the current stream of the device.

    Arguments:
        arguments: tensors, tensor descriptors and None, then numbers, in the kernel's order.
        constants: its constexpr parameters, all of them.
    """
    if programs == 0:
        return
    if programs >= 2**31:
        raise RuntimeError(f"The call needs {programs} programs, more than a launch can have")
    where = runtime.current()
    grid = (programs, 1, 1)
    with where.guard(device):
        key = None
        if where.is_nvidia:
            kinds, addresses = _pointers(arguments)
            known = constants.key if isinstance(constants, Constants) else (*constants.values(),)
            key = (id(kernel), device.index, tile[2:], known, *kinds)
            found = _compiled.get(key)
            if found is not None:
                compiled, values = found
                compiled[grid](*addresses, *arguments[len(addresses) :], *values)
                return
        compiled = where.entry(kernel)[grid](
            *arguments, **constants, num_warps=tile.num_warps, num_stages=tile.num_stages
        )
        if key is not None and compiled is not None:
            names = kernel.arg_names[len(arguments) :]
            _compiled[key] = compiled, tuple(constants[name] for name in names)
