"""MHA: the same whichever way attention is computed, packed, padded and generating with a cache."""

import math
from itertools import pairwise

import pytest
import reference
import torch
from module_checks import DIM, HEAD_DIM, HEADS, generate

from flash_attn.modules.mha import (
    MHA,
    _update_kv_cache,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

pytestmark = pytest.mark.cpu  # modules are compared in float32; their kernels are tested elsewhere

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
