"""Rotary embedding under torch.compile, and its op."""

import pytest
import torch
from checks import FP32
from rotary_checks import tables

from flash_attn.layers.rotary import (
    RotaryEmbedding,
    apply_rotary_emb,
    apply_rotary_emb_qkv_,
)


def compiled(function, **options):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend="aot_eager", **options)


@pytest.mark.parametrize("inplace", [False, True], ids=["copy", "in_place"])
@pytest.mark.parametrize("grad", [False, True], ids=["no_grad", "grad"])
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(dynamic, grad, inplace):
    cos, sin = tables(16)
    offsets = torch.tensor([1, 5])

    def function(x, offset):
        hidden = x * 2
        out = apply_rotary_emb(hidden, cos, sin, inplace=inplace, seqlen_offsets=offset)
        return out**2, hidden * 1

    for seqlen in (9, 12):
        x = torch.randn(2, seqlen, 3, 16, requires_grad=grad)
        for offset in (3, offsets):
            actual = compiled(function, dynamic=dynamic)(x, offset)
            expected = function(x, offset)
            torch.testing.assert_close(actual, expected)
            if grad:
                dx = [torch.autograd.grad(a.sum() + b.sum(), x)[0] for a, b in (actual, expected)]
                torch.testing.assert_close(dx[0], dx[1])


def test_compile_in_place_on_inputs():
    cos, sin = tables(16)
    for grad in (False, True):
        qkv = torch.randn(2, 9, 3, 4, 16, requires_grad=grad)
        actual, expected = (qkv.detach().clone().requires_grad_(grad) for _ in range(2))
        out = compiled(lambda x: apply_rotary_emb_qkv_(x, cos, sin) * 1)(actual)
        expected_out = apply_rotary_emb_qkv_(expected, cos, sin) * 1
        torch.testing.assert_close(out, expected_out)
        torch.testing.assert_close(actual.detach(), expected.detach())
        if grad:
            dx = [
                torch.autograd.grad((o**2).sum(), x)[0]
                for o, x in ((out, actual), (expected_out, expected))
            ]
            torch.testing.assert_close(dx[0], dx[1])


def test_compile_packed():
    cos, sin = tables(16)
    cu_seqlens = torch.tensor([0, 4, 17], dtype=torch.int32)
    x = torch.randn(17, 3, 16, requires_grad=True)

    def function(x, cu_seqlens):
        return apply_rotary_emb(x, cos, sin, cu_seqlens=cu_seqlens, max_seqlen=13)

    out = compiled(function)(x, cu_seqlens)
    torch.testing.assert_close(out, function(x, cu_seqlens))
    out.sum().backward()


@pytest.mark.parametrize("module", ["qkv", "q_kv", "xpos"])
def test_compile_module(module):
    embedding = RotaryEmbedding(16, scale_base=512 if module == "xpos" else None)
    x = torch.randn(2, 9, 3, 4, 16, requires_grad=True)

    def function(x):
        hidden = x * 1
        if module == "q_kv":
            q, kv = embedding(hidden[:, :, 0], hidden[:, :, 1:], seqlen_offset=2)
            return torch.cat([q.unsqueeze(2), kv], dim=2)
        return embedding(hidden, seqlen_offset=2)

    out = compiled(function)(x)
    expected = function(x)
    torch.testing.assert_close(out, expected)
    weights = torch.randn(x.shape)
    dx = [torch.autograd.grad((o * weights).sum(), x)[0] for o in (out, expected)]
    torch.testing.assert_close(dx[0], dx[1])


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
def test_opcheck(dtype):
    cos, sin = tables(8, dtype)
    x = torch.randn(2, 5, 2, 10, dtype=dtype)
    packed = torch.randn(6, 2, 10, dtype=dtype)
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    offsets = torch.tensor([1, 3])
    for tensor, options in (
        (x, {"seqlen_offset": 2, "interleaved": True}),
        (x.transpose(1, 2), {"seqlen_offsets": offsets, "conjugate": True}),
        (packed, {"cu_seqlens": cu_seqlens, "max_seqlen": 3}),
    ):
        leaf = tensor.clone().requires_grad_()
        torch.library.opcheck(torch.ops.flash_attn.rotary.default, (leaf, cos, sin), options)
        torch.library.opcheck(
            torch.ops.flash_attn.rotary_.default, (tensor.clone(), cos, sin), options
        )


def test_meta_tensors():
    x = torch.empty(2, 5, 3, 16, device="meta")
    table = torch.empty(9, 8, device="meta")
    out = apply_rotary_emb(x, table, table)
    assert out.shape == x.shape and out.device.type == "meta"
