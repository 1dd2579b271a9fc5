"""Attention forward for Hopper with specialised warps (Triton 3.6).

One group of warps has the copy engine bring keys and values, two others have half of the rows each:
while one multiplies, the other is at its softmax (Shah et al., arXiv:2407.08608). The compiler
parts a kernel among warps only if it has this form: one loop, which masks everything or nothing; no
branch with an alternative; and tiles that are halved read through descriptors made here, because
those of the host have the size of the whole. Otherwise as forward.py.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import (
    LOG2E,
    alibi_slope,
    any_visible_keys,
    rows_of_sequence,
    scores_in_log2,
)
from flash_attn.backends.flaggems.kernels.rows import (
    fill_unused_rows,
    finish_rows,
    keys_of_sequence,
    load_described,
)

# Strides of operands are counted in units of so many elements, 16 bytes.
UNIT = tl.constexpr(8)

NO_SPECIALISATION = [
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("k_row_stride", "k_head_stride", "v_row_stride", "v_head_stride"),
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("lse_batch_stride", "lse_head_stride"),
    *("slopes_batch_stride", "slopes_head_stride", "s_aux_stride"),
    *("batch", "num_heads", "group_size", "seqlen_q", "seqlen_k", "total_q", "total_k"),
    *("num_tiles", "window_left", "window_right", "scale", "softcap"),
]


@triton.jit(do_not_specialize=NO_SPECIALISATION)
def attention_forward_specialized(
    q,
    k,  # tensor descriptors (b, h, s, d), pointers when VARLEN
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    alibi_slopes,
    s_aux,
    q_batch_stride: tl.int64,
    q_row_stride: tl.int64,
    q_head_stride: tl.int64,
    k_row_stride: tl.int64,  # those of keys and values when VARLEN
    k_head_stride: tl.int64,
    v_row_stride: tl.int64,
    v_head_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    out_head_stride: tl.int64,
    lse_batch_stride: tl.int64,  # in elements, as are those below
    lse_head_stride: tl.int64,
    slopes_batch_stride: tl.int64,
    slopes_head_stride: tl.int64,
    s_aux_stride: tl.int64,
    batch: tl.int32,
    num_heads: tl.int32,
    group_size: tl.int32,
    seqlen_q: tl.int32,
    seqlen_k: tl.int32,
    total_q: tl.int64,
    total_k: tl.int64,
    num_tiles: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    scale: tl.float32,  # of products, as scores_in_log2 takes it
    softcap: tl.float32,  # in log2
    VARLEN: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    MASKED: tl.constexpr,  # a window, or a last block of keys that is not full
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_SINK: tl.constexpr,
    TRANSFORMED: tl.constexpr,  # softcap, ALiBi, or a scale that is not positive
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for each tile of rows, head, sequence, in the order of attention_forward."""
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    program = program // num_tiles
    head = (program % num_heads).to(tl.int64)
    sequence = (program // num_heads).to(tl.int64)
    head_k = head // group_size
    q_begin, num_queries = rows_of_sequence(cu_seqlens_q, sequence, seqlen_q, total_q, VARLEN)
    first, num_keys = keys_of_sequence(
        cu_seqlens_k, seqused_k, seqused_k, sequence, seqlen_k, total_k, 0,
        VARLEN, HAS_SEQUSED, False, False,
    )  # fmt: skip
    offset = num_keys - num_queries
    row_begin = tile * BLOCK_M
    row = row_begin + tl.arange(0, BLOCK_M)

    q += sequence * (q_batch_stride * UNIT) + head * (q_head_stride * UNIT)
    rows_of_q = num_queries
    if VARLEN:
        fill_unused_rows(
            out, lse, s_aux, cu_seqlens_q, batch, total_q, head, 1,
            sequence * num_tiles + tile, batch.to(tl.int64) * num_tiles,
            out_row_stride * UNIT, out_head_stride * UNIT, lse_head_stride, s_aux_stride,
            HAS_SINK, HEAD_DIM, D0,
        )  # fmt: skip
        # A descriptor has a row at least: of an empty sequence the tensor's first.
        q += tl.where(num_queries > 0, q_begin, 0) * (q_row_stride * UNIT)
        rows_of_q = tl.maximum(num_queries, 1)
        first = tl.where(num_keys > 0, first, 0)
        k += first * (k_row_stride * UNIT) + head_k * (k_head_stride * UNIT)
        v += first * (v_row_stride * UNIT) + head_k * (v_head_stride * UNIT)
        shape = [tl.maximum(num_keys, 1), HEAD_DIM]
        k = tl.make_tensor_descriptor(k, shape, [k_row_stride * UNIT, 1], [BLOCK_N, D0])
        v = tl.make_tensor_descriptor(v, shape, [v_row_stride * UNIT, 1], [BLOCK_N, D0])
    rows = tl.make_tensor_descriptor(
        q, [rows_of_q, HEAD_DIM], [q_row_stride * UNIT, 1], [BLOCK_M, D0]
    )
    # Not row_begin itself: halving the tile, the compiler moves the value that is the coordinate,
    # for all who use it, and `row` below would move twice.
    q0 = rows.load([tl.minimum(row_begin, rows_of_q), 0])
    slope = alibi_slope(
        alibi_slopes, sequence, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI
    )
    begin, end = any_visible_keys(
        row_begin,
        tl.minimum(row_begin + BLOCK_M, num_queries),
        offset,
        num_keys,
        window_left,
        window_right,
        HAS_LEFT,
        HAS_RIGHT,
    )

    if VARLEN:
        end = tl.where(row_begin < num_queries, end, begin)
    # The keys that each row sees.
    keys_begin = row + offset - window_left
    keys_end = tl.zeros([BLOCK_M], tl.int32) + num_keys
    if HAS_RIGHT:
        keys_end = tl.minimum(row + offset + window_right + 1, num_keys)

    top = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total = tl.zeros([BLOCK_M], tl.float32)
    out0 = tl.zeros([BLOCK_M, D0], tl.float32)
    for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N, warp_specialize=True):
        column = start + tl.arange(0, BLOCK_N)
        if VARLEN:
            k0 = k.load([start, 0])
        else:
            k0 = load_described(k, sequence, head_k, start, BLOCK_N, D0)
        score = tl.dot(q0, tl.trans(k0))
        if TRANSFORMED:
            distance = (row[:, None] + offset - column[None, :]).to(tl.float32)
            score = scores_in_log2(score, distance, scale, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        if MASKED:
            sees = column[None, :] < keys_end[:, None]
            if HAS_LEFT:
                sees = sees & (column[None, :] >= keys_begin[:, None])
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
        if VARLEN:
            v0 = v.load([start, 0])
        else:
            v0 = load_described(v, sequence, head_k, start, BLOCK_N, D0)
        out0 = tl.dot(p.to(v0.dtype), v0, out0 * factor[:, None])

    sink = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    if HAS_SINK:
        sink = tl.zeros([BLOCK_M], tl.float32) + tl.load(s_aux + head * s_aux_stride) * LOG2E
    row_lse, factor = finish_rows(top, total, sink)
    lse += sequence * lse_batch_stride + head * lse_head_stride + q_begin
    tl.store(lse + row, row_lse, mask=row < num_queries)
    out += sequence * (out_batch_stride * UNIT) + head * (out_head_stride * UNIT)
    out += q_begin * (out_row_stride * UNIT)
    d = tl.arange(0, D0)
    address = out + row[:, None] * (out_row_stride * UNIT) + d[None, :]
    mask = row[:, None] < num_queries
    if HEAD_DIM < D0:
        mask = mask & (d[None, :] < HEAD_DIM)
    tl.store(address, (out0 * factor[:, None]).to(out.dtype.element_ty), mask=mask)
