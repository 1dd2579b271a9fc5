"""The functions under vmap, grad and the other function transforms.

The kernels are tested elsewhere: here results are compared with the plain eager call, which must be
the same to the last bit unless a comment says why not.
"""

import pytest
import torch
import torch._dynamo.testing
from checks import CLOSE
from public_functions import (
    CU_K,
    CU_Q,
    HEADS,
    OPTIONS,
    SLOPES,
    every_function,
    inputs_of,
    leaves,
    qkv,
    varlen,
)

import flash_attn


def stacked(function, count=3):
    return [torch.stack(x) for x in zip(*(inputs_of(function) for _ in range(count)), strict=True)]


@every_function
def test_vmap(function):
    batch = stacked(function)

    def results(*inputs):
        return function(*inputs, return_attn_probs=True, **OPTIONS)[:2]

    actual = torch.vmap(results)(*batch)
    expected = [torch.stack(x) for x in zip(*map(results, *batch), strict=True)]
    for x, y in zip(actual, expected, strict=True):  # other heads, other blocks
        torch.testing.assert_close(x, y, **CLOSE)


@every_function
def test_vmap_of_gradients(function):
    batch = stacked(function)
    which = tuple(range(len(batch)))

    def loss(*inputs):
        out, lse, _ = function(*inputs, return_attn_probs=True, **OPTIONS)
        return out.square().sum() + lse.sum()

    gradients = torch.func.grad(loss, argnums=which)
    expected = [torch.stack(x) for x in zip(*map(gradients, *batch), strict=True)]
    per_sample = torch.vmap(gradients)(*batch)
    outside = leaves(batch)
    whole = torch.autograd.grad(torch.vmap(loss)(*outside).sum(), outside)
    for x, y, z in zip(per_sample, whole, expected, strict=True):
        torch.testing.assert_close(x, z, **CLOSE)
        torch.testing.assert_close(y, z, **CLOSE)


def test_vmap_over_queries_alone():
    q, k, v = qkv()
    queries = torch.stack([q, -q, 2 * q], dim=2)

    def function(q):
        return flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=SLOPES)

    actual = torch.vmap(function, in_dims=2, out_dims=1)(queries)
    torch.testing.assert_close(actual[:, 1], function(-q), **CLOSE)
    torch.testing.assert_close(actual[:, 2], function(2 * q), **CLOSE)


def test_vmap_over_slopes_alone():
    q, k, v = qkv()
    slopes = torch.rand(3, HEADS)

    def function(slopes):
        return flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes)

    torch.testing.assert_close(torch.vmap(function)(slopes)[1], function(slopes[1]), **CLOSE)


def test_vmap_dropout():
    q, k, v = qkv()

    def function(q):
        return flash_attn.flash_attn_func(q, k, v, dropout_p=0.5)

    batch = torch.stack([q, q])
    out = torch.vmap(function, randomness="different")(batch)
    assert not torch.equal(out[0], out[1])
    with pytest.raises(RuntimeError, match="randomness='different'"):
        torch.vmap(function, randomness="same")(batch)
    with pytest.raises(RuntimeError, match="randomness"):
        torch.vmap(function)(batch)


def test_vmap_over_sequence_ends_is_refused():
    q, k, v, _ = inputs_of(varlen)

    def function(cu_seqlens):
        return flash_attn.flash_attn_varlen_func(q, k, v, cu_seqlens, CU_K, 4, 5)

    with pytest.raises(RuntimeError, match="cu_seqlens_q cannot be mapped"):
        torch.vmap(function)(torch.stack([CU_Q, CU_Q]))


@pytest.mark.cpu  # in float32
def test_jacobian_of_a_small_call():
    q = torch.randn(1, 2, 1, 4)
    k, v = torch.randn(1, 3, 1, 4), torch.randn(1, 3, 1, 4)

    def function(q):
        return flash_attn.flash_attn_func(q, k, v)

    def naive(q):
        p = (torch.einsum("bihd,bjhd->bhij", q, k) * 0.5).softmax(-1)
        return torch.einsum("bhij,bjhd->bihd", p, v)

    torch.testing.assert_close(torch.func.jacrev(function)(q), torch.func.jacrev(naive)(q))


@pytest.mark.parametrize("way", ["function", "op"])
def test_second_derivatives_are_refused(way):
    q, k, v = leaves(qkv())
    if way == "function":
        out = flash_attn.flash_attn_func(q, k, v)
    else:
        out = torch.ops.flash_attn._flash_attn_forward(
            q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False
        )[0]
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        dq.sum().backward()
