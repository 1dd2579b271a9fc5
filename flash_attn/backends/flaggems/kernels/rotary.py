"""Rotary embedding of a whole tensor, and the append of new keys and values to a cache.

A program has a tile of rows of one head. Rotations are computed in float32 and rounded once; rows
at positions outside the tables, which only lengths on the device can have, do not rotate. Bound by
memory, or by latency for the few rows of decode.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import clamped, rows_of_sequence


@triton.jit
def _copy_columns(x, out, valid, begin: tl.constexpr, end: tl.constexpr, COLUMNS: tl.constexpr):
    """Copies columns [begin, end) of the valid rows; x and out are (rows, 1) addresses."""
    for first in tl.static_range(begin, end, COLUMNS):
        column = first + tl.arange(0, COLUMNS)
        mask = valid[:, None] & (column[None, :] < end)
        tl.store(out + column[None, :], tl.load(x + column[None, :], mask=mask), mask=mask)


@triton.jit
def _rotate(
    x,
    out,
    valid,
    cos,
    sin,
    known,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
):
    """Rotates the first 2 HALF columns of the valid rows.

    x, out, cos, sin: (rows, 1) addresses; rows that are not `known` have none in the tables.
    """
    pair = tl.arange(0, BLOCK_HALF)[None, :]
    mask = valid[:, None] & (pair < HALF)
    dtype = out.dtype.element_ty
    c = tl.load(cos + pair, mask=mask & known[:, None], other=1.0).to(tl.float32)
    s = tl.load(sin + pair, mask=mask & known[:, None], other=0.0).to(tl.float32)
    if CONJUGATE:
        s = -s
    if INTERLEAVED:
        column = tl.arange(0, 2 * BLOCK_HALF)[None, :]
        mask = valid[:, None] & (column < 2 * HALF)
        both = tl.load(x + column, mask=mask, other=0.0)
        u, w = tl.split(tl.reshape(both, [both.shape[0], BLOCK_HALF, 2]))
    else:
        u = tl.load(x + pair, mask=mask, other=0.0)
        w = tl.load(x + HALF + pair, mask=mask, other=0.0)
    a, b = u.to(tl.float32), w.to(tl.float32)
    first = tl.where(known[:, None], (a * c - b * s).to(dtype), u)
    second = tl.where(known[:, None], (a * s + b * c).to(dtype), w)
    if INTERLEAVED:
        both = tl.reshape(tl.join(first, second), [u.shape[0], 2 * BLOCK_HALF])
        tl.store(out + column, both, mask=mask)
    else:
        tl.store(out + pair, first, mask=mask)
        tl.store(out + HALF + pair, second, mask=mask)


ROTARY_NUMBERS = [
    *("x_batch_stride", "x_row_stride", "x_head_stride"),
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("cos_stride", "sin_stride", "batch", "num_heads", "seqlen", "total"),
    *("num_positions", "offset", "num_tiles"),
]


@triton.jit(do_not_specialize=ROTARY_NUMBERS)
def rotate_rows(
    x,
    out,
    cos,
    sin,
    offsets,
    cu_seqlens,
    x_batch_stride: tl.int64,
    x_row_stride: tl.int64,
    x_head_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    out_head_stride: tl.int64,
    cos_stride: tl.int64,  # in elements, as is the next
    sin_stride: tl.int64,
    batch: tl.int32,
    num_heads: tl.int32,
    seqlen: tl.int32,
    total: tl.int64,  # rows in all, with cu_seqlens
    num_positions: tl.int64,
    offset: tl.int64,  # position of a sequence's first row, unless there are offsets
    num_tiles: tl.int32,
    UNIT: tl.constexpr,
    VARLEN: tl.constexpr,
    HAS_OFFSETS: tl.constexpr,
    ADVANCES: tl.constexpr,  # row i is at its sequence's position + i, else all rows are there
    IN_PLACE: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    CONJUGATE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """Rows of x to out, their first 2 HALF columns rotated; out may be x."""
    program = tl.program_id(0)
    row_begin = program % num_tiles * ROWS
    head = (program // num_tiles % num_heads).to(tl.int64)
    sequence = (program // num_tiles // num_heads).to(tl.int64)
    begin, num_rows = rows_of_sequence(cu_seqlens, sequence, seqlen, total, VARLEN)
    x += head * (x_head_stride * UNIT)
    out += head * (out_head_stride * UNIT)
    if VARLEN and not IN_PLACE:
        # Rows that belong to no sequence have no position: they stay as they are.
        unused = clamped(tl.load(cu_seqlens + batch).to(tl.int64), total)
        index = sequence * num_tiles + program % num_tiles
        step = batch.to(tl.int64) * num_tiles * ROWS
        for start in range(unused + index * ROWS, total, step):
            row = start + tl.arange(0, ROWS)
            _copy_columns(
                x + row[:, None] * (x_row_stride * UNIT),
                out + row[:, None] * (out_row_stride * UNIT),
                row < total, 0, HEAD_DIM, BLOCK_HALF,
            )  # fmt: skip
    if row_begin >= num_rows:
        return
    row = row_begin + tl.arange(0, ROWS)
    valid = row < num_rows
    position = tl.zeros([ROWS], tl.int64) + offset
    if HAS_OFFSETS:
        position = tl.zeros([ROWS], tl.int64) + tl.load(offsets + sequence).to(tl.int64)
    if ADVANCES:
        position += row
    known = (position >= 0) & (position < num_positions)
    x += sequence * (x_batch_stride * UNIT)
    out += sequence * (out_batch_stride * UNIT)
    x_address = x + (begin + row)[:, None] * (x_row_stride * UNIT)
    out_address = out + (begin + row)[:, None] * (out_row_stride * UNIT)
    _rotate(
        x_address, out_address, valid,
        cos + position[:, None] * cos_stride, sin + position[:, None] * sin_stride, known,
        HALF, BLOCK_HALF, INTERLEAVED, CONJUGATE,
    )  # fmt: skip
    if not IN_PLACE:
        _copy_columns(x_address, out_address, valid, 2 * HALF, HEAD_DIM, BLOCK_HALF)


APPEND_NUMBERS = [
    *("k_batch_stride", "k_row_stride", "k_head_stride"),
    *("v_batch_stride", "v_row_stride", "v_head_stride"),
    *("k_cache_batch_stride", "k_cache_row_stride", "k_cache_head_stride"),
    *("v_cache_batch_stride", "v_cache_row_stride", "v_cache_head_stride"),
    *("cos_stride", "sin_stride", "table_stride", "num_heads_k", "seqlen_new", "capacity"),
    *("cache_rows", "page_size", "num_pages", "num_positions", "num_tiles"),
]


@triton.jit(do_not_specialize=APPEND_NUMBERS)
def append_rows(
    k,
    v,
    k_cache,
    v_cache,
    cos,
    sin,
    cache_seqlens,
    cache_batch_idx,
    block_table,
    k_batch_stride: tl.int64,
    k_row_stride: tl.int64,
    k_head_stride: tl.int64,
    v_batch_stride: tl.int64,
    v_row_stride: tl.int64,
    v_head_stride: tl.int64,
    k_cache_batch_stride: tl.int64,
    k_cache_row_stride: tl.int64,
    k_cache_head_stride: tl.int64,
    v_cache_batch_stride: tl.int64,
    v_cache_row_stride: tl.int64,
    v_cache_head_stride: tl.int64,
    cos_stride: tl.int64,  # in elements, as are the next two
    sin_stride: tl.int64,
    table_stride: tl.int64,
    num_heads_k: tl.int32,
    seqlen_new: tl.int32,
    capacity: tl.int32,  # rows that a sequence's cache has
    cache_rows: tl.int32,
    page_size: tl.int32,
    num_pages: tl.int32,
    num_positions: tl.int64,
    num_tiles: tl.int32,
    UNIT: tl.constexpr,
    HAS_BATCH_IDX: tl.constexpr,
    PAGED: tl.constexpr,
    ROTATES: tl.constexpr,
    INTERLEAVED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HALF: tl.constexpr,
    BLOCK_HALF: tl.constexpr,
    ROWS: tl.constexpr,
):
    """New keys, rotated, and values go to each sequence's cache from its length on.

    What the lengths and tables on the device say is checked: no row is written that is not in the
    sequence's own cache.
    """
    program = tl.program_id(0)
    row = program % num_tiles * ROWS + tl.arange(0, ROWS)
    head = (program // num_tiles % num_heads_k).to(tl.int64)
    sequence = (program // num_tiles // num_heads_k).to(tl.int64)
    position = tl.load(cache_seqlens + sequence) + row
    valid = (row < seqlen_new) & (position >= 0) & (position < capacity)
    if PAGED:
        pages = block_table + sequence * table_stride
        place = tl.load(pages + position // page_size, mask=valid, other=-1)
        valid = valid & (place >= 0) & (place < num_pages)
        cache_row = position % page_size
    else:
        place = tl.zeros([ROWS], tl.int64) + sequence
        cache_row = position
        if HAS_BATCH_IDX:
            place = tl.zeros([ROWS], tl.int32) + tl.load(cache_batch_idx + sequence)
            valid = valid & (place >= 0) & (place < cache_rows)
    place = place.to(tl.int64)[:, None]
    cache_row = cache_row.to(tl.int64)[:, None]
    row = row.to(tl.int64)[:, None]
    k += sequence * (k_batch_stride * UNIT) + head * (k_head_stride * UNIT)
    v += sequence * (v_batch_stride * UNIT) + head * (v_head_stride * UNIT)
    k_cache += head * (k_cache_head_stride * UNIT)
    v_cache += head * (v_cache_head_stride * UNIT)
    k_address = k + row * (k_row_stride * UNIT)
    k_out = (
        k_cache + place * (k_cache_batch_stride * UNIT) + cache_row * (k_cache_row_stride * UNIT)
    )
    if ROTATES:
        known = position < num_positions
        position = position.to(tl.int64)[:, None]
        _rotate(
            k_address, k_out, valid, cos + position * cos_stride, sin + position * sin_stride,
            known, HALF, BLOCK_HALF, INTERLEAVED, False,
        )  # fmt: skip
        _copy_columns(k_address, k_out, valid, 2 * HALF, HEAD_DIM, BLOCK_HALF)
    else:
        _copy_columns(k_address, k_out, valid, 0, HEAD_DIM, BLOCK_HALF)
    _copy_columns(
        v + row * (v_row_stride * UNIT),
        v_cache + place * (v_cache_batch_stride * UNIT) + cache_row * (v_cache_row_stride * UNIT),
        valid, 0, HEAD_DIM, BLOCK_HALF,
    )  # fmt: skip
