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
    """Sets the rows before `begin` and from `end` on to 0."""
    ROWS: gl.constexpr = 8
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [gl.num_warps(), 1], [1, 0])
    for i in gl.static_range(tile.shape[0] // ROWS):
        if (begin > i * ROWS) | (end < (i + 1) * ROWS):
            part = tile.slice(i * ROWS, ROWS)
            row = i * ROWS + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
            valid = (row >= begin) & (row < end)
            part.store(gl.where(valid[:, None], part.load(layout), 0.0))


# PTX, as Triton has no branches of warps. Whether one of a thread's two factors, or of those of its
# warp, is not 1:
_VOTE = gl.constexpr(
    """{
    .reg .pred scales;
    setp.neu.f32 scales, $2, 0f3F800000;
    setp.neu.or.f32 scales, $3, 0f3F800000, scales;
    vote.sync.any.pred scales, scales, 0xFFFFFFFF;
    selp.b32 $0, 1, 0, scales;
    mov.b32 $1, $0;
    }"""
)
# And if so, 32 entries times their factors (the first of what was voted stands for all):
_SCALE = gl.constexpr(
    "{\n.reg .pred scales;\n"
    + "".join(f"mov.f32 ${i}, ${32 + i};\n" for i in range(32))
    + "setp.ne.s32 scales, $96, 0;\n@!scales bra DONE;\n"
    + "".join(f"mul.f32 ${i}, ${i}, ${64 + i};\n" for i in range(32))
    + "DONE:\n}"
)
_SCALE_OPERANDS = gl.constexpr(",".join(["=&f"] * 32 + ["f"] * 64 + ["r"] * 32))


@gluon.jit
def scaled(x, factor):
    """x * factor[:, None], of an accumulator. A warp whose factors are all 1 does not multiply."""
    of_row: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    scales = gl.inline_asm_elementwise(
        _VOTE, "=&r,=&r,f,f", [factor], dtype=gl.int32, is_pure=True, pack=2
    )
    factor = gl.convert_layout(factor, of_row, assert_trivial=True)[:, None]
    scales = gl.convert_layout(scales, of_row, assert_trivial=True)[:, None]
    return gl.inline_asm_elementwise(
        _SCALE, _SCALE_OPERANDS, [x, factor, scales], dtype=gl.float32, is_pure=True, pack=32
    )


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
def _bases_of_counters(columns):
    of_thread = [[0, 1]] + [[0, 8 << i] for i in range((columns // 32).bit_length() - 1)]
    return of_thread, [[0, 2], [0, 4], [1, 0], [2, 0], [4, 0]], [[8, 0], [16, 0]]


@gluon.constexpr_function
def layout_of_counters(columns):
    """Of Philox blocks (32, columns / 4), each for 2 rows and 4 columns of an accumulator (GROUP,
    columns) of a product: a block is in the thread that has these.
    """
    return gl.DistributedLinearLayout(*_bases_of_counters(columns), [], [32, columns // 4])


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


# Of a transposed accumulator, (GROUP columns of the mask, rows), a thread has half of the entries
# of a Philox block: c and c + 8; c + 16 and c + 24 are in the next warp. So other warps compute the
# blocks, each once, and leave in shared memory a bit for each entry: four in a number for a thread.


@gluon.constexpr_function
def layout_of_bits(rows):
    """In shared memory, of the numbers (GROUP / 2, rows / 2): those of a thread lie together."""
    of_thread, lanes, warps = _bases_of_counters(2 * rows)
    return gl.SharedLinearLayout([*of_thread, *lanes, *warps])


@gluon.constexpr_function
def _layout_of_draws(rows, num_warps):
    """Of Philox blocks (GROUP / 4, rows / 2), by 4 or 8 warps."""
    of_rows = [[0, 1 << i] for i in range((rows // 2).bit_length() - 1)]
    of_thread, warps = [of_rows[0], *of_rows[3:-1]], [of_rows[-1], [8, 0]]
    if num_warps == 8:
        warps.append(of_thread.pop())
    lanes = [*of_rows[1:3], [1, 0], [2, 0], [4, 0]]
    return gl.DistributedLinearLayout(of_thread, lanes, warps, [], [GROUP.value // 4, rows // 2])


@gluon.jit
def _bits_of_words(near, far, threshold):
    """What they keep: bit 0, of the row r and the column c; 1, of r + 8; 2 and 3, of c + 8."""
    low = (near & 0xFFFF).to(gl.int32) - threshold
    high = (near >> 16).to(gl.int32) - threshold
    far_low = (far & 0xFFFF).to(gl.int32) - threshold
    far_high = (far >> 16).to(gl.int32) - threshold
    bits = far_high.to(gl.uint32) >> 31
    bits = bits << 1 | far_low.to(gl.uint32) >> 31
    bits = bits << 1 | high.to(gl.uint32) >> 31
    return bits << 1 | low.to(gl.uint32) >> 31


@gluon.jit
def draw_transposed(bits, key0, key1, threshold, batch, head, row, column, ROWS: gl.constexpr):
    """Leaves in `bits` which entries of (GROUP columns, ROWS) dropout keeps."""
    layout: gl.constexpr = _layout_of_draws(ROWS, gl.num_warps())
    c0 = row // 2 + gl.arange(0, ROWS // 2, gl.SliceLayout(0, layout))
    c1 = column // 4 + gl.arange(0, GROUP // 4, gl.SliceLayout(1, layout))
    zero = gl.full([GROUP // 4, ROWS // 2], 0, gl.uint32, layout)
    w0, w1, w2, w3 = philox(
        c0.to(gl.uint32)[None, :] + zero,
        c1.to(gl.uint32)[:, None] + zero,
        zero + head.to(gl.uint32),
        zero + batch.to(gl.uint32),
        key0,
        key1,
    )
    drawn = gl.join(_bits_of_words(w0, w1, threshold), _bits_of_words(w2, w3, threshold))
    drawn = gl.reshape(drawn.to(gl.uint8), [GROUP // 32, 8, ROWS // 2, 2])
    bits.store(gl.reshape(gl.permute(drawn, [0, 3, 1, 2]), [GROUP // 2, ROWS // 2]))


@gluon.jit
def _bit(bits, i: gl.constexpr):
    return ((bits & (1 << i)) != 0).to(gl.int8)


@gluon.jit
def keeps_transposed(bits, ROWS: gl.constexpr):
    """Which entries of (GROUP columns, ROWS) dropout keeps, of what draw_transposed() left."""
    drawn = bits.load(layout_of_counters(2 * ROWS)).to(gl.uint32)
    near = gl.join(_bit(drawn, 0), _bit(drawn, 1))
    far = gl.join(_bit(drawn, 2), _bit(drawn, 3))
    kept = gl.join(near, far)  # (columns, rows, r or r + 8, c or c + 8)
    kept = gl.reshape(kept, [GROUP // 16, 8, ROWS // 16, 8, 2, 2])
    kept = gl.reshape(gl.permute(kept, [0, 5, 1, 2, 4, 3]), [GROUP, ROWS]) != 0
    return gl.convert_layout(kept, layout_of_product(ROWS), assert_trivial=True)
