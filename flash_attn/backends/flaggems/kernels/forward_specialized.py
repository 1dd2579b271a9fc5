"""Attention forward for Hopper with specialised warps (Triton 3.6): dense, causal or not.

One group of warps has the copy engine bring keys and values, two others have half of the rows each:
while one multiplies, the other is at its softmax (Shah et al., arXiv:2407.08608). The compiler
parts a kernel among warps only if it has this form: one loop, which masks everything or nothing; no
branch with an alternative; and a tile that is halved read through a descriptor made here, because
those of the host have the size of the whole. Otherwise as forward.py, which serves what is slower
in this form: windows, softcap, ALiBi and sequences of varying length.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import LOG2E
from flash_attn.backends.flaggems.kernels.rows import finish_rows, load_described

# Strides of operands are counted in units of so many elements, 16 bytes.
UNIT = tl.constexpr(8)

NO_SPECIALISATION = [
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("lse_batch_stride", "lse_head_stride", "s_aux_stride"),
    *("num_heads", "group_size", "seqlen_q", "seqlen_k", "num_tiles", "scale"),
]


@triton.jit(do_not_specialize=NO_SPECIALISATION)
def attention_forward_specialized(
    q,
    k,  # tensor descriptors (b, h, s, d)
    v,
    out,
    lse,
    s_aux,
    q_batch_stride: tl.int64,
    q_row_stride: tl.int64,
    q_head_stride: tl.int64,
    out_batch_stride: tl.int64,
    out_row_stride: tl.int64,
    out_head_stride: tl.int64,
    lse_batch_stride: tl.int64,  # in elements, as is the one below
    lse_head_stride: tl.int64,
    s_aux_stride: tl.int64,
    num_heads: tl.int32,
    group_size: tl.int32,
    seqlen_q: tl.int32,
    seqlen_k: tl.int32,
    num_tiles: tl.int32,
    scale: tl.float32,  # of products, to units of log2; positive
    CAUSAL: tl.constexpr,
    MASKED: tl.constexpr,  # causal, or a last block of keys that is not full
    HAS_SINK: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    D0: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """One program for each tile of rows, head, batch, in the order of attention_forward."""
    program = tl.program_id(0)
    tile = num_tiles - 1 - program % num_tiles
    program = program // num_tiles
    head = (program % num_heads).to(tl.int64)
    batch = (program // num_heads).to(tl.int64)
    head_k = head // group_size
    row_begin = tile * BLOCK_M
    row = row_begin + tl.arange(0, BLOCK_M)

    q += batch * (q_batch_stride * UNIT) + head * (q_head_stride * UNIT)
    rows = tl.make_tensor_descriptor(
        q, [seqlen_q, HEAD_DIM], [q_row_stride * UNIT, 1], [BLOCK_M, D0]
    )
    # Not row_begin itself: halving the tile, the compiler moves the value that is the coordinate,
    # for all who use it, and `row` would move twice.
    q0 = rows.load([tl.minimum(row_begin, seqlen_q), 0])

    # The end of the keys that each row sees.
    end = seqlen_k
    keys_end = tl.zeros([BLOCK_M], tl.int32) + seqlen_k
    if CAUSAL:
        offset = seqlen_k - seqlen_q
        end = tl.minimum(tl.minimum(row_begin + BLOCK_M, seqlen_q) + offset, seqlen_k)
        keys_end = tl.minimum(row + offset + 1, seqlen_k)

    top = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    total = tl.zeros([BLOCK_M], tl.float32)
    out0 = tl.zeros([BLOCK_M, D0], tl.float32)
    for start in tl.range(0, end, BLOCK_N, warp_specialize=True):
        k0 = load_described(k, batch, head_k, start, BLOCK_N, D0)
        score = tl.dot(q0, tl.trans(k0))
        if MASKED:
            column = start + tl.arange(0, BLOCK_N)
            score = tl.where(column[None, :] < keys_end[:, None], score, float("-inf"))
        new_top = tl.maximum(top, tl.max(score, 1) * scale)
        reference = tl.where(new_top == float("-inf"), 0.0, new_top)
        p = tl.math.exp2(score * scale - reference[:, None])
        factor = tl.math.exp2(top - reference)
        top = new_top
        total = total * factor + tl.sum(p, 1)
        v0 = load_described(v, batch, head_k, start, BLOCK_N, D0)
        out0 = tl.dot(p.to(v0.dtype), v0, out0 * factor[:, None])

    sink = tl.zeros([BLOCK_M], tl.float32) - float("inf")
    if HAS_SINK:
        sink = tl.zeros([BLOCK_M], tl.float32) + tl.load(s_aux + head * s_aux_stride) * LOG2E
    row_lse, factor = finish_rows(top, total, sink)
    lse += batch * lse_batch_stride + head * lse_head_stride
    tl.store(lse + row, row_lse, mask=row < seqlen_q)
    out += batch * (out_batch_stride * UNIT) + head * (out_head_stride * UNIT)
    d = tl.arange(0, D0)
    address = out + row[:, None] * (out_row_stride * UNIT) + d[None, :]
    mask = row[:, None] < seqlen_q
    if HEAD_DIM < D0:
        mask = mask & (d[None, :] < HEAD_DIM)
    tl.store(address, (out0 * factor[:, None]).to(out.dtype.element_ty), mask=mask)
