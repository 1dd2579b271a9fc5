"""The modules: against the reference, against each other, and generating with a cache."""

import copy
import inspect
import math
from itertools import pairwise

import pytest
import reference
import torch
from checks import BF16, FP32, assert_close

import flash_attn
from flash_attn import flash_attention as first_generation
from flash_attn.modules.mha import (
    MHA,
    CrossAttention,
    FlashAttention,
    FlashCrossAttention,
    FlashMHA,
    FlashSelfAttention,
    SelfAttention,
    _update_kv_cache,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

DIM, HEADS, HEAD_DIM = 128, 4, 32


def check_attention(out, q, k, v, **options):
    expected, _ = reference.attention(q, k, v, **options)
    naive, _ = reference.attention(q, k, v, **options, dtype=q.dtype)
    assert_close(out, expected, naive, "out")


def qkv(batch=2, seqlen=23, heads=HEADS, dtype=FP32):
    return torch.randn(batch, seqlen, 3, heads, HEAD_DIM).to(dtype)


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
    q, kv = torch.randn(2, 9, HEADS, HEAD_DIM), torch.randn(2, 21, 2, 2, HEAD_DIM)
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
    kv = torch.randn(2, 31, 2, 2, HEAD_DIM)
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


# --------------------------------------------------------------------------------------------------
# MHA: the same whichever way attention is computed

CONFIGURATIONS = {
    "self": {},
    "causal": {"causal": True},
    "no_bias": {"qkv_proj_bias": False, "out_proj_bias": False},
    "grouped": {"num_heads_kv": 2, "causal": True},
    "multi_query": {"num_heads_kv": 1},
    "scale": {"softmax_scale": 0.3},
    "rotary": {"rotary_emb_dim": 32, "causal": True},
    "rotary_partial": {"rotary_emb_dim": 12, "rotary_emb_interleaved": True},
    "rotary_grouped": {"rotary_emb_dim": 16, "num_heads_kv": 2, "rotary_emb_base": 500.0},
    "xpos": {"rotary_emb_dim": 32, "rotary_emb_scale_base": 64, "causal": True},
    "dwconv": {"dwconv": True, "causal": True},
    "dwconv_grouped": {"dwconv": True, "num_heads_kv": 2},
    "cross": {"cross_attn": True},
    "cross_grouped": {"cross_attn": True, "num_heads_kv": 2, "causal": True},
    "cross_dwconv": {"cross_attn": True, "dwconv": True},
    "checkpointing": {"checkpointing": True},
    "checkpointing_grouped": {"checkpointing": True, "num_heads_kv": 2},
}


def flash_and_plain(**options):
    flash = MHA(DIM, HEADS, use_flash_attn=True, **options)
    plain = MHA(DIM, HEADS, **options | {"checkpointing": False})
    plain.load_state_dict(flash.state_dict())
    return flash, plain


def gradients(module, out, weights, *inputs):
    return torch.autograd.grad((out * weights).sum(), [*inputs, *module.parameters()])


@pytest.mark.parametrize("name", CONFIGURATIONS)
def test_mha_flash_and_plain_agree(name):
    options = CONFIGURATIONS[name]
    flash, plain = flash_and_plain(**options)
    x = torch.randn(2, 17, DIM, requires_grad=True)
    inputs = [x]
    if options.get("cross_attn"):
        inputs.append(torch.randn(2, 29, DIM, requires_grad=True))
    out, expected = flash(*inputs), plain(*inputs)
    assert out.shape == x.shape
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
    weights = torch.randn(out.shape)
    actual_gradients = gradients(flash, out, weights, *inputs)
    expected_gradients = gradients(plain, expected, weights, *inputs)
    for actual, wanted in zip(actual_gradients, expected_gradients, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-4)


def test_mha_is_attention_between_projections():
    module = MHA(DIM, HEADS, num_heads_kv=2, causal=True, use_flash_attn=True).double()
    x = torch.randn(2, 17, DIM, dtype=torch.float64)
    q, k, v = module.Wqkv(x).split([DIM, DIM // 2, DIM // 2], dim=-1)
    q = q.unflatten(-1, (HEADS, HEAD_DIM))
    k, v = (t.unflatten(-1, (2, HEAD_DIM)) for t in (k, v))
    context, _ = reference.attention(q, k, v, causal=True)
    expected = module.out_proj(context.flatten(-2))
    torch.testing.assert_close(module.float()(x.float()), expected.float())


@pytest.mark.parametrize(
    "options",
    [{"use_alibi": True}, {"window_size": (4, 0)}, {"use_alibi": True, "num_heads_kv": 2}],
    ids=str,
)
def test_mha_alibi_and_windows(options):
    module = MHA(DIM, HEADS, causal=True, use_flash_attn=True, **options)
    x = torch.randn(2, 17, DIM)
    heads_k = module.num_heads_kv
    q, k, v = module.Wqkv(x).unflatten(-1, (-1, HEAD_DIM)).split([HEADS, heads_k, heads_k], dim=2)
    slopes = torch.tensor(get_alibi_slopes(HEADS)) if "use_alibi" in options else None
    context, _ = reference.attention(
        q,
        k,
        v,
        causal=True,
        alibi_slopes=slopes,
        window_size=options.get("window_size", (-1, -1)),
    )
    expected = module.out_proj(context.flatten(-2).float())
    torch.testing.assert_close(module(x), expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("name", ["self", "grouped", "rotary", "rotary_grouped"])
def test_mha_packed_sequences(name):
    module = MHA(DIM, HEADS, use_flash_attn=True, **CONFIGURATIONS[name])
    bounds = [0, 5, 18, 19]
    x = torch.randn(19, DIM)
    out = module(x, cu_seqlens=torch.tensor(bounds, dtype=torch.int32), max_seqlen=13)
    for begin, end in pairwise(bounds):
        torch.testing.assert_close(out[begin:end], module(x[None, begin:end])[0])


def test_mha_packed_cross_attention():
    module = MHA(DIM, HEADS, cross_attn=True, use_flash_attn=True)
    bounds, bounds_k = [0, 5, 18], [0, 9, 11]
    x, x_kv = torch.randn(18, DIM), torch.randn(11, DIM)
    out = module(
        x,
        x_kv,
        cu_seqlens=torch.tensor(bounds, dtype=torch.int32),
        max_seqlen=13,
        cu_seqlens_k=torch.tensor(bounds_k, dtype=torch.int32),
        max_seqlen_k=9,
    )
    for (begin, end), (begin_k, end_k) in zip(pairwise(bounds), pairwise(bounds_k), strict=True):
        expected = module(x[None, begin:end], x_kv[None, begin_k:end_k])[0]
        torch.testing.assert_close(out[begin:end], expected)


@pytest.mark.parametrize("name", ["self", "causal", "grouped", "rotary", "cross", "cross_grouped"])
def test_mha_padding_mask(name):
    flash, plain = flash_and_plain(**CONFIGURATIONS[name])
    cross = flash.cross_attn
    mask = torch.arange(17) < torch.tensor([[17], [6], [11]])
    x = torch.randn(3, 17, DIM)
    poisoned = x.masked_fill(~mask[..., None], math.nan)
    if cross:
        x_q = torch.randn(3, 5, DIM)
        out = flash(x_q, poisoned, key_padding_mask=mask)
        torch.testing.assert_close(out, plain(x_q, x, key_padding_mask=mask), rtol=1e-4, atol=1e-5)
        return
    out = flash(poisoned, key_padding_mask=mask)
    expected = plain(x, key_padding_mask=mask)
    torch.testing.assert_close(out[mask], expected[mask], rtol=1e-4, atol=1e-5)
    assert (out[~mask] == 0).all()


def test_mha_subset_of_queries_and_residual():
    module = MHA(DIM, HEADS, cross_attn=True, use_flash_attn=True, return_residual=True)
    x = torch.randn(2, 17, DIM)
    whole, residual = module(x)
    assert residual is x
    first, _ = module(x, mixer_subset=slice(0, 1))
    torch.testing.assert_close(first, whole[:, :1])


FLASH_ATTENTION_2_NAMES = {
    "self": {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"},
    "no_bias": {"Wqkv.weight", "out_proj.weight"},
    "rotary": {"Wqkv.weight", "Wqkv.bias", "out_proj.weight", "out_proj.bias"},
    "cross": {"Wq.weight", "Wq.bias", "Wkv.weight", "Wkv.bias", "out_proj.weight", "out_proj.bias"},
    "dwconv": {
        "Wqkv.weight",
        "Wqkv.bias",
        "dwconv_qkv.weight",
        "dwconv_qkv.bias",
        "out_proj.weight",
        "out_proj.bias",
    },
    "dwconv_grouped": {
        "Wqkv.weight",
        "Wqkv.bias",
        "dwconv_q.weight",
        "dwconv_q.bias",
        "dwconv_kv.weight",
        "dwconv_kv.bias",
        "out_proj.weight",
        "out_proj.bias",
    },
}


@pytest.mark.parametrize("name", FLASH_ATTENTION_2_NAMES)
def test_mha_state_dict_names(name):
    module = MHA(DIM, HEADS, use_flash_attn=True, **CONFIGURATIONS[name])
    assert set(module.state_dict()) == FLASH_ATTENTION_2_NAMES[name]
    grouped = MHA(DIM, HEADS, num_heads_kv=2)
    assert grouped.Wqkv.weight.shape == (DIM + 2 * 2 * HEAD_DIM, DIM)


def test_mha_reset_parameters():
    module = MHA(DIM, HEADS, dwconv=True, device="meta").to_empty(device="cpu")
    torch.manual_seed(1)
    module.reset_parameters()
    torch.manual_seed(1)
    other = MHA(DIM, HEADS, dwconv=True)
    other.reset_parameters()
    assert all(parameter.isfinite().all() for parameter in module.parameters())
    for name, parameter in module.state_dict().items():
        assert parameter.shape == other.state_dict()[name].shape


def test_mha_bad_input():
    with pytest.raises(ValueError, match="embed_dim 100 must be divisible by num_heads 3"):
        MHA(100, 3)
    with pytest.raises(ValueError, match="num_heads 4 must be divisible by num_heads_kv 3"):
        MHA(DIM, 4, num_heads_kv=3)
    with pytest.raises(ValueError, match="does not support cross-attention"):
        MHA(DIM, 4, cross_attn=True, rotary_emb_dim=16)
    with pytest.raises(ValueError, match="need use_flash_attn"):
        MHA(DIM, 4, use_alibi=True)
    with pytest.raises(ValueError, match="need use_flash_attn"):
        MHA(DIM, 4, window_size=(3, 0))
    x, mask = torch.randn(2, 5, DIM), torch.ones(2, 5, dtype=torch.bool)
    cu_seqlens = torch.tensor([0, 10], dtype=torch.int32)
    packed = {"cu_seqlens": cu_seqlens, "max_seqlen": 10}
    flash, plain = MHA(DIM, HEADS, use_flash_attn=True), MHA(DIM, HEADS)
    with pytest.raises(RuntimeError, match="cu_seqlens needs max_seqlen and use_flash_attn"):
        plain(x.flatten(0, 1), **packed)
    with pytest.raises(RuntimeError, match="cu_seqlens needs max_seqlen and use_flash_attn"):
        flash(x.flatten(0, 1), cu_seqlens=cu_seqlens)
    with pytest.raises(RuntimeError, match="exclude each other"):
        flash(x.flatten(0, 1), key_padding_mask=mask, **packed)
    with pytest.raises(RuntimeError, match="x_kv and mixer_subset are for cross-attention"):
        flash(x, x)
    with pytest.raises(RuntimeError, match="inference_params excludes"):
        flash(x, key_padding_mask=mask, inference_params=InferenceParams(5, 2))
    with pytest.raises(RuntimeError, match="Generation requires layer_idx"):
        flash(x, inference_params=InferenceParams(5, 2))
    with pytest.raises(RuntimeError, match="excludes dwconv"):
        MHA(DIM, HEADS, dwconv=True, use_flash_attn=True)(x, key_padding_mask=mask)
    with pytest.raises(RuntimeError, match="excludes dwconv"):
        options = {"dwconv": True, "cross_attn": True, "use_flash_attn": True}
        MHA(DIM, HEADS, **options)(x, key_padding_mask=mask)


# --------------------------------------------------------------------------------------------------
# Generation

GENERATION = {
    "plain": {"use_flash_attn": False},
    "flash": {},
    "grouped": {"num_heads_kv": 2},
    "scale": {"softmax_scale": 0.3},
    "rotary": {"rotary_emb_dim": 32},
    "rotary_interleaved": {"rotary_emb_dim": 16, "rotary_emb_interleaved": True},
    "rotary_grouped": {"rotary_emb_dim": 16, "num_heads_kv": 1},
    "rotary_not_16": {"rotary_emb_dim": 12},
    "rotary_plain": {"rotary_emb_dim": 32, "use_flash_attn": False},
    "xpos": {"rotary_emb_dim": 32, "rotary_emb_scale_base": 64},
    "alibi": {"use_alibi": True},
    "window": {"window_size": (3, 0)},
}


def generate(module, x, steps, params):
    """Passes x in pieces of the given lengths."""
    outputs, position = [], 0
    for step in steps:
        outputs.append(module(x[:, position : position + step], inference_params=params))
        position += step
        params.seqlen_offset = position
    return torch.cat(outputs, dim=1)


@pytest.mark.parametrize("name", GENERATION)
@torch.inference_mode()
def test_generation_gives_what_the_whole_sequence_gives(name):
    options = {"use_flash_attn": True} | GENERATION[name]
    module = MHA(DIM, HEADS, causal=True, layer_idx=3, **options).eval()
    x = torch.randn(2, 14, DIM)
    expected = module(x)
    for steps in ([14], [9, 1, 1, 1, 1, 1], [1] * 14, [5, 4, 5]):
        params = InferenceParams(max_seqlen=20, max_batch_size=2)
        out = generate(module, x, steps, params)
        torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-5)
        assert set(params.key_value_memory_dict) == {3}


@torch.inference_mode()
def test_generation_in_a_part_of_the_cache():
    module = MHA(DIM, HEADS, causal=True, layer_idx=0, use_flash_attn=True, rotary_emb_dim=16)
    x = torch.randn(2, 7, DIM)
    cache = module.allocate_inference_cache(5, 9).fill_(math.nan)
    assert cache.shape == (5, 9, 2, HEADS, HEAD_DIM)
    params = InferenceParams(9, 5, batch_size_offset=2, key_value_memory_dict={0: cache})
    out = generate(module, x, [4, 1, 2], params)
    torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-5)
    assert cache[2:4, :7].isfinite().all()
    assert cache[:2].isnan().all() and cache[4:].isnan().all() and cache[2:4, 7:].isnan().all()


@torch.inference_mode()
@pytest.mark.parametrize("rotary_dim", [0, 12, 16])
def test_generation_with_lengths_of_each_sequence(rotary_dim):
    module = MHA(
        DIM, HEADS, causal=True, layer_idx=0, use_flash_attn=True, rotary_emb_dim=rotary_dim
    )
    lengths = [6, 3]
    x = torch.randn(2, 8, DIM)
    params = InferenceParams(max_seqlen=10, max_batch_size=2)
    module(x[:, :6], inference_params=params)  # the second prompt is padded
    params.seqlen_offset = 6
    params.lengths_per_sample = torch.tensor(lengths, dtype=torch.int32)
    step = torch.stack([x[row, length : length + 1] for row, length in enumerate(lengths)])
    out = module(step, inference_params=params)
    for row, length in enumerate(lengths):
        expected = module(x[row : row + 1, : length + 1])[:, -1]
        torch.testing.assert_close(out[row], expected, rtol=1e-4, atol=1e-5)


def test_update_kv_cache():
    params = InferenceParams(max_seqlen=6, max_batch_size=3)
    first, second = torch.randn(2, 4, 2, 1, 8), torch.randn(2, 1, 2, 1, 8)
    assert torch.equal(_update_kv_cache(first, params, 0), first)
    params.seqlen_offset = 4
    kv = _update_kv_cache(second, params, 0)
    assert torch.equal(kv, torch.cat([first, second], dim=1))
    assert kv.data_ptr() == params.key_value_memory_dict[0].data_ptr()
    assert params.key_value_memory_dict[0].shape == (3, 6, 2, 1, 8)
    with pytest.raises(RuntimeError, match="no room for rows 0 to 2, positions 4 to 8"):
        _update_kv_cache(first, params, 0)
    params.batch_size_offset = 2
    with pytest.raises(RuntimeError, match="no room for rows 2 to 4"):
        _update_kv_cache(second, params, 0)


def test_decoding_needs_a_cache():
    module = MHA(DIM, HEADS, causal=True, layer_idx=0, use_flash_attn=True)
    params = InferenceParams(max_seqlen=6, max_batch_size=1, seqlen_offset=3)
    with pytest.raises(RuntimeError, match="layer 0 has no cache"):
        module(torch.randn(1, 1, DIM), inference_params=params)


def test_inference_params_reset():
    lengths = torch.tensor([3, 4], dtype=torch.int32)
    params = InferenceParams(6, 2, seqlen_offset=4, lengths_per_sample=lengths)
    params.key_value_memory_dict[0] = cache = torch.zeros(1)
    params.reset(8, 3)
    assert (params.max_seqlen, params.max_batch_size, params.seqlen_offset) == (8, 3, 0)
    assert lengths.tolist() == [0, 0] and params.key_value_memory_dict[0] is cache


# --------------------------------------------------------------------------------------------------
# FlashMHA


def test_signatures():
    expected = {
        FlashAttention: "(num_heads, head_dim, dropout=0.0, causal=False, window_size=(-1, -1), "
        "alibi_slopes=None)",
        FlashMHA: "(embed_dim, num_heads, dropout=0.0, causal=False, layer_idx=None, device=None, "
        "dtype=None)",
        first_generation.FlashAttention: "(softmax_scale=None, attention_dropout=0.0)",
        first_generation.FlashMHA: "(embed_dim, num_heads, bias=True, batch_first=True, "
        "attention_dropout=0.0, causal=False, device=None, dtype=None)",
        FlashSelfAttention: "(causal=False, softmax_scale=None, attention_dropout=0.0, "
        "window_size=(-1, -1), alibi_slopes=None, deterministic=False)",
        FlashCrossAttention: "(causal=False, softmax_scale=None, attention_dropout=0.0, "
        "alibi_slopes=None, window_size=(-1, -1), deterministic=False)",
    }
    for cls, text in expected.items():
        parameters = inspect.signature(cls).parameters.values()
        plain = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
        assert str(inspect.Signature(plain)) == text
    assert flash_attn.FlashAttention is FlashAttention and flash_attn.FlashMHA is FlashMHA


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@torch.no_grad()
def test_flash_mha(causal, dtype):
    module = FlashMHA(DIM, HEADS, causal=causal, dtype=dtype)
    x = torch.randn(2, 17, DIM).to(dtype)
    out = module(x)
    assert out.shape == x.shape and out.dtype == dtype

    def computed_in(dtype):
        projections = copy.deepcopy(module).to(dtype)
        q, k, v = projections.Wqkv(x.to(dtype)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
        context, _ = reference.attention(q, k, v, causal=causal, dtype=dtype)
        return projections.out_proj(context.flatten(-2))

    assert_close(out, computed_in(torch.float64), computed_in(dtype), "out")


def test_flash_mha_resets_its_parameters():
    module = FlashMHA(DIM, HEADS, device="meta").to_empty(device="cpu")
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    fresh = FlashMHA(DIM, HEADS)
    for name, value in fresh.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_flash_mha_loads_first_generation_weights():
    old = first_generation.FlashMHA(DIM, HEADS, causal=True)
    new = FlashMHA(DIM, HEADS, causal=True)
    new.load_state_dict(old.state_dict())
    x = torch.randn(2, 17, DIM)
    assert torch.equal(new(x), old(x)[0])


def test_flash_mha_dropout_acts_in_training_only():
    module = FlashMHA(DIM, HEADS, dropout=0.5)
    x = torch.randn(2, 17, DIM)
    assert not torch.equal(module(x), module(x))
    module.eval()
    plain = FlashMHA(DIM, HEADS)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x))


def test_flash_mha_padding_mask():
    module = FlashMHA(DIM, HEADS, causal=True)
    mask = torch.arange(17) < torch.tensor([[17], [6]])
    x = torch.randn(2, 17, DIM)
    out = module(x.masked_fill(~mask[..., None], math.nan), key_padding_mask=mask)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[:1], module(x[:1]))
    torch.testing.assert_close(out[1:, :6], module(x[1:, :6]))
    packed = module(x[mask], cu_seqlens=torch.tensor([0, 17, 23], dtype=torch.int32), max_seqlen=17)
    assert torch.equal(packed, out[mask])


@torch.inference_mode()
def test_flash_mha_generation():
    module = FlashMHA(DIM, HEADS, causal=True, layer_idx=1, dropout=0.5).eval()
    x = torch.randn(2, 12, DIM)
    out = generate(module, x, [8, 1, 1, 2], InferenceParams(max_seqlen=12, max_batch_size=2))
    torch.testing.assert_close(out, module(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: FlashMHA(DIM, HEADS, causal=True),
        lambda: MHA(DIM, HEADS, num_heads_kv=2, rotary_emb_dim=16, use_flash_attn=True),
    ],
    ids=["FlashMHA", "MHA_rotary"],
)
def test_compile(make, dynamic):
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (17, 20):
        x = torch.randn(2, seqlen, DIM, requires_grad=True)
        out, expected = compiled(x), module(x)
        torch.testing.assert_close(out, expected)
        dx, expected_dx = (torch.autograd.grad(o.sum(), x)[0] for o in (out, expected))
        torch.testing.assert_close(dx, expected_dx)


def test_autocast():
    module = FlashMHA(DIM, HEADS, causal=True)
    x = torch.randn(2, 17, DIM)
    with torch.autocast("cpu", dtype=BF16):
        out = module(x)
    assert out.dtype == BF16
    torch.testing.assert_close(out.float(), module(x), rtol=0.05, atol=0.05)


def test_copies_and_pickles(tmp_path):
    module = FlashMHA(DIM, HEADS, causal=True)
    x = torch.randn(2, 5, DIM)
    assert torch.equal(copy.deepcopy(module)(x), module(x))
    torch.save(module, tmp_path / "module.pt")
    loaded = torch.load(tmp_path / "module.pt", weights_only=False)
    assert torch.equal(loaded(x), module(x))
    assert "causal=True" in repr(module)


# --------------------------------------------------------------------------------------------------
# The first generation


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_first_generation_attention(causal):
    module = first_generation.FlashAttention(softmax_scale=0.2)
    x = qkv()
    out, weights = module(x, causal=causal)
    assert weights is None
    check_attention(out, *x.unbind(2), causal=causal, softmax_scale=0.2)

    mask = torch.arange(23) < torch.tensor([[23], [6]])
    masked, _ = module(x.masked_fill(~mask[..., None, None, None], math.nan), mask, causal=causal)
    assert (masked[~mask] == 0).all()
    check_attention(masked[:1], *x[:1].unbind(2), causal=causal, softmax_scale=0.2)
    check_attention(masked[1:, :6], *x[1:, :6].unbind(2), causal=causal, softmax_scale=0.2)

    cu_seqlens = torch.tensor([0, 23, 29], dtype=torch.int32)
    packed, _ = module(x[mask], causal=causal, cu_seqlens=cu_seqlens, max_s=23)
    assert torch.equal(packed, masked[mask])


def test_first_generation_mha():
    module = first_generation.FlashMHA(DIM, HEADS, bias=False, attention_dropout=0.3, causal=True)
    assert set(module.state_dict()) == {"Wqkv.weight", "out_proj.weight"}
    x = torch.randn(2, 17, DIM)
    assert not torch.equal(module(x)[0], module(x)[0])
    module.eval()
    out, weights = module(x, key_padding_mask=torch.ones(2, 17, dtype=torch.bool))
    assert weights is None and torch.equal(out, module(x)[0])


def test_first_generation_bad_input():
    module = first_generation.FlashAttention()
    with pytest.raises(RuntimeError, match="does not return attention weights"):
        module(qkv(), need_weights=True)
    with pytest.raises(RuntimeError, match="max_s must be given"):
        module(qkv()[0], cu_seqlens=torch.tensor([0, 23], dtype=torch.int32))
    with pytest.raises(ValueError, match="takes the batch first"):
        first_generation.FlashMHA(DIM, HEADS, batch_first=False)
    with pytest.raises(ValueError, match="must be divisible"):
        first_generation.FlashMHA(100, 3)
