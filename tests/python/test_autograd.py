"""Gradients in eager mode, with autocast, checkpoints, hooks and torch's deterministic algorithms.

The kernels are tested elsewhere: here results are compared with the plain eager call, which must be
the same to the last bit unless a comment says why not.
"""

import contextlib

import pytest
import raw
import reference
import torch
import torch._dynamo.testing
from checks import CLOSE, CLOSE_LSE, DEVICE, DTYPE, RANDOM, randn
from public_functions import (
    BATCH,
    CU_K,
    CU_Q,
    HEAD_DIM,
    HEADS,
    HEADS_K,
    OPTIONS,
    SQ,
    KVCache,
    OpRecorder,
    assert_same,
    compiled,
    dense,
    every_function,
    inputs_of,
    int32,
    leaves,
    qkv,
    run,
)
from torch.utils.checkpoint import checkpoint

import flash_attn

# --------------------------------------------------------------------------------------------------
# Gradients in eager mode


@every_function
def test_only_the_gradients_that_are_needed(function):
    inputs = inputs_of(function)
    expected = run(function, inputs)[2:]
    for i in range(len(inputs)):
        chosen = [x.detach().clone().requires_grad_(i == j) for j, x in enumerate(inputs)]
        out, lse, _ = function(*chosen, return_attn_probs=True, **OPTIONS)
        loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + lse.sin().sum()
        loss.backward()
        assert torch.equal(chosen[i].grad, expected[i])


def test_gradient_of_lse_alone():
    q, k, v = leaves(qkv())
    _, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    lse.sum().backward()
    _, expected_lse, expected = reference.with_gradients(
        reference.attention, [q, k, v], torch.zeros_like(q), torch.ones_like(lse)
    )
    torch.testing.assert_close(lse.double(), expected_lse, **CLOSE_LSE)
    for x, y in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad.double(), y, **CLOSE)


@pytest.mark.parametrize("kind", ["expanded", "transposed", "strided"])
def test_gradients_of_any_layout(kind):
    inputs = qkv()
    shape = inputs[0].shape
    dout = {
        "expanded": lambda: torch.tensor(0.5).expand(shape),
        "transposed": lambda: torch.randn(shape[::-1]).permute(3, 2, 1, 0),
        "strided": lambda: torch.randn(*shape[:-1], 2 * HEAD_DIM)[..., ::2],
    }[kind]()
    a, b = leaves(inputs), leaves(inputs)
    actual = torch.autograd.grad(flash_attn.flash_attn_func(*a), a, dout)
    assert_same(actual, torch.autograd.grad(flash_attn.flash_attn_func(*b), b, dout.contiguous()))


def test_packed_gradient_is_one_tensor():
    """Backward writes into one tensor: nothing is allocated for dq, dk and dv beside it."""
    (x,) = leaves([randn(BATCH, SQ, 3, HEADS, HEAD_DIM)])
    out = flash_attn.flash_attn_qkvpacked_func(x)
    with OpRecorder() as mode:
        (gradient,) = torch.autograd.grad(out.sum(), x)
    assert gradient.is_contiguous()
    assert not {op for op in mode.seen if "stack" in op or "cat" in op or "copy" in op}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64], ids=str)
def test_sinks_of_any_dtype(dtype):
    q, k, v = qkv()
    s_aux = torch.randn(HEADS).to(dtype).requires_grad_()
    flash_attn.flash_attn_func(q, k, v, s_aux=s_aux).sum().backward()
    assert s_aux.grad.dtype == dtype
    single = s_aux.detach().float().requires_grad_()
    flash_attn.flash_attn_func(q, k, v, s_aux=single).sum().backward()
    assert torch.equal(s_aux.grad, single.grad.to(dtype))


@pytest.mark.parametrize("form", [tuple, list, torch.tensor], ids=["tuple", "list", "tensor"])
def test_forms_of_window_size(form):
    q, k, v = qkv()
    expected = flash_attn.flash_attn_func(q, k, v, window_size=(2, 1))
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=form((2, 1))), expected)


@pytest.mark.parametrize("window_size", [3, (1, 2, 3), ()], ids=str)
def test_wrong_forms_of_window_size(window_size):
    q, k, v = qkv()
    with pytest.raises(RuntimeError, match=r"window_size must be \(left, right\)"):
        flash_attn.flash_attn_func(q, k, v, window_size=window_size)


def test_tiny_dropout_is_none():
    q, k, v = qkv()
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, 1e-30, return_attn_probs=True)
    assert torch.equal(out, flash_attn.flash_attn_func(q, k, v))
    assert lse.shape == (BATCH, HEADS, SQ) and s_dmask.shape == (0,)
    state = RANDOM.get_rng_state()
    flash_attn.flash_attn_func(q, k, v, 1e-30)
    assert torch.equal(RANDOM.get_rng_state(), state)


def test_backward_through_pages_is_refused():
    q = randn(SQ, HEADS, HEAD_DIM).requires_grad_()
    pages = randn(4, 3, HEADS_K, HEAD_DIM)
    out = flash_attn.flash_attn_varlen_func(
        q, pages, pages, CU_Q, CU_K, 4, 5, block_table=int32(0, 1, 2, 3).view(2, 2)
    )
    with pytest.raises(RuntimeError, match="does not support a paged"):
        out.sum().backward()


# --------------------------------------------------------------------------------------------------
# Autocast, checkpointing, determinism


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(function, dtype):
    inputs = [x.float() for x in inputs_of(function)]
    with torch.autocast(DEVICE.type, dtype):
        out, lse, *gradients = run(function, inputs)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert {x.dtype for x in gradients} == {torch.float32}
    halves = [x.to(dtype) for x in inputs[:-1]] + inputs[-1:]
    expected = run(function, halves)
    assert_same([out, lse, *gradients], expected[:2] + [x.float() for x in expected[2:]])


def test_autocast_off_inside():
    q, k, v = qkv()
    dtype = torch.get_autocast_dtype(DEVICE.type)
    with torch.autocast(DEVICE.type), torch.autocast(DEVICE.type, enabled=False):
        assert flash_attn.flash_attn_func(q, k, v).dtype == DTYPE != dtype
    with torch.autocast(DEVICE.type):
        assert flash_attn.flash_attn_func(q, k, v).dtype == dtype
        assert compiled(flash_attn.flash_attn_func)(q, k, v).dtype == dtype


def test_autocast_follows_the_cache():
    cache = KVCache()
    cache.caches = [x.bfloat16() for x in cache.caches]
    with torch.autocast(DEVICE.type):
        actual = cache.call()
    cache.q, cache.new = cache.q.bfloat16(), [x.bfloat16() for x in cache.new]
    cache.tables = [x.bfloat16() for x in cache.tables]
    assert_same(actual, cache.call())


@every_function
@pytest.mark.parametrize("use_reentrant", [False, True], ids=["nonreentrant", "reentrant"])
def test_checkpoint(function, use_reentrant):
    """Dropout draws the same mask when the forward pass is run again."""

    def checkpointed(*inputs, **options):
        call = lambda *inputs: function(*inputs, **options)  # noqa: E731
        return checkpoint(call, *inputs, use_reentrant=use_reentrant)

    inputs = inputs_of(function)
    torch.manual_seed(5)
    expected = run(function, inputs, dropout_p=0.3)
    torch.manual_seed(5)
    assert_same(run(checkpointed, inputs, dropout_p=0.3), expected)


def test_compiled_checkpoint():
    def function(q, k, v, dropout_p):
        def layer(q, k, v):
            return flash_attn.flash_attn_func(q, k, v, dropout_p).sin()

        return checkpoint(layer, q, k, v, use_reentrant=False)

    inputs = qkv()
    call = compiled(function)
    for dropout_p in (0.0, 0.3):
        x = leaves(inputs)
        gradients = torch.autograd.grad(call(*x, dropout_p).sum(), x)
        assert all(x.isfinite().all() for x in gradients)
        if dropout_p == 0:
            x = leaves(inputs)
            assert_same(gradients, torch.autograd.grad(function(*x, 0.0).sum(), x))


def test_saved_tensor_hooks_see_the_inputs():
    seen = []
    q, k, v = leaves(qkv())
    with torch.autograd.graph.saved_tensors_hooks(lambda x: seen.append(x) or x, lambda x: x):
        out = flash_attn.flash_attn_func(q, k, v)
    out.sum().backward()
    assert {id(x) for x in (q, k, v)} <= {id(x) for x in seen}


@pytest.mark.parametrize("grad", [True, False], ids=["recorded", "unrecorded"])
def test_tensors_kept_from_a_transform_that_has_ended(grad):
    q, k, v = qkv()
    kept = []
    torch.func.grad(lambda x: kept.append(x * 1) or x.sum())(q)
    with torch.set_grad_enabled(grad):
        out = flash_attn.flash_attn_func(*kept, k, v)
    assert torch.equal(out.detach(), flash_attn.flash_attn_func(q, k, v))


def test_a_change_in_place_is_noticed():
    q, k, v = leaves(qkv())
    out = flash_attn.flash_attn_func(q, k, v)
    with torch.no_grad():
        k.add_(1)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        out.sum().backward()


@contextlib.contextmanager
def deterministic_algorithms():
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@every_function
def test_deterministic_algorithms(function):
    inputs = inputs_of(function)
    expected = run(function, inputs, deterministic=True)
    with deterministic_algorithms():
        assert_same(run(function, inputs), expected)
        assert_same(run(compiled(function), inputs), expected)


@pytest.mark.native
def test_deterministic_setting_reaches_the_backend(monkeypatch):
    from flash_attn.attention import arguments
    from flash_attn.backends import native

    asked = []
    backward = native._core.backward
    index = raw.BACKWARD.index("deterministic")
    monkeypatch.setattr(native._core, "backward", lambda *a: asked.append(a[index]) or backward(*a))
    inputs = inputs_of(dense)
    run(dense, inputs)
    run(dense, inputs, deterministic=True)
    run(compiled(dense), inputs, deterministic=True)
    with deterministic_algorithms():
        run(dense, inputs)
    monkeypatch.setattr(arguments, "_DETERMINISTIC", True)  # FLASH_ATTENTION_DETERMINISTIC=1
    run(dense, inputs)
    assert asked == [False, True, True, True, True]
