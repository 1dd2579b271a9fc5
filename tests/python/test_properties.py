"""Properties that hold for whatever Hypothesis comes up with."""

import math

import pytest
import reference
import torch
from checks import (
    CLOSE,
    DTYPES,
    FP32,
    assert_attention_close,
    check_gradients,
    new_generator,
    randn,
)
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import flash_attn

COMMON = {
    "deadline": None,
    "derandomize": True,
    "suppress_health_check": [HealthCheck.too_slow, HealthCheck.data_too_large],
}

LENGTH = st.one_of(st.integers(0, 9), st.integers(0, 150), st.sampled_from((16, 32, 64, 65, 128)))
HEAD_DIM = st.one_of(st.integers(1, 256), st.sampled_from((32, 64, 80, 128)))
SIDE = st.one_of(st.just(-1), st.integers(0, 8), st.integers(0, 200))


@st.composite
def tensors(draw, shape, dtype):
    """Dimensions in memory in any order but the last, with gaps, or expanded."""
    order = [*draw(st.permutations(range(len(shape) - 1))), len(shape) - 1]
    gaps = [draw(st.integers(0, 2)) for _ in shape]
    expanded = [draw(st.integers(0, 9)) == 0 for _ in shape[:-1]] + [False]
    sizes = [1 if e else n + g for n, g, e in zip(shape, gaps, expanded, strict=True)]
    generator = new_generator(draw(st.integers(0, 2**32)))
    whole = torch.randn([sizes[axis] for axis in order], generator=generator).to(dtype)
    view = whole.permute([order.index(axis) for axis in range(len(shape))])
    view = view[tuple(slice(0, 1 if e else n) for n, e in zip(shape, expanded, strict=True))]
    return view.expand(shape)


@st.composite
def features(draw, batch, heads):
    options = {
        "causal": draw(st.booleans()),
        "window_size": (draw(SIDE), draw(SIDE)) if draw(st.booleans()) else (-1, -1),
        "softcap": draw(st.sampled_from((0.0, 0.0, 0.7, 8.0))),
        "softmax_scale": draw(st.sampled_from((None, None, 0.2, -0.3))),
    }
    slopes = draw(st.sampled_from(("", "", "h", "bh")))
    if slopes:
        shape = (heads,) if slopes == "h" else (batch, heads)
        options["alibi_slopes"] = torch.linspace(0.0, 0.4, max(math.prod(shape), 1))[
            : math.prod(shape)
        ].view(shape)
    return options


@st.composite
def dense_calls(draw):
    batch, heads_k, group = (
        draw(st.integers(0, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    sq, sk, head_dim = draw(LENGTH), draw(LENGTH), draw(HEAD_DIM)
    dtype = draw(st.sampled_from(DTYPES))
    heads = heads_k * group
    q = draw(tensors((batch, sq, heads, head_dim), dtype))
    k = draw(tensors((batch, sk, heads_k, head_dim), dtype))
    v = draw(tensors((batch, sk, heads_k, head_dim), dtype))
    dout = draw(tensors((batch, sq, heads, head_dim), dtype))
    options = draw(features(batch, heads))
    s_aux = torch.linspace(-1.0, 2.0, heads) if draw(st.booleans()) else None
    dropout_p = draw(st.sampled_from((0.0, 0.0, 0.25)))
    return q, k, v, dout, options, s_aux, dropout_p


@settings(**COMMON, max_examples=150)
@given(dense_calls())
def test_dense(call):
    q, k, v, dout, options, s_aux, dropout_p = call
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    if s_aux is not None:
        leaves.append(s_aux.requires_grad_())
    out, lse, s_dmask = flash_attn.flash_attn_func(
        *leaves[:3], dropout_p, **options, s_aux=s_aux, return_attn_probs=True
    )
    gradients = torch.autograd.grad(out, leaves, dout)
    keep_mask = None
    if dropout_p > 0:
        keep_mask = ~torch.signbit(s_dmask[:, :, : q.shape[1], : k.shape[1]])
    check_gradients(
        (out, lse, gradients),
        reference.attention,
        leaves[:3],
        s_aux,
        dout,
        None,
        ["dq", "dk", "dv", "ds_aux"][: len(leaves)],
        **options,
        dropout_p=dropout_p,
        keep_mask=keep_mask,
    )


@st.composite
def varlen_calls(draw):
    count = draw(st.integers(1, 5))
    lengths_q = [draw(st.integers(0, 70)) for _ in range(count)]
    lengths_k = [draw(st.integers(0, 70)) for _ in range(count)]
    heads_k, group = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    head_dim = draw(HEAD_DIM)
    dtype = draw(st.sampled_from(DTYPES))
    total_q = sum(lengths_q) + draw(st.integers(0, 3))
    total_k = sum(lengths_k) + draw(st.integers(0, 3))
    heads = heads_k * group
    q = draw(tensors((total_q, heads, head_dim), dtype))
    k = draw(tensors((total_k, heads_k, head_dim), dtype))
    v = draw(tensors((total_k, heads_k, head_dim), dtype))
    dout = draw(tensors((total_q, heads, head_dim), dtype))
    return q, k, v, dout, lengths_q, lengths_k, draw(features(count, heads))


@settings(**COMMON, max_examples=100)
@given(varlen_calls())
def test_variable_length(call):
    q, k, v, dout, lengths_q, lengths_k, options = call
    cu_q = torch.tensor([0, *lengths_q]).cumsum(0).int()
    cu_k = torch.tensor([0, *lengths_k]).cumsum(0).int()
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *(*leaves, cu_q, cu_k, max(lengths_q), max(lengths_k)), **options, return_attn_probs=True
    )
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


@st.composite
def cache_calls(draw):
    batch, heads_k, group = (
        draw(st.integers(1, 3)),
        draw(st.integers(1, 3)),
        draw(st.integers(1, 4)),
    )
    sq, new = draw(st.integers(1, 6)), draw(st.integers(0, 6))
    head_dim = draw(st.one_of(st.integers(16, 256), st.sampled_from((64, 128))))
    dtype = draw(st.sampled_from(DTYPES))
    capacity = draw(st.integers(max(new, 1), 180))
    lengths = [draw(st.integers(0, capacity - new)) for _ in range(batch)]
    heads = heads_k * group
    options = draw(features(batch, heads))
    options["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    if draw(st.booleans()):
        padding = [draw(st.integers(0, length)) for length in lengths]
        options["cache_leftpad"] = torch.tensor(padding, dtype=torch.int32)
    shape = [batch, capacity, heads_k, head_dim]
    if draw(st.booleans()):
        page_size = draw(st.integers(1, 40))
        columns = -(-capacity // page_size)
        shape[:2] = batch * columns + draw(st.integers(0, 3)), page_size
        table = torch.tensor(draw(st.permutations(range(shape[0]))), dtype=torch.int32)
        options["block_table"] = table[: batch * columns].view(batch, columns)
    elif draw(st.booleans()):
        shape[0] += 2
        order = draw(st.permutations(range(shape[0])))
        options["cache_batch_idx"] = torch.tensor(order[:batch], dtype=torch.int32)
    caches = [draw(tensors(tuple(shape), dtype)).clone() for _ in range(2)]
    q = draw(tensors((batch, sq, heads, head_dim), dtype))
    if new:
        for name in ("k", "v"):
            options[name] = draw(tensors((batch, new, heads_k, head_dim), dtype))
        if draw(st.booleans()):
            rows = capacity + 40
            rotary_dim = 16 * draw(st.integers(1, head_dim // 16))
            angles = torch.linspace(0, 50, rows * rotary_dim // 2).view(rows, -1)
            options["rotary_cos"] = angles.cos().to(dtype)
            options["rotary_sin"] = angles.sin().to(dtype)
            options["rotary_interleaved"] = draw(st.booleans())
    return q, *caches, options, draw(st.sampled_from((0, 0, 1, 2, 7)))


@settings(**COMMON, max_examples=120)
@given(cache_calls())
def test_cache(call):
    q, k_cache, v_cache, options, num_splits = call
    before = k_cache.clone(), v_cache.clone()
    actual = flash_attn.flash_attn_with_kvcache(
        q, k_cache, v_cache, **options, num_splits=num_splits, return_softmax_lse=True
    )
    rotary = "rotary_cos" in options
    assert_attention_close(
        actual,
        reference.kvcache_attention,
        (q, *before),
        **options,
        lse_dtype=q.dtype if rotary else FP32,
    )


# -------------------------------------------------------------------------------------------------
# Exact properties


@settings(**COMMON, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 130), st.integers(1, 128), st.sampled_from(DTYPES))
def test_equal_values_give_that_value(sq, sk, head_dim, dtype):
    """The weights of a row add up to one: a constant comes out as that constant."""
    q, k = torch.randn(1, sq, 2, head_dim), torch.randn(1, sk, 2, head_dim)
    v = torch.full((1, sk, 2, head_dim), 0.75)
    out = flash_attn.flash_attn_func(q.to(dtype), k.to(dtype), v.to(dtype))
    torch.testing.assert_close(
        out.double(),
        torch.full_like(out, 0.75, dtype=torch.float64),
        rtol=2e-2 if dtype != FP32 else 1e-6,
        atol=0.0,
    )


@settings(**COMMON, max_examples=40)
@given(st.integers(1, 40), st.integers(1, 90), st.integers(0, 10**6))
def test_order_of_keys_does_not_matter(sq, sk, seed):
    generator = new_generator(seed)
    q = randn(1, sq, 2, 32, generator=generator)
    k, v = (randn(1, sk, 2, 32, generator=generator) for _ in range(2))
    order = torch.randperm(sk, generator=generator)
    torch.testing.assert_close(
        flash_attn.flash_attn_func(q, k[:, order], v[:, order]),
        flash_attn.flash_attn_func(q, k, v),
        **CLOSE,
    )


@settings(**COMMON, max_examples=40)
@given(st.integers(1, 60), st.integers(1, 60), st.integers(1, 40), st.booleans())
def test_causal_rows_do_not_see_the_future(sq, sk, cut, backward):
    """Changing keys beyond the diagonal of a row changes nothing in it, bitwise."""
    q, k, v = randn(1, sq, 2, 32), randn(1, sk, 2, 32), randn(1, sk, 2, 32)
    row = min(cut, sq) - 1
    end = max(0, row + sk - sq + 1)
    before = flash_attn.flash_attn_func(q, k, v, causal=True)[:, : row + 1]
    k[:, end:], v[:, end:] = 50.0, -1e30
    after = flash_attn.flash_attn_func(q, k, v, causal=True)[:, : row + 1]
    assert torch.equal(before, after)


@pytest.mark.cpu  # 16-bit keys do not hold the sum
@settings(**COMMON, max_examples=30)
@given(st.integers(1, 50), st.integers(1, 80), st.floats(-5.0, 5.0))
def test_a_constant_added_to_all_scores(sq, sk, shift):
    """Adds to the log-sum-exp and leaves the output alone."""
    q, k, v = torch.randn(1, sq, 2, 32), torch.randn(1, sk, 2, 32), torch.randn(1, sk, 2, 32)
    q[..., 0] = 1.0
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, softmax_scale=1.0, return_attn_probs=True)
    k[..., 0] += shift
    moved, moved_lse, _ = flash_attn.flash_attn_func(
        q, k, v, softmax_scale=1.0, return_attn_probs=True
    )
    torch.testing.assert_close(moved_lse, lse + shift, rtol=1e-5, atol=1e-4)
    torch.testing.assert_close(moved, out, rtol=1e-4, atol=1e-4)
