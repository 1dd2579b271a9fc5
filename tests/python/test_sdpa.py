"""scaled_dot_product_attention through this library: the same numbers, and only when asked for."""

import pytest
import torch
from torch.nn.functional import scaled_dot_product_attention

import flash_attn.backends.native
import flash_attn.sdpa

pytestmark = pytest.mark.cpu

attention = pytest.importorskip("torch.nn.attention")
if not hasattr(attention, "register_flash_attention_impl"):
    pytest.skip("this torch has no registry", allow_module_level=True)


@pytest.fixture
def calls(monkeypatch):
    """Names of the backend's functions in the order in which they are called."""
    names = []
    for name in ("forward", "backward"):
        function = getattr(flash_attn.backends.native, name)

        def recorded(*args, _name=name, _function=function, **kwargs):
            names.append(_name)
            return _function(*args, **kwargs)

        monkeypatch.setattr(flash_attn.backends.native, name, recorded)
    return names


@pytest.fixture
def activated():
    flash_attn.sdpa.register()
    attention.activate_flash_attention_impl(flash_attn.sdpa.NAME)
    yield
    attention.restore_flash_attention_impl()


def inputs(sq=19, sk=19, heads_k=4, dtype=torch.float32):
    q = torch.randn(2, 4, sq, 32).to(dtype)
    k, v = (torch.randn(2, heads_k, sk, 32).to(dtype) for _ in range(2))
    return [x.requires_grad_() for x in (q, k, v)]


def results(tensors, **options):
    out = scaled_dot_product_attention(*tensors, **options)
    weights = torch.linspace(-1, 1, out.numel()).reshape(out.shape).to(out.dtype)
    return out, *torch.autograd.grad(out, tensors, weights)


CALLS = {
    "full": ({}, {}),
    "causal": ({}, {"is_causal": True}),
    "scale": ({}, {"scale": 0.3}),
    "cross": ({"sk": 33}, {}),
    "grouped": ({"heads_k": 2}, {"enable_gqa": True}),
    "bf16": ({"dtype": torch.bfloat16}, {"is_causal": True}),
}


@pytest.mark.parametrize("name", CALLS)
def test_served(name, calls, request):
    shape, options = CALLS[name]
    tensors = inputs(**shape)
    expected = results(tensors, **options)
    assert not calls
    request.getfixturevalue("activated")
    actual = results(tensors, **options)
    assert calls == ["forward", "backward"]
    tolerance = {"rtol": 0.05, "atol": 0.05} if name == "bf16" else {"rtol": 1e-4, "atol": 1e-5}
    for got, wanted in zip(actual, expected, strict=True):
        torch.testing.assert_close(got, wanted, **tolerance)
        assert got.stride() == wanted.stride()


@pytest.mark.parametrize("name", ["mask", "float64", "top_left"])
def test_left_to_torch(name, calls, request):
    tensors = inputs(sk=33)
    options = {}
    if name == "mask":
        options = {"attn_mask": torch.rand(19, 33) < 0.7}
    elif name == "float64":
        tensors = [x.detach().double().requires_grad_() for x in tensors]
    else:
        options = {"is_causal": True}
    expected = results(tensors, **options)
    request.getfixturevalue("activated")
    actual = results(tensors, **options)
    assert not calls
    for got, wanted in zip(actual, expected, strict=True):
        assert torch.equal(got, wanted)


def test_compiled(activated, calls):
    torch._dynamo.reset()
    tensors = inputs()
    expected = results(tensors, is_causal=True)
    compiled = torch.compile(scaled_dot_product_attention, fullgraph=True, backend="aot_eager")
    out = compiled(*tensors, is_causal=True)
    torch.testing.assert_close(out, expected[0])
    assert calls == ["forward", "backward", "forward"]


def test_only_when_activated(calls):
    scaled_dot_product_attention(*inputs())
    assert not calls
    activation = flash_attn.sdpa.activate()
    scaled_dot_product_attention(*inputs())
    activation.remove()
    scaled_dot_product_attention(*inputs())
    assert calls == ["forward"]
