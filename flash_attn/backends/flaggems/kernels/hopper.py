"""What the kernels of Hopper have in common: how tiles come into shared memory, and go.

They are written in Gluon, the explicit form of Triton 3.6: what a group of warps waits for, and
where its numbers lie, is said in the kernel and not found by the compiler. A program has two groups
of four warps with GROUP rows each, and a warp that has the copy engine bring what they need.
"""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

from flash_attn.backends.flaggems.kernels.gluon_functions import (
    keeps_of_counters,
    keeps_of_word,
    philox,
    tanh_by_reciprocal,
)

# Rows of a group of four warps.
GROUP = gl.constexpr(64)
# Strides of operands are counted in units of so many elements, 16 bytes.
UNIT = gl.constexpr(8)


@gluon.constexpr_function
def layout_of_product(columns):
    """Of a product (GROUP, columns) of a group of warps."""
    return gl.NVMMADistributedLayout([3, 0], [4, 1], [16, columns, 16])


@gluon.constexpr_function
def layout_of_memory(columns):
    """Of a tile that a group of warps moves, 16 bytes at once."""
    lanes = columns // 8
    return gl.BlockedLayout([1, 8], [32 // lanes, lanes], [4, 1], [1, 0])


@gluon.jit
def _addresses(pointer, row_stride, begin, end, HEAD_DIM: gl.constexpr, D0: gl.constexpr):
    """Of the elements of a tile (GROUP, D0), and which of them there are."""
    layout: gl.constexpr = layout_of_memory(D0)
    row = gl.arange(0, GROUP, gl.SliceLayout(1, layout))
    d = gl.arange(0, D0, gl.SliceLayout(0, layout))
    mask = ((row >= begin) & (row < end))[:, None]
    if HEAD_DIM < D0:
        mask = mask & (d[None, :] < HEAD_DIM)
    return pointer + row.to(gl.int64)[:, None] * row_stride + d[None, :], mask


@gluon.jit
def load_tile(tile, pointer, row_stride, begin, end, HEAD_DIM: gl.constexpr):
    """Rows of memory into shared memory, by a group: 0 before row `begin` and from `end` on."""
    address, mask = _addresses(pointer, row_stride, begin, end, HEAD_DIM, tile.shape[1])
    tile.store(gl.load(address, mask=mask, other=0.0))
    fence_async_shared()


@gluon.jit
def store_tile(pointer, row_stride, x, tile, end, HEAD_DIM: gl.constexpr):
    """The first `end` rows of x into memory, by a group and through the tile in shared memory."""
    tile.store(x)
    address, mask = _addresses(pointer, row_stride, 0, end, HEAD_DIM, tile.shape[1])
    gl.store(address, tile.load(layout_of_memory(tile.shape[1])), mask=mask)


@gluon.jit
def bring(x, batch, head, row, tile, full):
    """Has the copy engine bring rows of a head (x: descriptor of (b, h, s, d)); `full` expects
    their bytes already.
    """
    tma.async_copy_global_to_shared(x, [batch, head, row, 0], full, tile)


@gluon.jit
def clear_rows(tile, begin, end):
    """Sets the rows before `begin` and from `end` on to 0; by one warp."""
    ROWS: gl.constexpr = 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [1, 1], [1, 0])
    for i in gl.static_range(tile.shape[0] // ROWS):
        if (begin > i * ROWS) | (end < (i + 1) * ROWS):
            part = tile.slice(i * ROWS, ROWS)
            row = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            valid = (row >= begin) & (row < end)
            part.store(gl.where(valid[:, None], part.load(layout), 0.0))


@gluon.jit
def softcap_reciprocal(x):
    """1 / (exp2(x) + 1) of an accumulator (GROUP, columns) of a product, of which tanh is made.

    Four entries of a row, which are in one thread, share one reciprocal: the unit that has it, and
    the exponentials, is what softcap waits for. x is cut off at 30, where tanh is 1, so that the
    product of four is finite. A NaN spreads to the other three.
    """
    columns: gl.constexpr = x.shape[1]
    x = gl.exp2(gl.minimum(x, 30.0, propagate_nan=tl.PropagateNan.ALL)) + 1.0
    fours = gl.permute(gl.reshape(x, [GROUP, columns // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    even, odd = gl.split(fours)
    a, b = gl.split(even)
    c, d = gl.split(odd)
    ab = a * b
    cd = c * d
    root = gl.rsqrt(ab * cd)
    of_all = root * root
    of_ab = of_all * cd
    of_cd = of_all * ab
    even = gl.join(of_ab * b, of_ab * a)
    odd = gl.join(of_cd * d, of_cd * c)
    fours = gl.permute(gl.join(even, odd), [0, 1, 3, 2, 4])
    return gl.convert_layout(
        gl.reshape(fours, [GROUP, columns]), layout_of_product(columns), assert_trivial=True
    )


@gluon.jit
def exponents(
    score,
    distance,
    softcap,
    slope,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
):
    """As exponents of backward_tiles.py."""
    capped = score
    if HAS_SOFTCAP:
        capped = tanh_by_reciprocal(score, softcap_reciprocal(score), HAS_SOFTCAP == 2)
        score = softcap * capped
    if HAS_ALIBI:
        score = score - slope * gl.abs(distance)
    return score, capped


@gluon.constexpr_function
def layout_of_counters(columns):
    """Of Philox blocks (32, columns / 4), each for 2 rows and 4 columns of an accumulator (GROUP,
    columns) of a product: a block is in the thread that has these.
    """
    columns_of_thread = [[0, 1]] + [[0, 8 << i] for i in range((columns // 32).bit_length() - 1)]
    lanes = [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(
        columns_of_thread, lanes, [[8, 0], [16, 0]], [], [32, columns // 4]
    )


@gluon.jit
def dropout_keeps(
    key0,
    key1,
    threshold,
    batch,
    head,
    row,
    column,
    COLUMNS: gl.constexpr,
):
    """Which entries of (GROUP, COLUMNS) dropout keeps; as dropout_keeps of common.py."""
    counters: gl.constexpr = layout_of_counters(COLUMNS)
    c0 = (row // 2 + gl.arange(0, GROUP // 2, gl.SliceLayout(1, counters))).to(gl.uint32)
    c1 = (column // 4 + gl.arange(0, COLUMNS // 4, gl.SliceLayout(0, counters))).to(gl.uint32)
    zero = gl.full([GROUP // 2, COLUMNS // 4], 0, gl.uint32, counters)
    keeps = keeps_of_counters(c0, c1, zero, key0, key1, threshold, batch, head, GROUP, COLUMNS)
    return gl.convert_layout(keeps, layout_of_product(COLUMNS), assert_trivial=True)


@gluon.jit
def dropout_keeps_transposed(key0, key1, threshold, batch, head, row, column, ROWS: gl.constexpr):
    """Which entries of (GROUP columns, ROWS) dropout keeps; as in common.py.

    A thread has c and c + 8 of 16 columns, so a Philox block is computed for every 16.
    """
    counters: gl.constexpr = layout_of_counters(2 * ROWS)
    of_column = gl.arange(0, GROUP // 2, gl.SliceLayout(1, counters))
    of_row = gl.arange(0, ROWS // 2, gl.SliceLayout(0, counters))
    zero = gl.full([GROUP // 2, ROWS // 2], 0, gl.uint32, counters)
    c0 = (row // 2 + of_row).to(gl.uint32)
    c1 = (column // 4 + of_column // 16 * 8 + of_column % 8).to(gl.uint32)
    w0, w1, w2, w3 = philox(
        c0[None, :] + zero,
        c1[:, None] + zero,
        zero + head.to(gl.uint32),
        zero + batch.to(gl.uint32),
        key0,
        key1,
    )
    second = (of_column // 8 % 2 == 1)[:, None]
    near = keeps_of_word(gl.where(second, w2, w0), threshold)
    far = keeps_of_word(gl.where(second, w3, w1), threshold)
    keeps = gl.join(near, far)  # (columns, rows, r or r + 8, c or c + 8)
    keeps = gl.reshape(keeps, [GROUP // 16, 8, ROWS // 16, 8, 2, 2])
    keeps = gl.permute(keeps, [0, 5, 1, 2, 4, 3])
    keeps = gl.reshape(keeps, [GROUP, ROWS]) != 0
    return gl.convert_layout(keeps, layout_of_product(ROWS), assert_trivial=True)
