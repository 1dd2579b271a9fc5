"""What precedes and follows the two large kernels of the backward pass.

`prepare` makes two numbers for every query row: D = rowsum(dO * O) - dlse, and the log-sum-exp as
the other kernels want it. They go into a workspace of float32, (h, 2, rows), in which every
sequence begins at a multiple of ROW_ALIGNMENT and is padded to one with rows that have no
probability, so that the tiles of the other kernels read whole vectors without a mask. It also
zeroes gradients of rows that belong to no sequence. Bound by memory.

`sink_gradient` sums the gradient of each head's attention sink, in double and in a fixed order.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import LOG2E, clamped, rows_of_sequence

# Rows: a multiple of every tile of rows.
ROW_ALIGNMENT = tl.constexpr(128)


@triton.jit
def workspace_row(batch, first_row, seqlen, IS_VARLEN: tl.constexpr):
    """Where the rows of a sequence begin in the workspace (int64), a multiple of ROW_ALIGNMENT.

    batch: int64. first_row: of the sequence among all rows. seqlen: rows of each sequence, when
    they are all alike.
    """
    if IS_VARLEN:
        block = (first_row + batch * ROW_ALIGNMENT) // ROW_ALIGNMENT
    else:
        block = batch * tl.cdiv(seqlen, ROW_ALIGNMENT)
    return block * ROW_ALIGNMENT


PREPARE_NUMBERS = [
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("dout_batch_stride", "dout_row_stride", "dout_head_stride"),
    *("lse_batch_stride", "lse_head_stride", "lse_row_stride"),
    *("dlse_batch_stride", "dlse_head_stride", "dlse_row_stride"),
    *("softmax_d_batch_stride", "softmax_d_head_stride", "workspace_rows"),
    *("dq_row_stride", "dq_head_stride", "dk_row_stride", "dk_head_stride"),
    *("dv_row_stride", "dv_head_stride", "total_q", "total_k", "batches", "num_heads"),
    *("num_heads_k", "seqlen_q", "num_tiles", "num_row_programs", "num_gap_programs", "lse_factor"),
]


@triton.jit(do_not_specialize=PREPARE_NUMBERS)
def prepare(
    out,
    dout,
    softmax_lse,
    dsoftmax_lse,
    softmax_d,
    workspace,
    dq,
    dk,
    dv,
    cu_seqlens_q,
    cu_seqlens_k,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    out_head_stride: tl.int64,
    dout_batch_stride: tl.int64,
    dout_row_stride: tl.int64,
    dout_head_stride: tl.int64,
    lse_batch_stride: tl.int64,
    lse_head_stride: tl.int64,
    lse_row_stride: tl.int64,
    dlse_batch_stride: tl.int64,
    dlse_head_stride: tl.int64,
    dlse_row_stride: tl.int64,
    softmax_d_batch_stride: tl.int64,
    softmax_d_head_stride: tl.int64,
    workspace_rows: tl.int64,
    dq_row_stride: tl.int64,
    dq_head_stride: tl.int64,
    dk_row_stride: tl.int64,
    dk_head_stride: tl.int64,
    dv_row_stride: tl.int64,
    dv_head_stride: tl.int64,
    total_q: tl.int64,
    total_k: tl.int64,
    batches: tl.int32,
    num_heads: tl.int32,
    num_heads_k: tl.int32,
    seqlen_q: tl.int32,
    num_tiles: tl.int32,
    num_row_programs: tl.int32,
    num_gap_programs: tl.int32,
    lse_factor: tl.float32,
    IS_VARLEN: tl.constexpr,
    HAS_DLSE: tl.constexpr,
    UNIT: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D_PADDED: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """Row statistics, and zeros where no sequence is.

    out, dout: (b, sq, h, d) or (tq, h, d), strides in units of UNIT, all others in elements.
    softmax_lse, dsoftmax_lse, softmax_d: (b, h, sq) or (h, tq), float32; workspace: above. With
    lse_factor the workspace gets -lse * lse_factor and -D.

    The first num_row_programs programs have BLOCK rows of a head each, the num_gap_programs after
    them the rows of no sequence.
    """
    program = tl.program_id(0).to(tl.int64)
    column = tl.arange(0, D_PADDED)
    if program < num_row_programs:
        pair = program // num_tiles
        batch = pair // num_heads
        head = pair % num_heads
        first, length = rows_of_sequence(cu_seqlens_q, batch, seqlen_q, total_q, IS_VARLEN)
        begin = (program % num_tiles).to(tl.int32) * BLOCK
        row = begin + tl.arange(0, BLOCK)
        valid = row < length
        if begin < tl.cdiv(length, ROW_ALIGNMENT) * ROW_ALIGNMENT:
            start = first + begin
            out += (
                batch * out_batch_stride + start * out_row_stride + head * out_head_stride
            ) * UNIT
            dout += (
                batch * dout_batch_stride + start * dout_row_stride + head * dout_head_stride
            ) * UNIT
            step = tl.arange(0, BLOCK)[:, None].to(tl.int64)
            mask = valid[:, None] & (column[None, :] < HEAD_DIM)
            o = tl.load(out + step * (out_row_stride * UNIT) + column[None, :], mask, 0.0)
            do = tl.load(dout + step * (dout_row_stride * UNIT) + column[None, :], mask, 0.0)
            # An entry of O that is 0 counts 0 whatever dO is there: a row that sees nothing has no
            # gradient.
            products = tl.where(o == 0.0, 0.0, o.to(tl.float32) * do.to(tl.float32))
            d = tl.sum(products, 1)
            rows = first + row
            if HAS_DLSE:
                address = batch * dlse_batch_stride + head * dlse_head_stride
                d -= tl.load(dsoftmax_lse + address + rows * dlse_row_stride, valid, 0.0)
            address = batch * lse_batch_stride + head * lse_head_stride
            lse = tl.load(softmax_lse + address + rows * lse_row_stride, valid, float("inf"))
            # Rows beyond the end, and rows that see nothing (lse = inf): exp(s - lse) is 0, and
            # what the gradient of their lse is must not count.
            d = tl.where(lse == float("inf"), 0.0, d)
            address = batch * softmax_d_batch_stride + head * softmax_d_head_stride
            tl.store(softmax_d + address + rows, d, valid)
            row_of_workspace = workspace_row(batch, first, seqlen_q, IS_VARLEN) + row
            workspace += head * 2 * workspace_rows
            tl.store(workspace + row_of_workspace, -lse * lse_factor)
            tl.store(workspace + workspace_rows + row_of_workspace, -d)
    elif IS_VARLEN:
        program -= num_row_programs
        begin_q = clamped(tl.load(cu_seqlens_q).to(tl.int64), total_q)
        end_q = clamped(tl.load(cu_seqlens_q + batches).to(tl.int64), total_q)
        begin_k = clamped(tl.load(cu_seqlens_k).to(tl.int64), total_k)
        end_k = clamped(tl.load(cu_seqlens_k + batches).to(tl.int64), total_k)
        zero_outside(
            dq, dq_row_stride, dq_head_stride, num_heads, begin_q, end_q, total_q,
            program, num_gap_programs, HEAD_DIM, D_PADDED,
        )  # fmt: skip
        zero_outside(
            softmax_d, 1, softmax_d_head_stride, num_heads, begin_q, end_q, total_q,
            program, num_gap_programs, 1, 1,
        )  # fmt: skip
        zero_outside(
            dk, dk_row_stride, dk_head_stride, num_heads_k, begin_k, end_k, total_k,
            program, num_gap_programs, HEAD_DIM, D_PADDED,
        )  # fmt: skip
        zero_outside(
            dv, dv_row_stride, dv_head_stride, num_heads_k, begin_k, end_k, total_k,
            program, num_gap_programs, HEAD_DIM, D_PADDED,
        )  # fmt: skip


@triton.jit
def zero_outside(
    x,
    row_stride,
    head_stride,
    num_heads,
    begin,
    end,
    total,
    program,
    num_programs,
    HEAD_DIM: tl.constexpr,
    D_PADDED: tl.constexpr,
):
    """A program's share of the rows of x (rows, h, d) outside of [begin, end), 0 to total."""
    step = tl.arange(0, 16)
    column = tl.arange(0, D_PADDED)
    outside = begin + total - end
    for start in range(program * 16, outside, num_programs * 16):
        row = start + step
        row = tl.where(row < begin, row, row - begin + end)
        address = x + row[:, None] * row_stride + column[None, :]
        mask = (row[:, None] < total) & (column[None, :] < HEAD_DIM)
        for _ in range(num_heads):
            tl.store(address, tl.zeros([16, D_PADDED], x.dtype.element_ty), mask)
            address += head_stride


SINK_NUMBERS = [
    *("s_aux_stride", "ds_aux_stride", "lse_batch_stride", "lse_head_stride", "lse_row_stride"),
    *("softmax_d_batch_stride", "softmax_d_head_stride", "rows", "rows_of_batch"),
]


@triton.jit(do_not_specialize=SINK_NUMBERS)
def sink_gradient(
    s_aux,
    ds_aux,
    softmax_lse,
    softmax_d,
    s_aux_stride: tl.int64,
    ds_aux_stride: tl.int64,
    lse_batch_stride: tl.int64,
    lse_head_stride: tl.int64,
    lse_row_stride: tl.int64,
    softmax_d_batch_stride: tl.int64,
    softmax_d_head_stride: tl.int64,
    rows: tl.int64,
    rows_of_batch: tl.int64,
    BLOCK: tl.constexpr,
):
    """ds_aux = -sum over all rows of exp(s_aux - lse) * D, for the head of the program.

    s_aux, ds_aux: (h,), softmax_lse and softmax_d: (b, h, sq) or (h, tq), all float32. rows: b * sq
    or tq. rows_of_batch: sq or tq, at least 1.
    """
    head = tl.program_id(0).to(tl.int64)
    sink = tl.load(s_aux + head * s_aux_stride)
    softmax_lse += head * lse_head_stride
    softmax_d += head * softmax_d_head_stride
    total = tl.zeros([BLOCK], tl.float64)
    for start in range(0, rows, BLOCK):
        row = start + tl.arange(0, BLOCK)
        batch = row // rows_of_batch
        row_of_batch = row % rows_of_batch
        address = softmax_lse + batch * lse_batch_stride + row_of_batch * lse_row_stride
        lse = tl.load(address, row < rows, float("inf"))
        d = tl.load(softmax_d + batch * softmax_d_batch_stride + row_of_batch, row < rows, 0.0)
        # Rows of no sequence have D = 0, and lse = inf.
        share = tl.where(d == 0.0, 0.0, tl.math.exp2((sink - lse) * LOG2E) * d)
        total += share.to(tl.float64)
    # Of a sink of -inf exp(sink - lse) is 0, and no number where lse is -inf or inf.
    gradient = tl.where(sink == float("-inf"), 0.0, -tl.sum(total, 0))
    tl.store(ds_aux + head * ds_aux_stride, gradient.to(tl.float32))
