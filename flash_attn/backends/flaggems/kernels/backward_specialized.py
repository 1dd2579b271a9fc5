"""Attention backward for Hopper with specialised warps (Triton 3.6).

The products and programs of backward_dkdv.py and backward_dq.py, in the form that the compiler can
part among warps; see forward_specialized.py. One group of warps brings what passes through a
program, two others have half of what stays in it: of the keys of `backward_dkdv_specialized`, of
the rows of `backward_dq_specialized`.

For dense calls in which every row sees a key, and for variable length; without dropout.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.backward_prepare import (
    ROW_ALIGNMENT,
    workspace_row,
)
from flash_attn.backends.flaggems.kernels.backward_tiles import (
    NUMBERS,
    exponents,
    program_order,
    store_tile,
)
from flash_attn.backends.flaggems.kernels.common import (
    alibi_slope,
    any_seeing_queries,
    any_visible_keys,
    clamped,
    in_window,
    rows_of_sequence,
)
from flash_attn.backends.flaggems.kernels.forward_specialized import UNIT
from flash_attn.backends.flaggems.kernels.rows import load_described


@triton.jit(
    do_not_specialize=[
        *("dk_batch_stride", "dk_row_stride", "dk_head_stride"),
        *("dv_batch_stride", "dv_row_stride", "dv_head_stride"),
        *NUMBERS,
    ]
)
def backward_dkdv_specialized(
    q,  # tensor descriptor (b, h, sq, d), as is dout; pointers when IS_VARLEN
    k,
    v,
    dout,
    workspace,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    alibi_slopes,
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
    dk_batch_stride: tl.int64,
    dk_row_stride: tl.int64,
    dk_head_stride: tl.int64,
    dv_batch_stride: tl.int64,
    dv_row_stride: tl.int64,
    dv_head_stride: tl.int64,
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
    IS_VARLEN: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dk and dv of BLOCK_N keys of one key head; arguments as those of backward_dkdv."""
    tile, pair = program_order(num_tiles, num_pairs, pairs_at_once)
    workspace_rows = workspace_rows // ROW_ALIGNMENT * ROW_ALIGNMENT  # tells the compiler
    batch = pair // num_heads_k
    head_k = pair % num_heads_k
    first_q, num_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, total_q, IS_VARLEN)
    first_k, num_rows = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, total_k, IS_VARLEN)
    num_k = num_rows
    if HAS_SEQUSED:
        num_k = clamped(tl.load(seqused_k + batch), num_rows)
    offset = num_k - num_q
    first_key = tile * BLOCK_N
    k += batch * (k_batch_stride * UNIT) + head_k * (k_head_stride * UNIT)
    v += batch * (v_batch_stride * UNIT) + head_k * (v_head_stride * UNIT)
    shape = [num_k, HEAD_DIM]
    row_begin = 0
    if IS_VARLEN:
        # Rows that see nothing may hold anything, and lie outside of the descriptors. Those have
        # a row at least: if none, the tensor's first.
        start_k = tl.where(num_k > 0, first_k, 0)
        k += start_k * (k_row_stride * UNIT)
        v += start_k * (v_row_stride * UNIT)
        shape = [tl.maximum(num_k, 1), HEAD_DIM]
        row_begin, row_end = any_seeing_queries(
            0, num_k, offset, num_q, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        start_q = tl.where(row_end > row_begin, first_q + row_begin, 0)
        heads_and_rows = [num_heads_k * group_size, tl.maximum(row_end - row_begin, 1), HEAD_DIM]
        q = tl.make_tensor_descriptor(
            q + start_q * (q_row_stride * UNIT),
            heads_and_rows,
            [q_head_stride * UNIT, q_row_stride * UNIT, 1],
            [1, BLOCK_M, D0],
        )
        dout = tl.make_tensor_descriptor(
            dout + start_q * (dout_row_stride * UNIT),
            heads_and_rows,
            [dout_head_stride * UNIT, dout_row_stride * UNIT, 1],
            [1, BLOCK_M, D0],
        )
    k_rows = tl.make_tensor_descriptor(k, shape, [k_row_stride * UNIT, 1], [BLOCK_N, D0])
    v_rows = tl.make_tensor_descriptor(v, shape, [v_row_stride * UNIT, 1], [BLOCK_N, D0])
    # A value of its own: forward_specialized.py says why.
    first_loaded = tl.minimum(first_key, shape[0])
    k0 = k_rows.load([first_loaded, 0])
    v0 = v_rows.load([first_loaded, 0])
    dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
    dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
    # The statistics of the group's rows: of each head first -lse, then -D.
    size = (group_size * 2 * workspace_rows).to(tl.int32)
    workspace += head_k * group_size * 2 * workspace_rows
    statistics = tl.make_tensor_descriptor(workspace, [size], [1], [BLOCK_M])
    first_statistic = workspace_row(batch, first_q, seqlen_q, IS_VARLEN).to(tl.int32)
    rows_of_statistics = workspace_rows.to(tl.int32)

    begin, end = any_seeing_queries(
        first_key,
        tl.minimum(first_key + BLOCK_N, num_k),
        offset,
        num_q,
        window_left,
        window_right,
        HAS_LEFT,
        HAS_RIGHT,
    )
    begin = begin // BLOCK_M
    num_blocks = tl.cdiv(end, BLOCK_M) - begin
    if IS_VARLEN:
        num_blocks = tl.where(first_key < num_k, num_blocks, 0)
    key = first_key + tl.arange(0, BLOCK_N)
    # All blocks of rows of all query heads, in one loop.
    for i in tl.range(0, group_size * num_blocks, warp_specialize=True):
        member = i // num_blocks
        head = head_k * group_size + member
        start = (begin + i % num_blocks) * BLOCK_M
        statistic = first_statistic + 2 * member * rows_of_statistics + start
        minus_lse = statistics.load([statistic])
        if IS_VARLEN:
            q0 = q.load([head.to(tl.int32), start - row_begin, 0]).reshape(BLOCK_M, D0)
        else:
            q0 = load_described(q, batch, head, start, BLOCK_M, D0)
        s = tl.dot(k0, tl.trans(q0))
        row = start + tl.arange(0, BLOCK_M)
        if HAS_SOFTCAP or HAS_ALIBI:
            slope = alibi_slope(
                alibi_slopes, batch, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI
            )
            distance = (row + offset).to(tl.float32)[None, :] - key.to(tl.float32)[:, None]
            score, capped = exponents(
                s * score_scale, distance, softcap, slope, HAS_SOFTCAP, HAS_ALIBI
            )
        else:
            score = s * score_scale
        if not HAS_SOFTCAP:
            minus_lse *= score_scale
        score += minus_lse[None, :]
        if HAS_RIGHT or HAS_LEFT:
            sees = in_window(
                row[None, :] + offset, key[:, None], window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            score = tl.where(sees, score, float("-inf"))
        p = tl.math.exp2(score)
        if IS_VARLEN:
            dout0 = dout.load([head.to(tl.int32), start - row_begin, 0]).reshape(BLOCK_M, D0)
        else:
            dout0 = load_described(dout, batch, head, start, BLOCK_M, D0)
        dv0 = tl.dot(p.to(dout0.dtype), dout0, dv0)
        minus_d = statistics.load([statistic + rows_of_statistics])
        dp = tl.dot(v0, tl.trans(dout0))
        ds = p * (dp + minus_d[None, :])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        if HAS_RIGHT or HAS_LEFT:
            # Whatever dO is where P is 0. To keep `sees` for this would take more registers.
            ds = tl.where(p == 0.0, 0.0, ds)
        dk0 = tl.dot(ds.to(q0.dtype), q0, dk0)

    if HAS_SEQUSED:  # keys behind have no gradient, whatever was computed for them
        dk0 = tl.where((key < num_k)[:, None], dk0, 0.0)
        dv0 = tl.where((key < num_k)[:, None], dv0, 0.0)
    rows = num_rows - first_key
    first_key += first_k
    dk += batch * (dk_batch_stride * UNIT) + head_k * (dk_head_stride * UNIT)
    dv += batch * (dv_batch_stride * UNIT) + head_k * (dv_head_stride * UNIT)
    dk += first_key * (dk_row_stride * UNIT)
    dv += first_key * (dv_row_stride * UNIT)
    dk0 = (dk0 * softmax_scale).to(dk.dtype.element_ty)
    store_tile(dk, dk_row_stride * UNIT, dk0, rows, BLOCK_N, D0, HEAD_DIM)
    store_tile(dv, dv_row_stride * UNIT, dv0.to(dv.dtype.element_ty), rows, BLOCK_N, D0, HEAD_DIM)


@triton.jit(do_not_specialize=[*NUMBERS, *("dq_batch_stride", "dq_row_stride", "dq_head_stride")])
def backward_dq_specialized(
    q,
    k,  # tensor descriptor (b, hk, sk, d), as is v; pointers when IS_VARLEN
    v,
    dout,
    workspace,
    dq,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    alibi_slopes,
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
    IS_VARLEN: tl.constexpr,
    HAS_SEQUSED: tl.constexpr,
    HAS_LEFT: tl.constexpr,
    HAS_RIGHT: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """dq of BLOCK_M rows of one query head; arguments as those of backward_dq."""
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
    offset = num_k - num_q
    first_row = (num_tiles - 1 - tile) * BLOCK_M
    q += batch * (q_batch_stride * UNIT) + head * (q_head_stride * UNIT)
    dout += batch * (dout_batch_stride * UNIT) + head * (dout_head_stride * UNIT)
    shape = [num_q, HEAD_DIM]
    if IS_VARLEN:  # descriptors have a row at least: if none, the tensor's first
        start_q = tl.where(num_q > 0, first_q, 0)
        q += start_q * (q_row_stride * UNIT)
        dout += start_q * (dout_row_stride * UNIT)
        shape = [tl.maximum(num_q, 1), HEAD_DIM]
        start_k = tl.where(num_k > 0, first_k, 0)
        k += start_k * (k_row_stride * UNIT) + head_k * (k_head_stride * UNIT)
        v += start_k * (v_row_stride * UNIT) + head_k * (v_head_stride * UNIT)
        keys = [tl.maximum(num_k, 1), HEAD_DIM]
        k = tl.make_tensor_descriptor(k, keys, [k_row_stride * UNIT, 1], [BLOCK_N, D0])
        v = tl.make_tensor_descriptor(v, keys, [v_row_stride * UNIT, 1], [BLOCK_N, D0])
    q_rows = tl.make_tensor_descriptor(q, shape, [q_row_stride * UNIT, 1], [BLOCK_M, D0])
    dout_rows = tl.make_tensor_descriptor(dout, shape, [dout_row_stride * UNIT, 1], [BLOCK_M, D0])
    first_loaded = tl.minimum(first_row, shape[0])  # a value of its own, as above
    q0 = q_rows.load([first_loaded, 0])
    dout0 = dout_rows.load([first_loaded, 0])
    dq0 = tl.zeros([BLOCK_M, D0], tl.float32)
    workspace += head * 2 * workspace_rows
    size = (2 * workspace_rows).to(tl.int32)
    statistics = tl.make_tensor_descriptor(workspace, [size], [1], [BLOCK_M])
    statistic = workspace_row(batch, first_q, seqlen_q, IS_VARLEN).to(tl.int32) + first_row
    # As prepare writes it: in the units of what it is added to in backward_dkdv.
    minus_lse = statistics.load([statistic])
    if not HAS_SOFTCAP:
        minus_lse *= score_scale
    minus_d = statistics.load([statistic + workspace_rows.to(tl.int32)])
    slope = alibi_slope(
        alibi_slopes, batch, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI
    )
    begin, end = any_visible_keys(
        first_row,
        tl.minimum(first_row + BLOCK_M, num_q),
        offset,
        num_k,
        window_left,
        window_right,
        HAS_LEFT,
        HAS_RIGHT,
    )
    if IS_VARLEN:
        end = tl.where(first_row < num_q, end, begin)
    row = first_row + tl.arange(0, BLOCK_M)
    for start in tl.range(begin // BLOCK_N * BLOCK_N, end, BLOCK_N, warp_specialize=True):
        if IS_VARLEN:
            k0 = k.load([start, 0])
            v0 = v.load([start, 0])
        else:
            k0 = load_described(k, batch, head_k, start, BLOCK_N, D0)
            v0 = load_described(v, batch, head_k, start, BLOCK_N, D0)
        s = tl.dot(q0, tl.trans(k0))
        key = start + tl.arange(0, BLOCK_N)
        if HAS_SOFTCAP or HAS_ALIBI:
            distance = (row + offset).to(tl.float32)[:, None] - key.to(tl.float32)[None, :]
            score, capped = exponents(
                s * score_scale, distance, softcap, slope, HAS_SOFTCAP, HAS_ALIBI
            )
        else:
            score = s * score_scale
        score += minus_lse[:, None]
        if HAS_RIGHT or HAS_LEFT:
            sees = in_window(
                row[:, None] + offset, key[None, :], window_left, window_right, HAS_LEFT, HAS_RIGHT
            )
            score = tl.where(sees, score, float("-inf"))
        p = tl.math.exp2(score)
        dp = tl.dot(dout0, tl.trans(v0))
        ds = p * (dp + minus_d[:, None])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        if HAS_RIGHT or HAS_LEFT:
            ds = tl.where(p == 0.0, 0.0, ds)
        dq0 = tl.dot(ds.to(k0.dtype), k0, dq0)

    dq += batch * (dq_batch_stride * UNIT) + head * (dq_head_stride * UNIT)
    dq += (first_q + first_row) * (dq_row_stride * UNIT)
    dq0 = (dq0 * softmax_scale).to(dq.dtype.element_ty)
    store_tile(dq, dq_row_stride * UNIT, dq0, num_q - first_row, BLOCK_M, D0, HEAD_DIM)
