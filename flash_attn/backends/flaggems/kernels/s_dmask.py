"""S_dmask: what dropout did to the softmax, for tests.

Entry (row, column) is exp(score - row maximum), negative where it was dropped, 0 where masked. A
program has a tile of rows of one query head and walks over the keys twice.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import (
    LOG2E,
    clamped,
    dropout_keeps,
    dropout_key,
    rows_of_sequence,
    scores_in_log2,
    visible,
)
from flash_attn.backends.flaggems.kernels.rows import (
    keys_of_sequence,
    load_keys,
    load_pieces,
    pages_of,
)

NO_SPECIALISATION = [
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("k_batch_stride", "k_row_stride", "k_head_stride"),
    *("s_dmask_batch_stride", "s_dmask_head_stride", "s_dmask_row_stride"),
    *("table_stride", "slopes_batch_stride", "slopes_head_stride", "s_aux_stride"),
    *("batch", "num_heads", "group_size", "seqlen_q", "seqlen_k", "seqlen_new"),
    *("total_q", "total_k", "page_size", "num_pages", "cache_rows"),
    *("forward_tiles", "num_splits", "window_left", "window_right"),
    *("scale", "softcap", "dropout_threshold", "dropout_scale"),
    *("num_tiles", "num_rows", "num_columns"),
]


@triton.jit
def _scores(
    start,
    q0,
    q1,
    k,
    first,
    pages,
    query,
    offset,
    num_keys,
    k_batch_stride,
    k_row_stride,
    page_size,
    num_pages,
    window_left,
    window_right,
    scale,
    softcap,
    slope,
    PAGED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Scores in log2 of the keys from `start` on, -inf where masked, and their columns."""
    E0: tl.constexpr = D0 if D0 < HEAD_DIM else HEAD_DIM
    column = start + tl.arange(0, BLOCK_N)
    page = start
    if PAGED:
        page = pages_of(pages, first, column, num_keys, page_size)
    k0 = load_keys(
        k, first, page, column, num_keys, k_batch_stride, k_row_stride, page_size, num_pages,
        PAGED, True, D0, E0,
    )  # fmt: skip
    score = tl.dot(q0, tl.trans(k0), input_precision="ieee")
    if D1 > 0:
        k1 = load_keys(
            k + D0, first, page, column, num_keys, k_batch_stride, k_row_stride, page_size,
            num_pages, PAGED, True, D1, HEAD_DIM - D0,
        )  # fmt: skip
        score = tl.dot(q1, tl.trans(k1), score, input_precision="ieee")
    distance = (query[:, None] + offset - column[None, :]).to(tl.float32)
    score = scores_in_log2(score, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
    sees = visible(
        query[:, None], column[None, :], offset, num_keys, window_left, window_right,
        HAS_LEFT, HAS_RIGHT,
    )  # fmt: skip
    return tl.where(sees, score, float("-inf")), column


@triton.jit(do_not_specialize=NO_SPECIALISATION)
def write_s_dmask(
    q,
    k,
    s_dmask,
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
    s_dmask_batch_stride: tl.int64,  # in elements, as are those below
    s_dmask_head_stride: tl.int64,
    s_dmask_row_stride: tl.int64,
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
    forward_tiles: tl.int32,
    num_splits: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    scale: tl.float32,
    softcap: tl.float32,
    dropout_threshold: tl.int32,
    dropout_scale: tl.float32,
    num_tiles: tl.int32,
    num_rows: tl.int32,  # of s_dmask
    num_columns: tl.int32,
    UNIT: tl.constexpr,
    VARLEN_Q: tl.constexpr,
    VARLEN_K: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFTPAD: tl.constexpr,
    HAS_BATCH_IDX: tl.constexpr,
    PAGED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """Arguments as those of attention_forward."""
    program = tl.program_id(0)
    row_begin = program % num_tiles * BLOCK_M
    head = (program // num_tiles % num_heads).to(tl.int64)
    sequence = (program // num_tiles // num_heads).to(tl.int64)
    q_begin, num_queries = rows_of_sequence(cu_seqlens_q, sequence, seqlen_q, total_q, VARLEN_Q)
    first, num_keys = keys_of_sequence(
        cu_seqlens_k, seqused_k, leftpad_k, sequence, seqlen_k, total_k, seqlen_new,
        VARLEN_K, HAS_SEQUSED, HAS_LEFTPAD, PAGED,
    )  # fmt: skip
    offset = num_keys - num_queries
    query = row_begin + tl.arange(0, BLOCK_M)
    k += head // group_size * (k_head_stride * UNIT)
    pages = block_table
    if PAGED:
        pages += sequence * table_stride
    else:
        cache_row = sequence
        if HAS_BATCH_IDX:
            cache_row = clamped(tl.load(cache_batch_idx + sequence), cache_rows - 1).to(tl.int64)
        k += cache_row * (k_batch_stride * UNIT) + first * (k_row_stride * UNIT)
    q_row = (q_begin + query) * (q_row_stride * UNIT) + head * (q_head_stride * UNIT)
    q_address = q + sequence * (q_batch_stride * UNIT) + q_row[:, None]
    E0: tl.constexpr = D0 if D0 < HEAD_DIM else HEAD_DIM
    q0 = load_pieces(q_address, query < num_queries, D0, E0)
    q1 = q0
    if D1 > 0:
        q1 = load_pieces(q_address + D0, query < num_queries, D1, HEAD_DIM - D0)
    key0, key1 = dropout_key(rng_state)
    slope = 0.0
    if HAS_ALIBI:
        slopes = alibi_slopes + sequence * slopes_batch_stride + head * slopes_head_stride
        slope = tl.load(slopes) * LOG2E

    top = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    for start in range(0, num_keys, BLOCK_N):
        score, column = _scores(
            start, q0, q1, k, first, pages, query, offset, num_keys, k_batch_stride * UNIT,
            k_row_stride * UNIT, page_size, num_pages, window_left, window_right, scale, softcap,
            slope, PAGED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HEAD_DIM, D0, D1, BLOCK_N,
        )  # fmt: skip
        top = tl.maximum(top, tl.max(score, 1))
    top = tl.where(top == float("-inf"), 0.0, top)
    s_dmask += sequence * s_dmask_batch_stride + head * s_dmask_head_stride
    for start in range(0, num_columns, BLOCK_N):
        score, column = _scores(
            start, q0, q1, k, first, pages, query, offset, num_keys, k_batch_stride * UNIT,
            k_row_stride * UNIT, page_size, num_pages, window_left, window_right, scale, softcap,
            slope, PAGED, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HEAD_DIM, D0, D1, BLOCK_N,
        )  # fmt: skip
        value = tl.math.exp2(score - top[:, None])
        keeps = dropout_keeps(
            key0, key1, dropout_threshold, sequence, head, row_begin, start, BLOCK_M, BLOCK_N
        )
        is_entry = (score > float("-inf")) | (score != score)
        value = tl.where(keeps | (is_entry == 0), value, -value)
        value = tl.where(query[:, None] < num_queries, value, 0.0)
        address = s_dmask + query[:, None].to(tl.int64) * s_dmask_row_stride + column[None, :]
        mask = (query[:, None] < num_rows) & (column[None, :] < num_columns)
        tl.store(address, value.to(s_dmask.dtype.element_ty), mask=mask)
