"""What the kernels of Hopper have in common: how tiles come into shared memory, and go.

They are written in Gluon, the explicit form of Triton 3.6: what a group of warps waits for, and
where its numbers lie, is said in the kernel and not found by the compiler. A program has two groups
of four warps with GROUP rows each, and a warp (with dropout in dK and dV several, that draw its
numbers too) that has the copy engine bring what they need. What happens to scores is in
scores_hopper.py and dropout_hopper.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, tma

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
    """Sets the rows before `begin` and from `end` on to 0."""
    ROWS: gl.constexpr = 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    for i in gl.static_range(tile.shape[0] // ROWS):
        if (begin > i * ROWS) | (end < (i + 1) * ROWS):
            part = tile.slice(i * ROWS, ROWS)
            row = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            valid = (row >= begin) & (row < end)
            part.store(gl.where(valid[:, None], part.load(layout), 0.0))
