"""Rows of keys in memory or in pages, and rows of results: what forward and combine share."""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import LN2, clamped, rows_of_sequence


@triton.jit
def keys_of_sequence(
    cu_seqlens_k,
    seqused_k,
    leftpad_k,
    batch,
    seqlen_k,
    total_k,
    seqlen_new,
    VARLEN_K: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFTPAD: tl.constexpr,
    PAGED: tl.constexpr,
):
    """First row of the keys (int64, inside the pages when paged) and how many there are (int32)."""
    begin = tl.cast(0, tl.int64)
    length = seqlen_k
    if VARLEN_K:
        if PAGED:  # rows are counted from the sequence's own start
            first = tl.load(cu_seqlens_k + batch)
            length = clamped(tl.load(cu_seqlens_k + batch + 1) - first, seqlen_k)
        else:
            begin, length = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, total_k, True)
    if HAS_SEQUSED:
        used = tl.load(seqused_k + batch) + seqlen_new
        length = clamped(used, seqlen_k if PAGED else length)
    if HAS_LEFTPAD:
        leftpad = clamped(tl.load(leftpad_k + batch), length)
        begin += leftpad
        length -= leftpad
    return begin, length


@triton.jit
def pages_of(pages, first, column, num_keys, page_size):
    """The page of each key; 0 from num_keys on."""
    slot = (column + first.to(tl.int32)) // page_size
    return tl.load(pages + slot, mask=column < num_keys, other=0)


@triton.jit
def load_keys(
    base,
    first,
    page,
    column,
    num_keys,
    batch_stride,
    row_stride,
    page_size,
    num_pages,
    PAGED: tl.constexpr,
    MASKED: tl.constexpr,
    D0: tl.constexpr,
    D: tl.constexpr,
):
    """Rows `column` of the keys or values as (len(column), D0), 0 from num_keys on when MASKED.

    base: element 0 of the piece in row 0, of page 0 when paged. first: row of key 0 in the pages.
    page: what pages_of says, when paged.
    """
    if PAGED:
        place = clamped(page, num_pages - 1).to(tl.int64)
        row = (column + first.to(tl.int32)) % page_size
        offset = place * batch_stride + row.to(tl.int64) * row_stride
    else:
        offset = column.to(tl.int64) * row_stride
    d = tl.arange(0, D0)
    address = base + offset[:, None] + d[None, :]
    if MASKED:
        if D < D0:
            x = tl.load(address, mask=(column[:, None] < num_keys) & (d[None, :] < D), other=0.0)
        else:
            x = tl.load(address, mask=column[:, None] < num_keys, other=0.0)
    elif D < D0:
        x = tl.load(address, mask=d[None, :] < D, other=0.0)
    else:
        x = tl.load(address)
    return x


@triton.jit
def load_pieces(address, valid, D0: tl.constexpr, D: tl.constexpr):
    """A piece (rows, D0) of the rows that begin at address (rows, 1); 0 where not valid."""
    d = tl.arange(0, D0)
    mask = valid[:, None]
    if D < D0:
        mask = mask & (d[None, :] < D)
    return tl.load(address + d[None, :], mask=mask, other=0.0)


@triton.jit
def store_pieces(address, valid, x, D0: tl.constexpr, D: tl.constexpr):
    """The inverse of load_pieces."""
    d = tl.arange(0, D0)
    mask = valid[:, None]
    if D < D0:
        mask = mask & (d[None, :] < D)
    tl.store(address + d[None, :], x, mask=mask)


@triton.jit
def finish_rows(top, total, sink):
    """The log-sum-exp of whole rows, and what their sums are to be multiplied by.

    top, total: maximum of the scores in log2 and sum of exp2(score - top). sink: in log2, -inf when
    there is none. Without a key and a sink the first is +inf, and without a key the second is 0.
    """
    none = total == 0.0
    # Relative to the larger of the two, so that neither overflows.
    most = tl.maximum(top, sink)
    shift = tl.where(most == float("-inf"), 0.0, most)
    keys = tl.math.exp2(top - shift)
    whole = tl.where(none, 0.0, total * keys) + tl.math.exp2(sink - shift)
    factor = tl.where(none, 0.0, keys / whole)
    lse = (shift + tl.math.log2(whole)) * LN2
    lse = tl.where(whole == 0.0, float("inf"), lse)
    return tl.where(most == float("inf"), float("inf"), lse), factor


@triton.jit
def fill_unused_rows(
    out,
    lse,
    s_aux,
    cu_seqlens_q,
    batch,
    total_q,
    head,
    num_heads,
    index,
    num_programs,
    out_row_stride,
    out_head_stride,
    lse_head_stride,
    s_aux_stride,
    HAS_SINK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """Rows that belong to no sequence: output 0, log-sum-exp that of no key.

    Those of num_heads heads from `head` on, shared by num_programs programs of which this is number
    `index`; all numbers are int64.
    """
    ROWS: tl.constexpr = 16
    d = tl.arange(0, BLOCK_D)
    begin = clamped(tl.load(cu_seqlens_q + batch).to(tl.int64), total_q)
    for start in range(begin + index * ROWS, total_q, num_programs * ROWS):
        row = start + tl.arange(0, ROWS)
        for i in range(num_heads):
            value = tl.zeros([ROWS], tl.float32) + float("inf")
            if HAS_SINK:
                value = tl.zeros([ROWS], tl.float32) + tl.load(s_aux + (head + i) * s_aux_stride)
            address = out + (head + i) * out_head_stride + row[:, None] * out_row_stride
            mask = (row[:, None] < total_q) & (d[None, :] < HEAD_DIM)
            zeros = tl.zeros([ROWS, BLOCK_D], out.dtype.element_ty)
            tl.store(address + d[None, :], zeros, mask=mask)
            tl.store(lse + (head + i) * lse_head_stride + row, value, mask=row < total_q)


@triton.jit
def load_described(x, batch, head, row, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Rows of a head by the descriptor of a tensor (b, h, s, d): 0 outside of it."""
    tile = x.load([batch.to(tl.int32), head.to(tl.int32), row, 0])
    return tl.reshape(tile, [ROWS, COLUMNS])
