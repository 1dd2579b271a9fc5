"""What happens to scores in Hopper's kernels: softcap, the softmax of a block, exponents."""

import triton.language as tl
from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from flash_attn.backends.flaggems.kernels.gluon_functions import tanh_by_reciprocal
from flash_attn.backends.flaggems.kernels.hopper import GROUP, layout_of_product

# By how much scores may exceed the reference of their row, in log2.
SLACK = gl.constexpr(8.0)


@gluon.jit
def softcap_reciprocal(x):
    """1 / (exp2(x) + 1) of an accumulator (GROUP, columns) of a product, of which tanh is made.

    Four entries of a row, which are in one thread, share one reciprocal: the unit that has it, and
    the exponentials, is what softcap waits for. x is cut off at 30, where tanh is 1, so that the
    product of four is finite. A NaN spreads to the other three.
    """
    columns: gl.constexpr = x.shape[1]
    x = gl.exp2(gl.minimum(x, 30.0, propagate_nan=tl.PropagateNan.ALL)) + 1.0
    fours = gl.permute(gl.reshape(x, [GROUP, columns // 16, 2, 4, 2]), [0, 1, 3, 2, 4])
    even, odd = gl.split(fours)
    a, b = gl.split(even)
    c, d = gl.split(odd)
    ab = a * b
    cd = c * d
    root = gl.rsqrt(ab * cd)
    of_all = root * root
    of_ab = of_all * cd
    of_cd = of_all * ab
    even = gl.join(of_ab * b, of_ab * a)
    odd = gl.join(of_cd * d, of_cd * c)
    fours = gl.permute(gl.join(even, odd), [0, 1, 3, 2, 4])
    return gl.convert_layout(
        gl.reshape(fours, [GROUP, columns]), layout_of_product(columns), assert_trivial=True
    )


@gluon.jit
def exponents(
    score,
    distance,
    softcap,
    slope,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
):
    """As exponents of backward_tiles.py."""
    capped = score
    if HAS_SOFTCAP:
        capped = tanh_by_reciprocal(score, softcap_reciprocal(score), HAS_SOFTCAP == 2)
        score = softcap * capped
    if HAS_ALIBI:
        score = score - slope * gl.abs(distance)
    return score, capped


@gluon.jit
def _where_seen(x, start, keys_begin, keys_end, HAS_LEFT: gl.constexpr):
    """x, -inf where a row does not see the key."""
    column = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
    sees = column[None, :] < (keys_end - start)[:, None]
    if HAS_LEFT:
        sees = sees & (column[None, :] >= (keys_begin - start)[:, None])
    return gl.where(sees, x, float("-inf"))


@gluon.jit
def sum_in_threads(p):
    """(GROUP, 4): a row's sums over the entries that each of its four threads has. What these are
    for all blocks is put together at the end, so no block waits for other threads.
    """
    columns: gl.constexpr = p.shape[1]
    return gl.sum(gl.sum(gl.reshape(p, [GROUP, columns // 8, 4, 2]), 3), 1)


@gluon.jit
def probabilities(
    x,
    start,
    top,
    total,
    query,
    offset,
    keys_begin,
    keys_end,
    scale,
    softcap,
    slope,
    masked,
    HAS_LEFT: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    HAS_ALIBI: gl.constexpr,
    TRANSFORMED: gl.constexpr,
    LAZY: gl.constexpr,
):
    """Of a block of products x: exp2(score - top), the rows' new top, the new totals of their
    threads, and the factor of what was summed before.

    The top is the largest score of a row; with LAZY one that no score exceeds by more than SLACK,
    so that it seldom changes.
    """
    # Scores are by * x + plus, which is computed in the exponent.
    by = 1.0 if TRANSFORMED else scale
    plus = 0.0
    if TRANSFORMED:
        x = x * scale
    if HAS_SOFTCAP:
        if masked:  # what is not seen may be NaN
            x = _where_seen(x, start, keys_begin, keys_end, HAS_LEFT)
        reciprocal = softcap_reciprocal(x)
        if HAS_ALIBI or HAS_SOFTCAP == 2:
            x = softcap * tanh_by_reciprocal(x, reciprocal, HAS_SOFTCAP == 2)
        else:
            x = -reciprocal
            by = 2.0 * softcap
            plus = softcap
    if HAS_ALIBI:
        column = gl.arange(0, x.shape[1], gl.SliceLayout(0, x.type.layout))
        distance = ((query + offset - start)[:, None] - column[None, :]).to(gl.float32)
        x = x - slope * gl.abs(distance)
    if masked:
        x = _where_seen(x, start, keys_begin, keys_end, HAS_LEFT)
    highest = gl.max(x, 1) * by + plus
    new_top = gl.where(highest > top + SLACK, highest, top) if LAZY else gl.maximum(top, highest)
    reference = gl.where(new_top == float("-inf"), 0.0, new_top)
    p = gl.exp2(x * by + (plus - reference)[:, None])
    factor = gl.exp2(top - reference)
    of_row: gl.constexpr = gl.SliceLayout(1, total.type.layout)
    total = total * gl.convert_layout(factor, of_row, assert_trivial=True)[:, None]
    return p, new_top, total + sum_in_threads(p), factor


# PTX, as Triton has no branches of warps. Whether one of a thread's two factors, or of those of its
# warp, is not 1:
_VOTE = gl.constexpr(
    """{
    .reg .pred scales;
    setp.neu.f32 scales, $2, 0f3F800000;
    setp.neu.or.f32 scales, $3, 0f3F800000, scales;
    vote.sync.any.pred scales, scales, 0xFFFFFFFF;
    selp.b32 $0, 1, 0, scales;
    mov.b32 $1, $0;
    }"""
)
# And if so, 32 entries times their factors (the first of what was voted stands for all):
_SCALE = gl.constexpr(
    "{\n.reg .pred scales;\n"
    + "".join(f"mov.f32 ${i}, ${32 + i};\n" for i in range(32))
    + "setp.ne.s32 scales, $96, 0;\n@!scales bra DONE;\n"
    + "".join(f"mul.f32 ${i}, ${i}, ${64 + i};\n" for i in range(32))
    + "DONE:\n}"
)
_SCALE_OPERANDS = gl.constexpr(",".join(["=&f"] * 32 + ["f"] * 64 + ["r"] * 32))


@gluon.jit
def scaled_rows(x, factor):
    """x * factor[:, None], of an accumulator. A warp whose factors are all 1 does not multiply."""
    of_row: gl.constexpr = gl.SliceLayout(1, x.type.layout)
    scales = gl.inline_asm_elementwise(
        _VOTE, "=&r,=&r,f,f", [factor], dtype=gl.int32, is_pure=True, pack=2
    )
    factor = gl.convert_layout(factor, of_row, assert_trivial=True)[:, None]
    scales = gl.convert_layout(scales, of_row, assert_trivial=True)[:, None]
    return gl.inline_asm_elementwise(
        _SCALE, _SCALE_OPERANDS, [x, factor, scales], dtype=gl.float32, is_pure=True, pack=32
    )
