"""Attention backward for Hopper, in Gluon: dK and dV.

What it computes, and from what arguments, backward_dkdv.py says; how warps share the work,
hopper.py. A group of warps has 64 keys and walks over the rows that are brought: while one group
computes probabilities, the products of the other run.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attn.backends.flaggems.kernels.backward_prepare import ROW_ALIGNMENT
from flash_attn.backends.flaggems.kernels.backward_tiles import NUMBERS
from flash_attn.backends.flaggems.kernels.dropout_hopper import (
    draw_transposed,
    keeps_transposed,
    layout_of_bits,
)
from flash_attn.backends.flaggems.kernels.gluon_functions import (
    alibi_slope,
    any_seeing_queries,
    clamped,
    dropout_key,
    program_order,
    rows_of_sequence,
    workspace_row,
)
from flash_attn.backends.flaggems.kernels.hopper import (
    GROUP,
    UNIT,
    bring,
    clear_rows,
    layout_of_product,
    load_tile,
    store_tile,
)
from flash_attn.backends.flaggems.kernels.scores_hopper import exponents


@gluon.jit
def _produce_rows(
    call,
    CLEARS: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
    BLOCK_M: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Brings the blocks [begin, end) of Q and dO of all query heads of a group, and what is to be
    added to their scores and to dP; draws the numbers of dropout for the keys of each group.

    CLEARS: there may be rows that see no key, or are of another sequence; they become 0.
    """
    q, dout, workspace, workspace_rows, buffers, cleared, place, sizes, dropout = call
    queries, douts, minus_lses, minus_ds, q_full, dout_full, free = buffers
    batch, first_q, head_k, group_size = place
    row_begin, row_end, begin, end = sizes
    bits, numbers, first_key = dropout
    of_rows: gl.constexpr = gl.BlockedLayout([2], [32], [gl.num_warps()], [0])
    step = gl.arange(0, BLOCK_M, of_rows)
    workspace += head_k.to(gl.int64) * group_size * 2 * workspace_rows
    n = 0
    num_cleared = 0
    for i in range(group_size):
        head = head_k * group_size + i
        for block in range(begin, end):
            stage = n % STAGES
            mbarrier.wait(free.index(stage), (n // STAGES + 1) & 1)
            start = block * BLOCK_M
            full = dout_full.index(stage)
            if CLEARS and ((start < row_begin) | (start + BLOCK_M > row_end)):
                mbarrier.expect(cleared, 2 * q.block_type.nbytes)
                bring(q, batch, head, first_q + start, queries.index(stage), cleared)
                bring(dout, batch, head, first_q + start, douts.index(stage), cleared)
                mbarrier.wait(cleared, num_cleared & 1)
                num_cleared += 1
                clear_rows(queries.index(stage), row_begin - start, row_end - start)
                clear_rows(douts.index(stage), row_begin - start, row_end - start)
                fence_async_shared()
                mbarrier.arrive(q_full.index(stage))
                mbarrier.arrive(full)
            else:
                mbarrier.expect(q_full.index(stage), q.block_type.nbytes)
                bring(q, batch, head, first_q + start, queries.index(stage), q_full.index(stage))
                mbarrier.expect(full, dout.block_type.nbytes)
                bring(dout, batch, head, first_q + start, douts.index(stage), full)
            minus_lses.index(stage).store(gl.load(workspace + start + step))
            minus_ds.index(stage).store(gl.load(workspace + workspace_rows + start + step))
            mbarrier.arrive(q_full.index(stage))
            if HAS_DROPOUT:
                for group in gl.static_range(len(bits)):
                    draw_transposed(
                        bits[group].index(stage), *numbers, head,
                        start, first_key + group * GROUP, BLOCK_M,
                    )  # fmt: skip
                mbarrier.arrive(full)
            n += 1
        workspace += 2 * workspace_rows


@gluon.jit
def _consume_rows(
    tiles, buffers, call, first_key, HAS_DK: gl.constexpr, HAS_DV: gl.constexpr, FLAGS: gl.constexpr
):
    """dK and dV of the GROUP keys from first_key on, or one of the two: then the other group has
    the other, and they share the tiles, of which each loads one.
    """
    HAS_LEFT: gl.constexpr = FLAGS[0]
    HAS_RIGHT: gl.constexpr = FLAGS[1]
    HAS_SOFTCAP: gl.constexpr = FLAGS[2]
    HAS_ALIBI: gl.constexpr = FLAGS[3]
    HAS_DROPOUT: gl.constexpr = FLAGS[4]
    HEAD_DIM: gl.constexpr = FLAGS[5]
    D0: gl.constexpr = FLAGS[6]
    BLOCK_M: gl.constexpr = FLAGS[7]
    STAGES: gl.constexpr = FLAGS[8]
    keys, values, bits, tiles_full = tiles
    queries, douts, minus_lses, minus_ds, q_full, dout_full, free = buffers
    operands, place, sizes, window, numbers, alibi = call
    k, v, dk, dv, k_row_stride, v_row_stride, dk_row_stride, dv_row_stride = operands
    batch, head_k, group_size, num_rows, num_k = place
    offset, begin, end = sizes
    window_left, window_right = window
    score_scale, softcap, softmax_scale, dropout_scale = numbers
    slopes, slopes_batch_stride, slopes_head_stride = alibi
    dtype: gl.constexpr = k.dtype.element_ty
    of_scores: gl.constexpr = layout_of_product(BLOCK_M)
    of_gradient: gl.constexpr = layout_of_product(D0)
    of_operand: gl.constexpr = gl.DotOperandLayout(0, of_gradient, 2)
    of_row: gl.constexpr = gl.SliceLayout(0, of_scores)

    skip = first_key.to(gl.int64)
    if HAS_DV:
        load_tile(keys, k + skip * k_row_stride, k_row_stride, 0, num_k - first_key, HEAD_DIM)
    if HAS_DK:
        load_tile(values, v + skip * v_row_stride, v_row_stride, 0, num_k - first_key, HEAD_DIM)
    if not (HAS_DK and HAS_DV):
        mbarrier.arrive(tiles_full)
        mbarrier.wait(tiles_full, 0)
    key = first_key + gl.arange(0, GROUP, gl.SliceLayout(1, of_scores))
    step = gl.arange(0, BLOCK_M, of_row)
    zeros = gl.full([GROUP, BLOCK_M], 0.0, gl.float32, of_scores)
    if HAS_DK:
        dk_sum = gl.full([GROUP, D0], 0.0, gl.float32, of_gradient)
    if HAS_DV:
        dv_sum = gl.full([GROUP, D0], 0.0, gl.float32, of_gradient)
    keep_probability = 1.0 / dropout_scale
    n = 0
    for i in range(group_size):
        head = (head_k * group_size + i).to(gl.int64)
        slope = alibi_slope(slopes, batch, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI)
        for block in range(begin, end):
            stage = n % STAGES
            phase = (n // STAGES) & 1
            start = block * BLOCK_M
            mbarrier.wait(q_full.index(stage), phase)
            minus_lse = minus_lses.index(stage).load(of_row)
            # What is to be added is where the products begin, which costs no registers.
            s, zeros = gl.broadcast(zeros if HAS_SOFTCAP else minus_lse[None, :], zeros)
            s = warpgroup_mma(keys, queries.index(stage).permute((1, 0)), s, is_async=True)
            mbarrier.wait(dout_full.index(stage), phase)
            if HAS_DK:
                dp = zeros
                if not HAS_DROPOUT:
                    dp, zeros = gl.broadcast(minus_ds.index(stage).load(of_row)[None, :], zeros)
                dp = warpgroup_mma(values, douts.index(stage).permute((1, 0)), dp, is_async=True)
                s = warpgroup_mma_wait(1, deps=[s])
            else:
                s = warpgroup_mma_wait(0, deps=[s])
            row = start + step
            distance = 0.0
            if HAS_ALIBI:
                distance = ((row + offset)[None, :] - key[:, None]).to(gl.float32)
            score, capped = exponents(
                s * score_scale, distance, softcap, slope, HAS_SOFTCAP, HAS_ALIBI
            )
            if HAS_SOFTCAP:
                score = score + minus_lse[None, :]
            p = gl.exp2(score)
            if HAS_RIGHT:
                least = first_key + GROUP - 1 - offset - window_right
                if start < least:
                    p = gl.where(
                        step[None, :] < (key - offset - window_right - start)[:, None], 0.0, p
                    )
            if HAS_LEFT:
                most = first_key - offset + window_left
                if start + BLOCK_M - 1 > most:
                    p = gl.where(
                        step[None, :] > (key - offset + window_left - start)[:, None], 0.0, p
                    )
            weight = p
            if HAS_DROPOUT:
                keeps = keeps_transposed(bits.index(stage), BLOCK_M)
                weight = gl.where(keeps, p, 0.0)
            if HAS_DK:
                dp = warpgroup_mma_wait(0, deps=[dp])
                ds = weight * dp
                if HAS_DROPOUT:  # its scale comes at the end
                    minus_d = minus_ds.index(stage).load(of_row) * keep_probability
                    ds += p * minus_d[None, :]
                if HAS_SOFTCAP:
                    ds = ds * (1.0 - capped * capped)
            if HAS_DV:
                weight = gl.convert_layout(weight.to(dtype), of_operand)
                dv_sum = warpgroup_mma(weight, douts.index(stage), dv_sum, is_async=True)
            if HAS_DK:
                ds = gl.convert_layout(ds.to(dtype), of_operand)
                dk_sum = warpgroup_mma(ds, queries.index(stage), dk_sum, is_async=True)
                dk_sum, ds = warpgroup_mma_wait(0, deps=[dk_sum, ds])
            if HAS_DV:
                dv_sum, weight = warpgroup_mma_wait(0, deps=[dv_sum, weight])
            mbarrier.arrive(free.index(stage))
            n += 1

    # Keys behind seqused_k have no gradient, whatever was computed for them.
    in_use = (first_key + gl.arange(0, GROUP, gl.SliceLayout(1, of_gradient)) < num_k)[:, None]
    rows = num_rows - first_key
    if not (HAS_DK and HAS_DV):
        mbarrier.arrive(tiles_full)
    if HAS_DK:
        dk_sum = gl.where(in_use, dk_sum * (softmax_scale * dropout_scale), 0.0).to(dtype)
        store_tile(dk + skip * dk_row_stride, dk_row_stride, dk_sum, values, rows, HEAD_DIM)
    if HAS_DV:
        dv_sum = gl.where(in_use, dv_sum * dropout_scale, 0.0).to(dtype)
        if not HAS_DK:  # the other group may still read them
            mbarrier.wait(tiles_full, 1)
        store_tile(dv + skip * dv_row_stride, dv_row_stride, dv_sum, keys, rows, HEAD_DIM)


@gluon.jit(
    do_not_specialize=[
        *NUMBERS,
        *("dk_batch_stride", "dk_row_stride", "dk_head_stride"),
        *("dv_batch_stride", "dv_row_stride", "dv_head_stride"),
    ]
)
def backward_dkdv_hopper(
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
    q_batch_stride: gl.int64,
    q_row_stride: gl.int64,
    q_head_stride: gl.int64,
    k_batch_stride: gl.int64,
    k_row_stride: gl.int64,
    k_head_stride: gl.int64,
    v_batch_stride: gl.int64,
    v_row_stride: gl.int64,
    v_head_stride: gl.int64,
    dout_batch_stride: gl.int64,
    dout_row_stride: gl.int64,
    dout_head_stride: gl.int64,
    dk_batch_stride: gl.int64,
    dk_row_stride: gl.int64,
    dk_head_stride: gl.int64,
    dv_batch_stride: gl.int64,
    dv_row_stride: gl.int64,
    dv_head_stride: gl.int64,
    workspace_rows: gl.int64,
    slopes_batch_stride: gl.int64,
    slopes_head_stride: gl.int64,
    total_q: gl.int64,
    total_k: gl.int64,
    num_heads_k: gl.int32,
    group_size: gl.int32,
    seqlen_q: gl.int32,
    seqlen_k: gl.int32,
    window_left: gl.int32,
    window_right: gl.int32,
    num_tiles: gl.int32,
    num_pairs: gl.int64,
    pairs_at_once: gl.int32,
    score_scale: gl.float32,
    softcap: gl.float32,
    softmax_scale: gl.float32,
    dropout_threshold: gl.int32,
    dropout_scale: gl.float32,
    IS_VARLEN: gl.constexpr,
    HAS_SEQUSED: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
    CLEARS: gl.constexpr,
    HEAD_DIM: gl.constexpr,
    D0: gl.constexpr,
    BLOCK_M: gl.constexpr,
    BLOCK_N: gl.constexpr,  # of two groups, or one that they share
    STAGES: gl.constexpr,
):
    """As backward_dkdv, with q and dout descriptors of (b, h, s, d), or (1, h, rows, d)."""
    tile, pair = program_order(num_tiles, num_pairs, pairs_at_once)
    workspace_rows = workspace_rows // ROW_ALIGNMENT * ROW_ALIGNMENT  # tells the compiler
    batch = pair // num_heads_k
    head_k = pair % num_heads_k
    first_q, num_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, total_q, IS_VARLEN)
    first_k, num_rows = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, total_k, IS_VARLEN)
    num_k = num_rows
    if HAS_SEQUSED:
        num_k = clamped(gl.load(seqused_k + batch), num_rows)
    first_key = tile * BLOCK_N
    if first_key >= num_rows:
        return
    offset = num_k - num_q
    # Rows that see at least one key of the sequence, then of these keys, in tiles.
    row_begin, row_end = any_seeing_queries(
        0, num_k, offset, num_q, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    last_key = gl.minimum(first_key + BLOCK_N, num_k)
    begin, end = any_seeing_queries(
        first_key, last_key, offset, num_q, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    begin = begin // BLOCK_M
    end = gl.cdiv(end, BLOCK_M)
    if first_key >= num_k:
        end = begin
    k += (batch * k_batch_stride + first_k * k_row_stride + head_k * k_head_stride) * UNIT
    v += (batch * v_batch_stride + first_k * v_row_stride + head_k * v_head_stride) * UNIT
    dk += (batch * dk_batch_stride + first_k * dk_row_stride + head_k * dk_head_stride) * UNIT
    dv += (batch * dv_batch_stride + first_k * dv_row_stride + head_k * dv_head_stride) * UNIT
    workspace += workspace_row(batch, first_q, seqlen_q, IS_VARLEN)
    key0 = 0
    key1 = 0
    if HAS_DROPOUT:
        key0, key1 = dropout_key(rng_state)
    batch_q = batch.to(gl.int32)
    if IS_VARLEN:
        batch_q = 0

    dtype: gl.constexpr = k.dtype.element_ty
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, D0], dtype)
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_M, D0], dtype)
    of_numbers: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    of_barriers: gl.constexpr = mbarrier.MBarrierLayout()
    keys0 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_keys)
    values0 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_keys)
    # With one tile for both groups, one of them has dK and the other dV.
    SHARES: gl.constexpr = BLOCK_N == GROUP
    keys1 = keys0
    values1 = values0
    bits0 = keys0  # nobody reads it without dropout
    bits1 = keys0
    bits = ()
    if HAS_DROPOUT:
        shape: gl.constexpr = [STAGES, GROUP // 2, BLOCK_M // 2]
        bits0 = gl.allocate_shared_memory(gl.uint8, shape, layout_of_bits(BLOCK_M))
        bits1 = bits0
        bits = (bits0,)
        if not SHARES:
            bits1 = gl.allocate_shared_memory(gl.uint8, shape, layout_of_bits(BLOCK_M))
            bits = (bits0, bits1)
    if not SHARES:
        keys1 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_keys)
        values1 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_keys)
    queries = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D0], of_rows)
    douts = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_M, D0], of_rows)
    minus_lses = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], of_numbers)
    minus_ds = gl.allocate_shared_memory(gl.float32, [STAGES, BLOCK_M], of_numbers)
    q_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    dout_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    cleared = gl.allocate_shared_memory(gl.int64, [1], of_barriers)
    tiles_full = gl.allocate_shared_memory(gl.int64, [1], of_barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(q_full.index(stage), count=2)  # copies, and numbers
        mbarrier.init(dout_full.index(stage), count=2 if HAS_DROPOUT else 1)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(cleared, count=1)
    mbarrier.init(tiles_full, count=2)
    fence_async_shared()

    buffers = (queries, douts, minus_lses, minus_ds, q_full, dout_full, free)
    call = (
        (
            k, v, dk, dv, k_row_stride * UNIT, v_row_stride * UNIT,
            dk_row_stride * UNIT, dv_row_stride * UNIT,
        ),
        (batch, head_k, group_size, num_rows, num_k),
        (offset, begin, end),
        (window_left, window_right),
        (score_scale, softcap, softmax_scale, dropout_scale),
        (alibi_slopes, slopes_batch_stride, slopes_head_stride),
    )  # fmt: skip
    bringing = (
        q, dout, workspace, workspace_rows, buffers, cleared,
        (batch_q, first_q.to(gl.int32), head_k.to(gl.int32), group_size),
        (row_begin, row_end, begin, end),
        (bits, (key0, key1, dropout_threshold, batch), first_key),
    )  # fmt: skip
    FLAGS: gl.constexpr = (
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, HEAD_DIM, D0, BLOCK_M, STAGES,
    )  # fmt: skip
    # Those that bring also draw, with as many warps as there are registers for.
    WARPS: gl.constexpr = 1 if not HAS_DROPOUT else 8 if D0 <= 128 else 4
    REGISTERS: gl.constexpr = (240, 24) if WARPS == 1 else (224, 32) if WARPS == 8 else (232, 40)
    tiles0 = (keys0, values0, bits0, tiles_full)
    tiles1 = (keys1, values1, bits1, tiles_full)
    other_key = first_key if SHARES else first_key + GROUP
    gl.warp_specialize(
        [
            (
                _consume_rows,
                (tiles0, buffers, call, first_key, True, not SHARES, FLAGS),
            ),
            (
                _consume_rows,
                (tiles1, buffers, call, other_key, not SHARES, True, FLAGS),
            ),
            (_produce_rows, (bringing, CLEARS, HAS_DROPOUT, BLOCK_M, STAGES)),
        ],
        [4, WARPS],
        REGISTERS,
    )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(q_full.index(stage))
        mbarrier.invalidate(dout_full.index(stage))
        mbarrier.invalidate(free.index(stage))
    mbarrier.invalidate(cleared)
    mbarrier.invalidate(tiles_full)
