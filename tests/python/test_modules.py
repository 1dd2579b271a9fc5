"""The modules without projections against the reference, and ALiBi slopes."""

import inspect
from itertools import pairwise

import pytest
import torch
from checks import BF16, FP32, randn
from module_checks import HEAD_DIM, HEADS, check_attention, qkv

from flash_attn.modules.mha import (
    CrossAttention,
    FlashAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)

# --------------------------------------------------------------------------------------------------
# ALiBi slopes


def test_alibi_slopes():
    assert get_alibi_slopes(1) == [2.0**-8]
    assert get_alibi_slopes(8) == [2.0**-i for i in range(1, 9)]
    assert get_alibi_slopes(4) == [2.0**-2, 2.0**-4, 2.0**-6, 2.0**-8]
    assert get_alibi_slopes(6) == get_alibi_slopes(4) + get_alibi_slopes(8)[0:4:2]
    assert get_alibi_slopes(12) == get_alibi_slopes(8) + get_alibi_slopes(16)[0:8:2]


# --------------------------------------------------------------------------------------------------
# Attention without projections


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("heads_k", [4, 2, 1])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True},
        {"window_size": (5, 2)},
        {"alibi_slopes": get_alibi_slopes(HEADS), "causal": True},
    ],
    ids=["full", "causal", "window", "alibi"],
)
def test_flash_attention(options, heads_k, dtype):
    module = FlashAttention(HEADS, HEAD_DIM, **options).to(dtype)
    module.reset_parameters()
    assert not list(module.parameters()) and not module.state_dict()
    q = torch.randn(2, 19, HEADS, HEAD_DIM).to(dtype)
    k, v = (torch.randn(2, 23, heads_k, HEAD_DIM).to(dtype) for _ in range(2))
    if "alibi_slopes" in options:
        options = options | {"alibi_slopes": torch.tensor(options["alibi_slopes"])}
    check_attention(module(q, k, v), q, k, v, **options)


def test_flash_attention_checks_its_input():
    q = torch.randn(2, 5, HEADS, HEAD_DIM)
    with pytest.raises(RuntimeError, match=r"q must have shape \(batch, seqlen, 3, 32\)"):
        FlashAttention(3, HEAD_DIM)(q, q, q)


SELF_OPTIONS = {
    "full": {},
    "causal": {"causal": True},
    "scale": {"softmax_scale": 0.3},
    "window": {"window_size": (4, 1)},
    "alibi": {"alibi_slopes": torch.tensor(get_alibi_slopes(HEADS))},
}


@pytest.mark.parametrize("name", SELF_OPTIONS)
def test_flash_self_attention(name):
    options = SELF_OPTIONS[name]
    module = FlashSelfAttention(**options)
    x = qkv()
    q, k, v = x.unbind(2)
    check_attention(module(x), q, k, v, **options)
    check_attention(module(x, causal=True), q, k, v, **options | {"causal": True})

    bounds = [0, 7, 7, 23, 46]
    cu_seqlens = torch.tensor(bounds, dtype=torch.int32)
    packed = x.flatten(0, 1)
    out = module(packed, cu_seqlens=cu_seqlens, max_seqlen=23)
    for begin, end in pairwise(bounds):
        if begin == end:
            continue
        q, k, v = packed[None, begin:end].unbind(2)
        check_attention(out[None, begin:end], q, k, v, **options)


@pytest.mark.parametrize("name", SELF_OPTIONS)
def test_flash_cross_attention(name):
    options = SELF_OPTIONS[name]
    module = FlashCrossAttention(**options)
    q, kv = randn(2, 9, HEADS, HEAD_DIM), randn(2, 21, 2, 2, HEAD_DIM)
    check_attention(module(q, kv), q, *kv.unbind(2), **options)

    bounds_q, bounds_k = [0, 7, 18], [0, 30, 42]
    packed_q, packed_kv = q.flatten(0, 1), kv.flatten(0, 1)
    out = module(
        packed_q,
        packed_kv,
        cu_seqlens=torch.tensor(bounds_q, dtype=torch.int32),
        max_seqlen=11,
        cu_seqlens_k=torch.tensor(bounds_k, dtype=torch.int32),
        max_seqlen_k=30,
    )
    for (begin, end), (begin_k, end_k) in zip(pairwise(bounds_q), pairwise(bounds_k), strict=True):
        k, v = packed_kv[None, begin_k:end_k].unbind(2)
        check_attention(out[None, begin:end], packed_q[None, begin:end], k, v, **options)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_plain_modules(causal):
    x = qkv()
    q, k, v = x.unbind(2)
    check_attention(SelfAttention(causal=causal)(x), q, k, v, causal=causal)
    kv = randn(2, 31, 2, 2, HEAD_DIM)
    check_attention(CrossAttention(causal=causal)(q, kv), q, *kv.unbind(2), causal=causal)
    check_attention(CrossAttention()(q, kv, causal=causal), q, *kv.unbind(2), causal=causal)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_plain_modules_with_a_padding_mask(causal):
    lengths = [23, 11, 0]
    x = qkv(batch=3).requires_grad_()
    mask = torch.arange(23) < torch.tensor(lengths)[:, None]
    out = SelfAttention(causal=causal)(x, key_padding_mask=mask)
    out_cross = CrossAttention(causal=causal)(x[:, :, 0], x[:, :, 1:], key_padding_mask=mask)
    for row, length in enumerate(lengths):
        q, k, v = x.detach()[row : row + 1].unbind(2)
        k, v = k[:, :length], v[:, :length]
        check_attention(out_cross[row : row + 1], q, k, v, causal=causal)
        q = q[:, :length] if causal else q  # behind the last key, self-attention is not causal
        check_attention(out[row : row + 1, : q.shape[1]], q, k, v, causal=causal)
    (out.sum() + out_cross.sum()).backward()
    assert x.grad.isfinite().all()


@pytest.mark.parametrize(
    "make",
    [
        lambda p: FlashAttention(HEADS, HEAD_DIM, dropout=p),
        lambda p: FlashSelfAttention(attention_dropout=p),
        lambda p: FlashCrossAttention(attention_dropout=p),
        lambda p: SelfAttention(attention_dropout=p),
        lambda p: CrossAttention(attention_dropout=p),
    ],
    ids=["FlashAttention", "FlashSelf", "FlashCross", "Self", "Cross"],
)
def test_dropout_acts_in_training_only(make):
    x = qkv()
    module, plain = make(0.5), make(0.0)
    parameters = len(inspect.signature(module.forward).parameters)
    if isinstance(module, FlashAttention):
        tensors = x.unbind(2)
    elif isinstance(module, FlashSelfAttention | SelfAttention):
        tensors = (x,)
    else:
        tensors = (x[:, :, 0], x[:, :, 1:])
    assert parameters >= len(tensors)
    expected = plain(*tensors)
    first, second = module(*tensors), module(*tensors)
    assert not torch.equal(first, second) and not torch.equal(first, expected)
    torch.manual_seed(5)
    first = module(*tensors)
    torch.manual_seed(5)
    assert torch.equal(module(*tensors), first)
    module.eval()
    assert torch.equal(module(*tensors), expected)


def test_alibi_slopes_stay_float32():
    slopes = torch.tensor(get_alibi_slopes(6))
    module = FlashSelfAttention(alibi_slopes=slopes).to(BF16)
    assert module.alibi_slopes.dtype == FP32 and torch.equal(module.alibi_slopes, slopes)
    x = torch.randn(1, 9, 3, 6, HEAD_DIM).to(BF16)
    check_attention(module(x), *x.unbind(2), alibi_slopes=slopes)
    assert module.to("meta").alibi_slopes.is_meta
