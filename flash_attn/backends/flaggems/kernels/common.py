"""What the Triton kernels have in common: masks, scores, dropout, sequences, pieces of a head.

Only Triton is imported here and in the other files of this directory, and nothing newer than Triton
3.0 is used, so that every vendor's compiler and Triton's own interpreter take them as they are.

Conventions of all kernels:

- Parameters are pointers, then strides, then lengths and numbers, then `constexpr` flags and tiles.
- A tensor that is not given arrives as None or as any pointer, with its flag off.
- Strides are int64 and counted in units of UNIT elements of the operand (`operand_unit` in
  launch.py): what the compiler has to know to move 16 bytes at once is a flag, not a
  specialisation on the number.
- Lengths inside a sequence are int32 and below 2^30, so that sums of a few of them fit. Offsets of
  elements are int64.
- Nothing specialises on lengths, batch, heads or strides: a new shape compiles nothing.
- Scores are in units of log2, so that a softmax is made of exp2.
- A head of D elements is one piece of D0 >= D elements, a power of two, or two of D0 + D1 >= D
  (96 = 64 + 32): a product over the head is one tl.dot for each piece. D1 = 0 says there is none.
"""

import triton
import triton.language as tl

LOG2E = tl.constexpr(1.4426950408889634)
LN2 = tl.constexpr(0.6931471805599453)

# -------------------------------------------------------------------------------------------------
# Dropout: docs/numerics.md defines the function, src/attention/dropout.h is the same in C++.

PHILOX_ROUNDS = tl.constexpr(7)
PHILOX_MULTIPLIER_0 = tl.constexpr(0xD2511F53)
PHILOX_MULTIPLIER_1 = tl.constexpr(0xCD9E8D57)
PHILOX_WEYL_0 = tl.constexpr(0x9E3779B9)
PHILOX_WEYL_1 = tl.constexpr(0xBB67AE85)


@triton.jit
def philox(c0, c1, c2, c3, k0, k1):
    """Philox-4x32 with 7 rounds: four uint32 from four, and a key of two."""
    multiplier0 = tl.cast(PHILOX_MULTIPLIER_0, tl.uint64)
    multiplier1 = tl.cast(PHILOX_MULTIPLIER_1, tl.uint64)
    for _ in tl.static_range(PHILOX_ROUNDS):
        # One multiplication for both halves of a product.
        product0 = c0.to(tl.uint64) * multiplier0
        product1 = c2.to(tl.uint64) * multiplier1
        c0 = (product1 >> 32).to(tl.uint32) ^ c1 ^ k0
        c1 = product1.to(tl.uint32)
        c2 = (product0 >> 32).to(tl.uint32) ^ c3 ^ k1
        c3 = product0.to(tl.uint32)
        k0 = k0 + tl.cast(PHILOX_WEYL_0, tl.uint32)
        k1 = k1 + tl.cast(PHILOX_WEYL_1, tl.uint32)
    return c0, c1, c2, c3


@triton.jit
def dropout_key(rng_state):
    """The key of a call: two uint32 scalars. rng_state points to seed and offset, int64."""
    seed = tl.load(rng_state).to(tl.uint64)
    offset = tl.load(rng_state + 1).to(tl.uint64)
    zero = tl.cast(0, tl.uint32)
    k0, k1, _, _ = philox(
        offset.to(tl.uint32),
        (offset >> 32).to(tl.uint32),
        zero,
        zero,
        seed.to(tl.uint32),
        (seed >> 32).to(tl.uint32),
    )
    return k0, k1


@triton.jit
def dropout_keeps(
    k0, k1, threshold, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """Which entries of a tile dropout keeps: int1 (ROWS, COLUMNS).

    row and column, of the tile's first entry inside its sequence, are multiples of 16 and 32, as
    are ROWS and COLUMNS; head is the query head.

    Every block of Philox is computed once: it serves the rows r and r + 8 and the columns c, c + 8,
    c + 16 and c + 24, which are then put where they belong.
    """
    c0 = (row // 2 + tl.arange(0, ROWS // 2)).to(tl.uint32)
    c1 = (column // 4 + tl.arange(0, COLUMNS // 4)).to(tl.uint32)
    zero = tl.zeros([ROWS // 2, COLUMNS // 4], tl.uint32)
    return keeps_of_counters(c0, c1, zero, k0, k1, threshold, batch, head, ROWS, COLUMNS)


@triton.jit
def keeps_of_counters(
    c0, c1, zero, k0, k1, threshold, batch, head, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """dropout_keeps by the counters of 2 rows, c0, and of 4 columns, c1, and a uint32 tile of 0."""
    w0, w1, w2, w3 = philox(
        c0[:, None] + zero,
        c1[None, :] + zero,
        zero + head.to(tl.uint32),
        zero + batch.to(tl.uint32),
        k0,
        k1,
    )
    k02 = tl.join(keeps_of_word(w0, threshold), keeps_of_word(w2, threshold))
    k13 = tl.join(keeps_of_word(w1, threshold), keeps_of_word(w3, threshold))
    keeps = tl.join(k02, k13)  # (counter of rows, counter of columns, half, bit 1, bit 0 of word)
    keeps = tl.reshape(keeps, [ROWS // 16, 8, COLUMNS // 32, 8, 2, 2, 2])
    keeps = tl.permute(keeps, [0, 4, 1, 2, 5, 6, 3])
    return tl.reshape(keeps, [ROWS, COLUMNS]) != 0


@triton.jit
def dropout_keeps_transposed(
    k0, k1, threshold, batch, head, row, column, ROWS: tl.constexpr, COLUMNS: tl.constexpr
):
    """The transpose of dropout_keeps: int1 (COLUMNS, ROWS).

    In an accumulator of tensor cores whose rows are columns of the mask, a thread has c and c + 8,
    but c + 16 and c + 24 are in the next warp. So every block of Philox is computed for both, and
    the tile is put together by broadcasts, which needs no exchange between threads.
    """
    eight = tl.arange(0, 8)
    of_columns = tl.arange(0, COLUMNS // 16)
    of_rows = tl.arange(0, ROWS // 16)
    zero = tl.zeros([COLUMNS // 16, 8, ROWS // 16, 8], tl.int32)
    c0 = (row // 2 + of_rows * 8)[None, None, :, None] + eight[None, None, None, :] + zero
    c1 = (column // 4 + of_columns // 2 * 8)[:, None, None, None] + eight[None, :, None, None]
    w0, w1, w2, w3 = philox(
        c0.to(tl.uint32),
        (c1 + zero).to(tl.uint32),
        zero.to(tl.uint32) + head.to(tl.uint32),
        zero.to(tl.uint32) + batch.to(tl.uint32),
        k0,
        k1,
    )
    second = (of_columns % 2 == 1)[:, None, None, None]
    near = tl.where(second, w2, w0)[:, None, :, :, None, :]
    far = tl.where(second, w3, w1)[:, None, :, :, None, :]
    upper = tl.arange(0, 2) == 1
    word = tl.where(upper[None, :, None, None, None, None], far, near)
    number = tl.where(upper[None, None, None, None, :, None], word >> 16, word & 0xFFFF)
    return tl.reshape(number.to(tl.int32) < threshold, [COLUMNS, ROWS])


@triton.jit
def keeps_of_word(word, threshold):
    """int8 (..., 2): rows r and r + 8."""
    low = (word & 0xFFFF).to(tl.int32) < threshold
    high = (word >> 16).to(tl.int32) < threshold
    return tl.join(low.to(tl.int8), high.to(tl.int8))


# -------------------------------------------------------------------------------------------------
# Masks: src/attention/mask.h in Triton. A side that is infinite has its flag off.


@triton.jit
def visible(
    row,
    column,
    offset,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Whether query `row` sees key `column`; the two broadcast. offset = seqlen_k - seqlen_q."""
    sees = column < seqlen_k
    if HAS_LEFT or HAS_RIGHT:
        sees = sees & in_window(
            row + offset, column, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
    return sees


@triton.jit
def in_window(
    position, column, window_left, window_right, HAS_LEFT: tl.constexpr, HAS_RIGHT: tl.constexpr
):
    """Whether a query at `position` among the keys sees key `column`; a side or both are finite."""
    if HAS_RIGHT:
        sees = column <= position + window_right
        if HAS_LEFT:
            sees = sees & (column >= position - window_left)
    else:
        sees = column >= position - window_left
    return sees


@triton.jit
def any_visible_keys(
    row_begin,
    row_end,
    offset,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Keys [begin, end) that at least one of the rows [row_begin, row_end) sees."""
    begin = 0
    end = seqlen_k
    if HAS_LEFT:
        begin = tl.maximum(row_begin + offset - window_left, 0)
    if HAS_RIGHT:
        end = tl.minimum(row_end + offset + window_right, seqlen_k)
    return begin, tl.maximum(begin, end)


@triton.jit
def all_visible_keys(
    row_begin,
    row_end,
    offset,
    seqlen_k,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Keys [begin, end) that every one of the rows sees: no mask is needed inside."""
    begin = 0
    end = seqlen_k
    if HAS_LEFT:
        begin = tl.maximum(row_end - 1 + offset - window_left, 0)
    if HAS_RIGHT:
        end = tl.minimum(row_begin + offset + window_right + 1, seqlen_k)
    return begin, tl.maximum(begin, end)


@triton.jit
def any_seeing_queries(
    key_begin,
    key_end,
    offset,
    seqlen_q,
    window_left,
    window_right,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
):
    """Queries [begin, end) that see at least one of the keys [key_begin, key_end)."""
    begin = 0
    end = seqlen_q
    if HAS_RIGHT:
        begin = tl.maximum(key_begin - offset - window_right, 0)
    if HAS_LEFT:
        end = tl.minimum(key_end - offset + window_left, seqlen_q)
    return begin, tl.maximum(begin, end)


# -------------------------------------------------------------------------------------------------
# Scores


@triton.jit
def tanh_of(x, NEAR_ZERO: tl.constexpr):
    """tanh(x / (2 log2(e))), float32.

    By 1 - 2 / (exp2(x) + 1), the quotient by the square of a reciprocal root, which is one
    instruction on GPUs where a division is several. The error is a few units in the last place of 1
    everywhere; with NEAR_ZERO of the result, there by the series.
    """
    root = tl.math.rsqrt(tl.math.exp2(x) + 1.0)
    return tanh_by_reciprocal(x, root * root, NEAR_ZERO)


@triton.jit
def tanh_by_reciprocal(x, reciprocal, NEAR_ZERO: tl.constexpr):
    """tanh_of(x), of 1 / (exp2(x) + 1)."""
    result = 1.0 - 2.0 * reciprocal
    if NEAR_ZERO:
        y = x * (0.5 * LN2)
        square = y * y
        series = 2.0 / 15.0 + square * (-17.0 / 315.0 + square * (62.0 / 2835.0))
        series = y + y * square * (-1.0 / 3.0 + square * series)
        result = tl.where(tl.abs(y) < 0.25, series, result)
    return result


@triton.jit
def scores_in_log2(
    product,
    distance,
    scale,
    softcap,
    slope,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """Scores in units of log2 from products q.k: scale, then softcap, then ALiBi.

    scale: softmax_scale * log2(e), and with softcap 2 / softcap times that. softcap and slope: in
    units of log2. HAS_SOFTCAP: `softcap_kind` of launch.py. distance: row + offset - column,
    float32.
    """
    score = product * scale
    if HAS_SOFTCAP:
        score = softcap * tanh_of(score, HAS_SOFTCAP == 2)
    if HAS_ALIBI:
        score = score - slope * tl.abs(distance)
    return score


@triton.jit
def alibi_slope(slopes, batch, head, batch_stride, head_stride, HAS_ALIBI: tl.constexpr):
    """The slope of a query head in units of log2; 0 without ALiBi. Strides in elements."""
    slope = 0.0
    if HAS_ALIBI:
        slope = tl.load(slopes + batch * batch_stride + head * head_stride) * LOG2E
    return slope


# -------------------------------------------------------------------------------------------------
# Sequences: src/attention/sequence.h in Triton. Lengths on the device are not known when a call is
# checked: whatever they are, a sequence stays within its tensors.


@triton.jit
def clamped(x, most):
    """x, or the nearest number of [0, most]."""
    return tl.minimum(tl.maximum(x, 0), most)


@triton.jit
def rows_of_sequence(cu_seqlens, batch, seqlen, total, IS_VARLEN: tl.constexpr):
    """First row (int64) and number of rows (int32) of a sequence.

    seqlen: rows of each sequence, of the longest when lengths vary. total: rows in all, int64.
    batch: int64.
    """
    begin = tl.cast(0, tl.int64)
    length = seqlen
    if IS_VARLEN:
        begin = clamped(tl.load(cu_seqlens + batch).to(tl.int64), total)
        end = tl.load(cu_seqlens + batch + 1).to(tl.int64)
        length = clamped(end - begin, tl.minimum(total - begin, seqlen.to(tl.int64))).to(tl.int32)
    return begin, length
