"""NaN that users of FlashAttention reported: none of them may be here.

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
    assert_attention_close,
    check_varlen_backward,
    cumulative,
    dtype_id,
    randn,
)

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

HALVES = (BF16, FP16)

# -------------------------------------------------------------------------------------------------
# NaN in gradients


# 443: "nan in some configurations": dq of causal variable length with more queries than keys
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_dq_when_causal_rows_see_nothing(dtype):
    q = (randn(256, 1, 32) * 3).to(dtype)
    k, v = ((randn(3, 1, 32) * 3).to(dtype) for _ in range(2))
    cu_q, cu_k = cumulative(76, 34, 146), cumulative(1, 1, 1)
    check_varlen_backward(q, k, v, cu_q, cu_k, 256, 3, causal=True)


# 334: "NaNs in bw pass for some inputs": one query, one key, head dimension 16
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_the_gradients_of_a_single_key(dtype):
    q, k, v = ((randn(1, 1, 1, 16) * 3).to(dtype).requires_grad_() for _ in range(3))
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
    q, k, v = ((randn(1, 256, 1, 128) * 3).to(dtype).requires_grad_() for _ in range(3))
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    gradients = torch.autograd.grad(out, (q, k, v), torch.randn_like(out))
    assert all(x.isfinite().all() for x in (out, *gradients))


# 752: NaN in the backward of variable length with dropout when there are more tokens than sequences
@pytest.mark.parametrize("dtype", HALVES, ids=dtype_id)
def test_nan_in_gradients_of_tokens_of_no_sequence(dtype):
    qkv = randn(120, 3, 4, 64).to(dtype).requires_grad_()
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
    q = randn(61, 4, head_dim)
    k, v = randn(214, 1, head_dim), randn(214, 1, head_dim)
    _, _, (_, dk, dv) = check_varlen_backward(q, k, v, cu_q, cu_k, 41, 90, causal=causal)
    for x in (dk, dv):
        assert torch.count_nonzero(x[:60]) == 0 and torch.count_nonzero(x[124:]) == 0


# 1155 and 2568: writes out of bounds, hangs and NaN when a sequence has no keys
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_sequences_without_keys(dtype, causal):
    cu_q, cu_k = cumulative(33, 20, 65), cumulative(0, 30, 0)
    q = randn(118, 4, 64).to(dtype)
    k, v = (randn(30, 2, 64).to(dtype) for _ in range(2))
    out, lse, (dq, _, _) = check_varlen_backward(q, k, v, cu_q, cu_k, 65, 30, causal=causal)
    for rows in (slice(0, 33), slice(53, 118)):
        assert torch.count_nonzero(out[rows]) == 0 and torch.count_nonzero(dq[rows]) == 0
        assert (lse[:, rows] == math.inf).all()


# 2324: gradients of tokens beyond the last sequence are left uninitialised
def test_uninitialised_gradients_of_padding():
    cu_seqlens = cumulative(10, 20)
    tensors = [randn(50, 2, 32).requires_grad_() for _ in range(3)]
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
    q = randn(4, 8, 64).to(BF16)
    k, v = (torch.full((512, 8, 64), math.nan, dtype=BF16) for _ in range(2))
    for i, length in enumerate(used.tolist()):
        for x in (k, v):
            x[128 * i : 128 * i + length] = randn(length, 8, 64).to(BF16)
    out, lse, _, _ = _flash_attn_varlen_forward(
        *(q, k, v, cu_q, cu_k, 1, 128, 0.0, 0.125, False), seqused_k=used
    )
    assert_attention_close(
        (out, lse), reference.varlen_attention, (q, k, v, cu_q, cu_k), seqused_k=used
    )


# 1395: keys beyond the end of a sequence that are not cleared
def test_nan_behind_the_keys():
    q = randn(1, 40, 2, 64).to(FP16)
    whole = torch.full((1, 128, 2, 64), math.nan, dtype=FP16)
    whole[:, :70] = randn(1, 70, 2, 64)
    k = v = whole[:, :70]
    assert torch.equal(
        flash_attn.flash_attn_func(q, k, v), flash_attn.flash_attn_func(q, k.clone(), v.clone())
    )
