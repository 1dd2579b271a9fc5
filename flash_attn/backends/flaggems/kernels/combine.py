"""Puts the parts of split keys together: a program has one row.

Each part has its output, divided by the sum of its own exponentials, and its log-sum-exp. Parts are
added in the order of the keys, so that the result does not depend on timing. Bound by latency.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import LOG2E, rows_of_sequence
from flash_attn.backends.flaggems.kernels.rows import fill_unused_rows, finish_rows

NO_SPECIALISATION = [
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("lse_batch_stride", "lse_head_stride", "s_aux_stride"),
    *("batch", "num_heads", "group_size", "seqlen_q", "total_q", "num_splits"),
]


@triton.jit(do_not_specialize=NO_SPECIALISATION)
def combine_parts(
    partial_out,  # (num_splits, rows, HEAD_DIM) float32
    partial_lse,  # (num_splits, rows) float32, in log2
    out,
    lse,
    cu_seqlens_q,
    s_aux,
    out_batch_stride: tl.int64,  # strides in elements
    out_row_stride: tl.int64,
    out_head_stride: tl.int64,
    lse_batch_stride: tl.int64,
    lse_head_stride: tl.int64,
    s_aux_stride: tl.int64,
    batch: tl.int32,
    num_heads: tl.int32,
    group_size: tl.int32,
    seqlen_q: tl.int32,
    total_q: tl.int64,
    num_splits: tl.int32,
    VARLEN_Q: tl.constexpr,
    PACKED: tl.constexpr,
    HAS_SINK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MAX_SPLITS: tl.constexpr,
):
    """Rows as attention_forward counts them: of a sequence, of a head (key head when PACKED)."""
    PARTS: tl.constexpr = 8
    program = tl.program_id(0).to(tl.int64)
    num_rows = tl.num_programs(0).to(tl.int64)
    rows_of_head = seqlen_q * group_size if PACKED else seqlen_q
    heads = num_heads // group_size if PACKED else num_heads
    row = (program % rows_of_head).to(tl.int32)
    head_index = program // rows_of_head % heads
    sequence = program // rows_of_head // heads
    query = row
    head = head_index
    if PACKED:
        query = row // group_size
        head = head_index * group_size + row % group_size
    q_begin, num_queries = rows_of_sequence(cu_seqlens_q, sequence, seqlen_q, total_q, VARLEN_Q)
    if VARLEN_Q:
        fill_unused_rows(
            out, lse, s_aux, cu_seqlens_q, batch, total_q, head, 1,
            sequence * seqlen_q + query, batch.to(tl.int64) * seqlen_q,
            out_row_stride, out_head_stride, lse_head_stride, s_aux_stride,
            HAS_SINK, HEAD_DIM, BLOCK_D,
        )  # fmt: skip
    if query >= num_queries:
        return

    every = tl.arange(0, MAX_SPLITS)
    lse_address = partial_lse + every * num_rows + program
    lses = tl.load(lse_address, mask=every < num_splits, other=float("-inf"))
    top = tl.max(lses, 0)
    reference = tl.where(top == float("-inf"), 0.0, top)
    total = tl.sum(tl.math.exp2(lses - reference), 0)
    sink = float("-inf")
    if HAS_SINK:
        sink = tl.load(s_aux + head * s_aux_stride) * LOG2E
    row_lse, factor = finish_rows(top, total, sink)

    d = tl.arange(0, BLOCK_D)
    sums = tl.zeros([BLOCK_D], tl.float32)
    for first in range(0, num_splits, PARTS):
        part = first + tl.arange(0, PARTS)
        at = part * num_rows + program
        part_lse = tl.load(partial_lse + at, mask=part < num_splits, other=float("-inf"))
        weight = tl.math.exp2(part_lse - reference)
        mask = (part[:, None] < num_splits) & (d[None, :] < HEAD_DIM)
        x = tl.load(partial_out + at[:, None] * HEAD_DIM + d[None, :], mask=mask, other=0.0)
        sums += tl.sum(weight[:, None] * x, 0)
    tl.store(lse + sequence * lse_batch_stride + head * lse_head_stride + q_begin + query, row_lse)
    out += sequence * out_batch_stride + (q_begin + query) * out_row_stride + head * out_head_stride
    tl.store(out + d, (sums * factor).to(out.dtype.element_ty), mask=d < HEAD_DIM)
