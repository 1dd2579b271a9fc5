"""Tiles of the kernels: one table, chosen by the capability of the device and the head.

Those of Hopper were timed on an H200 (benchmarks/tune_triton.py; docs/flaggems.md sums it up), the
others follow from registers and shared memory as the compiler reports them. Other vendors'
accelerators take the last entry, which asks for little.
"""

from __future__ import annotations

import functools
from typing import NamedTuple


class Tile(NamedTuple):
    """BLOCK_M query rows by BLOCK_N keys, and how a program runs."""

    block_m: int
    block_n: int
    num_warps: int
    num_stages: int


# From the largest head dimension on the left: (head_dim at most, tile).
_FORWARD = {
    90: (
        (64, Tile(64, 128, 4, 3)),
        (128, Tile(128, 128, 8, 3)),
        (256, Tile(128, 64, 8, 2)),
    ),
    80: (
        (64, Tile(128, 64, 4, 3)),
        (128, Tile(128, 64, 8, 3)),
        (256, Tile(64, 64, 4, 2)),
    ),
    86: (
        (64, Tile(128, 64, 4, 2)),
        (128, Tile(64, 64, 4, 2)),
        (256, Tile(64, 32, 4, 2)),
    ),
    0: (
        (64, Tile(64, 64, 4, 2)),
        (128, Tile(64, 64, 4, 1)),
        (256, Tile(64, 32, 4, 1)),
    ),
}
# Few rows, of which a program has all: bound by the reading of keys.
_FEW_ROWS = {
    90: ((64, Tile(16, 128, 4, 4)), (128, Tile(16, 64, 4, 4)), (256, Tile(16, 32, 4, 4))),
    80: ((64, Tile(16, 128, 4, 4)), (128, Tile(16, 64, 4, 4)), (256, Tile(16, 64, 4, 2))),
    86: ((64, Tile(16, 64, 4, 3)), (128, Tile(16, 64, 4, 2)), (256, Tile(16, 32, 4, 2))),
    0: ((64, Tile(16, 64, 4, 2)), (128, Tile(16, 64, 4, 1)), (256, Tile(16, 32, 4, 1))),
}

# Of the kernel in Gluon, which parts warps itself: num_warps of a group.
_FORWARD_HOPPER = ((128, Tile(128, 128, 4, 2)), (256, Tile(128, 64, 4, 2)))


def family(capability: int) -> int:
    """The key of a capability in the tables."""
    if capability in (90, 100, 103, 110):
        return 90
    if capability in (80, 87):
        return 80
    return 86 if capability >= 80 else 0


def _find(table: dict[int, tuple[tuple[int, Tile], ...]], capability: int, head_dim: int) -> Tile:
    entries = table[family(capability)]
    return next(tile for most, tile in entries if head_dim <= most)


def for_unit(unit: int, capability: int, tile: Tile) -> Tile:
    """The tile itself, or where elements are moved one by one (`unit_of` in launch.py) a smaller
    one: their addresses take registers.
    """
    if unit > 1 or family(capability) == 0:
        return tile
    return tile._replace(block_m=min(tile.block_m, 64), block_n=min(tile.block_n, 64), num_warps=8)


def forward(capability: int, head_dim: int, has_dropout: bool = False) -> Tile:
    """The tile of the forward kernel; head_dim: of all pieces."""
    tile = _find(_FORWARD, capability, head_dim)
    if has_dropout:  # random numbers take registers
        tile = tile._replace(block_n=min(tile.block_n, 64))
    return tile


def forward_hopper(head_dim: int) -> Tile:
    """The tile of the forward kernel of Hopper."""
    return next(tile for most, tile in _FORWARD_HOPPER if head_dim <= most)


def few_rows(capability: int, head_dim: int, rows: int) -> Tile:
    """The tile for at most 64 rows."""
    tile = _find(_FEW_ROWS, capability, head_dim)
    return tile._replace(block_m=16 if rows <= 16 else 32 if rows <= 32 else 64)


# Kernels that move rows, whose blocks follow from the call: only how a program runs counts.
ROWS = Tile(0, 0, 4, 1)
COMBINE = Tile(0, 0, 4, 1)
# For tests.
S_DMASK = Tile(32, 32, 4, 1)


# Of dK and dV: BLOCK_N keys stay, BLOCK_M rows pass. Registers are the limit: dK and dV take
# 2 * BLOCK_N * head_dim numbers, S and dP 2 * BLOCK_M * BLOCK_N.
_BACKWARD_DKDV = {
    90: (
        (64, Tile(128, 64, 4, 2)),
        (128, Tile(64, 64, 4, 2)),
        (256, Tile(64, 64, 8, 2)),
    ),
    80: (
        (64, Tile(64, 128, 8, 2)),
        (128, Tile(64, 64, 8, 2)),
        (192, Tile(16, 64, 8, 2)),
        (256, Tile(32, 64, 8, 2)),
    ),
    86: (
        (64, Tile(64, 128, 8, 2)),
        (128, Tile(64, 64, 8, 2)),
        (192, Tile(16, 64, 8, 2)),
        (256, Tile(32, 32, 8, 1)),
    ),
    0: (
        (64, Tile(32, 64, 4, 1)),
        (128, Tile(32, 64, 4, 1)),
        (256, Tile(32, 32, 4, 1)),
    ),
}
# Of dQ: BLOCK_M rows stay.
_BACKWARD_DQ = {
    90: (
        (64, Tile(128, 64, 4, 3)),
        (128, Tile(128, 64, 8, 3)),
        (256, Tile(64, 32, 4, 3)),
    ),
    80: (
        (64, Tile(128, 64, 8, 2)),
        (128, Tile(64, 64, 8, 2)),
        (256, Tile(64, 32, 8, 2)),
    ),
    86: (
        (64, Tile(128, 64, 8, 2)),
        (128, Tile(64, 64, 8, 2)),
        (256, Tile(64, 32, 8, 1)),
    ),
    0: (
        (64, Tile(64, 32, 4, 1)),
        (128, Tile(64, 32, 4, 1)),
        (256, Tile(32, 32, 4, 1)),
    ),
}

_BACKWARD_HOPPER = {
    64: (Tile(64, 128, 4, 2), Tile(128, 128, 4, 2)),
    128: (Tile(64, 128, 4, 2), Tile(128, 64, 4, 3)),
    256: (Tile(64, 64, 4, 2), Tile(64, 64, 4, 2)),
}


def backward_dkdv(
    capability: int,
    head_dim: int,
    described: bool = False,
    has_features: bool = False,
) -> Tile:
    """The tile of the kernel of dK and dV.

    described: operands arrive as tensor descriptors. has_features: softcap, ALiBi or dropout.
    """
    tile = _find(_BACKWARD_DKDV, capability, head_dim)
    if head_dim > 128 and family(capability) == 90 and (has_features or not described):
        return tile._replace(block_m=32)
    return tile


def backward_dq(capability: int, head_dim: int, has_features: bool = False) -> Tile:
    """The tile of the kernel of dQ; has_features: softcap, ALiBi or dropout."""
    tile = _find(_BACKWARD_DQ, capability, head_dim)
    return tile._replace(block_n=min(tile.block_n, 64)) if has_features else tile


def backward_hopper(head_dim: int) -> tuple[Tile, Tile]:
    """The tiles of the backward kernels of Hopper, of dK and dV and of dQ; head_dim: D0."""
    return _BACKWARD_HOPPER[head_dim]


@functools.cache
def has_gluon(capability: int) -> bool:
    """Whether the kernel in Gluon serves: on Hopper, by the Triton that it was written for."""
    import triton

    return capability == 90 and triton.__version__.startswith("3.6.")


def head_of_hopper(capability: int, head_dim: int, unit: int) -> int:
    """D0 of the kernels in Gluon, to which a head is one piece; 0 where they do not serve.

    unit: of the strides, see `unit_of` in launch.py.
    """
    if unit == 1 or head_dim <= 32 or not has_gluon(capability):
        return 0
    return max(64, 1 << (head_dim - 1).bit_length())


@functools.cache
def has_descriptors(capability: int) -> bool:
    """Whether kernels may read through tensor descriptors: Hopper's copy engine, and Triton 3.6."""
    if family(capability) != 90:
        return False
    import triton

    return tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
