"""Defects that users of FlashAttention reported: none of them may be here.

Each test names the report in Dao-AILab/flash-attention that it comes from (another repository where
it says so), reduced to what a CPU does in a moment, and compares with the reference or with the
property that was missing.
"""

import math

import pytest
import reference
import torch
from checks import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    Case,
    assert_attention_close,
    assert_close,
    check_backward,
    check_forward,
    check_gradients,
    dtype_id,
)

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_backward, _flash_attn_varlen_forward

HALVES = (BF16, FP16)


def cumulative(*lengths):
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def varlen_backward(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    """Run, differentiate and compare; returns out, lse and the gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *(*leaves, cu_q, cu_k, max_q, max_k), **options, return_attn_probs=True
    )
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    check_gradients(
        (out, lse, gradients),
        reference.varlen_attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        **options,
    )
    return out, lse, gradients


# -------------------------------------------------------------------------------------------------
# NaN in gradients


# 443: "nan in some configurations": dq of causal variable length with more queries than keys
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_dq_when_causal_rows_see_nothing(dtype):
    q = (torch.randn(256, 1, 32) * 3).to(dtype)
    k, v = ((torch.randn(3, 1, 32) * 3).to(dtype) for _ in range(2))
    cu_q, cu_k = cumulative(76, 34, 146), cumulative(1, 1, 1)
    varlen_backward(q, k, v, cu_q, cu_k, 256, 3, causal=True)


# 334: "NaNs in bw pass for some inputs": one query, one key, head dimension 16
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_the_gradients_of_a_single_key(dtype):
    q, k, v = ((torch.randn(1, 1, 1, 16) * 3).to(dtype).requires_grad_() for _ in range(3))
    out = flash_attn.flash_attn_func(q, k, v)
    dq, dk, dv = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    assert torch.equal(out, v.detach())
    # One key has the weight 1 whatever the score: the rounding of scores up to 30 is left.
    rounding = 32 * torch.finfo(dtype).eps
    torch.testing.assert_close(dv, torch.ones_like(v), rtol=rounding, atol=0.0)
    limit = 16 * 27 * torch.finfo(dtype).eps
    assert dq.abs().max() <= limit and dk.abs().max() <= limit


# 1052: "nan gradients in the BW pass": inputs three times larger than usual
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_gradients_of_large_scores(dtype):
    q, k, v = ((torch.randn(1, 256, 1, 128) * 3).to(dtype).requires_grad_() for _ in range(3))
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(x.isfinite().all() for x in (out, *gradients))


# 752: NaN in the backward of variable length with dropout when there are more tokens than sequences
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_nan_in_gradients_of_tokens_of_no_sequence(dtype):
    qkv = torch.randn(120, 3, 4, 64).to(dtype).requires_grad_()
    cu_seqlens = cumulative(37, 49)
    for _ in range(3):
        out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, 2048, 0.1, causal=True)
        (gradient,) = torch.autograd.grad(out, qkv, torch.ones_like(out))
        assert out.isfinite().all() and gradient.isfinite().all()
        assert torch.count_nonzero(out[86:]) == 0 and torch.count_nonzero(gradient[86:]) == 0


# 2421 and 2562: NaN or illegal accesses in dk, dv when a sequence has no queries
@pytest.mark.parametrize("head_dim", (64, 128, 256))
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_sequences_without_queries(causal, head_dim):
    cu_q, cu_k = cumulative(0, 41, 20, 0), cumulative(60, 44, 20, 90)
    q = torch.randn(61, 4, head_dim)
    k, v = torch.randn(214, 1, head_dim), torch.randn(214, 1, head_dim)
    _, _, (_, dk, dv) = varlen_backward(q, k, v, cu_q, cu_k, 41, 90, causal=causal)
    for x in (dk, dv):
        assert torch.count_nonzero(x[:60]) == 0 and torch.count_nonzero(x[124:]) == 0


# 1155 and 2568: writes out of bounds, hangs and NaN when a sequence has no keys
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_sequences_without_keys(dtype, causal):
    cu_q, cu_k = cumulative(33, 20, 65), cumulative(0, 30, 0)
    q = torch.randn(118, 4, 64).to(dtype)
    k, v = (torch.randn(30, 2, 64).to(dtype) for _ in range(2))
    out, lse, (dq, _, _) = varlen_backward(q, k, v, cu_q, cu_k, 65, 30, causal=causal)
    for rows in (slice(0, 33), slice(53, 118)):
        assert torch.count_nonzero(out[rows]) == 0 and torch.count_nonzero(dq[rows]) == 0
        assert (lse[:, rows] == math.inf).all()


# 2324: gradients of tokens beyond the last sequence are left uninitialised
def test_uninitialised_gradients_of_padding():
    cu_seqlens = cumulative(10, 20)
    tensors = [torch.randn(50, 2, 32).requires_grad_() for _ in range(3)]
    for _ in range(4):
        poison = [torch.full((50, 2, 32), math.nan) for _ in range(8)]
        del poison  # so that the allocator hands out memory full of NaN
        out = flash_attn.flash_attn_varlen_func(*tensors, cu_seqlens, cu_seqlens, 20, 20)
        gradients = torch.autograd.grad(out, tensors, torch.ones_like(out))
        assert all(torch.count_nonzero(x[30:]) == 0 for x in (out, *gradients))


# 41: NaN gradients for inputs that are all alike and large
def test_nan_in_gradients_of_equal_large_inputs():
    qkv = torch.full((2, 64, 3, 4, 32), 1000.0, dtype=BF16).requires_grad_()
    out = flash_attn.flash_attn_qkvpacked_func(qkv)
    torch.testing.assert_close(out, torch.full_like(out, 1000.0), rtol=2**-7, atol=0.0)
    (gradient,) = torch.autograd.grad(out.float().mean(), qkv)
    assert gradient.isfinite().all()


# pytorch 121558: NaN for bfloat16 scores of 1e11
def test_nan_for_huge_scores():
    tensors = [torch.full((1, 1, 1, 64), 133120.0, dtype=BF16).requires_grad_() for _ in range(3)]
    out = flash_attn.flash_attn_func(*tensors)
    torch.testing.assert_close(out, tensors[2], rtol=2**-7, atol=0.0)
    tensors = [torch.cat([x, -x], 1).detach() for x in tensors]
    out, lse, _ = flash_attn.flash_attn_func(*tensors, return_attn_probs=True)
    torch.testing.assert_close(out, tensors[2], rtol=2**-7, atol=0.0)
    assert lse.isfinite().all()


# -------------------------------------------------------------------------------------------------
# NaN from memory that nobody asked to read


# 1745 and 2374: NaN in the unused end of the cache becomes NaN in the output
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_nan_in_the_unused_end_of_the_cache(dtype):
    lengths = torch.tensor([1, 3], dtype=torch.int32)
    q = torch.full((2, 3, 1, 64), 0.5, dtype=dtype)
    k, v = (torch.full((2, 3, 1, 64), math.nan, dtype=dtype) for _ in range(2))
    for i, length in enumerate(lengths.tolist()):
        k[i, :length], v[i, :length] = 0.5, 0.25
    out = flash_attn.flash_attn_with_kvcache(q, k, v, cache_seqlens=lengths)
    assert torch.equal(out, torch.full_like(out, 0.25))


# 2374 again: the same through seqused_k
def test_nan_behind_seqused_k():
    used = torch.tensor([32, 64, 96, 48], dtype=torch.int32)
    cu_q, cu_k = cumulative(1, 1, 1, 1), cumulative(128, 128, 128, 128)
    q = torch.randn(4, 8, 64).to(BF16)
    k, v = (torch.full((512, 8, 64), math.nan, dtype=BF16) for _ in range(2))
    for i, length in enumerate(used.tolist()):
        for x in (k, v):
            x[128 * i : 128 * i + length] = torch.randn(length, 8, 64).to(BF16)
    out, lse, _, _ = _flash_attn_varlen_forward(
        *(q, k, v, cu_q, cu_k, 1, 128, 0.0, 0.125, False), seqused_k=used
    )
    assert_attention_close(
        (out, lse), reference.varlen_attention, (q, k, v, cu_q, cu_k), seqused_k=used
    )


# 1395: keys beyond the end of a sequence that are not cleared
def test_nan_behind_the_keys():
    q = torch.randn(1, 40, 2, 64).to(FP16)
    whole = torch.full((1, 128, 2, 64), math.nan, dtype=FP16)
    whole[:, :70] = torch.randn(1, 70, 2, 64)
    k = v = whole[:, :70]
    assert torch.equal(
        flash_attn.flash_attn_func(q, k, v), flash_attn.flash_attn_func(q, k.clone(), v.clone())
    )


# -------------------------------------------------------------------------------------------------
# Masks


# 1778: more queries than keys, causal or windowed: rows that are 0 and rows that are not
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "options", ({"causal": True}, {"window_size": (40, 10)}, {"window_size": (-1, 3)}), ids=str
)
def test_more_queries_than_keys(dtype, options):
    check_backward(Case(sq=200, sk=100, dtype=dtype, **options))
    q, k, v = Case(sq=200, sk=100, dtype=dtype).inputs()
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.count_nonzero(out[:, :100]) == 0
    assert (out[:, 100:].abs().amax((2, 3)) > 0).all()


# 895: a window side longer than sk hides keys when there are more queries than keys
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("window_size", ((0, 150), (-1, 160), (150, 150), (5, 1 << 31)), ids=str)
def test_window_longer_than_the_keys(dtype, window_size):
    check_forward(Case(sq=180, sk=100, window_size=window_size, dtype=dtype))
    check_backward(Case(sq=180, sk=100, window_size=window_size, dtype=dtype))


# 1133: (S - 1, 0) hides nothing of a causal sequence of S
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_window_as_long_as_the_sequence(dtype):
    q, k, v = Case(sq=129, sk=129, dtype=dtype).inputs()
    causal = flash_attn.flash_attn_func(q, k, v, causal=True)
    for window_size in ((-1, 0), (129, 0), (128, 0)):
        out = flash_attn.flash_attn_func(q, k, v, window_size=window_size)
        assert torch.equal(out, causal)
    assert not torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(127, 0)), causal)


# 2199: a window as a list, with more queries than keys: rows of zeros where keys are visible
def test_window_as_a_list():
    q, k, v = Case(sq=129, sk=65, batch=1).inputs()
    actual = flash_attn.flash_attn_func(q, k, v, window_size=[32, 64], return_attn_probs=True)
    assert_attention_close(actual[:2], reference.attention, (q, k, v), window_size=(32, 64))


# 1116: a negative side other than -1 is infinite, too
def test_any_negative_side_is_infinite():
    q, k, v = Case().inputs()
    expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(
        flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(-1, -3)), expected
    )
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(-9, 0)), expected)


# 881: variable length, not causal, queries and keys of different lengths
def test_variable_lengths_that_differ():
    q = torch.randn(60, 4, 64)
    k, v = torch.randn(97, 4, 64), torch.randn(97, 4, 64)
    varlen_backward(q, k, v, cumulative(10, 50), cumulative(80, 17), 50, 80)


# -------------------------------------------------------------------------------------------------
# Variable length


# 1537: max_seqlen_q = 1 with sequences of length 0 and grouped heads
@pytest.mark.parametrize("convert", (int, torch.tensor), ids=("int", "tensor"))
def test_at_most_one_query_each(convert):
    cu_q, cu_k = cumulative(1, 0, 1), cumulative(3, 0, 5)
    q = torch.rand(2, 9, 64).to(BF16)
    k, v = (torch.rand(8, 3, 64).to(BF16) for _ in range(2))
    actual = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, convert(1), convert(5)),
        softmax_scale=1.0,
        causal=True,
        return_attn_probs=True,
    )
    assert_attention_close(
        actual[:2],
        reference.varlen_attention,
        (q, k, v, cu_q, cu_k),
        softmax_scale=1.0,
        causal=True,
    )


# 1619: fewer tokens than sequences, with grouped heads
def test_fewer_tokens_than_sequences():
    cu_seqlens = cumulative(0, 0, 0, 1)
    q = torch.randn(1, 21, 120).to(BF16)
    k, v = (torch.randn(1, 7, 120).to(BF16) for _ in range(2))
    out = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, 1, 1), softmax_scale=math.sqrt(120)
    )
    assert torch.equal(out, v.repeat_interleave(3, 1))


# 1713: sequences with keys but without queries: is their result written to somebody else?
def test_no_queries_between_others():
    q = torch.randn(300, 2, 64)
    k, v = torch.randn(300, 2, 64), torch.randn(300, 2, 64)
    varlen_backward(q, k, v, cumulative(150, 0, 150), cumulative(100, 100, 100), 150, 100)


# 1773: a sequence longer than max_seqlen_k is an error, not an illegal access
def test_max_seqlen_too_small():
    q = torch.randn(20, 2, 64)
    with pytest.raises(RuntimeError, match="max_seqlen_k is 12"):
        flash_attn.flash_attn_varlen_func(q, q, q, cumulative(7, 13), cumulative(7, 13), 13, 12)


# 1661: fewer rows in cu_seqlens_q than in q
def test_queries_of_no_sequence():
    q, kv = torch.randn(40, 2, 64), torch.randn(30, 2, 2, 64)
    out = flash_attn.flash_attn_varlen_kvpacked_func(
        q, kv, cumulative(15, 10), cumulative(10, 20), 15, 20
    )
    assert torch.count_nonzero(out[25:]) == 0


# 1786: more sequences than a grid dimension has room for
def test_very_many_sequences():
    count, length = 70_000, 2
    qkv = torch.randn(count * length, 3, 1, 8)
    cu_seqlens = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, length)
    dense = flash_attn.flash_attn_qkvpacked_func(qkv.view(count, length, 3, 1, 8))
    torch.testing.assert_close(out.view_as(dense), dense)
    last, _ = reference.attention(*(x[None] for x in qkv[-length:].unbind(1)))
    torch.testing.assert_close(out[-length:].double(), last[0], rtol=1e-5, atol=1e-5)


# 2842: the log-sum-exp of a sequence without keys is written to the row of another one
def test_lse_of_sequences_without_keys():
    cu_q, cu_k = cumulative(1, 1, 1), cumulative(0, 70, 0)
    q = torch.randn(3, 4, 64)
    k, v = torch.randn(70, 2, 64), torch.randn(70, 2, 64)
    actual = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, 1, 70), return_attn_probs=True
    )
    assert_attention_close(actual[:2], reference.varlen_attention, (q, k, v, cu_q, cu_k))


# vllm-project/flash-attention 87: the log-sum-exp of one query each with grouped heads and splits
def test_lse_layout_of_grouped_single_queries():
    q = torch.randn(5, 8, 64)
    k, v = torch.randn(5 * 1500, 2, 64), torch.randn(5 * 1500, 2, 64)
    cu_q, cu_k = cumulative(*[1] * 5), cumulative(*[1500] * 5)
    actual = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, 1, 1500), return_attn_probs=True
    )
    assert actual[1].shape == (8, 5)
    assert_attention_close(actual[:2], reference.varlen_attention, (q, k, v, cu_q, cu_k))


# -------------------------------------------------------------------------------------------------
# Layouts and sizes


# 355: gradients are wrong when dout is not contiguous
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_that_is_not_contiguous(dtype):
    tensors = [x.requires_grad_() for x in Case(dtype=dtype).inputs()]
    out = flash_attn.flash_attn_func(*tensors, causal=True)
    dense = torch.randn(2, 67, 4, 64).to(dtype)
    layouts = (
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([dense, dense], -1)[..., 0],
        torch.cat([dense, dense], 2)[:, :, :4],
    )
    expected = torch.autograd.grad(out, tensors, dense, retain_graph=True)
    for dout in layouts:
        assert not dout.is_contiguous()
        gradients = torch.autograd.grad(out, tensors, dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


# 325, 364 and 91: "dout tensor must have contiguous last dimension" after .sum().backward()
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_expanded_gradient(dtype):
    tensors = [x.requires_grad_() for x in Case(sq=5, sk=5, head_dim=8, dtype=dtype).inputs()]
    flash_attn.flash_attn_func(*tensors, causal=True).sum().backward()
    again = [x.detach().requires_grad_() for x in tensors]
    out = flash_attn.flash_attn_func(*again, causal=True)
    out.backward(torch.ones_like(out))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, again, strict=True))


# 2777: "dq must have contiguous last dimension" for inputs transposed in the last dimension
def test_inputs_transposed_in_the_last_dimension():
    tensors = [torch.randn(2, 4, 64, 30).transpose(2, 3).transpose(1, 2) for _ in range(3)]
    assert all(x.stride(-1) != 1 for x in tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    dout = torch.randn_like(out)
    check_gradients(
        (out, lse, torch.autograd.grad(out, leaves, dout)),
        reference.attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
    )


# 818: keys contiguous, values not
def test_keys_and_values_of_different_layouts():
    q, k = torch.randn(2, 53, 4, 64), torch.randn(2, 53, 4, 64)
    v = torch.randn(2, 4, 53, 64).transpose(1, 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    dout = torch.randn(2, 4, 53, 64).transpose(1, 2)
    check_gradients(
        (out, lse, torch.autograd.grad(out, leaves, dout)),
        reference.attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
    )


# 772, 1500, 2214, 2260, 2611: offsets beyond 2^31 elements wrap around
def test_strides_beyond_two_to_the_31():
    """Virtual memory of 5 GB, of which a few pages are touched."""
    rows, step = 3, 1 << 30
    whole = torch.empty((rows - 1) * step + 64 * 64, dtype=BF16)
    x = whole.as_strided((rows, 4, 2, 64), (step, 128, 64, 1), 0)
    x.copy_(torch.randn(rows, 4, 2, 64))
    dense = x.contiguous().requires_grad_()
    strided = x.detach().requires_grad_()
    expected, out = (flash_attn.flash_attn_func(y, y, y, causal=True) for y in (dense, strided))
    assert torch.equal(out, expected)
    (a,) = torch.autograd.grad(expected, dense, x.detach())
    (b,) = torch.autograd.grad(out, strided, x.detach())
    assert torch.equal(a, b)
    q, new = torch.randn(rows, 1, 2, 64).to(BF16), torch.randn(rows, 1, 2, 64).to(BF16)
    caches = x.clone(), x.clone()
    for k_cache, v_cache in ((x, x.clone()), caches):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=3)
    assert torch.equal(x, caches[0])


# 2260: many sequences of one query and key
def test_large_batch_of_single_keys():
    tensors = [torch.randn(8300, 1, 4, 8).requires_grad_() for _ in range(3)]
    out = flash_attn.flash_attn_func(*tensors)
    torch.testing.assert_close(out, tensors[2])
    gradients = torch.autograd.grad(out.sum(), tensors)
    torch.testing.assert_close(gradients[2], torch.ones_like(gradients[2]))
    assert all(x.isfinite().all() for x in gradients)


# 1347: head dimensions that are not multiples of 8, whose softmax_scale is the caller's
@pytest.mark.parametrize("head_dim", (4, 7, 12, 59, 120, 193))
def test_head_dimensions_that_are_no_multiples_of_eight(head_dim):
    check_forward(Case(head_dim=head_dim))
    check_backward(Case(head_dim=head_dim))


# 1300: head dimension 4: another result than plain attention
def test_head_dimension_four():
    q = torch.tensor([0.1, 0.1, 0.3, 0.1]).half()[None, :, None, None].expand(1, 4, 1, 4)
    out = flash_attn.flash_attn_qkvpacked_func(torch.stack([q, q, q], 2))
    expected, _ = reference.attention(q, q, q)
    naive, _ = reference.attention(q, q, q, dtype=FP16)
    assert_close(out, expected, naive, "out")


# -------------------------------------------------------------------------------------------------
# The log-sum-exp


# 141, 404, 889, 1137, 1817: the gradient of the log-sum-exp is silently zero
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("function", ("dense", "qkvpacked", "kvpacked", "varlen"))
def test_gradient_of_the_log_sum_exp(function, dtype):
    q, k, v = Case(batch=1, dtype=dtype).inputs()
    lengths = cumulative(67)
    leaf = torch.stack([q, k, v], 2).requires_grad_()
    a, b, c = leaf.unbind(2)
    options = {"causal": True, "return_attn_probs": True}
    if function == "dense":
        _, lse, _ = flash_attn.flash_attn_func(a, b, c, **options)
    elif function == "qkvpacked":
        _, lse, _ = flash_attn.flash_attn_qkvpacked_func(leaf, **options)
    elif function == "kvpacked":
        _, lse, _ = flash_attn.flash_attn_kvpacked_func(a, leaf[:, :, 1:], **options)
    else:
        _, lse, _ = flash_attn.flash_attn_varlen_qkvpacked_func(leaf[0], lengths, 67, **options)
    (gradient,) = torch.autograd.grad(lse.square().sum(), leaf)
    tensors = [x.detach() for x in (q, k, v)]
    dlse = (2 * lse.detach()).view(1, 4, 67)
    zeros = torch.zeros_like(q)
    _, _, expected = reference.with_gradients(
        reference.attention, tensors, zeros, dlse, causal=True
    )
    _, _, naive = reference.with_gradients(
        reference.attention, tensors, zeros, dlse, causal=True, dtype=dtype
    )
    for name, part, want, plain in zip(
        ("dq", "dk", "dv"), gradient.unbind(2), expected, naive, strict=True
    ):
        assert_close(part, want, plain, name, dtype=dtype)
    assert torch.count_nonzero(gradient[:, :, 2]) == 0 and gradient[:, :, 0].abs().max() > 0


# The bias of causal ALiBi counts only up to a constant a row in FlashAttention-2, which the
# log-sum-exp lacks then; the documented one is -slope * |i + off - j|.
@pytest.mark.parametrize("sq,sk", ((60, 60), (20, 90), (90, 20)))
def test_alibi_in_the_log_sum_exp(sq, sk):
    q, k, v = Case(sq=sq, sk=sk).inputs()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    actual = flash_attn.flash_attn_func(
        q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True
    )
    assert_attention_close(
        actual[:2], reference.attention, (q, k, v), causal=True, alibi_slopes=slopes
    )


# -------------------------------------------------------------------------------------------------
# Dropout and softcap


# FlashAttention-2 compares 8-bit numbers: p = 0.001 drops nothing or one in 255.
def test_small_probabilities_of_dropout():
    q, k, v = (torch.randn(2, 700, 2, 8) for _ in range(3))
    _, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.001, return_attn_probs=True)
    dropped = int(torch.signbit(s_dmask[:, :, :700, :700]).sum())
    expected = 0.001 * 4 * 700 * 700
    assert abs(dropped - expected) < 6 * math.sqrt(expected) + 4 * 700 * 700 * 2**-16


# 1025: "softcapping does not support dropout for now"
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softcap_with_dropout(dtype):
    check_backward(Case(softcap=2.0, dropout_p=0.3, causal=True, dtype=dtype))


# 2402 and 2544: the gradient of the softcap, dense and of variable length
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_of_softcap(dtype):
    check_backward(Case(sq=113, sk=203, softcap=15.0, softmax_scale=3.0, dtype=dtype))
    q = torch.randn(90, 4, 64).to(dtype)
    k, v = (torch.randn(90, 4, 64).to(dtype) for _ in range(2))
    cu = cumulative(40, 50)
    varlen_backward(q, k, v, cu, cu, 50, 50, softcap=15.0, softmax_scale=3.0)


# 1357: S_dmask is empty without dropout, and not aligned with the rest with it
def test_s_dmask_covers_the_whole_matrix():
    q, k, v = Case(sq=31, sk=97).inputs()
    _, _, empty = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert empty.shape == (0,)
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 1e-4, return_attn_probs=True)
    assert out.shape == q.shape
    assert s_dmask.shape[2] >= 31 and s_dmask.shape[3] >= 97 and s_dmask.isfinite().all()
    largest = s_dmask[:, :, :31, :97].abs().amax(-1)
    torch.testing.assert_close(largest, torch.ones_like(largest))


# aws-neuron-sdk 1156: NaN when dropout leaves a row without any entry
def test_dropout_of_a_whole_row():
    q, k, v = Case(sq=64, sk=64).inputs()
    out = flash_attn.flash_attn_func(q, k, v, 0.95, causal=True)
    assert out.isfinite().all() and (out.abs().amax(-1) == 0).any()


# 1251: forward and backward have different dropout masks
def test_forward_and_backward_drop_the_same():
    v = torch.randn(1, 40, 2, 40)
    q, k = torch.randn(1, 50, 2, 40), torch.randn(1, 40, 2, 40)
    v.requires_grad_()
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    # out is linear in v: dv of a unit dout is a row of the dropped probabilities
    dout = torch.zeros_like(out)
    dout[0, 17, 1, 0] = 1.0
    (dv,) = torch.autograd.grad(out, v, dout)
    kept = ~torch.signbit(s_dmask[0, 1, 17, :40])
    assert torch.equal(dv[0, :, 1, 0] != 0, kept)


# -------------------------------------------------------------------------------------------------
# Determinism


# 414, 429, 988, 2244: dq differs from run to run
@pytest.mark.parametrize("deterministic", (False, True))
def test_dq_is_the_same_every_time(deterministic):
    tensors = [torch.randn(2, 300, 4, 64).to(BF16).requires_grad_() for _ in range(3)]
    dout = torch.randn(2, 300, 4, 64).to(BF16)

    def gradients():
        out = flash_attn.flash_attn_func(*tensors, causal=True, deterministic=deterministic)
        return torch.autograd.grad(out, tensors, dout)

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


# 47: the same sequence gives different results in batches of different sizes
def test_batch_size_does_not_matter():
    q, k, v = (torch.randn(1, n, 2, 64).to(BF16) for n in (50, 3500, 3500))
    alone = flash_attn.flash_attn_func(q, k, v)
    together = flash_attn.flash_attn_func(*(x.expand(6, -1, -1, -1) for x in (q, k, v)))
    assert all(torch.equal(x[None], alone) for x in together)


# vllm 51902: a neighbour that grows from 9 to 10 rows changes a decode row
def test_neighbours_do_not_matter():
    q = torch.randn(30, 14, 64).to(BF16)
    k, v = (torch.randn(1500, 2, 64).to(BF16) for _ in range(2))
    rows = []
    for more in (1, 9, 10, 17, 29):
        out = flash_attn.flash_attn_varlen_func(
            *(q[: 1 + more], k[: 1402 + more], v[: 1402 + more]),
            *(cumulative(1, more), cumulative(1402, more), more, 1402),
            causal=True,
        )
        rows.append(out[0])
    assert all(torch.equal(row, rows[0]) for row in rows)


# -------------------------------------------------------------------------------------------------
# The cache


# 1647: different results for different num_splits
@pytest.mark.parametrize("num_splits", (1, 2, 16, 32, 128))
def test_number_of_splits(num_splits):
    q = torch.randn(1, 1, 16, 128).to(BF16)
    k, v = (torch.randn(1, 1024, 8, 128).to(BF16) for _ in range(2))
    lengths = torch.tensor([1024], dtype=torch.int32)
    actual = flash_attn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, num_splits=num_splits, return_softmax_lse=True
    )
    assert_attention_close(actual, reference.attention, (q, k, v))


# 778: splits planned from the length before the append lose the new keys
@pytest.mark.parametrize("num_splits", (0, 1, 2, 5))
def test_splits_with_new_keys(num_splits):
    q = torch.randn(1, 1, 8, 128)
    k_cache, v_cache = torch.zeros(1, 500, 8, 128), torch.zeros(1, 500, 8, 128)
    k_cache[:, :256], v_cache[:, :256] = torch.randn(2, 1, 256, 8, 128)
    k, v = torch.randn(1, 196, 8, 128), torch.randn(1, 196, 8, 128)
    before = k_cache.clone(), v_cache.clone()
    actual = flash_attn.flash_attn_with_kvcache(
        *(q, k_cache, v_cache, k, v),
        cache_seqlens=256,
        num_splits=num_splits,
        return_softmax_lse=True,
    )
    assert_attention_close(
        actual, reference.kvcache_attention, (q, *before, k, v), cache_seqlens=256
    )


# 1417: a cache with room to spare and one that is cut to its length give different results
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_sliced_cache(dtype):
    q = torch.randn(1, 1, 4, 64).to(dtype)
    k, v = (torch.randn(1, 3000, 4, 64).to(dtype) for _ in range(2))
    lengths = torch.tensor([1000], dtype=torch.int32)
    outs = [
        flash_attn.flash_attn_with_kvcache(
            q, k[:, :capacity], v[:, :capacity], cache_seqlens=lengths, num_splits=1
        )
        for capacity in (1000, 1024, 2000, 3000)
    ]
    outs.append(flash_attn.flash_attn_with_kvcache(q, k[:, :1000], v[:, :1000], num_splits=1))
    assert all(torch.equal(out, outs[0]) for out in outs)


# 638: appending to a full cache overwrites other tensors
def test_append_to_a_full_cache():
    k_cache, v_cache = torch.zeros(1, 8, 2, 64), torch.zeros(1, 8, 2, 64)
    q = k = v = torch.randn(1, 3, 2, 64)
    with pytest.raises(RuntimeError, match="passes the end of the KV cache"):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=8)
    assert torch.count_nonzero(k_cache) == 0 and torch.count_nonzero(v_cache) == 0


# 1402: more than one new row: causal is aligned at the end of the cache, rotary goes on row by row
def test_several_new_rows():
    q, k, v = (torch.randn(2, 4, 2, 64) for _ in range(3))
    angles = torch.rand(40, 16)
    k_cache, v_cache = torch.randn(2, 30, 2, 64), torch.randn(2, 30, 2, 64)
    options = {"rotary_cos": angles.cos(), "rotary_sin": angles.sin(), "rotary_interleaved": False}
    before = k_cache.clone(), v_cache.clone()
    together = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=11, causal=True, **options
    )
    for i in range(4):
        one = [x[:, i : i + 1] for x in (q, k, v)]
        out = flash_attn.flash_attn_with_kvcache(
            one[0], *before, *one[1:], cache_seqlens=11 + i, causal=True, **options
        )
        torch.testing.assert_close(out[:, 0], together[:, i])
    torch.testing.assert_close(before[0], k_cache)


# 1788: cache_leftpad is ignored; FlashAttention-2 refuses it with pages
@pytest.mark.parametrize("page_size", (0, 16))
def test_left_padding_counts(page_size):
    q = torch.randn(2, 1, 4, 64)
    k, v = torch.randn(2, 48, 4, 64), torch.randn(2, 48, 4, 64)
    padding, lengths = torch.tensor([5, 20]).int(), torch.tensor([40, 21]).int()
    options = {"cache_leftpad": padding, "cache_seqlens": lengths}
    caches = k, v
    if page_size:
        options["block_table"] = torch.arange(6, dtype=torch.int32).view(2, 3)
        caches = [x.view(6, 16, 4, 64) for x in caches]
    out = flash_attn.flash_attn_with_kvcache(q, *caches, **options, causal=True)
    for i in range(2):
        rows = slice(int(padding[i]), int(lengths[i]))
        expected = flash_attn.flash_attn_func(q[i : i + 1], k[i : i + 1, rows], v[i : i + 1, rows])
        torch.testing.assert_close(out[i : i + 1], expected)


# 1579 and 1999: "Paged KV cache block size must be divisible by" 16, 128 or 256
@pytest.mark.parametrize("page_size", (1, 3, 16, 100, 128))
def test_any_page_size(page_size):
    columns = -(-200 // page_size)
    table = torch.randperm(columns).int()[None]
    pages = torch.randn(2, columns, page_size, 2, 64)
    q = torch.randn(1, 1, 2, 64)
    rows = [x[table[0].long()].flatten(0, 1)[None, :200] for x in pages]
    out = flash_attn.flash_attn_with_kvcache(
        q, *pages, cache_seqlens=torch.tensor([200]).int(), block_table=table
    )
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, *rows))


# tspeterkim/paged-attention-minimal 3 and 1314: prefill into pages equals causal attention
def test_prefill_into_pages():
    q, k, v = (torch.randn(3, 20, 4, 64) for _ in range(3))
    pages = torch.zeros(2, 12, 8, 4, 64)
    table = torch.randperm(12).int()[:9].view(3, 3)
    out = flash_attn.flash_attn_with_kvcache(
        q, *pages, k, v, cache_seqlens=0, block_table=table, causal=True
    )
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, k, v, causal=True))


# 1569: full attention and attention through the cache differ when sequences grow
def test_growing_sequences():
    lengths = [3, 17, 8]
    q, k, v = (torch.randn(3, 25, 2, 64) for _ in range(3))
    k_cache, v_cache = torch.full((2, 3, 30, 2, 64), math.nan)
    for i, length in enumerate(lengths):
        k_cache[i, :length], v_cache[i, :length] = k[i, :length], v[i, :length]
    new = [torch.stack([x[i, n : n + 5] for i, n in enumerate(lengths)]) for x in (q, k, v)]
    out = flash_attn.flash_attn_with_kvcache(
        new[0],
        *(k_cache, v_cache, new[1], new[2]),
        cache_seqlens=torch.tensor(lengths).int(),
        causal=True,
    )
    for i, n in enumerate(lengths):
        whole = flash_attn.flash_attn_func(*(x[i : i + 1, : n + 5] for x in (q, k, v)), causal=True)
        torch.testing.assert_close(out[i : i + 1], whole[:, n:])


# FlashAttention-2's combination of splits for an empty cache: lse -inf, out NaN
@pytest.mark.parametrize("num_splits", (0, 1, 4))
def test_empty_cache(num_splits):
    q = torch.randn(2, 1, 4, 64)
    cache = torch.full((2, 300, 4, 64), math.nan)
    lengths = torch.tensor([0, 0], dtype=torch.int32)
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, cache, cache, cache_seqlens=lengths, num_splits=num_splits, return_softmax_lse=True
    )
    assert torch.count_nonzero(out) == 0 and (lse == math.inf).all()


# Ring attention passes out and lse of other keys to backward: rows with lse +inf give 0, not NaN
def test_backward_with_infinite_lse():
    q, k, v = Case(sq=40, sk=40).inputs()
    lse = torch.full((2, 4, 40), math.inf)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_backward(
        *(torch.randn_like(q), q, k, v, torch.zeros_like(q), lse, dq, dk, dv),
        *(0.0, 0.125, False, -1, -1, 0.0, None, False),
    )
    assert all(torch.count_nonzero(x) == 0 for x in (dq, dk, dv))


# 548, 385: sums in half precision: a thousand equal values still average to themselves
@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=dtype_id)
def test_accumulation_is_in_float32(dtype):
    q, k = torch.zeros(1, 4, 1, 64, dtype=dtype), torch.randn(1, 4096, 1, 64).to(dtype)
    v = torch.full((1, 4096, 1, 64), 1.0, dtype=dtype)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(out.float(), torch.ones(1, 4, 1, 64), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(4096)), rtol=1e-6, atol=0.0)
