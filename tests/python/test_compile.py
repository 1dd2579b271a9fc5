"""The functions under torch.compile.

The kernels are tested elsewhere: here results are compared with the plain eager call, which must be
the same to the last bit unless a comment says why not.
"""

import pytest
import reference
import torch
import torch._dynamo.testing
from checks import CLOSE, DTYPE, assert_close, randn
from public_functions import (
    BATCH,
    CU_K,
    CU_Q,
    HEAD_DIM,
    HEADS,
    SQ,
    KVCache,
    assert_same,
    compiled,
    dense,
    every_function,
    inputs_of,
    leaves,
    qkv,
    run,
    varlen,
)

import flash_attn


@every_function
@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
def test_compile(function, dynamic):
    inputs = inputs_of(function)
    assert_same(run(compiled(function, dynamic), inputs), run(function, inputs))


@pytest.mark.parametrize("dynamic", [False, True], ids=["static", "dynamic"])
@pytest.mark.parametrize("seqlens", [None, 5], ids=["tensor", "int"])
def test_compile_cache(dynamic, seqlens):
    cache = KVCache(seqlens)
    function = compiled(flash_attn.flash_attn_with_kvcache, dynamic)
    assert_same(cache.call(function), cache.call())


def test_compile_with_inductor():
    """The whole stack, once: a model's block around attention, forward and backward."""

    def block(x, s_aux):
        out = flash_attn.flash_attn_qkvpacked_func(x.sin() * 2, s_aux=s_aux, causal=True)
        return out.cos().sum()

    inputs = [randn(BATCH, SQ, 3, HEADS, HEAD_DIM), torch.randn(HEADS)]
    expected = torch.autograd.grad(block(*(x := leaves(inputs))), x)
    function = compiled(block, backend="inductor")
    actual = torch.autograd.grad(function(*(x := leaves(inputs))), x)
    # Inductor's sin and cos are other ones, and what it fuses it rounds less often.
    tolerance = {"rtol": 5e-2, "atol": 5e-2} if CLOSE else {"rtol": 1e-4, "atol": 1e-5}
    for x, y in zip(actual, expected, strict=True):
        torch.testing.assert_close(x, y, **tolerance)


@pytest.mark.parametrize("function", [dense, varlen], ids=lambda f: f.__name__)
def test_dynamic_shapes_do_not_recompile(function):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = 0  # of the first call: torch may start it over to turn a float into a constant
    for length in (9, 10, 13, 31):
        shape = (BATCH, length, HEADS, HEAD_DIM) if function is dense else (length, HEADS, HEAD_DIM)
        inputs = [randn(*shape) for _ in range(3)] + [torch.randn(HEADS)]
        assert torch.equal(call(*inputs), function(*inputs))
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


def test_cache_position_does_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(
        flash_attn.flash_attn_with_kvcache, fullgraph=True, dynamic=True, backend=counter
    )
    frames = 0
    for position in (2, 3, 4, 5):
        cache = KVCache(position)
        assert_same(cache.call(call), cache.call())
        frames = frames or counter.frame_count
    assert counter.frame_count == frames


def test_compile_without_gradient():
    inputs = inputs_of(dense)
    with torch.no_grad():
        assert torch.equal(compiled(dense)(*inputs), dense(*inputs))


def test_compile_with_shared_tensors():
    x = randn(SQ, HEADS, HEAD_DIM)

    def function(x, cu_seqlens):
        return flash_attn.flash_attn_varlen_func(x, x, x, cu_seqlens, cu_seqlens, 4, 4, causal=True)

    (a,), (b,) = leaves([x]), leaves([x])
    compiled(function)(a, CU_Q).square().sum().backward()
    function(b, CU_Q).square().sum().backward()
    assert torch.equal(a.grad, b.grad)


def test_compile_with_max_seqlen_in_a_tensor():
    q, k, v, _ = inputs_of(varlen)

    def function(q, k, v, longest):
        return flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, longest, longest)

    longest = torch.tensor(5)
    expected = flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 5, 5)
    assert torch.equal(function(q, k, v, longest), expected)
    assert torch.equal(compiled(function)(q, k, v, longest), expected)


def test_compile_dropout():
    """The mask of a compiled call is another one, but forward and backward agree on it."""
    q, k, v = leaves(qkv())
    function = compiled(flash_attn.flash_attn_func)
    out, _, s_dmask = function(q, k, v, 0.4, return_attn_probs=True)
    keep_mask = ~torch.signbit(s_dmask)
    assert 0 < keep_mask.double().mean() < 1
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    options = {"dropout_p": 0.4, "keep_mask": keep_mask}
    expected = reference.with_gradients(reference.attention, [q, k, v], dout, **options)
    naive = reference.with_gradients(reference.attention, [q, k, v], dout, **options, dtype=DTYPE)
    assert_close(out, expected[0], naive[0], "out")
    for name, x, y, z in zip(("dq", "dk", "dv"), gradients, expected[2], naive[2], strict=True):
        assert_close(x, y, z, name)
    again, _, _ = function(q, k, v, 0.4, return_attn_probs=True)
    assert not torch.equal(again, out)


def test_compile_cache_leaves_other_rows_alone():
    cache = KVCache()
    _, _, k_cache, v_cache = cache.call(compiled(flash_attn.flash_attn_with_kvcache))
    for before, after in zip(cache.caches, (k_cache, v_cache), strict=True):
        assert torch.equal(before[[1, 3]], after[[1, 3]])
        assert not torch.equal(before[[0, 2]], after[[0, 2]])
