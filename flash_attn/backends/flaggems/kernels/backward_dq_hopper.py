"""Attention backward for Hopper, in Gluon: dQ.

What it computes, and from what arguments, backward_dq.py says; how warps share the work, hopper.py.
A group of warps has 64 rows and walks over the keys that are brought, as in
backward_dkdv_hopper.py.
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
from flash_attn.backends.flaggems.kernels.dropout_hopper import dropout_keeps
from flash_attn.backends.flaggems.kernels.gluon_functions import (
    alibi_slope,
    all_visible_keys,
    any_seeing_queries,
    any_visible_keys,
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
def _produce_keys(call, CLEARS: gl.constexpr, BLOCK_N: gl.constexpr, STAGES: gl.constexpr):
    """Brings the blocks [begin, end) of keys and values.

    CLEARS: there may be other rows behind the keys, which become 0; values are not multiplied with.
    """
    k, v, buffers, cleared, place, sizes = call
    keys, values, keys_full, values_full, keys_free, values_free = buffers
    batch, first_k, head_k = place
    num_k, begin, end = sizes
    for block in range(begin, end):
        n = block - begin
        stage = n % STAGES
        phase = (n // STAGES) & 1
        row = first_k + block * BLOCK_N
        mbarrier.wait(keys_free.index(stage), phase ^ 1)
        full = keys_full.index(stage)
        if CLEARS and (block + 1) * BLOCK_N > num_k:
            mbarrier.expect(cleared, k.block_type.nbytes)
            bring(k, batch, head_k, row, keys.index(stage), cleared)
            mbarrier.wait(cleared, 0)
            clear_rows(keys.index(stage), 0, num_k - block * BLOCK_N)
            fence_async_shared()
            mbarrier.arrive(full)
        else:
            mbarrier.expect(full, k.block_type.nbytes)
            bring(k, batch, head_k, row, keys.index(stage), full)
        mbarrier.wait(values_free.index(stage), phase ^ 1)
        mbarrier.expect(values_full.index(stage), v.block_type.nbytes)
        bring(v, batch, head_k, row, values.index(stage), values_full.index(stage))


@gluon.jit
def _consume_keys(
    tiles, buffers, call, first_row, EVERY: gl.constexpr, GROUP_INDEX: gl.constexpr,
    FLAGS: gl.constexpr,
):  # fmt: skip
    """dQ of the GROUP rows from first_row on, by every block of keys, or by every second, beginning
    with GROUP_INDEX: then the groups share the rows, and the first adds up both sums.
    """
    HAS_LEFT: gl.constexpr = FLAGS[0]
    HAS_RIGHT: gl.constexpr = FLAGS[1]
    HAS_SOFTCAP: gl.constexpr = FLAGS[2]
    HAS_ALIBI: gl.constexpr = FLAGS[3]
    HAS_DROPOUT: gl.constexpr = FLAGS[4]
    HEAD_DIM: gl.constexpr = FLAGS[5]
    D0: gl.constexpr = FLAGS[6]
    BLOCK_N: gl.constexpr = FLAGS[7]
    STAGES: gl.constexpr = FLAGS[8]
    queries, douts, tiles_full = tiles
    keys, values, keys_full, values_full, keys_free, values_free = buffers
    operands, workspace, sizes, window, numbers, dropout = call
    q, dout, dq, q_row_stride, dout_row_stride, dq_row_stride = operands
    minus_lses, minus_ds = workspace
    num_q, num_k, begin, end = sizes
    window_left, window_right = window
    score_scale, softcap, softmax_scale, slope, dropout_scale = numbers
    key0, key1, threshold, batch, head = dropout
    dtype: gl.constexpr = q.dtype.element_ty
    of_scores: gl.constexpr = layout_of_product(BLOCK_N)
    of_gradient: gl.constexpr = layout_of_product(D0)
    of_operand: gl.constexpr = gl.DotOperandLayout(0, of_gradient, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, of_scores)

    offset = num_k - num_q
    row_begin, row_end = any_seeing_queries(
        0, num_k, offset, num_q, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    row_begin -= first_row
    row_end -= first_row
    skip = first_row.to(gl.int64)
    if EVERY == 1 or GROUP_INDEX == 0:
        load_tile(queries, q + skip * q_row_stride, q_row_stride, row_begin, row_end, HEAD_DIM)
    dout += skip * dout_row_stride
    if EVERY == 1 or GROUP_INDEX == 1:
        load_tile(douts, dout, dout_row_stride, row_begin, row_end, HEAD_DIM)
    if EVERY == 2:
        mbarrier.arrive(tiles_full)
        mbarrier.wait(tiles_full, 0)
    row = first_row + gl.arange(0, GROUP, of_row)
    step = gl.arange(0, BLOCK_N, gl.SliceLayout(0, of_scores))
    # As prepare writes it: in the units of what it is added to in backward_dkdv. The workspace has
    # rows up to a multiple of ROW_ALIGNMENT.
    minus_lse = gl.load(minus_lses + row)
    if not HAS_SOFTCAP:
        minus_lse *= score_scale
    minus_d = gl.load(minus_ds + row)
    last_row = gl.minimum(first_row + GROUP, num_q)
    whole_begin, whole_end = all_visible_keys(
        first_row, last_row, offset, num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    # The keys that each row sees.
    keys_begin = row
    keys_end = gl.full([GROUP], 0, gl.int32, of_row) + num_k
    if HAS_LEFT:
        keys_begin = row + offset - window_left
    if HAS_RIGHT:
        keys_end = gl.minimum(row + offset + window_right + 1, num_k)
    zeros = gl.full([GROUP, BLOCK_N], 0.0, gl.float32, of_scores)
    dq_sum = gl.full([GROUP, D0], 0.0, gl.float32, of_gradient)
    for block in range(begin + (GROUP_INDEX if EVERY == 2 else 0), end, EVERY):
        n = block - begin
        stage = n % STAGES
        phase = (n // STAGES) & 1
        start = block * BLOCK_N
        mbarrier.wait(keys_full.index(stage), phase)
        s = warpgroup_mma(
            queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        mbarrier.wait(values_full.index(stage), phase)
        dp = warpgroup_mma(
            douts, values.index(stage).permute((1, 0)), zeros, use_acc=False, is_async=True
        )
        s = warpgroup_mma_wait(1, deps=[s])
        distance = 0.0
        if HAS_ALIBI:
            distance = ((row + offset - start)[:, None] - step[None, :]).to(gl.float32)
        score, capped = exponents(s * score_scale, distance, softcap, slope, HAS_SOFTCAP, HAS_ALIBI)
        p = gl.exp2(score + minus_lse[:, None])
        dp = warpgroup_mma_wait(0, deps=[dp])
        mbarrier.arrive(values_free.index(stage))
        if HAS_DROPOUT:
            keeps = dropout_keeps(key0, key1, threshold, batch, head, first_row, start, BLOCK_N)
            dp = gl.where(keeps, dp, 0.0) * dropout_scale
        ds = p * (dp + minus_d[:, None])
        if HAS_SOFTCAP:
            ds = ds * (1.0 - capped * capped)
        if (start < whole_begin) | (start + BLOCK_N > whole_end):
            sees = step[None, :] < (keys_end - start)[:, None]
            if HAS_LEFT:
                sees = sees & (step[None, :] >= (keys_begin - start)[:, None])
            ds = gl.where(sees, ds, 0.0)
        ds = gl.convert_layout(ds.to(dtype), of_operand)
        dq_sum = warpgroup_mma(ds, keys.index(stage), dq_sum, is_async=True)
        dq_sum, ds = warpgroup_mma_wait(0, deps=[dq_sum, ds])
        mbarrier.arrive(keys_free.index(stage))

    if EVERY == 2:
        # Once both groups are done with the values, the second leaves its sum there.
        mbarrier.arrive(tiles_full)
        mbarrier.wait(tiles_full, 1)
        of_sums: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
        sums = values._reinterpret(gl.float32, [GROUP, D0], of_sums)
        if GROUP_INDEX == 1:
            sums.store(dq_sum)
        mbarrier.arrive(tiles_full)
        if GROUP_INDEX == 0:
            mbarrier.wait(tiles_full, 0)
            dq_sum += sums.load(of_gradient)
    if EVERY == 1 or GROUP_INDEX == 0:
        dq_sum = (dq_sum * softmax_scale).to(dtype)
        dq += skip * dq_row_stride
        store_tile(dq, dq_row_stride, dq_sum, queries, num_q - first_row, HEAD_DIM)


@gluon.jit(do_not_specialize=[*NUMBERS, *("dq_batch_stride", "dq_row_stride", "dq_head_stride")])
def backward_dq_hopper(
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
    dq_batch_stride: gl.int64,
    dq_row_stride: gl.int64,
    dq_head_stride: gl.int64,
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
    BLOCK_M: gl.constexpr,  # of two groups, or one that they share
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """As backward_dq, with k and v descriptors of (b, hk, s, d), or (1, hk, rows, d)."""
    tile, pair = program_order(num_tiles, num_pairs, pairs_at_once)
    workspace_rows = workspace_rows // ROW_ALIGNMENT * ROW_ALIGNMENT  # tells the compiler
    num_heads = num_heads_k * group_size
    batch = pair // num_heads
    head = pair % num_heads
    head_k = head // group_size
    first_q, num_q = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, total_q, IS_VARLEN)
    first_k, num_k = rows_of_sequence(cu_seqlens_k, batch, seqlen_k, total_k, IS_VARLEN)
    if HAS_SEQUSED:
        num_k = clamped(gl.load(seqused_k + batch), num_k)
    first_row = (num_tiles - 1 - tile) * BLOCK_M
    if first_row >= num_q:
        return
    offset = num_k - num_q
    last_row = gl.minimum(first_row + BLOCK_M, num_q)
    begin, end = any_visible_keys(
        first_row, last_row, offset, num_k, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    begin = begin // BLOCK_N
    end = gl.cdiv(end, BLOCK_N)
    q += (batch * q_batch_stride + first_q * q_row_stride + head * q_head_stride) * UNIT
    dout += (batch * dout_batch_stride + first_q * dout_row_stride + head * dout_head_stride) * UNIT
    dq += (batch * dq_batch_stride + first_q * dq_row_stride + head * dq_head_stride) * UNIT
    workspace += workspace_row(batch, first_q, seqlen_q, IS_VARLEN) + head * 2 * workspace_rows
    slope = alibi_slope(
        alibi_slopes, batch, head, slopes_batch_stride, slopes_head_stride, HAS_ALIBI
    )
    key0 = 0
    key1 = 0
    if HAS_DROPOUT:
        key0, key1 = dropout_key(rng_state)
    batch_k = batch.to(gl.int32)
    if IS_VARLEN:
        batch_k = 0

    dtype: gl.constexpr = q.dtype.element_ty
    of_rows: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, D0], dtype)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D0], dtype)
    of_barriers: gl.constexpr = mbarrier.MBarrierLayout()
    queries0 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_rows)
    douts0 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_rows)
    # With one tile for both groups, each of them has every second block of keys.
    EVERY: gl.constexpr = 2 if BLOCK_M == GROUP else 1
    queries1 = queries0
    douts1 = douts0
    if EVERY == 1:
        queries1 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_rows)
        douts1 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_rows)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D0], of_keys)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D0], of_keys)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    keys_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    values_free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    cleared = gl.allocate_shared_memory(gl.int64, [1], of_barriers)
    tiles_full = gl.allocate_shared_memory(gl.int64, [1], of_barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(keys_free.index(stage), count=2 // EVERY)
        mbarrier.init(values_free.index(stage), count=2 // EVERY)
    mbarrier.init(cleared, count=1)
    mbarrier.init(tiles_full, count=2)
    fence_async_shared()

    buffers = (keys, values, keys_full, values_full, keys_free, values_free)
    call = (
        (q, dout, dq, q_row_stride * UNIT, dout_row_stride * UNIT, dq_row_stride * UNIT),
        (workspace, workspace + workspace_rows),
        (num_q, num_k, begin, end),
        (window_left, window_right),
        (score_scale, softcap, softmax_scale, slope, dropout_scale),
        (key0, key1, dropout_threshold, batch, head),
    )
    bringing = (
        k, v, buffers, cleared,
        (batch_k, first_k.to(gl.int32), head_k.to(gl.int32)), (num_k, begin, end),
    )  # fmt: skip
    FLAGS: gl.constexpr = (
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, HEAD_DIM, D0, BLOCK_N, STAGES,
    )  # fmt: skip
    other_row = first_row + GROUP if EVERY == 1 else first_row
    gl.warp_specialize(
        [
            (
                _consume_keys,
                ((queries0, douts0, tiles_full), buffers, call, first_row, EVERY, 0, FLAGS),
            ),
            (
                _consume_keys,
                ((queries1, douts1, tiles_full), buffers, call, other_row, EVERY, 1, FLAGS),
            ),
            (_produce_keys, (bringing, CLEARS, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(keys_full.index(stage))
        mbarrier.invalidate(values_full.index(stage))
        mbarrier.invalidate(keys_free.index(stage))
        mbarrier.invalidate(values_free.index(stage))
    mbarrier.invalidate(cleared)
    mbarrier.invalidate(tiles_full)
