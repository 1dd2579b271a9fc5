"""The ops: their schemas and fakes, and the ways through which torch sees them.

The kernels are tested elsewhere: here results are compared with the plain eager call, which must be
the same to the last bit unless a comment says why not.
"""

import pytest
import torch
import torch._dynamo.testing
from checks import DTYPE
from public_functions import (
    BATCH,
    CU_K,
    CU_Q,
    HEAD_DIM,
    HEADS,
    SK,
    SQ,
    KVCache,
    OpRecorder,
    assert_same,
    every_function,
    inputs_of,
    int32,
    leaves,
    qkv,
    qkvpacked,
    run,
    varlen,
)
from torch.utils.flop_counter import FlopCounterMode

import flash_attn
from flash_attn import flash_attn_interface

OPS = torch.ops.flash_attn

# --------------------------------------------------------------------------------------------------
# The ops


OP_NAMES = (
    "forward",
    "forward-gradient",
    "forward-dropout-sinks",
    "varlen",
    "varlen-gradient",
    "backward",
    "backward-dk-only",
    "varlen-backward",
    "gradients",
    "cache",
)


def op_cases():
    """(name, op, arguments), in the order of OP_NAMES."""
    q, k, v, s_aux = *qkv(), torch.randn(HEADS)
    rng_state = torch.tensor([7, 3])
    plain = (0.0, 0.25, True, -1, -1, 0.0, None)
    out, lse, _, _ = OPS._flash_attn_forward(q, k, v, *plain, False)
    dout = torch.randn_like(out)
    tokens = [x[0] for x in (q, k, v)]
    lengths = (CU_Q, CU_K, 4, 5)
    varlen_out, varlen_lse, _, _ = OPS._flash_attn_varlen_forward(*tokens, *lengths, *plain[:3])
    varlen_dout = torch.randn_like(varlen_out)
    empty = torch.empty_like
    cache = KVCache()
    yield "forward", OPS._flash_attn_forward, (q, k, v, *plain, False)
    yield "forward-gradient", OPS._flash_attn_forward, (*leaves((q, k, v)), *plain, False)
    yield (
        "forward-dropout-sinks",
        OPS._flash_attn_forward,
        (*leaves((q, k, v)), 0.3, *plain[1:], True, *leaves([s_aux]), rng_state),
    )
    yield "varlen", OPS._flash_attn_varlen_forward, (*tokens, *lengths, *plain[:3])
    yield (
        "varlen-gradient",
        OPS._flash_attn_varlen_forward,
        (*leaves(tokens), *lengths, *plain[:3]),
    )
    yield (
        "backward",
        OPS._flash_attn_backward,
        (dout, q, k, v, out, lse, empty(q), empty(k), empty(v), *plain, False),
    )
    yield (
        "backward-dk-only",
        OPS._flash_attn_backward,
        (dout, q, k, v, out, lse, None, empty(k), None, *plain, False),
    )
    yield (
        "varlen-backward",
        OPS._flash_attn_varlen_backward,
        (
            varlen_dout,
            *tokens,
            varlen_out,
            varlen_lse,
            *map(empty, tokens),
            *lengths,
            *plain,
            False,
        ),
    )
    yield (
        "gradients",
        OPS.attention_backward,
        (dout, q, k, v, out, lse, lse.sin(), *plain, s_aux, None, None, None, 0, 0, None, False),
    )
    yield (
        "cache",
        OPS.with_kvcache,
        (
            *(cache.q, *cache.caches, *cache.new, *cache.tables, cache.seqlens, int32(2, 0)),
            *(None, None, 0.25, True, -1, -1, 0.0, True, None, 0, s_aux),
        ),
    )


def test_every_op_case_has_its_name():
    assert tuple(name for name, _, _ in op_cases()) == OP_NAMES


@pytest.mark.parametrize("name", OP_NAMES)
def test_opcheck(name):
    op, arguments = next((op, arguments) for n, op, arguments in op_cases() if n == name)
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", OP_NAMES)
def test_op_on_meta_tensors(name):
    op, arguments = next((op, arguments) for n, op, arguments in op_cases() if n == name)

    def meta(x):
        return x.detach().to("meta") if isinstance(x, torch.Tensor) else x

    real, fake = op(*arguments), op(*map(meta, arguments))
    if isinstance(real, torch.Tensor):
        real, fake = [real], [fake]
    for x, y in zip(real, fake, strict=True):
        assert (x.shape, x.dtype, x.stride()) == (y.shape, y.dtype, y.stride())
        assert y.is_meta


def test_op_draws_its_own_rng_state():
    q, k, v = qkv()
    arguments = (q, k, v, 0.5, 0.25, False, -1, -1, 0.0, None, True)
    torch.manual_seed(1)
    out, _, s_dmask, rng_state = OPS._flash_attn_forward(*arguments)
    assert rng_state.shape == (2,) and rng_state.dtype == torch.int64
    torch.manual_seed(1)
    assert torch.equal(OPS._flash_attn_forward(*arguments)[0], out)
    assert not torch.equal(OPS._flash_attn_forward(*arguments)[2], s_dmask)
    again = flash_attn_interface._flash_attn_forward(*arguments, rng_state=rng_state)
    assert_same(again, (out, *again[1:]))
    assert again[3].data_ptr() != rng_state.data_ptr()  # a result is never an argument


def test_internals_differentiate_when_asked_to():
    q, k, v = leaves(qkv())
    out, lse, _, _ = flash_attn_interface._flash_attn_forward(
        q, k, v, 0.0, 0.25, True, -1, -1, 0.0, None, False
    )
    expected, expected_lse, _ = flash_attn.flash_attn_func(
        q, k, v, softmax_scale=0.25, causal=True, return_attn_probs=True
    )
    actual = torch.autograd.grad(out.sum() + lse.sum(), (q, k, v))
    assert_same(actual, torch.autograd.grad(expected.sum() + expected_lse.sum(), (q, k, v)))


def test_modes_see_the_internals():
    """Each function below the public ones as its op, with the same results and operations."""
    q, k, v = (x[0] for x in qkv())
    options = (0.0, 0.25, True, -1, -1, 0.0, None)
    ends = (CU_Q, CU_K, 4, 5)

    def call():
        results = flash_attn_interface._flash_attn_varlen_forward(q, k, v, *ends, *options)
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        flash_attn_interface._flash_attn_varlen_backward(
            *(torch.ones_like(q), q, k, v, *results[:2], *gradients, *ends, *options, False)
        )
        dense = [x[None] for x in (q, k, v)]
        results += flash_attn_interface._flash_attn_forward(*dense, *options, False)
        dense_gradients = [torch.empty_like(x) for x in dense]
        flash_attn_interface._flash_attn_backward(
            *(torch.ones_like(dense[0]), *dense, *results[4:6], *dense_gradients, *options, False)
        )
        return [*results, *gradients, *dense_gradients]

    expected = call()
    with OpRecorder() as mode:
        assert_same(call(), expected)
    for name in ("forward", "backward", "varlen_forward", "varlen_backward"):
        assert f"flash_attn._flash_attn_{name}.default" in mode.seen
    with FlopCounterMode(display=False) as counter:
        call()
    pairs = SQ * SK + 3 * 4 + 4 * 5
    assert counter.get_total_flops() == 14 * pairs * HEADS * HEAD_DIM


@pytest.mark.parametrize("names", ["dq", "dk", "dv", "dq dk", ""])
def test_internal_backward_writes_what_is_given(names):
    q, k, v = qkv()
    plain = (0.0, 0.25, True, -1, -1, 0.0, None)
    out, lse, _, _ = flash_attn_interface._flash_attn_forward(q, k, v, *plain, False)
    dout = torch.randn_like(out)

    def gradients(given):
        buffers = {
            f"d{n}": torch.full_like(x, torch.nan) if f"d{n}" in given else None
            for n, x in zip("qkv", (q, k, v), strict=True)
        }
        softmax_d = flash_attn_interface._flash_attn_backward(
            dout, q, k, v, out, lse, **buffers, **dict(zip(OPTION_NAMES, plain, strict=True)),
            deterministic=False,
        )  # fmt: skip
        return buffers, softmax_d

    expected, expected_d = gradients("dq dk dv")
    actual, softmax_d = gradients(names)
    assert torch.equal(softmax_d, expected_d)
    torch.testing.assert_close(softmax_d, (dout.float() * out.float()).sum(-1).transpose(1, 2))
    for name in names.split():
        assert torch.equal(actual[name], expected[name])


OPTION_NAMES = (
    "dropout_p",
    "softmax_scale",
    "causal",
    "window_size_left",
    "window_size_right",
    "softcap",
    "alibi_slopes",
)

# --------------------------------------------------------------------------------------------------
# The ways that need to see a call


@every_function
def test_dispatch_modes_see_the_ops(function):
    inputs = inputs_of(function)
    expected = run(function, inputs)
    with OpRecorder() as mode:
        actual = run(function, inputs)
    assert_same(actual, expected)
    varlen = "varlen_" if "varlen" in function.__name__ else ""
    for direction in ("forward", "backward"):
        assert f"flash_attn._flash_attn_{varlen}{direction}.default" in mode.seen


def test_dispatch_modes_see_the_cache_op():
    cache = KVCache()
    expected = cache.call()
    with OpRecorder() as mode:
        assert_same(cache.call(), expected)
    assert "flash_attn.with_kvcache.default" in mode.seen


def test_profiler_sees_the_op():
    q, k, v = qkv()
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        flash_attn.flash_attn_func(q, k, v)
    assert "flash_attn::_flash_attn_forward" in {event.key for event in profile.key_averages()}


class _Module(torch.nn.Module):
    def forward(self, q, k, v):
        return flash_attn.flash_attn_func(q, k, v, causal=True)


@pytest.mark.parametrize("strict", [False, True], ids=["nonstrict", "strict"])
def test_export(strict):
    inputs = tuple(qkv())
    exported = torch.export.export(_Module(), inputs, strict=strict)
    assert "flash_attn._flash_attn_forward" in str(exported.graph)
    inputs = tuple(qkv())
    assert torch.equal(exported.module()(*inputs), _Module()(*inputs))


def test_jit_trace():
    with pytest.warns():  # torch.jit is deprecated
        traced = torch.jit.trace(_Module(), tuple(qkv()))
    inputs = tuple(qkv())
    assert torch.equal(traced(*inputs), _Module()(*inputs))


# --------------------------------------------------------------------------------------------------
# FLOPs


@every_function
def test_flops(function):
    inputs = leaves(inputs_of(function))
    with FlopCounterMode(display=False) as counter:
        function(*inputs).sum().backward()
    if "varlen" not in function.__name__:
        pairs = BATCH * SQ * (SQ if function is qkvpacked else SK)
    elif function is varlen:
        pairs = 3 * 4 + 4 * 5
    else:
        pairs = 3 * 3 + 4 * 4
    assert counter.get_total_flops() == 14 * pairs * HEADS * HEAD_DIM


def test_flops_agree_with_torch():
    q, k, v = (torch.randn(BATCH, SQ, HEADS, HEAD_DIM).to(DTYPE) for _ in range(3))
    totals = []
    for function in (
        lambda: flash_attn.flash_attn_func(q, k, v),
        lambda: torch.nn.functional.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v))
        ),
    ):
        with FlopCounterMode(display=False) as counter:
            function()
        totals.append(counter.get_total_flops())
    if totals[1]:  # torch does not count its CPU kernel in every version
        assert totals[0] == totals[1]


def test_flops_of_the_cache():
    cache = KVCache()
    with FlopCounterMode(display=False) as counter:
        cache.call()
    assert counter.get_total_flops() == 4 * HEADS * HEAD_DIM * 2 * (6 + 3 + 2 * 2)
