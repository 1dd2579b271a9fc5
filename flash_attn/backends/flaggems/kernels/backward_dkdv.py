"""Attention backward: dK and dV, and dQ, by two kernels that compute the scores each for itself.

    S = Q K^T    dP = dO V^T    P = exp(S - lse)    dS = P (dP - D)    D = rowsum(dO * O) - dlse
    dV = P^T dO    dK = scale dS^T Q    dQ = scale dS K

Seven products where one kernel would need five; in exchange there are no atomics, no accumulator in
memory, and every result is bitwise reproducible.

`backward_dkdv`: a program has BLOCK_N keys of one key head, and walks over the query heads of its
group and their rows, BLOCK_M at a time. Scores are transposed, (keys, rows): so P^T and dS^T are
the left operands of the next products as they lie in registers. What is to be subtracted from a
column (log-sum-exp, D) is where the accumulator of the product begins, which costs no registers:
dK, dV, S^T and dP^T fill them.

`backward_dq`: a program has BLOCK_M rows of one query head and walks over the keys that they see.

DESCRIPTORS: what passes through a program (Q and dO, or K and V) arrives as tensor descriptors
instead of pointers, which Hopper's copy engine reads. Addresses take no registers then. It is for
heads of one piece, dense inputs, and calls in which every row sees a key, so that there is nothing
to hide from the products but what lies outside of the tensor.

Both walk over the blocks that a mask cuts in a loop of their own, and over the others without a
mask; backward_dq over the latter first, since ptxas serialises Hopper's products otherwise. With
MASKS_ALL backward_dkdv masks all in one loop, which takes fewer registers than two. Loops name
their number of stages because Triton fetches vectors ahead only then.

Bound by the tensor cores, and at small head dimensions as much by the exponentials and what
surrounds them.
"""

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
    any_seeing_queries,
    clamped,
    dropout_keeps_transposed,
    dropout_key,
    rows_of_sequence,
)
from flash_attn.backends.flaggems.kernels.rows import load_described


@triton.jit(
    do_not_specialize=[
        *NUMBERS,
        *("dk_batch_stride", "dk_row_stride", "dk_head_stride"),
        *("dv_batch_stride", "dv_row_stride", "dv_head_stride"),
    ]
)
def backward_dkdv(
    q,
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
    """dk and dv of BLOCK_N keys of one key head.

    q, dout: (b, sq, h, d) or (tq, h, d); k, v, dk, dv: (b, sk, hk, d) or (tk, hk, d); their strides
    in units of UNIT. With DESCRIPTORS q and dout are descriptors of (b, h, sq, d). workspace: of
    backward_prepare.py. score_scale: softmax_scale * log2(e), or with softcap that times 2 /
    softcap. softcap: in units of log2.
    """
    tile, pair = program_order(num_tiles, num_pairs, pairs_at_once)
    workspace_rows = workspace_rows // ROW_ALIGNMENT * ROW_ALIGNMENT  # tells the compiler
    batch = pair // num_heads_k
    head_k = pair % num_heads_k
    first_q, num_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, total_q, IS_VARLEN)
    first_k, num_rows = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, total_k, IS_VARLEN)
    num_k = num_rows
    if HAS_SEQUSED:
        num_k = clamped(tl.load(seqused_k + batch), num_rows)
    first_key = tile * BLOCK_N
    if first_key < num_rows:
        offset = num_k - num_q
        keys = num_k - first_key
        start_k = first_k + first_key
        k += (batch * k_batch_stride + start_k * k_row_stride + head_k * k_head_stride) * UNIT
        v += (batch * v_batch_stride + start_k * v_row_stride + head_k * v_head_stride) * UNIT
        VALID0: tl.constexpr = HEAD_DIM if HEAD_DIM < D0 else D0
        k_offsets = tile_offsets(k_row_stride * UNIT, BLOCK_N, D0)
        v_offsets = tile_offsets(v_row_stride * UNIT, BLOCK_N, D0)
        k0 = load_tile(k, k_offsets, 0, keys, BLOCK_N, D0, VALID0, False, True)
        v0 = load_tile(v, v_offsets, 0, keys, BLOCK_N, D0, VALID0, False, True)
        dk0 = tl.zeros([BLOCK_N, D0], tl.float32)
        dv0 = tl.zeros([BLOCK_N, D0], tl.float32)
        k1 = k0
        v1 = v0
        dk1 = dk0
        dv1 = dv0
        q_row_stride *= UNIT
        dout_row_stride *= UNIT
        q_offsets0 = tile_offsets(q_row_stride, BLOCK_M, D0)
        dout_offsets0 = tile_offsets(dout_row_stride, BLOCK_M, D0)
        q_offsets1 = q_offsets0
        dout_offsets1 = dout_offsets0
        if D1 > 0:
            k_offsets = tile_offsets(k_row_stride * UNIT, BLOCK_N, D1)
            v_offsets = tile_offsets(v_row_stride * UNIT, BLOCK_N, D1)
            k1 = load_tile(k + D0, k_offsets, 0, keys, BLOCK_N, D1, HEAD_DIM - D0, False, True)
            v1 = load_tile(v + D0, v_offsets, 0, keys, BLOCK_N, D1, HEAD_DIM - D0, False, True)
            dk1 = tl.zeros([BLOCK_N, D1], tl.float32)
            dv1 = tl.zeros([BLOCK_N, D1], tl.float32)
            q_offsets1 = tile_offsets(q_row_stride, BLOCK_M, D1)
            dout_offsets1 = tile_offsets(dout_row_stride, BLOCK_M, D1)
        key0 = 0
        key1 = 0
        if HAS_DROPOUT:
            key0, key1 = dropout_key(rng_state)

        # Rows that see at least one key of the sequence, then of these keys, in tiles.
        row_begin, row_end = any_seeing_queries(
            0, num_k, offset, num_q, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        last_key = tl.minimum(first_key + BLOCK_N, num_k)
        begin, end = any_seeing_queries(
            first_key, last_key, offset, num_q, window_left, window_right, HAS_LEFT, HAS_RIGHT
        )
        begin = begin // BLOCK_M
        end = tl.cdiv(end, BLOCK_M)
        if first_key >= num_k:
            end = begin
        IS_MASKED: tl.constexpr = HAS_LEFT or HAS_RIGHT
        if not DESCRIPTORS:
            q += (batch * q_batch_stride + head_k * group_size * q_head_stride) * UNIT
            q += first_q * q_row_stride
            dout += (batch * dout_batch_stride + head_k * group_size * dout_head_stride) * UNIT
            dout += first_q * dout_row_stride
        workspace += workspace_row(batch, first_q, seqlen_q, IS_VARLEN)
        workspace += head_k * group_size * 2 * workspace_rows
        for i in range(group_size):
            head = head_k * group_size + i
            slope = alibi_slope(
                alibi_slopes, batch, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI
            )
            for block in tl.range(begin, end, num_stages=STAGES):
                start = tl.multiple_of(block * BLOCK_M, BLOCK_M)
                step = tl.arange(0, BLOCK_M)
                minus_lse = tl.load(workspace + start + step)
                minus_d = tl.load(workspace + workspace_rows + start + step)
                if DESCRIPTORS:
                    q0 = load_described(q, batch, head, start, BLOCK_M, D0)
                    dout0 = load_described(dout, batch, head, start, BLOCK_M, D0)
                else:
                    q_rows = q + start * q_row_stride
                    dout_rows = dout + start * dout_row_stride
                    rows_begin = row_begin - start
                    rows_end = row_end - start
                    # Rows that see nothing may hold anything, and are read as 0.
                    q0 = load_tile(
                        q_rows, q_offsets0, rows_begin, rows_end,
                        BLOCK_M, D0, VALID0, IS_MASKED, True,
                    )  # fmt: skip
                    dout0 = load_tile(
                        dout_rows, dout_offsets0, rows_begin, rows_end,
                        BLOCK_M, D0, VALID0, IS_MASKED, True,
                    )  # fmt: skip

                s = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                dp = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
                # Additions where broadcasts would do take as many instructions, fewer registers.
                if not HAS_SOFTCAP:
                    s += minus_lse[None, :]
                if not HAS_DROPOUT:
                    dp += minus_d[None, :]
                s = tl.dot(k0, tl.trans(q0), s)
                dp = tl.dot(v0, tl.trans(dout0), dp)
                if D1 > 0:
                    q1 = load_tile(
                        q_rows + D0, q_offsets1, rows_begin, rows_end,
                        BLOCK_M, D1, HEAD_DIM - D0, IS_MASKED, True,
                    )  # fmt: skip
                    dout1 = load_tile(
                        dout_rows + D0, dout_offsets1, rows_begin, rows_end,
                        BLOCK_M, D1, HEAD_DIM - D0, IS_MASKED, True,
                    )  # fmt: skip
                    s = tl.dot(k1, tl.trans(q1), s)
                    dp = tl.dot(v1, tl.trans(dout1), dp)

                row = start + step
                key = first_key + tl.arange(0, BLOCK_N)
                distance = 0.0
                if HAS_ALIBI:
                    distance = (row + offset).to(tl.float32)[None, :] - key.to(tl.float32)[:, None]
                score, capped = exponents(
                    s * score_scale, distance, softcap, slope, HAS_SOFTCAP, HAS_ALIBI
                )
                if HAS_SOFTCAP:
                    score = score + minus_lse[None, :]
                p = tl.math.exp2(score)
                if IS_MASKED:
                    if HAS_RIGHT:
                        hidden = row[None, :] < (key - offset - window_right)[:, None]
                        if HAS_LEFT:
                            hidden = hidden | (row[None, :] > (key - offset + window_left)[:, None])
                    else:
                        hidden = row[None, :] > (key - offset + window_left)[:, None]
                    p = tl.where(hidden, 0.0, p)
                weight = p
                if HAS_DROPOUT:
                    keeps = dropout_keeps_transposed(
                        key0,
                        key1,
                        dropout_threshold,
                        batch,
                        head,
                        start,
                        first_key,
                        BLOCK_M,
                        BLOCK_N,
                    )
                    weight = tl.where(keeps, p, 0.0)
                    dp = tl.where(keeps, dp, 0.0) * dropout_scale + minus_d[None, :]
                weight = weight.to(dout0.dtype)
                dv0 = tl.dot(weight, dout0, dv0)
                if D1 > 0:
                    dv1 = tl.dot(weight, dout1, dv1)
                ds = p * dp
                if HAS_SOFTCAP:
                    ds = ds * (1.0 - capped * capped)
                ds = ds.to(q0.dtype)
                dk0 = tl.dot(ds, q0, dk0)
                if D1 > 0:
                    dk1 = tl.dot(ds, q1, dk1)
            if not DESCRIPTORS:
                q += q_head_stride * UNIT
                dout += dout_head_stride * UNIT
            workspace += 2 * workspace_rows

        # Keys behind seqused_k have no gradient, whatever was computed for them.
        in_use = (tl.arange(0, BLOCK_N) < keys)[:, None]
        dk0 = tl.where(in_use, dk0 * softmax_scale, 0.0)
        dv0 = tl.where(in_use, dv0 * dropout_scale, 0.0)
        rows = num_rows - first_key
        dk += (batch * dk_batch_stride + start_k * dk_row_stride + head_k * dk_head_stride) * UNIT
        dv += (batch * dv_batch_stride + start_k * dv_row_stride + head_k * dv_head_stride) * UNIT
        dk_row_stride *= UNIT
        dv_row_stride *= UNIT
        dtype = dk.dtype.element_ty
        store_tile(dk, dk_row_stride, dk0.to(dtype), rows, BLOCK_N, D0, VALID0)
        store_tile(dv, dv_row_stride, dv0.to(dtype), rows, BLOCK_N, D0, VALID0)
        if D1 > 0:
            dk1 = tl.where(in_use, dk1 * softmax_scale, 0.0)
            dv1 = tl.where(in_use, dv1 * dropout_scale, 0.0)
            store_tile(dk + D0, dk_row_stride, dk1.to(dtype), rows, BLOCK_N, D1, HEAD_DIM - D0)
            store_tile(dv + D0, dv_row_stride, dv1.to(dtype), rows, BLOCK_N, D1, HEAD_DIM - D0)
