"""Attention over a cache against the reference: append, rotary, padding, batch index and pages.

Every slot of the caches that a call may not look at holds NaN, and every slot that it may not write
is compared bitwise afterwards.
"""

from dataclasses import dataclass

import pytest
import reference
import torch
from checks import (
    BF16,
    CLOSE,
    DTYPE,
    DTYPE_NAMES,
    DTYPES,
    FP16,
    FP32,
    assert_attention_close,
    assert_close,
    dtype_id,
    new_generator,
    pairwise,
    randn,
)

import flash_attn


@dataclass(frozen=True)
class CacheCase:
    dtype: torch.dtype = DTYPE
    lengths: tuple = (100, 7, 64)  # valid keys before the call
    sq: int = 1
    new: int | None = None  # keys that are appended
    heads: tuple = (4, 2)
    head_dim: int = 64
    rotary: str = ""  # "interleaved" or "halves"
    rotary_dim: int = 32
    page_size: int = 0  # 0: not paged
    leftpad: bool = False
    batch_idx: bool = False
    int_lengths: bool = False  # cache_seqlens as an int, all sequences alike
    causal: bool = True
    window_size: tuple = (-1, -1)
    softcap: float = 0.0
    alibi: bool = False
    sinks: bool = False
    num_splits: int = 0

    def __str__(self):
        words = [DTYPE_NAMES[self.dtype], f"sq{self.sq}", f"h{self.heads[0]}x{self.heads[1]}"]
        words.append(f"d{self.head_dim}")
        words += ["len" + "_".join(map(str, self.lengths))]
        words += [f"new{self.new}"] if self.new is not None else []
        words += [f"{self.rotary}{self.rotary_dim}"] if self.rotary else []
        words += [f"page{self.page_size}"] if self.page_size else []
        words += ["leftpad"] if self.leftpad else []
        words += ["batch_idx"] if self.batch_idx else []
        words += ["int"] if self.int_lengths else []
        words += ["causal"] if self.causal else []
        words += ["window{}_{}".format(*self.window_size)] if self.window_size != (-1, -1) else []
        words += [f"softcap{self.softcap:g}"] if self.softcap else []
        words += ["alibi"] if self.alibi else []
        words += ["sinks"] if self.sinks else []
        words += [f"splits{self.num_splits}"] if self.num_splits else []
        return "-".join(words)


CAPACITY = 130


def make_call(case):
    """q, caches, and the keyword arguments that the function and the reference share."""
    batch = len(case.lengths)
    heads, heads_k = case.heads
    lengths = [case.lengths[0]] * batch if case.int_lengths else list(case.lengths)
    q = torch.randn(batch, case.sq, heads, case.head_dim).to(case.dtype)
    options = {
        "causal": case.causal,
        "window_size": case.window_size,
        "softcap": case.softcap,
        "cache_seqlens": lengths[0]
        if case.int_lengths
        else torch.tensor(lengths, dtype=torch.int32),
    }
    if case.new is not None:
        for name in ("k", "v"):
            options[name] = torch.randn(batch, case.new, heads_k, case.head_dim).to(case.dtype)
    padding = [0] * batch
    if case.leftpad:
        padding = [min(3 + 5 * i, length) for i, length in enumerate(lengths)]
        options["cache_leftpad"] = torch.tensor(padding, dtype=torch.int32)
    if case.alibi:
        options["alibi_slopes"] = torch.rand(batch, heads) * 0.3
    if case.sinks:
        options["s_aux"] = torch.randn(heads)

    capacity = CAPACITY
    generator = new_generator(5)
    if case.page_size:
        pages_each = -(-CAPACITY // case.page_size)
        capacity = pages_each * case.page_size
        shape = (batch * pages_each + 2, case.page_size, heads_k, case.head_dim)
        table = torch.randperm(shape[0], generator=generator)[: batch * pages_each]
        table = table.view(batch, pages_each).to(torch.int32)
        options["block_table"] = table
    elif case.batch_idx:
        shape = (batch + 2, CAPACITY, heads_k, case.head_dim)
        options["cache_batch_idx"] = torch.randperm(batch + 2, generator=generator)[:batch].to(
            torch.int32
        )
    else:
        shape = (batch, CAPACITY, heads_k, case.head_dim)

    if case.rotary:
        angles = torch.rand(capacity + 5, case.rotary_dim // 2) * 6.3
        options["rotary_cos"] = angles.cos().to(case.dtype)
        options["rotary_sin"] = angles.sin().to(case.dtype)
        options["rotary_interleaved"] = case.rotary == "interleaved"

    caches = []
    for _ in range(2):
        cache = torch.full(shape, torch.nan, dtype=case.dtype)
        for i, length in enumerate(lengths):
            rows = torch.arange(padding[i], length)
            if case.page_size:
                place = (table[i].long()[rows // case.page_size], rows % case.page_size)
            elif case.batch_idx:
                place = (torch.full_like(rows, int(options["cache_batch_idx"][i])), rows)
            else:
                place = (torch.full_like(rows, i), rows)
            cache[place] = torch.randn(len(rows), heads_k, case.head_dim).to(case.dtype)
        caches.append(cache)
    return q, *caches, options


APPEND_OPTIONS = {
    "k",
    "v",
    "rotary_cos",
    "rotary_sin",
    "cache_seqlens",
    "cache_batch_idx",
    "block_table",
    "rotary_interleaved",
}


def append_options(options):
    return {name: value for name, value in options.items() if name in APPEND_OPTIONS}


def bits(x):
    return x.view(torch.int32 if x.dtype == FP32 else torch.int16)


def check(case):
    q, k_cache, v_cache, options = make_call(case)
    k_before, v_before = k_cache.clone(), v_cache.clone()
    out, lse = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, **options, num_splits=case.num_splits, return_softmax_lse=True
    )
    assert out.dtype == case.dtype
    # Rotated rows are rounded to the dtype before they are multiplied, so the scores are, too.
    assert_attention_close(
        (out, lse),
        reference.kvcache_attention,
        (q, k_before, v_before),
        **options,
        lse_dtype=case.dtype if case.rotary else FP32,
    )
    if case.new is None:
        assert torch.equal(bits(k_cache), bits(k_before))
        assert torch.equal(bits(v_cache), bits(v_before))
        return
    arguments = append_options(options)
    copied = {name: x for name, x in arguments.items() if not name.startswith("rotary")}
    k_copied, v_copied = reference.kvcache_append(k_before, v_before, **copied, dtype=case.dtype)
    assert torch.equal(bits(v_cache), bits(v_copied))
    if not case.rotary:
        assert torch.equal(bits(k_cache), bits(k_copied))
        return
    k_expected, _ = reference.kvcache_append(k_before, v_before, **arguments)
    k_naive, _ = reference.kvcache_append(k_before, v_before, **arguments, dtype=case.dtype)
    assert_close(k_cache, k_expected, k_naive, "k_cache")
    # Beyond the rotated dimensions it is a copy, and where nothing is appended it is untouched.
    rest = slice(case.rotary_dim, None)
    assert torch.equal(bits(k_cache)[..., rest], bits(k_copied)[..., rest])
    untouched = (bits(k_copied) == bits(k_before)).all(-1)
    assert torch.equal(bits(k_cache)[untouched], bits(k_before)[untouched])


@pytest.mark.parametrize("num_splits", (0, 1, 2, 3, 64, 1000))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_splits(dtype, num_splits):
    check(CacheCase(dtype=dtype, num_splits=num_splits))
    check(CacheCase(dtype=dtype, num_splits=num_splits, causal=False, page_size=16, sq=3))


@pytest.mark.parametrize("page_size", (1, 2, 16, 17, 64, 128, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_pages(dtype, page_size):
    check(CacheCase(dtype=dtype, page_size=page_size))
    check(CacheCase(dtype=dtype, page_size=page_size, new=5, sq=5, leftpad=True))


@pytest.mark.parametrize("sq", (1, 2, 5, 30))
@pytest.mark.parametrize("new", (1, 5, 30))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_append(dtype, new, sq):
    check(CacheCase(dtype=dtype, new=new, sq=sq))


@pytest.mark.parametrize("lengths", ((0, 0, 0), (129, 0, 64), (130, 130, 130), (1, 2, 3)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_cache_lengths(dtype, lengths):
    check(CacheCase(dtype=dtype, lengths=lengths))
    check(CacheCase(dtype=dtype, lengths=lengths, sq=4, causal=True, num_splits=3))
    if max(lengths) < 130:
        check(CacheCase(dtype=dtype, lengths=lengths, new=1))


@pytest.mark.parametrize("rotary", ("interleaved", "halves"))
@pytest.mark.parametrize("rotary_dim", (16, 32, 64))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_rotary(dtype, rotary_dim, rotary):
    for sq, new, causal, window in (
        (1, 1, True, (-1, -1)),
        (4, 4, True, (-1, -1)),
        (4, 4, False, (-1, -1)),  # then all rows of q are at the same position
        (4, 4, False, (20, 5)),
    ):
        check(
            CacheCase(
                dtype=dtype,
                rotary=rotary,
                rotary_dim=rotary_dim,
                sq=sq,
                new=new,
                causal=causal,
                window_size=window,
            )
        )


FEATURES = {
    "dtype": DTYPES,
    "sq": (1, 4),
    "new": (None, 1, 6),
    "heads": ((4, 4), (6, 2), (8, 1)),
    "head_dim": (64, 128, 40, 33),
    "rotary": ("", "interleaved", "halves"),
    "rotary_dim": (16, 32),
    "page_size": (0, 16, 33),
    "leftpad": (False, True),
    "batch_idx": (False, True),
    "int_lengths": (False, True),
    "causal": (False, True),
    "window_size": ((-1, -1), (24, 0), (17, 5)),
    "softcap": (0.0, 1.5),
    "alibi": (False, True),
    "sinks": (False, True),
    "num_splits": (0, 1, 3),
}


def feature_cases():
    for row in pairwise(seed=4, **FEATURES):
        if row["new"] is None:
            row["rotary"] = ""
        if row["page_size"]:
            row["batch_idx"] = False
        yield CacheCase(**row)


@pytest.mark.parametrize("case", list(feature_cases()), ids=str)
def test_features(case):
    check(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_whole_cache_without_lengths(dtype):
    """cache_seqlens=None: all of the cache is valid."""
    q = torch.randn(2, 3, 4, 64).to(dtype)
    k_cache, v_cache = (torch.randn(2, 90, 2, 64).to(dtype) for _ in range(2))
    actual = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, causal=True, return_softmax_lse=True
    )
    assert_attention_close(actual, reference.kvcache_attention, (q, k_cache, v_cache), causal=True)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_caches_that_are_views(dtype):
    """Caches packed together as (b, s, 2, hk, d): written in place through their strides."""
    packed = torch.randn(2, 50, 2, 2, 64).to(dtype)
    before = packed.clone()
    q = torch.randn(2, 1, 4, 64).to(dtype)
    k, v = torch.randn(2, 1, 2, 64).to(dtype), torch.randn(2, 1, 2, 64).to(dtype)
    lengths = torch.tensor([20, 49], dtype=torch.int32)
    actual = flash_attn.flash_attn_with_kvcache(
        *(q, packed[:, :, 0], packed[:, :, 1], k, v), cache_seqlens=lengths, return_softmax_lse=True
    )
    for i, length in enumerate(lengths.tolist()):
        before[i, length, 0] = k[i, 0]
        before[i, length, 1] = v[i, 0]
    assert torch.equal(packed, before)
    assert_attention_close(
        actual,
        reference.kvcache_attention,
        (q, before[:, :, 0], before[:, :, 1]),
        cache_seqlens=lengths + 1,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strided_new_keys_and_tables(dtype):
    """New keys cut out of a projection, and rotary tables with a row stride."""
    qkv = torch.randn(2, 3, 3, 4, 64).to(dtype)
    q, k, v = qkv.unbind(2)
    tables = torch.randn(60, 2, 16).to(dtype)
    k_cache, v_cache = (torch.randn(2, 40, 4, 64).to(dtype) for _ in range(2))
    options = {
        "rotary_cos": tables[:, 0],
        "rotary_sin": tables[:, 1],
        "cache_seqlens": torch.tensor([11, 30], dtype=torch.int32),
        "causal": True,
    }
    before = k_cache.clone(), v_cache.clone()
    actual = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, k, v, **options, return_softmax_lse=True
    )
    assert_attention_close(
        actual, reference.kvcache_attention, (q, *before, k, v), **options, lse_dtype=dtype
    )


def test_decoding_equals_one_causal_pass():
    """Token by token through the cache, and all at once."""
    q, k, v = (randn(2, 37, 4, 64) for _ in range(3))
    whole = flash_attn.flash_attn_func(q, k, v, causal=True)
    k_cache, v_cache = torch.full((2, 2, 40, 4, 64), torch.nan, dtype=DTYPE)
    for i in range(37):
        out = flash_attn.flash_attn_with_kvcache(
            *(q[:, i : i + 1], k_cache, v_cache, k[:, i : i + 1], v[:, i : i + 1]),
            cache_seqlens=i,
            causal=True,
        )
        torch.testing.assert_close(out[:, 0], whole[:, i], **CLOSE)


@pytest.mark.parametrize("dtype", (BF16, FP16, FP32), ids=dtype_id)
def test_long_cache(dtype):
    """Long enough that the keys are split, with lengths at and around the ends of parts."""
    lengths = torch.tensor([4096, 1, 1024, 1025, 3000], dtype=torch.int32)
    q = torch.randn(5, 1, 8, 64).to(dtype)
    k_cache, v_cache = (torch.randn(5, 4096, 2, 64).to(dtype) for _ in range(2))
    for i, length in enumerate(lengths.tolist()):
        k_cache[i, length:] = torch.nan
        v_cache[i, length:] = torch.nan
    for num_splits in (0, 1, 5):
        actual = flash_attn.flash_attn_with_kvcache(
            *(q, k_cache, v_cache),
            cache_seqlens=lengths,
            num_splits=num_splits,
            return_softmax_lse=True,
        )
        assert_attention_close(
            actual, reference.kvcache_attention, (q, k_cache, v_cache), cache_seqlens=lengths
        )


def test_return_values():
    q, cache = randn(2, 3, 4, 64), randn(2, 9, 4, 64)
    out = flash_attn.flash_attn_with_kvcache(q, cache, cache)
    assert isinstance(out, torch.Tensor) and out.shape == q.shape
    out, lse = flash_attn.flash_attn_with_kvcache(q, cache, cache, return_softmax_lse=True)
    assert lse.shape == (2, 4, 3) and lse.dtype == FP32


def test_autograd_notices_the_change_of_a_cache():
    k_cache, v_cache = randn(2, 1, 8, 2, 16)
    factor = torch.ones((), requires_grad=True)
    loss = (factor * k_cache).sum()  # saves the cache for the gradient of factor
    q, new = randn(1, 1, 2, 16), randn(1, 1, 2, 16)
    lengths = torch.tensor([3], dtype=torch.int32)
    flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=lengths)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
