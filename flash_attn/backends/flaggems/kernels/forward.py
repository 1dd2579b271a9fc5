"""Attention forward: dense, variable length, paged; whole rows, or parts of their keys.

A program has a tile of BLOCK_M rows of one query head and walks over the keys that they see,
BLOCK_N at a time, with the softmax of rows seen block by block (Milakov and Gimelshein,
arXiv:1805.02867; Dao, arXiv:2307.08691). Blocks that every row sees whole are walked without a
mask; the ones before them (a window) and after them (the diagonal, the end) with one.

PACKED: the rows of a tile are those of all query heads that share a key head, row r being query
r // group of head r % group: a decoded token of 8 heads on one key head is 8 rows of one product.
SPLIT: a program has one of num_splits parts of the keys, and combine.py puts the parts together.
DESCRIPTORS (Hopper, Triton 3.6): k and v of dense calls are tensor descriptors, whose tiles the
copy engine moves; that leaves the registers of their addresses to the products.

Bound by the tensor cores for long rows, by the reading of keys for few.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import (
    LOG2E,
    all_visible_keys,
    any_visible_keys,
    clamped,
    dropout_keeps,
    dropout_key,
    rows_of_sequence,
    scores_in_log2,
    visible,
)
from flash_attn.backends.flaggems.kernels.rows import (
    fill_unused_rows,
    finish_rows,
    keys_of_sequence,
    load_described,
    load_keys,
    load_pieces,
    pages_of,
    store_pieces,
)

NO_SPECIALISATION = [
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("k_batch_stride", "k_row_stride", "k_head_stride"),
    *("v_batch_stride", "v_row_stride", "v_head_stride"),
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("lse_batch_stride", "lse_head_stride", "table_stride"),
    *("slopes_batch_stride", "slopes_head_stride", "s_aux_stride"),
    *("batch", "num_heads", "group_size", "seqlen_q", "seqlen_k", "seqlen_new"),
    *("total_q", "total_k", "page_size", "num_pages", "cache_rows"),
    *("num_tiles", "num_splits", "window_left", "window_right"),
    *("scale", "softcap", "dropout_threshold", "dropout_scale"),
]


@triton.jit
def _attend(
    begin,
    end,
    q0,
    q1,
    out0,
    out1,
    top,
    total,
    k,
    v,
    first,
    pages,
    query,
    offset,
    num_keys,
    k_batch_stride,
    k_row_stride,
    v_batch_stride,
    v_row_stride,
    page_size,
    num_pages,
    window_left,
    window_right,
    scale,
    softcap,
    slope,
    key0,
    key1,
    dropout_threshold,
    batch,
    head,
    head_k,
    row_begin,
    MASKED: tl.constexpr,
    PAGED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TRANSFORMED: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Walks over the keys [begin, end) in blocks, begin being a multiple of BLOCK_N.

    out0, out1: sums of exp2(score - top) v, not divided yet, for the pieces of the head.
    top, total: maximum of the scores in log2, -inf at first, and sum of the exponentials.
    """
    E0: tl.constexpr = D0 if D0 < HEAD_DIM else HEAD_DIM
    page = begin
    if PAGED:
        page = pages_of(pages, first, begin + tl.arange(0, BLOCK_N), num_keys, page_size)
    for start in range(begin, end, BLOCK_N):
        column = start + tl.arange(0, BLOCK_N)
        if PAGED:  # looked up a block ahead, so that the loads of the keys do not wait for it
            next_page = pages_of(pages, first, column + BLOCK_N, num_keys, page_size)
        if DESCRIPTORS:
            k0 = load_described(k, batch, head_k, start, BLOCK_N, D0)
        else:
            k0 = load_keys(
                k, first, page, column, num_keys, k_batch_stride, k_row_stride,
                page_size, num_pages, PAGED, MASKED, D0, E0,
            )  # fmt: skip
        score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
        if D1 > 0:
            k1 = load_keys(
                k + D0, first, page, column, num_keys, k_batch_stride, k_row_stride,
                page_size, num_pages, PAGED, MASKED, D1, HEAD_DIM - D0,
            )  # fmt: skip
            score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
        if TRANSFORMED:
            distance = (query[:, None] + offset - column[None, :]).to(tl.float32)
            score = scores_in_log2(score, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        if MASKED:
            sees = visible(
                query[:, None],
                column[None, :],
                offset,
                num_keys,
                window_left,
                window_right,
                HAS_LEFT,
                HAS_RIGHT,
            )
            score = tl.where(sees, score, float("-inf"))
        # Without a transformation the products are scaled in the exponent.
        if TRANSFORMED:
            new_top = tl.maximum(top, tl.max(score, 1))
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.math.exp2(score - reference[:, None])
        else:
            new_top = tl.maximum(top, tl.max(score, 1) * scale)
            reference = tl.where(new_top == float("-inf"), 0.0, new_top)
            p = tl.math.exp2(score * scale - reference[:, None])
        factor = tl.math.exp2(top - reference)
        top = new_top
        total = total * factor + tl.sum(p, 1)
        if HAS_DROPOUT:
            keeps = dropout_keeps(
                key0,
                key1,
                dropout_threshold,
                batch,
                head,
                row_begin,
                start,
                BLOCK_M,
                BLOCK_N,
            )
            p = tl.where(keeps, p, 0.0)
        if DESCRIPTORS:
            v0 = load_described(v, batch, head_k, start, BLOCK_N, D0)
        else:
            v0 = load_keys(
                v, first, page, column, num_keys, v_batch_stride, v_row_stride,
                page_size, num_pages, PAGED, MASKED, D0, E0,
            )  # fmt: skip
        p = p.to(v0.dtype)
        out0 = tl.dot(p, v0, out0 * factor[:, None], input_precision="ieee")
        if D1 > 0:
            v1 = load_keys(
                v + D0, first, page, column, num_keys, v_batch_stride, v_row_stride,
                page_size, num_pages, PAGED, MASKED, D1, HEAD_DIM - D0,
            )  # fmt: skip
            out1 = tl.dot(p, v1, out1 * factor[:, None], input_precision="ieee")
        if PAGED:
            page = next_page
    return out0, out1, top, total


@triton.jit(do_not_specialize=NO_SPECIALISATION)
def attention_forward(
    q,
    k,
    v,
    out,
    lse,
    partial_out,  # (num_splits, rows, HEAD_DIM) float32, with SPLIT
    partial_lse,  # (num_splits, rows) float32, in log2
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    leftpad_k,
    cache_batch_idx,
    block_table,
    alibi_slopes,
    s_aux,
    rng_state,
    q_batch_stride: tl.int64,
    q_row_stride: tl.int64,
    q_head_stride: tl.int64,
    k_batch_stride: tl.int64,
    k_row_stride: tl.int64,
    k_head_stride: tl.int64,
    v_batch_stride: tl.int64,
    v_row_stride: tl.int64,
    v_head_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    out_head_stride: tl.int64,
    lse_batch_stride: tl.int64,  # in elements, as are those below
    lse_head_stride: tl.int64,
    table_stride: tl.int64,
    slopes_batch_stride: tl.int64,
    slopes_head_stride: tl.int64,
    s_aux_stride: tl.int64,
    batch: tl.int32,
    num_heads: tl.int32,
    group_size: tl.int32,
    seqlen_q: tl.int32,
    seqlen_k: tl.int32,
    seqlen_new: tl.int32,
    total_q: tl.int64,
    total_k: tl.int64,
    page_size: tl.int32,
    num_pages: tl.int32,
    cache_rows: tl.int32,
    num_tiles: tl.int32,
    num_splits: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    scale: tl.float32,  # of products, as scores_in_log2 takes it
    softcap: tl.float32,  # in log2
    dropout_threshold: tl.int32,
    dropout_scale: tl.float32,
    UNIT: tl.constexpr,
    VARLEN_Q: tl.constexpr,
    VARLEN_K: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFTPAD: tl.constexpr,
    HAS_BATCH_IDX: tl.constexpr,
    PAGED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    PACKED: tl.constexpr,
    SPLIT: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    TRANSFORMED: tl.constexpr,  # softcap, ALiBi, or a scale that is not positive
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for each tile of rows, part of the keys, head (key head when PACKED), sequence.

    In this order, the fastest first, and from the last tile of a head, which in causal mode has the
    most keys, to its first.
    """
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    program = program // num_tiles
    split = program % num_splits
    program = program // num_splits
    heads = num_heads // group_size if PACKED else num_heads
    head_index = program % heads
    sequence = (program // heads).to(tl.int64)

    q_begin, num_queries = rows_of_sequence(cu_seqlens_q, sequence, seqlen_q, total_q, VARLEN_Q)
    first, num_keys = keys_of_sequence(
        cu_seqlens_k,
        seqused_k,
        leftpad_k,
        sequence,
        seqlen_k,
        total_k,
        seqlen_new,
        VARLEN_K,
        HAS_SEQUSED,
        HAS_LEFTPAD,
        PAGED,
    )
    offset = num_keys - num_queries

    # The tile's rows: query and head of each, and the range of queries.
    row_begin = tile * BLOCK_M
    row = row_begin + tl.arange(0, BLOCK_M)
    if PACKED:
        query = row // group_size
        head_k = head_index
        head = (head_k * group_size + row % group_size).to(tl.int64)
        query_begin = row_begin // group_size
        query_end = tl.minimum((row_begin + BLOCK_M - 1) // group_size + 1, num_queries)
        valid = row < num_queries * group_size
    else:
        query = row
        head_k = head_index // group_size
        head = head_index.to(tl.int64)
        query_begin = row_begin
        query_end = tl.minimum(row_begin + BLOCK_M, num_queries)
        valid = row < num_queries

    if VARLEN_Q and not SPLIT:
        fill_unused_rows(
            out, lse, s_aux, cu_seqlens_q, batch, total_q,
            (head_k * group_size).to(tl.int64) if PACKED else head,
            group_size if PACKED else 1,
            sequence * num_tiles + tile, batch.to(tl.int64) * num_tiles,
            out_row_stride * UNIT, out_head_stride * UNIT, lse_head_stride, s_aux_stride,
            HAS_SINK, HEAD_DIM, D0 if D1 == 0 else 2 * D0,
        )  # fmt: skip
    if query_begin >= num_queries:
        return

    # First elements: of the queries, of the key head in the sequence's first key, or in page 0.
    E0: tl.constexpr = D0 if D0 < HEAD_DIM else HEAD_DIM
    q_row = (q_begin + query) * (q_row_stride * UNIT) + head * (q_head_stride * UNIT)
    q_address = q + sequence * (q_batch_stride * UNIT) + q_row[:, None]
    pages = block_table
    if not DESCRIPTORS:
        k += head_k * (k_head_stride * UNIT)
        v += head_k * (v_head_stride * UNIT)
        if PAGED:
            pages += sequence * table_stride
        else:
            cache_row = sequence
            if HAS_BATCH_IDX:
                cache_row = clamped(tl.load(cache_batch_idx + sequence), cache_rows - 1)
                cache_row = cache_row.to(tl.int64)
            k += cache_row * (k_batch_stride * UNIT) + first * (k_row_stride * UNIT)
            v += cache_row * (v_batch_stride * UNIT) + first * (v_row_stride * UNIT)
    q0 = load_pieces(q_address, valid, D0, E0)
    q1 = q0
    if D1 > 0:
        q1 = load_pieces(q_address + D0, valid, D1, HEAD_DIM - D0)

    key0 = tl.zeros([], tl.uint32)
    key1 = tl.zeros([], tl.uint32)
    if HAS_DROPOUT:
        key0, key1 = dropout_key(rng_state)
    slope = 0.0
    if HAS_ALIBI:
        slopes = alibi_slopes + sequence * slopes_batch_stride + head * slopes_head_stride
        slope = tl.load(slopes) * LOG2E
        if PACKED:
            slope = slope[:, None]

    # The part of the keys, and of these the ones that every row sees.
    begin, end = any_visible_keys(
        query_begin, query_end, offset, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    begin = begin // BLOCK_N * BLOCK_N
    if SPLIT:
        keys_of_part = tl.cdiv(tl.cdiv(end - begin, BLOCK_N), num_splits) * BLOCK_N
        begin = tl.minimum(begin + split * keys_of_part, end)
        end = tl.minimum(begin + keys_of_part, end)
    whole_begin, whole_end = all_visible_keys(
        query_begin, query_end, offset, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    whole_begin = tl.minimum(tl.maximum(tl.cdiv(whole_begin, BLOCK_N) * BLOCK_N, begin), end)
    whole_end = tl.maximum(tl.minimum(whole_end, end) // BLOCK_N * BLOCK_N, whole_begin)

    top = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total = tl.zeros([BLOCK_M], tl.float32)
    out0 = tl.zeros([BLOCK_M, D0], tl.float32)
    out1 = tl.zeros([BLOCK_M, D1 if D1 > 0 else 16], tl.float32)
    # Before, inside and behind the keys that every row sees.
    for stage in tl.static_range(3):
        if stage > 0 or HAS_LEFT:
            out0, out1, top, total = _attend(
                begin if stage == 0 else whole_begin if stage == 1 else whole_end,
                whole_begin if stage == 0 else whole_end if stage == 1 else end,
                q0, q1, out0, out1, top, total, k, v, first, pages, query, offset, num_keys,
                k_batch_stride * UNIT, k_row_stride * UNIT,
                v_batch_stride * UNIT, v_row_stride * UNIT, page_size, num_pages,
                window_left, window_right, scale, softcap, slope,
                key0, key1, dropout_threshold, sequence, head, head_k, row_begin,
                stage != 1, PAGED, DESCRIPTORS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI,
                HAS_DROPOUT, TRANSFORMED, HEAD_DIM, D0, D1, BLOCK_M, BLOCK_N,
            )  # fmt: skip

    if SPLIT:
        # A part: its output as if it were all, and its log-sum-exp in log2, -inf without a key.
        most_rows = (seqlen_q * group_size if PACKED else seqlen_q).to(tl.int64)
        num_rows = batch.to(tl.int64) * heads * most_rows
        part_row = split * num_rows + (sequence * heads + head_index) * most_rows + row
        factor = tl.where(total == 0.0, 0.0, 1.0 / total)
        shift = tl.where(top == float("-inf"), 0.0, top)
        part_lse = tl.where(top == float("inf"), top, shift + tl.math.log2(total))
        tl.store(partial_lse + part_row, part_lse, mask=valid)
        out_address = partial_out + part_row[:, None] * HEAD_DIM
        store_pieces(out_address, valid, out0 * factor[:, None], D0, E0)
        if D1 > 0:
            store_pieces(out_address + D0, valid, out1 * factor[:, None], D1, HEAD_DIM - D0)
    else:
        sink = tl.zeros([BLOCK_M], tl.float32) - float("inf")
        if HAS_SINK:
            sink = tl.zeros([BLOCK_M], tl.float32) + tl.load(s_aux + head * s_aux_stride) * LOG2E
        row_lse, factor = finish_rows(top, total, sink)
        if HAS_DROPOUT:
            factor *= dropout_scale
        row = q_begin + query
        lse_row = sequence * lse_batch_stride + head * lse_head_stride + row
        tl.store(lse + lse_row, row_lse, mask=valid)
        out_row = row * (out_row_stride * UNIT) + head * (out_head_stride * UNIT)
        out_address = out + sequence * (out_batch_stride * UNIT) + out_row[:, None]
        dtype = out.dtype.element_ty
        store_pieces(out_address, valid, (out0 * factor[:, None]).to(dtype), D0, E0)
        if D1 > 0:
            out1 = (out1 * factor[:, None]).to(dtype)
            store_pieces(out_address + D0, valid, out1, D1, HEAD_DIM - D0)
