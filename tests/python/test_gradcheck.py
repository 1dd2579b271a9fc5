"""Gradients against differences of the function itself, without any reference.

The functions compute in float32, so that torch.autograd.gradcheck is given steps and tolerances for
that: with a step h the central difference has an error of about eps / h from rounding and h^2 from
curvature, both below 1e-3 at h = 1e-2 for numbers of size 1.
"""

import pytest
import torch
from torch.autograd import gradcheck

import flash_attn

pytestmark = pytest.mark.cpu

STEP, TOLERANCE = 1e-2, 4e-3

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "softcap": {"softcap": 1.3},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.4])},
    "scale": {"softmax_scale": 0.8},
}


def check(function, *tensors):
    leaves = [x.detach().requires_grad_() for x in tensors]
    # Warns that float32 is not float64: the step and the tolerance above are made for it.
    with pytest.warns(UserWarning, match="double precision"):
        assert gradcheck(function, leaves, eps=STEP, atol=TOLERANCE, rtol=TOLERANCE, nondet_tol=0.0)


@pytest.mark.parametrize("name", FEATURES)
@pytest.mark.parametrize("sq,sk,heads_k", ((4, 5, 2), (6, 3, 1)))
def test_dense(name, sq, sk, heads_k):
    q, k, v = (
        torch.randn(1, sq, 2, 5),
        torch.randn(1, sk, heads_k, 5),
        torch.randn(1, sk, heads_k, 5),
    )

    def function(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, **FEATURES[name])

    check(function, q, k, v)


@pytest.mark.parametrize("name", FEATURES)
def test_log_sum_exp(name):
    q, k, v = torch.randn(1, 4, 2, 5), torch.randn(1, 6, 2, 5), torch.randn(1, 6, 2, 5)

    def function(q, k):
        return flash_attn.flash_attn_func(q, k, v, **FEATURES[name], return_attn_probs=True)[1]

    check(function, q, k)


@pytest.mark.parametrize("name", FEATURES)
def test_sinks(name):
    q, k, v = torch.randn(1, 4, 2, 5), torch.randn(1, 6, 2, 5), torch.randn(1, 6, 2, 5)

    def function(q, k, v, s_aux):
        return flash_attn.flash_attn_func(
            q, k, v, **FEATURES[name], s_aux=s_aux, return_attn_probs=True
        )[:2]

    check(function, q, k, v, torch.randn(2))


def test_dropout():
    """The seed is set in every call: the same function each time."""
    q, k, v = torch.randn(1, 4, 2, 5), torch.randn(1, 6, 2, 5), torch.randn(1, 6, 2, 5)

    def function(q, k, v):
        torch.manual_seed(4)
        return flash_attn.flash_attn_func(q, k, v, 0.3)

    check(function, q, k, v)


def test_variable_length():
    cu_q = torch.tensor([0, 3, 3, 5], dtype=torch.int32)
    cu_k = torch.tensor([0, 4, 6, 7], dtype=torch.int32)
    q, k, v = torch.randn(6, 2, 5), torch.randn(8, 1, 5), torch.randn(8, 1, 5)

    def function(q, k, v):
        return flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, 3, 4, causal=True)

    check(function, q, k, v)


def test_packed():
    def function(qkv):
        return flash_attn.flash_attn_qkvpacked_func(qkv, causal=True)

    check(function, torch.randn(1, 4, 3, 2, 5))
