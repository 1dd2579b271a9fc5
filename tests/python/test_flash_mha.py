"""FlashMHA, and the modules of the first generation."""

import copy
import inspect
import math

import pytest
import reference
import torch
from checks import BF16, CLOSE, DEVICE, DTYPE, FP32, assert_close, randn
from module_checks import DIM, HEAD_DIM, HEADS, check_attention, generate, qkv

import flash_attn
from flash_attn import flash_attention as first_generation
from flash_attn.modules.mha import (
    MHA,
    FlashAttention,
    FlashCrossAttention,
    FlashMHA,
    FlashSelfAttention,
)
from flash_attn.utils.generation import InferenceParams

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


def computed_in(dtype, module, x):
    projections = copy.deepcopy(module).to(dtype)
    q, k, v = projections.Wqkv(x.to(dtype)).unflatten(-1, (3, HEADS, HEAD_DIM)).unbind(2)
    context, _ = reference.attention(q, k, v, causal=module.causal, dtype=dtype)
    return projections.out_proj(context.flatten(-2))


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@torch.no_grad()
def test_flash_mha(causal, dtype):
    module = FlashMHA(DIM, HEADS, causal=causal, dtype=dtype)
    x = torch.randn(2, 17, DIM).to(dtype)
    out = module(x)
    assert out.shape == x.shape and out.dtype == dtype

    assert_close(out, computed_in(torch.float64, module, x), computed_in(dtype, module, x), "out")


def test_flash_mha_resets_its_parameters():
    module = FlashMHA(DIM, HEADS, device="meta").to_empty(device=DEVICE)
    torch.manual_seed(3)
    module.reset_parameters()
    torch.manual_seed(3)
    fresh = FlashMHA(DIM, HEADS)
    for name, value in fresh.state_dict().items():
        assert torch.equal(module.state_dict()[name], value)


def test_flash_mha_loads_first_generation_weights():
    old = first_generation.FlashMHA(DIM, HEADS, causal=True, dtype=DTYPE)
    new = FlashMHA(DIM, HEADS, causal=True, dtype=DTYPE)
    new.load_state_dict(old.state_dict())
    x = randn(2, 17, DIM)
    assert torch.equal(new(x), old(x)[0])


def test_flash_mha_dropout_acts_in_training_only():
    module = FlashMHA(DIM, HEADS, dropout=0.5, dtype=DTYPE)
    x = randn(2, 17, DIM)
    assert not torch.equal(module(x), module(x))
    module.eval()
    plain = FlashMHA(DIM, HEADS, dtype=DTYPE)
    plain.load_state_dict(module.state_dict())
    assert torch.equal(module(x), plain(x))


def test_flash_mha_padding_mask():
    module = FlashMHA(DIM, HEADS, causal=True, dtype=DTYPE)
    mask = torch.arange(17) < torch.tensor([[17], [6]])
    x = randn(2, 17, DIM)
    out = module(x.masked_fill(~mask[..., None], math.nan), key_padding_mask=mask)
    assert (out[~mask] == 0).all()
    torch.testing.assert_close(out[:1], module(x[:1]), **CLOSE)
    torch.testing.assert_close(out[1:, :6], module(x[1:, :6]), **CLOSE)
    packed = module(x[mask], cu_seqlens=torch.tensor([0, 17, 23], dtype=torch.int32), max_seqlen=17)
    assert torch.equal(packed, out[mask])


@torch.inference_mode()
def test_flash_mha_generation():
    module = FlashMHA(DIM, HEADS, causal=True, layer_idx=1, dropout=0.5, dtype=DTYPE).eval()
    x = randn(2, 12, DIM)
    out = generate(module, x, [8, 1, 1, 2], InferenceParams(max_seqlen=12, max_batch_size=2))
    torch.testing.assert_close(out, module(x), **(CLOSE or {"rtol": 1e-4, "atol": 1e-5}))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize(
    "make",
    [
        lambda: FlashMHA(DIM, HEADS, causal=True, dtype=DTYPE),
        lambda: MHA(
            DIM, HEADS, num_heads_kv=2, rotary_emb_dim=16, use_flash_attn=True, dtype=DTYPE
        ),
    ],
    ids=["FlashMHA", "MHA_rotary"],
)
def test_compile(make, dynamic):
    torch._dynamo.reset()
    module = make()
    compiled = torch.compile(module, fullgraph=True, dynamic=dynamic, backend="aot_eager")
    for seqlen in (17, 20):
        x = randn(2, seqlen, DIM).requires_grad_()
        out, expected = compiled(x), module(x)
        torch.testing.assert_close(out, expected, **CLOSE)
        dx, expected_dx = (torch.autograd.grad(o.sum(), x)[0] for o in (out, expected))
        torch.testing.assert_close(dx, expected_dx, **CLOSE)


def test_autocast():
    module = FlashMHA(DIM, HEADS, causal=True)
    x = torch.randn(2, 17, DIM)
    with torch.autocast(DEVICE.type, dtype=BF16):
        out = module(x)
    assert out.dtype == BF16
    expected = computed_in(FP32, module, x)
    torch.testing.assert_close(out.float(), expected, rtol=0.05, atol=0.05)


def test_copies_and_pickles(tmp_path):
    module = FlashMHA(DIM, HEADS, causal=True, dtype=DTYPE)
    x = randn(2, 5, DIM)
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
    module = first_generation.FlashMHA(
        DIM, HEADS, bias=False, attention_dropout=0.3, causal=True, dtype=DTYPE
    )
    assert set(module.state_dict()) == {"Wqkv.weight", "out_proj.weight"}
    x = randn(2, 17, DIM)
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
