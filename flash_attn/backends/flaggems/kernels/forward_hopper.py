"""Attention forward for Hopper, in Gluon, the explicit form of Triton 3.6.

The method is FlashAttention-3's (Shah et al., arXiv:2407.08608): one group of warps has the copy
engine bring keys and values, two others have 64 rows each, and a group's product of scores runs
while it computes the softmax of the block before. What a group of warps waits for, and where its
numbers lie, is said here and not found by the compiler. Otherwise as forward.py, which serves what
this kernel does not: few rows, pages, parts of the keys, heads of two pieces.

Keys are walked from the last block to the first, so that the blocks with a mask come first.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from flash_attn.backends.flaggems.kernels.common import LOG2E
from flash_attn.backends.flaggems.kernels.dropout_hopper import dropout_keeps
from flash_attn.backends.flaggems.kernels.gluon_functions import (
    all_visible_keys,
    any_visible_keys,
    clamped,
    dropout_key,
    finish_rows,
    keys_of_sequence,
    rows_of_sequence,
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
from flash_attn.backends.flaggems.kernels.scores_hopper import (
    probabilities,
    scaled_rows,
    sum_in_threads,
)

NO_SPECIALISATION = [
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("lse_batch_stride", "lse_head_stride"),
    *("slopes_batch_stride", "slopes_head_stride", "s_aux_stride"),
    *("batch", "num_heads", "group_size", "seqlen_q", "seqlen_k", "seqlen_new"),
    *("total_q", "total_k", "cache_rows", "num_tiles", "window_left", "window_right"),
    *("scale", "softcap", "dropout_threshold", "dropout_scale"),
]


@gluon.jit
def _produce(
    call,
    HAS_END: gl.constexpr,
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """Brings the blocks of keys and values, from the last on, as their buffers become free: those
    of a block's keys and of the values of the block before it at once.

    HAS_END: there may be other rows behind the keys, whose values, which may be NaN, are cleared.
    """
    k, v, buffers, batch, head_k, first, num_keys, last, num_blocks = call
    keys, values, keys_full, values_full, free, cleared = buffers
    for i in range(num_blocks):
        stage = i % STAGES
        row = first + (last - i) * BLOCK_N
        mbarrier.wait(free.index(stage), (i // STAGES + 1) & 1)
        mbarrier.expect(keys_full.index(stage), k.block_type.nbytes)
        bring(k, batch, head_k, row, keys.index(stage), keys_full.index(stage))
        mbarrier.wait(free.index((i + 1) % STAGES), ((i + 1) // STAGES + 1) & 1)
        if HAS_END and i == 0:
            mbarrier.expect(cleared, v.block_type.nbytes)
            bring(v, batch, head_k, row, values.index(0), cleared)
            mbarrier.wait(cleared, 0)
            clear_rows(values.index(0), 0, num_keys - last * BLOCK_N)
            fence_async_shared()
            mbarrier.arrive(values_full.index(0))
        else:
            mbarrier.expect(values_full.index(stage), v.block_type.nbytes)
            bring(v, batch, head_k, row, values.index(stage), values_full.index(stage))


@gluon.jit
def _consume(
    queries,
    buffers,
    call,
    row_begin,
    my_turn,
    other_turn,
    is_first,  # 1 or 0, no constant, so that both groups are one function to the compiler
    FLAGS: gl.constexpr,
):
    """Attention of the GROUP rows from row_begin on.

    With ALiBi and heads above 64 the two groups give their products to the tensor cores in turns,
    this one first or second, so that one computes probabilities while the products of the other
    run, which was 3 to 11% faster. Otherwise they find an order by themselves, as fast or faster.
    """
    HAS_LEFT: gl.constexpr = FLAGS[0]
    HAS_RIGHT: gl.constexpr = FLAGS[1]
    HAS_SOFTCAP: gl.constexpr = FLAGS[2]
    HAS_ALIBI: gl.constexpr = FLAGS[3]
    HAS_DROPOUT: gl.constexpr = FLAGS[4]
    TRANSFORMED: gl.constexpr = FLAGS[5]
    HEAD_DIM: gl.constexpr = FLAGS[6]
    D0: gl.constexpr = FLAGS[7]
    BLOCK_N: gl.constexpr = FLAGS[8]
    STAGES: gl.constexpr = FLAGS[9]
    TURNS: gl.constexpr = HAS_ALIBI and D0 > 64
    SPLITS: gl.constexpr = TRANSFORMED or HAS_DROPOUT
    # What was summed is scaled by few blocks only. That makes d = 256 10% faster and smaller heads
    # 2 to 3%, but not with features.
    LAZY: gl.constexpr = D0 > 128 or not SPLITS
    keys, values, keys_full, values_full, free, _ = buffers
    operands, sizes, blocks, window, numbers, dropout = call
    q, out, lse, q_row_stride, out_row_stride = operands
    num_queries, num_keys = sizes
    # The blocks [num_behind, num_until) of the num_blocks that arrive need no mask.
    last, num_behind, num_until, num_blocks = blocks
    window_left, window_right = window
    scale, softcap, slope, sink, dropout_scale = numbers
    dtype: gl.constexpr = q.dtype.element_ty
    of_scores: gl.constexpr = layout_of_product(BLOCK_N)
    of_out: gl.constexpr = layout_of_product(D0)
    of_p: gl.constexpr = gl.DotOperandLayout(0, of_out, 2)
    of_row: gl.constexpr = gl.SliceLayout(1, of_scores)
    of_out_row: gl.constexpr = gl.SliceLayout(1, of_out)

    q += row_begin.to(gl.int64) * q_row_stride
    load_tile(queries, q, q_row_stride, 0, num_queries - row_begin, HEAD_DIM)
    query = row_begin + gl.arange(0, GROUP, of_row)
    offset = num_keys - num_queries
    # The keys that each row sees.
    keys_begin = query
    keys_end = gl.full([GROUP], 0, gl.int32, of_row) + num_keys
    if HAS_LEFT:
        keys_begin = query + offset - window_left
    if HAS_RIGHT:
        keys_end = gl.minimum(query + offset + window_right + 1, num_keys)
    top = gl.full([GROUP], float("-inf"), gl.float32, of_row)
    acc = gl.full([GROUP, D0], 0.0, gl.float32, of_out)
    zeros = gl.full([GROUP, BLOCK_N], 0.0, gl.float32, of_scores)
    total = sum_in_threads(zeros)
    if num_blocks > 0:
        mbarrier.wait(keys_full.index(0), 0)
        score = warpgroup_mma(queries, keys.index(0).permute((1, 0)), zeros, use_acc=False)
        mbarrier.arrive(free.index(0))
        p, top, total, factor = probabilities(
            score, last * BLOCK_N, top, total, query, offset, keys_begin, keys_end,
            scale, softcap, slope, True, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, TRANSFORMED, LAZY,
        )  # fmt: skip
        if HAS_DROPOUT:
            keeps = dropout_keeps(*dropout, row_begin, last * BLOCK_N, BLOCK_N)
            p = gl.where(keeps, p, 0.0)
        mbarrier.wait(keys_full.index(1 % STAGES), (1 // STAGES) & 1, pred=num_blocks > 1)
        # Blocks behind the keys that every row sees, these, and the blocks before them: the scores
        # of one beside the output of the one before it, whose probabilities are carried as float32,
        # since halves of registers would have to be put together again. With features each in a
        # loop of its own: what is computed on both sides of a branch does not mix, which took up
        # to 10%. Otherwise in one, which is compiled sooner.
        WALKS: gl.constexpr = (SPLITS and HAS_RIGHT, True, SPLITS and HAS_LEFT)
        behind = gl.maximum(num_behind, 1) if WALKS[0] else 1
        until = gl.maximum(num_until, 1) if WALKS[2] else num_blocks
        for part in gl.static_range(3):
            if WALKS[part]:
                first = 1 if part == 0 else behind if part == 1 else until
                end = behind if part == 0 else until if part == 1 else num_blocks
                for i in range(first, end):
                    stage = i % STAGES
                    before = (i - 1) % STAGES
                    operand = gl.convert_layout(p.to(dtype), of_p)
                    if TURNS:
                        mbarrier.wait(my_turn, (i - 1 + is_first) & 1)
                    score = warpgroup_mma(
                        queries, keys.index(stage).permute((1, 0)), zeros, use_acc=False,
                        is_async=True,
                    )  # fmt: skip
                    mbarrier.wait(values_full.index(before), ((i - 1) // STAGES) & 1)
                    acc = warpgroup_mma(operand, values.index(before), acc, is_async=True)
                    if TURNS:
                        mbarrier.arrive(other_turn)
                    score = warpgroup_mma_wait(1, deps=[score])
                    masked = part != 1
                    if not SPLITS and (HAS_LEFT or HAS_RIGHT):
                        masked = (i < num_behind) | (i >= num_until)
                    p, top, total, factor = probabilities(
                        score, (last - i) * BLOCK_N, top, total, query, offset,
                        keys_begin, keys_end, scale, softcap, slope,
                        masked, HAS_LEFT, HAS_SOFTCAP, HAS_ALIBI, TRANSFORMED, LAZY,
                    )  # fmt: skip
                    if HAS_DROPOUT:
                        keeps = dropout_keeps(*dropout, row_begin, (last - i) * BLOCK_N, BLOCK_N)
                        p = gl.where(keeps, p, 0.0)
                    # Before the wait for the output, or ptxas has it wait before the exponentials.
                    mbarrier.wait(
                        keys_full.index((i + 1) % STAGES), ((i + 1) // STAGES) & 1,
                        pred=i + 1 < num_blocks,
                    )  # fmt: skip
                    acc, operand = warpgroup_mma_wait(0, deps=[acc, operand])
                    mbarrier.arrive(free.index(stage))
                    if LAZY:
                        acc = scaled_rows(acc, factor)
                    else:
                        acc = acc * gl.convert_layout(factor, of_out_row)[:, None]
        before = (num_blocks - 1) % STAGES
        mbarrier.wait(values_full.index(before), ((num_blocks - 1) // STAGES) & 1)
        acc = warpgroup_mma(gl.convert_layout(p.to(dtype), of_p), values.index(before), acc)

    total = gl.convert_layout(gl.sum(total, 1), of_row)
    row_lse, factor = finish_rows(top, total, gl.full([GROUP], 0.0, gl.float32, of_row) + sink)
    if HAS_DROPOUT:
        factor *= dropout_scale
    gl.store(lse + query, row_lse, mask=query < num_queries)
    acc = acc * gl.convert_layout(factor, of_out_row)[:, None]
    out += row_begin.to(gl.int64) * out_row_stride
    store_tile(out, out_row_stride, acc.to(dtype), queries, num_queries - row_begin, HEAD_DIM)


@gluon.jit
def _fill_unused_rows(
    out,
    lse,
    sink,
    cu_seqlens_q,
    batch,
    total_q,
    index,
    num_programs,
    out_row_stride,
    HEAD_DIM: gl.constexpr,
    D0: gl.constexpr,
):
    """Rows of a head that belong to no sequence, as in rows.py. sink: -inf where there is none."""
    ROWS: gl.constexpr = 16
    layout: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [4, 1], [1, 0])
    d = gl.arange(0, D0, gl.SliceLayout(0, layout))
    begin = clamped(gl.load(cu_seqlens_q + batch).to(gl.int64), total_q)
    for start in range(begin + index * ROWS, total_q, num_programs * ROWS):
        row = start + gl.arange(0, ROWS, gl.SliceLayout(1, layout))
        mask = (row[:, None] < total_q) & (d[None, :] < HEAD_DIM)
        zeros = gl.full([ROWS, D0], 0.0, out.dtype.element_ty, layout)
        gl.store(out + row[:, None] * out_row_stride + d[None, :], zeros, mask=mask)
        value = gl.full([ROWS], 0.0, gl.float32, gl.SliceLayout(1, layout))
        value += gl.where(sink == float("-inf"), float("inf"), sink)
        gl.store(lse + row, value, mask=row < total_q)


@gluon.jit(do_not_specialize=NO_SPECIALISATION)
def attention_forward_hopper(
    q,
    k,  # tensor descriptors (b, h, s, d); (1, h, rows of all sequences, d)
    v,
    out,
    lse,
    cu_seqlens_q,
    cu_seqlens_k,
    seqused_k,
    leftpad_k,
    cache_batch_idx,
    alibi_slopes,
    s_aux,
    rng_state,
    q_batch_stride: gl.int64,
    q_row_stride: gl.int64,
    q_head_stride: gl.int64,
    out_batch_stride: gl.int64,
    out_row_stride: gl.int64,
    out_head_stride: gl.int64,
    lse_batch_stride: gl.int64,  # in elements, as are those below
    lse_head_stride: gl.int64,
    slopes_batch_stride: gl.int64,
    slopes_head_stride: gl.int64,
    s_aux_stride: gl.int64,
    batch: gl.int32,
    num_heads: gl.int32,
    group_size: gl.int32,
    seqlen_q: gl.int32,
    seqlen_k: gl.int32,
    seqlen_new: gl.int32,
    total_q: gl.int64,
    total_k: gl.int64,
    cache_rows: gl.int32,
    num_tiles: gl.int32,
    window_left: gl.int32,
    window_right: gl.int32,
    scale: gl.float32,  # of products, as scores_in_log2 takes it
    softcap: gl.float32,  # in log2
    dropout_threshold: gl.int32,
    dropout_scale: gl.float32,
    VARLEN_Q: gl.constexpr,
    VARLEN_K: gl.constexpr,
    HAS_SEQUSED: gl.constexpr,
    HAS_LEFTPAD: gl.constexpr,
    HAS_BATCH_IDX: gl.constexpr,
    HAS_LEFT: gl.constexpr,
    HAS_RIGHT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
    HAS_SINK: gl.constexpr,
    HAS_DROPOUT: gl.constexpr,
    TRANSFORMED: gl.constexpr,  # softcap, ALiBi, or a scale that is not positive
    HEAD_DIM: gl.constexpr,
    D0: gl.constexpr,
    BLOCK_M: gl.constexpr,  # two groups
    BLOCK_N: gl.constexpr,
    STAGES: gl.constexpr,
):
    """One program for each tile of BLOCK_M rows, head, sequence, ordered as attention_forward."""
    program = gl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    program = program // num_tiles
    head = (program % num_heads).to(gl.int64)
    sequence = (program // num_heads).to(gl.int64)
    head_k = head // group_size
    q_begin, num_queries = rows_of_sequence(cu_seqlens_q, sequence, seqlen_q, total_q, VARLEN_Q)
    first, num_keys = keys_of_sequence(
        cu_seqlens_k, seqused_k, leftpad_k, sequence, seqlen_k, total_k, seqlen_new,
        VARLEN_K, HAS_SEQUSED, HAS_LEFTPAD, False,
    )  # fmt: skip
    offset = num_keys - num_queries
    row_begin = tile * BLOCK_M
    row_end = gl.minimum(row_begin + BLOCK_M, num_queries)

    sink = float("-inf")
    if HAS_SINK:
        sink = gl.load(s_aux + head * s_aux_stride)
    out_row_stride *= UNIT
    out += sequence * (out_batch_stride * UNIT) + head * (out_head_stride * UNIT)
    lse += sequence * lse_batch_stride + head * lse_head_stride
    if VARLEN_Q:
        _fill_unused_rows(
            out, lse, sink, cu_seqlens_q, batch, total_q,
            sequence * num_tiles + tile, batch.to(gl.int64) * num_tiles, out_row_stride,
            HEAD_DIM, D0,
        )  # fmt: skip
    if row_begin >= num_queries:
        return
    q += sequence * (q_batch_stride * UNIT) + head * (q_head_stride * UNIT)
    q += q_begin * (q_row_stride * UNIT)
    out += q_begin * out_row_stride
    lse += q_begin

    # In blocks: of those that any row sees, [begin, end), [whole_begin, whole_end) need no mask.
    begin, end = any_visible_keys(
        row_begin, row_end, offset, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    whole_begin, whole_end = all_visible_keys(
        row_begin, row_end, offset, num_keys, window_left, window_right, HAS_LEFT, HAS_RIGHT
    )
    begin = begin // BLOCK_N
    end = gl.maximum(gl.cdiv(end, BLOCK_N), begin)
    whole_begin = gl.minimum(gl.maximum(gl.cdiv(whole_begin, BLOCK_N), begin), end)
    whole_end = gl.maximum(gl.minimum(whole_end // BLOCK_N, end), whole_begin)

    batch_k = sequence.to(gl.int32)
    if VARLEN_K:
        batch_k = 0
    if HAS_BATCH_IDX:
        batch_k = clamped(gl.load(cache_batch_idx + sequence), cache_rows - 1)
    slope = 0.0
    if HAS_ALIBI:
        slopes = alibi_slopes + sequence * slopes_batch_stride + head * slopes_head_stride
        slope = gl.load(slopes) * LOG2E
    dropout = (0, 0, 0, 0, 0)
    if HAS_DROPOUT:
        key0, key1 = dropout_key(rng_state)
        dropout = (key0, key1, dropout_threshold, sequence, head)

    dtype: gl.constexpr = q.dtype.element_ty
    of_queries: gl.constexpr = gl.NVMMASharedLayout.get_default_for([GROUP, D0], dtype)
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([BLOCK_N, D0], dtype)
    of_barriers: gl.constexpr = mbarrier.MBarrierLayout()
    queries0 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_queries)
    queries1 = gl.allocate_shared_memory(dtype, [GROUP, D0], of_queries)
    keys = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D0], of_keys)
    values = gl.allocate_shared_memory(dtype, [STAGES, BLOCK_N, D0], of_keys)
    keys_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    values_full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    free = gl.allocate_shared_memory(gl.int64, [STAGES, 1], of_barriers)
    cleared = gl.allocate_shared_memory(gl.int64, [1], of_barriers)
    turn0 = gl.allocate_shared_memory(gl.int64, [1], of_barriers)
    turn1 = gl.allocate_shared_memory(gl.int64, [1], of_barriers)
    for stage in gl.static_range(STAGES):
        mbarrier.init(keys_full.index(stage), count=1)
        mbarrier.init(values_full.index(stage), count=1)
        mbarrier.init(free.index(stage), count=2)
    mbarrier.init(cleared, count=1)
    mbarrier.init(turn0, count=1)
    mbarrier.init(turn1, count=1)
    fence_async_shared()

    buffers = (keys, values, keys_full, values_full, free, cleared)
    call = (
        (q, out, lse, q_row_stride * UNIT, out_row_stride),
        (num_queries, num_keys),
        (end - 1, end - whole_end, end - whole_begin, end - begin),
        (window_left, window_right),
        (scale, softcap, slope, sink * LOG2E, dropout_scale),
        dropout,
    )
    FLAGS: gl.constexpr = (
        HAS_LEFT, HAS_RIGHT, HAS_SOFTCAP, HAS_ALIBI, HAS_DROPOUT, TRANSFORMED,
        HEAD_DIM, D0, BLOCK_N, STAGES,
    )  # fmt: skip
    bringing = (
        k, v, buffers, batch_k, head_k.to(gl.int32), first.to(gl.int32), num_keys,
        end - 1, end - begin,
    )  # fmt: skip
    HAS_END: gl.constexpr = VARLEN_K or HAS_SEQUSED
    gl.warp_specialize(
        [
            (_consume, (queries0, buffers, call, row_begin, turn0, turn1, gl.to_tensor(1), FLAGS)),
            (
                _consume,
                (queries1, buffers, call, row_begin + GROUP, turn1, turn0, gl.to_tensor(0), FLAGS),
            ),
            (_produce, (bringing, HAS_END, BLOCK_N, STAGES)),
        ],
        [4, 1],
        [240, 24],
    )
    for stage in gl.static_range(STAGES):
        mbarrier.invalidate(keys_full.index(stage))
        mbarrier.invalidate(values_full.index(stage))
        mbarrier.invalidate(free.index(stage))
    mbarrier.invalidate(cleared)
    mbarrier.invalidate(turn0)
    mbarrier.invalidate(turn1)
