"""Attention backward: dQ. `backward_dkdv.py` says how the two kernels share the work."""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.backward_prepare import ROW_ALIGNMENT, workspace_row
from flash_attn.backends.flaggems.kernels.backward_tiles import (
    NUMBERS,
    exponents,
    load_tile,
    program_order,
    store_tile,
    tile_offsets,
)
from flash_attn.backends.flaggems.kernels.common import (
    alibi_slope,
    all_visible_keys,
    any_seeing_queries,
    any_visible_keys,
    clamped,
    dropout_keeps,
    dropout_key,
    rows_of_sequence,
    visible,
)
from flash_attn.backends.flaggems.kernels.rows import load_described


@triton.jit
def _add_keys(
    dq0,
    dq1,
    q0,
    q1,
    dout0,
    dout1,
    k,
    v,
    minus_lse,
    minus_d,
    k_offsets0,
    k_offsets1,
    v_offsets0,
    v_offsets1,
    k_row_stride,
    v_row_stride,
    start,
    first_row,
    num_k,
    offset,
    window_left,
    window_right,
    score_scale,
    softcap,
    slope,
    key0,
    key1,
    dropout_threshold,
    dropout_scale,
    batch,
    head,
    head_k,
    MASKED: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One block of keys, from key `start` of the sequence on."""
    if DESCRIPTORS:
        k0 = load_described(k, batch, head_k, start, BLOCK_N, D0)
        v0 = load_described(v, batch, head_k, start, BLOCK_N, D0)
    else:
        k += start * k_row_stride
        v += start * v_row_stride
        end = num_k - start
        VALID0: tl.constexpr = HEAD_DIM if HEAD_DIM < D0 else D0
        k0 = load_tile(k, k_offsets0, 0, end, BLOCK_N, D0, VALID0, False, MASKED)
        v0 = load_tile(v, v_offsets0, 0, end, BLOCK_N, D0, VALID0, False, MASKED)
    s = tl.dot(q0, tl.trans(k0))
    dp = tl.dot(dout0, tl.trans(v0))
    if D1 > 0:
        k1 = load_tile(k + D0, k_offsets1, 0, end, BLOCK_N, D1, HEAD_DIM - D0, False, MASKED)
        v1 = load_tile(v + D0, v_offsets1, 0, end, BLOCK_N, D1, HEAD_DIM - D0, False, MASKED)
        s = tl.dot(q1, tl.trans(k1), s)
        dp = tl.dot(dout1, tl.trans(v1), dp)

    row = first_row + tl.arange(0, BLOCK_M)
    key = start + tl.arange(0, BLOCK_N)
    distance = 0.0
    if HAS_ALIBI:
        distance = (row + offset).to(tl.float32)[:, None] - key.to(tl.float32)[None, :]
    score, capped = exponents(s * score_scale, distance, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
    p = tl.math.exp2(score + minus_lse[:, None])
    if HAS_DROPOUT:
        keeps = dropout_keeps(
            key0, key1, dropout_threshold, batch, head, first_row, start, BLOCK_M, BLOCK_N
        )
        dp = tl.where(keeps, dp, 0.0) * dropout_scale
    ds = p * (dp + minus_d[:, None])
    if HAS_SOFTCAP:
        ds = ds * (1.0 - capped * capped)
    if MASKED:
        sees = visible(
            row[:, None], key[None, :], offset, num_k, window_left, window_right,
            HAS_LEFT, HAS_RIGHT,
        )  # fmt: skip
        ds = tl.where(sees, ds, 0.0)
    ds = ds.to(k0.dtype)
    dq0 = tl.dot(ds, k0, dq0)
    if D1 > 0:
        dq1 = tl.dot(ds, k1, dq1)
    return dq0, dq1


@triton.jit(do_not_specialize=[*NUMBERS, *("dq_batch_stride", "dq_row_stride", "dq_head_stride")])
def backward_dq(
    q,
    k,
    v,
    dout,
    workspace,
    dq,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    alibi_slopes,
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
    dout_batch_stride: tl.int64,
    dout_row_stride: tl.int64,
    dout_head_stride: tl.int64,
    dq_batch_stride: tl.int64,
    dq_row_stride: tl.int64,
    dq_head_stride: tl.int64,
    workspace_rows: tl.int64,
    slopes_batch_stride: tl.int64,
    slopes_head_stride: tl.int64,
    total_q: tl.int64,
    total_k: tl.int64,
    num_heads_k: tl.int32,
    group_size: tl.int32,
    seqlen_q: tl.int32,
    seqlen_k: tl.int32,
    window_left: tl.int32,
    window_right: tl.int32,
    num_tiles: tl.int32,
    num_pairs: tl.int64,
    pairs_at_once: tl.int32,
    score_scale: tl.float32,
    softcap: tl.float32,
    softmax_scale: tl.float32,
    dropout_threshold: tl.int32,
    dropout_scale: tl.float32,
    IS_VARLEN: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HAS_DROPOUT: tl.constexpr,
    DESCRIPTORS: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    D1: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    STAGES: tl.constexpr,
):
    """dq of BLOCK_M rows of one query head; arguments as those of backward_dkdv.

    With DESCRIPTORS k and v are descriptors of (b, hk, sk, d).

    Tiles are numbered from the last on: under a causal mask the last rows take longest.
    """
    tile, pair = program_order(num_tiles, num_pairs, pairs_at_once)
    workspace_rows = workspace_rows // ROW_ALIGNMENT * ROW_ALIGNMENT  # tells the compiler
    num_heads = num_heads_k * group_size
    batch = pair // num_heads
    head = pair % num_heads
    head_k = head // group_size
    first_q, num_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, total_q, IS_VARLEN)
    first_k, num_k = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, total_k, IS_VARLEN)
    if HAS_SEQUSED:
        num_k = clamped(tl.load(seqused_k + batch), num_k)
    first_row = (num_tiles - 1 - tile) * BLOCK_M
    if first_row < num_q:
        offset = num_k - num_q
        rows = num_q - first_row
        row_begin, row_end = any_seeing_queries(
            0, num_k, offset, num_q, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        start_q = first_q + first_row
        q += (batch * q_batch_stride + start_q * q_row_stride + head * q_head_stride) * UNIT
        dout += (
            batch * dout_batch_stride + start_q * dout_row_stride + head * dout_head_stride
        ) * UNIT
        VALID0: tl.constexpr = HEAD_DIM if HEAD_DIM < D0 else D0
        begin = row_begin - first_row
        end = row_end - first_row
        q_offsets = tile_offsets(q_row_stride * UNIT, BLOCK_M, D0)
        dout_offsets = tile_offsets(dout_row_stride * UNIT, BLOCK_M, D0)
        q0 = load_tile(q, q_offsets, begin, end, BLOCK_M, D0, VALID0, True, True)
        dout0 = load_tile(dout, dout_offsets, begin, end, BLOCK_M, D0, VALID0, True, True)
        dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
        q1 = q0
        dout1 = dout0
        dq1 = dq0
        k_row_stride *= UNIT
        v_row_stride *= UNIT
        k_offsets0 = tile_offsets(k_row_stride, BLOCK_N, D0)
        v_offsets0 = tile_offsets(v_row_stride, BLOCK_N, D0)
        k_offsets1 = k_offsets0
        v_offsets1 = v_offsets0
        if D1 > 0:
            q_offsets = tile_offsets(q_row_stride * UNIT, BLOCK_M, D1)
            dout_offsets = tile_offsets(dout_row_stride * UNIT, BLOCK_M, D1)
            q1 = load_tile(q + D0, q_offsets, begin, end, BLOCK_M, D1, HEAD_DIM - D0, True, True)
            dout1 = load_tile(
                dout + D0, dout_offsets, begin, end, BLOCK_M, D1, HEAD_DIM - D0, True, True
            )
            dq1 = tl.zeros([BLOCK_M, D1], tl.float32)
            k_offsets1 = tile_offsets(k_row_stride, BLOCK_N, D1)
            v_offsets1 = tile_offsets(v_row_stride, BLOCK_N, D1)
        workspace += workspace_row(batch, first_q, seqlen_q, IS_VARLEN) + first_row
        workspace += head * 2 * workspace_rows
        # As prepare writes it: in the units of what it is added to in backward_dkdv.
        minus_lse = tl.load(workspace + tl.arange(0, BLOCK_M))
        if not HAS_SOFTCAP:
            minus_lse *= score_scale
        minus_d = tl.load(workspace + workspace_rows + tl.arange(0, BLOCK_M))
        slope = alibi_slope(
            alibi_slopes, batch, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI
        )
        key0 = 0
        key1 = 0
        if HAS_DROPOUT:
            key0, key1 = dropout_key(rng_state)

        last_row = tl.minimum(first_row + BLOCK_M, num_q)
        begin, end = any_visible_keys(
            first_row, last_row, offset, num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        full_begin, full_end = all_visible_keys(
            first_row, last_row, offset, num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        begin = begin // BLOCK_N
        end = tl.cdiv(end, BLOCK_N)
        full_begin = tl.minimum(tl.maximum(tl.cdiv(full_begin, BLOCK_N), begin), end)
        full_end = tl.minimum(tl.maximum(full_end // BLOCK_N, full_begin), end)
        num_masked = full_begin - begin + end - full_end

        if not DESCRIPTORS:
            k += (batch * k_batch_stride + head_k * k_head_stride) * UNIT + first_k * k_row_stride
            v += (batch * v_batch_stride + head_k * v_head_stride) * UNIT + first_k * v_row_stride
        for block in tl.range(full_begin, full_end, num_stages=STAGES):
            dq0, dq1 = _add_keys(
                dq0, dq1, q0, q1, dout0, dout1, k, v, minus_lse, minus_d,
                k_offsets0, k_offsets1, v_offsets0, v_offsets1, k_row_stride, v_row_stride,
                tl.multiple_of(block * BLOCK_N, BLOCK_N), first_row, num_k, offset,
                window_left, window_right, score_scale, softcap, slope,
                key0, key1, dropout_threshold, dropout_scale, batch, head, head_k,
                False, DESCRIPTORS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
                HEAD_DIM, D0, D1, BLOCK_M, BLOCK_N,
            )  # fmt: skip
        for j in tl.range(0, num_masked, num_stages=STAGES):
            block = begin + j
            block = tl.where(block < full_begin, block, block - full_begin + full_end)
            dq0, dq1 = _add_keys(
                dq0, dq1, q0, q1, dout0, dout1, k, v, minus_lse, minus_d,
                k_offsets0, k_offsets1, v_offsets0, v_offsets1, k_row_stride, v_row_stride,
                tl.multiple_of(block * BLOCK_N, BLOCK_N), first_row, num_k, offset,
                window_left, window_right, score_scale, softcap, slope,
                key0, key1, dropout_threshold, dropout_scale, batch, head, head_k,
                True, DESCRIPTORS, HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT,
                HEAD_DIM, D0, D1, BLOCK_M, BLOCK_N,
            )  # fmt: skip

        dq += (batch * dq_batch_stride + start_q * dq_row_stride + head * dq_head_stride) * UNIT
        dq_row_stride *= UNIT
        dtype = dq.dtype.element_ty
        store_tile(dq, dq_row_stride, (dq0 * softmax_scale).to(dtype), rows, BLOCK_M, D0, VALID0)
        if D1 > 0:
            x = (dq1 * softmax_scale).to(dtype)
            store_tile(dq + D0, dq_row_stride, x, rows, BLOCK_M, D1, HEAD_DIM - D0)
