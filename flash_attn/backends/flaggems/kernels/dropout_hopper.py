"""Dropout in Hopper's kernels: the function of common.py, drawn where its entries are, or apart."""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn.backends.flaggems.kernels.gluon_functions import keeps_of_counters, philox
from flash_attn.backends.flaggems.kernels.hopper import GROUP, layout_of_product


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
