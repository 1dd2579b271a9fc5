"""Gradients against the reference's autograd in float64: of out, softmax_lse and the sinks."""

import pytest
import reference
import torch
from checks import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    LAYOUTS,
    Case,
    assert_close,
    case_id,
    check_backward,
    dtype_id,
    pairwise,
    with_dtypes,
)

import flash_attn

HEAD_DIMS = (1, 3, 8, 17, 32, 33, 40, 64, 72, 80, 96, 100, 128, 160, 192, 224, 255, 256)

LENGTHS = (
    (1, 1),
    (1, 40),
    (40, 1),
    (16, 16),
    (33, 31),
    (64, 64),
    (65, 130),
    (130, 65),
    (128, 257),
    (257, 128),
    (7, 600),
    (600, 7),
)

WINDOWS = ((-1, 0), (0, 0), (5, 0), (0, 5), (11, 3), (-1, 20), (20, -1), (500, 2), (2, 500))

FEATURES = {
    "dtype": DTYPES,
    "lengths": ((70, 70), (40, 130), (130, 40), (1, 150)),
    "heads": ((4, 4), (6, 2), (4, 1)),
    "head_dim": (64, 128, 40, 33),
    "causal": (False, True),
    "window_size": ((-1, -1), (24, 0), (-1, 9), (17, 31)),
    "softcap": (0.0, 1.5),
    "alibi": ("", "h", "bh"),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.17),
    "softmax_scale": (None, 0.31),
    "layout": tuple(LAYOUTS),
    "lse_gradient": (False, True),
}


def feature_case(lengths, heads, **fields):
    return Case(sq=lengths[0], sk=lengths[1], heads=heads[0], heads_k=heads[1], **fields)


@pytest.mark.parametrize(
    "case", with_dtypes([Case(head_dim=d, sq=40, sk=60) for d in HEAD_DIMS]), ids=case_id
)
def test_head_dim(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes([Case(sq=sq, sk=sk, causal=c) for sq, sk in LENGTHS for c in (False, True)]),
    ids=case_id,
)
def test_lengths(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes(
        [
            Case(batch=batch, sq=sq, sk=sk, causal=flag, sinks=flag, lse_gradient=flag)
            for batch, sq, sk in ((2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5))
            for flag in (False, True)
        ]
    ),
    ids=case_id,
)
def test_empty(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(sq=sq, sk=sk, window_size=window, dtype=dtype)
        for window in WINDOWS
        for sq, sk, dtype in ((70, 70, FP32), (40, 110, BF16), (110, 40, FP16))
    ],
    ids=case_id,
)
def test_window(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes(
        [
            Case(heads=h, heads_k=hk, causal=True)
            for h, hk in ((1, 1), (8, 2), (6, 3), (7, 1), (16, 1))
        ]
    ),
    ids=case_id,
)
def test_heads(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes([Case(layout=layout, heads_k=2, causal=True, sk=90) for layout in LAYOUTS]),
    ids=case_id,
)
def test_layout(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes(
        [
            Case(lse_gradient=True),
            Case(lse_gradient=True, causal=True, sq=90, sk=40),
            Case(lse_gradient=True, sinks=True, causal=True, sq=90, sk=40),
            Case(lse_gradient=True, softcap=2.0, heads_k=1),
            Case(lse_gradient=True, dropout_p=0.3, alibi="h"),
        ]
    ),
    ids=case_id,
)
def test_gradient_of_lse(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case", [feature_case(**row) for row in pairwise(seed=2, **FEATURES)], ids=case_id
)
def test_features(case):
    check_backward(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_of_lse_alone(dtype):
    """d lse / d q = scale * sum p k and d lse / d k = scale * sum p q; v has no part in it."""
    tensors = [x.requires_grad_() for x in Case(dtype=dtype).inputs()]
    _, lse, _ = flash_attn.flash_attn_func(*tensors, return_attn_probs=True)
    dlse = torch.randn_like(lse)
    dq, dk, dv = torch.autograd.grad(lse, tensors, dlse)
    zeros = torch.zeros_like(tensors[0])
    _, _, expected = reference.with_gradients(reference.attention, tensors, zeros, dlse)
    _, _, naive = reference.with_gradients(reference.attention, tensors, zeros, dlse, dtype=dtype)
    assert_close(dq, expected[0], naive[0], "dq")
    assert_close(dk, expected[1], naive[1], "dk")
    assert torch.count_nonzero(dv) == 0


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_many_rows(dtype):
    """More rows than any block has, in both directions."""
    check_backward(Case(dtype=dtype, batch=1, sq=700, sk=900, heads=2, heads_k=1, causal=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_many_sequences_and_heads(dtype):
    check_backward(Case(dtype=dtype, batch=200, sq=2, sk=3, heads=6, heads_k=2, head_dim=8))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2), ids=("", "dropout"))
def test_packed_functions_are_the_same_function(dtype, dropout_p):
    qkv = torch.randn(2, 40, 3, 4, 64).to(dtype).requires_grad_()
    dout = torch.randn(2, 40, 4, 64).to(dtype)
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(2))
    kv = qkv.detach()[:, :, 1:].requires_grad_()

    def gradients(function, *tensors):
        torch.manual_seed(3)
        out = function(*tensors, dropout_p, causal=True)
        return torch.autograd.grad(out, tensors, dout)

    dq, dk, dv = gradients(flash_attn.flash_attn_func, q, k, v)
    (dqkv,) = gradients(flash_attn.flash_attn_qkvpacked_func, qkv)
    dq_of_kv, dkv = gradients(flash_attn.flash_attn_kvpacked_func, q, kv)
    assert torch.equal(dqkv, torch.stack([dq, dk, dv], dim=2))
    assert torch.equal(dq_of_kv, dq)
    assert torch.equal(dkv, torch.stack([dk, dv], dim=2))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradients_of_strided_last_dimensions(dtype):
    strided = [torch.randn(2, 30, 4, 32, 2).to(dtype)[..., 0] for _ in range(4)]
    dout = strided.pop()

    def gradients(tensors, dout):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out = flash_attn.flash_attn_func(*tensors, causal=True)
        return torch.autograd.grad(out, tensors, dout)

    expected = gradients([x.contiguous() for x in strided], dout.contiguous())
    actual = gradients(strided, dout)
    assert all(torch.equal(a, b) for a, b in zip(actual, expected, strict=True))


def test_only_what_is_asked_for_has_a_gradient():
    q, k, v = Case().inputs()
    k.requires_grad_()
    out = flash_attn.flash_attn_func(q, k, v)
    out.sum().backward()
    assert k.grad is not None and q.grad is None and v.grad is None


def test_gradient_dtype_of_sinks():
    q, k, v = Case(dtype=BF16).inputs()
    for dtype in (FP32, BF16, FP16, torch.float64):
        sinks = torch.zeros(4, dtype=dtype, requires_grad=True)
        flash_attn.flash_attn_func(q, k, v, s_aux=sinks).sum().backward()
        assert sinks.grad.dtype == dtype and sinks.grad.isfinite().all()


def test_sinks_without_visible_keys():
    """A row without keys gives everything to the sink: out 0, lse = sink, gradient of lse alone."""
    q, k, v = Case(sq=5, sk=0).inputs()
    sinks = torch.randn(4, requires_grad=True)
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, s_aux=sinks, return_attn_probs=True)
    assert torch.count_nonzero(out) == 0
    assert torch.equal(lse, sinks.detach()[None, :, None].expand(2, 4, 5))
    dlse = torch.randn_like(lse)
    (gradient,) = torch.autograd.grad(lse, sinks, dlse)
    torch.testing.assert_close(gradient, dlse.sum((0, 2)))
