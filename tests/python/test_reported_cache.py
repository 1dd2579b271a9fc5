"""Defects of the cache that users of FlashAttention reported: none of them may be here.

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
    CLOSE,
    DTYPE,
    DTYPES,
    FP16,
    FP32,
    Case,
    assert_attention_close,
    dtype_id,
    randn,
)

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_backward

HALVES = (BF16, FP16)


# 1647: different results for different num_splits
@pytest.mark.parametrize("num_splits", (1, 2, 16, 32, 128))
def test_number_of_splits(num_splits):
    q = randn(1, 1, 16, 128).to(BF16)
    k, v = (randn(1, 1024, 8, 128).to(BF16) for _ in range(2))
    lengths = torch.tensor([1024], dtype=torch.int32)
    actual = flash_attn.flash_attn_with_kvcache(
        q, k, v, cache_seqlens=lengths, num_splits=num_splits, return_softmax_lse=True
    )
    assert_attention_close(actual, reference.attention, (q, k, v))


# 778: splits planned from the length before the append lose the new keys
@pytest.mark.parametrize("num_splits", (0, 1, 2, 5))
def test_splits_with_new_keys(num_splits):
    q = randn(1, 1, 8, 128)
    k_cache, v_cache = (
        torch.zeros(1, 500, 8, 128, dtype=DTYPE),
        torch.zeros(1, 500, 8, 128, dtype=DTYPE),
    )
    k_cache[:, :256], v_cache[:, :256] = randn(2, 1, 256, 8, 128)
    k, v = randn(1, 196, 8, 128), randn(1, 196, 8, 128)
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
    q = randn(1, 1, 4, 64).to(dtype)
    k, v = (randn(1, 3000, 4, 64).to(dtype) for _ in range(2))
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
    k_cache, v_cache = torch.zeros(1, 8, 2, 64, dtype=DTYPE), torch.zeros(1, 8, 2, 64, dtype=DTYPE)
    q = k = v = randn(1, 3, 2, 64)
    with pytest.raises(RuntimeError, match="passes the end of the KV cache"):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, k, v, cache_seqlens=8)
    assert torch.count_nonzero(k_cache) == 0 and torch.count_nonzero(v_cache) == 0


# 1402: more than one new row: causal is aligned at the end of the cache, rotary goes on row by row
def test_several_new_rows():
    q, k, v = (randn(2, 4, 2, 64) for _ in range(3))
    angles = torch.rand(40, 16)
    k_cache, v_cache = randn(2, 30, 2, 64), randn(2, 30, 2, 64)
    options = {
        "rotary_cos": angles.cos().to(DTYPE),
        "rotary_sin": angles.sin().to(DTYPE),
        "rotary_interleaved": False,
    }
    before = k_cache.clone(), v_cache.clone()
    together = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, cache_seqlens=11, causal=True, **options
    )
    for i in range(4):
        one = [x[:, i : i + 1] for x in (q, k, v)]
        out = flash_attn.flash_attn_with_kvcache(
            one[0], *before, *one[1:], cache_seqlens=11 + i, causal=True, **options
        )
        torch.testing.assert_close(out[:, 0], together[:, i], **CLOSE)
    torch.testing.assert_close(before[0], k_cache, **CLOSE)


# 1788: cache_leftpad is ignored; FlashAttention-2 refuses it with pages
@pytest.mark.parametrize("page_size", (0, 16))
def test_left_padding_counts(page_size):
    q = randn(2, 1, 4, 64)
    k, v = randn(2, 48, 4, 64), randn(2, 48, 4, 64)
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
        torch.testing.assert_close(out[i : i + 1], expected, **CLOSE)


# 1579 and 1999: "Paged KV cache block size must be divisible by" 16, 128 or 256
@pytest.mark.parametrize("page_size", (1, 3, 16, 100, 128))
def test_any_page_size(page_size):
    columns = -(-200 // page_size)
    table = torch.randperm(columns).int()[None]
    pages = randn(2, columns, page_size, 2, 64)
    q = randn(1, 1, 2, 64)
    rows = [x[table[0].long()].flatten(0, 1)[None, :200] for x in pages]
    out = flash_attn.flash_attn_with_kvcache(
        q, *pages, cache_seqlens=torch.tensor([200]).int(), block_table=table
    )
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, *rows), **CLOSE)


# tspeterkim/paged-attention-minimal 3 and 1314: prefill into pages equals causal attention
def test_prefill_into_pages():
    q, k, v = (randn(3, 20, 4, 64) for _ in range(3))
    pages = torch.zeros(2, 12, 8, 4, 64, dtype=DTYPE)
    table = torch.randperm(12).int()[:9].view(3, 3)
    out = flash_attn.flash_attn_with_kvcache(
        q, *pages, k, v, cache_seqlens=0, block_table=table, causal=True
    )
    torch.testing.assert_close(out, flash_attn.flash_attn_func(q, k, v, causal=True), **CLOSE)


# 1569: full attention and attention through the cache differ when sequences grow
def test_growing_sequences():
    lengths = [3, 17, 8]
    q, k, v = (randn(3, 25, 2, 64) for _ in range(3))
    k_cache, v_cache = torch.full((2, 3, 30, 2, 64), math.nan, dtype=DTYPE)
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
        torch.testing.assert_close(out[i : i + 1], whole[:, n:], **CLOSE)


# FlashAttention-2's combination of splits for an empty cache: lse -inf, out NaN
@pytest.mark.parametrize("num_splits", (0, 1, 4))
def test_empty_cache(num_splits):
    q = randn(2, 1, 4, 64)
    cache = torch.full((2, 300, 4, 64), math.nan, dtype=DTYPE)
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
    q, k = torch.zeros(1, 4, 1, 64, dtype=dtype), randn(1, 4096, 1, 64).to(dtype)
    v = torch.full((1, 4096, 1, 64), 1.0, dtype=dtype)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    torch.testing.assert_close(out.float(), torch.ones(1, 4, 1, 64), rtol=1e-3, atol=0.0)
    torch.testing.assert_close(lse, torch.full_like(lse, math.log(4096)), rtol=1e-6, atol=0.0)
