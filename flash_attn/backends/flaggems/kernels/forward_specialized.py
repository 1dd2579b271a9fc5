"""Attention forward for Hopper, dense calls, with specialised warps (Triton 3.6).

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
    scores_in_log2,
)
from flash_attn.backends.flaggems.kernels.rows import finish_rows, load_described

# Strides of operands are counted in units of so many elements, 16 bytes.
UNIT = tl.constexpr(8)

NO_SPECIALISATION = [
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("lse_batch_stride", "lse_head_stride"),
    *("slopes_batch_stride", "slopes_head_stride", "s_aux_stride"),
    *("num_heads", "group_size", "seqlen_q", "seqlen_k", "num_tiles"),
    *("window_left", "window_right", "scale", "softcap"),
]


@triton.jit(do_not_specialize=NO_SPECIALISATION)
def attention_forward_specialized(
    q,
    k,  # tensor descriptors (b, h, s, d)
    v,
    out,
    lse,
    alibi_slopes,
    s_aux,
    q_batch_stride: tl.int64,
    q_row_stride: tl.int64,
    q_head_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    out_head_stride: tl.int64,
    lse_batch_stride: tl.int64,  # in elements, as are those below
    lse_head_stride: tl.int64,
    slopes_batch_stride: tl.int64,
    slopes_head_stride: tl.int64,
    s_aux_stride: tl.int64,
    num_heads: tl.int32,
    group_size: tl.int32,
    seqlen_q: tl.int32,
    seqlen_k: tl.int32,
    num_tiles: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    scale: tl.float32,  # of products, as scores_in_log2 takes it
    softcap: tl.float32,  # in log2
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
    offset = seqlen_k - seqlen_q
    row_begin = tile * BLOCK_M
    row = row_begin + tl.arange(0, BLOCK_M)

    q += sequence * (q_batch_stride * UNIT) + head * (q_head_stride * UNIT)
    rows = tl.make_tensor_descriptor(
        q, [seqlen_q, HEAD_DIM], [q_row_stride * UNIT, 1], [BLOCK_M, D0]
    )
    q0 = rows.load([row_begin, 0])
    slope = alibi_slope(
        alibi_slopes, sequence, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI
    )
    begin, end = any_visible_keys(
        row_begin,
        tl.minimum(row_begin + BLOCK_M, seqlen_q),
        offset,
        seqlen_k,
        window_left,
        window_right,
        HAS_LEFT,
        HAS_RIGHT,
    )

    # The keys that each row sees.
    keys_begin = row + offset - window_left
    keys_end = tl.zeros([BLOCK_M], tl.int32) + seqlen_k
    if HAS_RIGHT:
        keys_end = tl.minimum(row + offset + window_right + 1, seqlen_k)

    top = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total = tl.zeros([BLOCK_M], tl.float32)
    out0 = tl.zeros([BLOCK_M, D0], tl.float32)
    for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N, warp_specialize=True):
        column = start + tl.arange(0, BLOCK_N)
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
        v0 = load_described(v, sequence, head_k, start, BLOCK_N, D0)
        out0 = tl.dot(p.to(v0.dtype), v0, out0 * factor[:, None])

    sink = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    if HAS_SINK:
        sink = tl.zeros([BLOCK_M], tl.float32) + tl.load(s_aux + head * s_aux_stride) * LOG2E
    row_lse, factor = finish_rows(top, total, sink)
    lse_row = sequence * lse_batch_stride + head * lse_head_stride + row
    tl.store(lse + lse_row, row_lse, mask=row < seqlen_q)
    out += sequence * (out_batch_stride * UNIT) + head * (out_head_stride * UNIT)
    d = tl.arange(0, D0)
    address = out + row[:, None] * (out_row_stride * UNIT) + d[None, :]
    mask = row[:, None] < seqlen_q
    if HEAD_DIM < D0:
        mask = mask & (d[None, :] < HEAD_DIM)
    tl.store(address, (out0 * factor[:, None]).to(out.dtype.element_ty), mask=mask)
