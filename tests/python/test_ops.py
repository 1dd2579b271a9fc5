"""The ops and functions inside torch: compile, export, autocast, checkpoints, transforms, FLOPs.

The kernels are tested elsewhere: here results are compared with the plain eager call, which must be
the same to the last bit unless a comment says why not.
"""

import contextlib

import pytest
import reference
import torch
import torch._dynamo.testing
from checks import assert_close
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode

import flash_attn
from flash_attn import flash_attn_interface

OPS = torch.ops.flash_attn
BATCH, SQ, SK, HEADS, HEADS_K, HEAD_DIM = 2, 7, 9, 4, 2, 16


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def randn(*shape, grad=True):
    return torch.randn(*shape, requires_grad=grad)


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


# --------------------------------------------------------------------------------------------------
# One call of every public function: (function of the differentiable inputs, those inputs)


def qkv():
    return [
        torch.randn(BATCH, SQ, HEADS, HEAD_DIM),
        torch.randn(BATCH, SK, HEADS_K, HEAD_DIM),
        torch.randn(BATCH, SK, HEADS_K, HEAD_DIM),
    ]


CU_Q, CU_K = int32(0, 3, 7), int32(0, 4, 9)
SLOPES = torch.tensor([0.1, 0.2, 0.3, 0.4])
OPTIONS = {"causal": True, "window_size": (5, 2), "softcap": 3.0, "alibi_slopes": SLOPES}


def dense(q, k, v, s_aux, **options):
    return flash_attn.flash_attn_func(q, k, v, s_aux=s_aux, **options)


def kvpacked(q, kv, s_aux, **options):
    return flash_attn.flash_attn_kvpacked_func(q, kv, s_aux=s_aux, **options)


def qkvpacked(qkv, s_aux, **options):
    return flash_attn.flash_attn_qkvpacked_func(qkv, s_aux=s_aux, **options)


def varlen(q, k, v, s_aux, **options):
    return flash_attn.flash_attn_varlen_func(q, k, v, CU_Q, CU_K, 4, 5, s_aux=s_aux, **options)


def varlen_kvpacked(q, kv, s_aux, **options):
    return flash_attn.flash_attn_varlen_kvpacked_func(
        q, kv, CU_Q, CU_Q, 4, 4, s_aux=s_aux, **options
    )


def varlen_qkvpacked(qkv, s_aux, **options):
    return flash_attn.flash_attn_varlen_qkvpacked_func(qkv, CU_Q, 4, s_aux=s_aux, **options)


def inputs_of(function):
    heads = (HEADS, HEAD_DIM)
    tensors = {
        dense: lambda: qkv(),
        kvpacked: lambda: [
            torch.randn(BATCH, SQ, *heads),
            torch.randn(BATCH, SK, 2, HEADS_K, HEAD_DIM),
        ],
        qkvpacked: lambda: [torch.randn(BATCH, SQ, 3, *heads)],
        varlen: lambda: [x[0] for x in qkv()],
        varlen_kvpacked: lambda: [torch.randn(SQ, *heads), torch.randn(SQ, 2, HEADS_K, HEAD_DIM)],
        varlen_qkvpacked: lambda: [torch.randn(SQ, 3, *heads)],
    }[function]()
    return [*tensors, torch.randn(HEADS)]


FUNCTIONS = [dense, kvpacked, qkvpacked, varlen, varlen_kvpacked, varlen_qkvpacked]
every_function = pytest.mark.parametrize("function", FUNCTIONS, ids=lambda f: f.__name__)


def run(function, inputs, **options):
    """Outputs and gradients of one call, lse and its gradient included."""
    inputs = leaves(inputs)
    out, lse, _ = function(*inputs, return_attn_probs=True, **OPTIONS, **options)
    loss = (out * torch.linspace(-1, 1, out.numel()).view(out.shape)).sum() + lse.sin().sum()
    loss.backward()
    return [out.detach(), lse.detach(), *(x.grad for x in inputs)]


def assert_same(actual, expected):
    for i, (x, y) in enumerate(zip(actual, expected, strict=True)):
        assert x.dtype == y.dtype
        assert torch.equal(x, y), f"result {i}: {(x - y).abs().max()}"


def compiled(function, dynamic=None, backend="aot_eager"):
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, dynamic=dynamic, backend=backend)


class KVCache:
    """Arguments of flash_attn_with_kvcache: two of four rows of a cache, and two new keys."""

    def __init__(self, seqlens=None):
        self.q = torch.randn(2, 2, HEADS, HEAD_DIM)
        self.caches = [torch.randn(4, 12, HEADS_K, HEAD_DIM) for _ in range(2)]
        self.new = [torch.randn(2, 2, HEADS_K, HEAD_DIM) for _ in range(2)]
        self.tables = [torch.randn(12, 8) for _ in range(2)]
        self.seqlens = int32(6, 3) if seqlens is None else seqlens

    def call(self, function=flash_attn.flash_attn_with_kvcache):
        caches = [x.clone() for x in self.caches]
        out, lse = function(
            self.q,
            *caches,
            *self.new,
            *self.tables,
            cache_seqlens=self.seqlens,
            cache_batch_idx=int32(2, 0),
            causal=True,
            return_softmax_lse=True,
        )
        return [out, lse, *caches]


# --------------------------------------------------------------------------------------------------
# The ops


def op_cases():
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


@pytest.mark.parametrize("name", [name for name, _, _ in op_cases()])
def test_opcheck(name):
    op, arguments = next((op, arguments) for n, op, arguments in op_cases() if n == name)
    torch.library.opcheck(op.default, arguments)


@pytest.mark.parametrize("name", [name for name, _, _ in op_cases()])
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
    torch.testing.assert_close(softmax_d, (dout * out).sum(-1).transpose(1, 2))
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


class _Unrecognised(torch.utils._python_dispatch.TorchDispatchMode):
    """A dispatch mode that remembers the ops that it saw."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(str(op))
        return op(*args, **(kwargs or {}))


@every_function
def test_dispatch_modes_see_the_ops(function):
    inputs = inputs_of(function)
    expected = run(function, inputs)
    with _Unrecognised() as mode:
        actual = run(function, inputs)
    assert_same(actual, expected)
    varlen = "varlen_" if "varlen" in function.__name__ else ""
    for direction in ("forward", "backward"):
        assert f"flash_attn._flash_attn_{varlen}{direction}.default" in mode.seen


def test_dispatch_modes_see_the_cache_op():
    cache = KVCache()
    expected = cache.call()
    with _Unrecognised() as mode:
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
# torch.compile


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

    inputs = [torch.randn(BATCH, SQ, 3, HEADS, HEAD_DIM), torch.randn(HEADS)]
    expected = torch.autograd.grad(block(*(x := leaves(inputs))), x)
    function = compiled(block, backend="inductor")
    actual = torch.autograd.grad(function(*(x := leaves(inputs))), x)
    for x, y in zip(actual, expected, strict=True):  # inductor's sin and cos are other ones
        torch.testing.assert_close(x, y, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("function", [dense, varlen], ids=lambda f: f.__name__)
def test_dynamic_shapes_do_not_recompile(function):
    counter = torch._dynamo.testing.CompileCounterWithBackend("aot_eager")
    torch._dynamo.reset()
    call = torch.compile(function, fullgraph=True, dynamic=True, backend=counter)
    frames = 0  # of the first call: torch may start it over to turn a float into a constant
    for length in (9, 10, 13, 31):
        shape = (BATCH, length, HEADS, HEAD_DIM) if function is dense else (length, HEADS, HEAD_DIM)
        inputs = [torch.randn(shape) for _ in range(3)] + [torch.randn(HEADS)]
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
    x = torch.randn(SQ, HEADS, HEAD_DIM)

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
    naive = reference.with_gradients(
        reference.attention, [q, k, v], dout, **options, dtype=torch.float32
    )
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


# --------------------------------------------------------------------------------------------------
# Autocast, checkpointing, determinism


@every_function
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_autocast(function, dtype):
    inputs = inputs_of(function)
    with torch.autocast("cpu", dtype):
        out, lse, *gradients = run(function, inputs)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert {x.dtype for x in gradients} == {torch.float32}
    halves = [x.to(dtype) for x in inputs[:-1]] + inputs[-1:]
    expected = run(function, halves)
    assert_same([out, lse, *gradients], expected[:2] + [x.float() for x in expected[2:]])


def test_autocast_off_inside():
    q, k, v = qkv()
    with torch.autocast("cpu"), torch.autocast("cpu", enabled=False):
        assert flash_attn.flash_attn_func(q, k, v).dtype == torch.float32
    with torch.autocast("cpu"):
        assert flash_attn.flash_attn_func(q, k, v).dtype == torch.bfloat16
        assert compiled(flash_attn.flash_attn_func)(q, k, v).dtype == torch.bfloat16


def test_autocast_follows_the_cache():
    cache = KVCache()
    cache.caches = [x.bfloat16() for x in cache.caches]
    with torch.autocast("cpu"):
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


def test_deterministic_setting_reaches_the_backend(monkeypatch):
    from flash_attn.attention import arguments
    from flash_attn.backends import native

    asked = []
    backward = native._core.backward
    monkeypatch.setattr(native._core, "backward", lambda *a: asked.append(a[-3]) or backward(*a))
    inputs = inputs_of(dense)
    run(dense, inputs)
    run(dense, inputs, deterministic=True)
    run(compiled(dense), inputs, deterministic=True)
    with deterministic_algorithms():
        run(dense, inputs)
    monkeypatch.setattr(arguments, "_DETERMINISTIC", True)  # FLASH_ATTENTION_DETERMINISTIC=1
    run(dense, inputs)
    assert asked == [False, True, True, True, True]


# --------------------------------------------------------------------------------------------------
# Function transforms


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
        torch.testing.assert_close(x, y)


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
        torch.testing.assert_close(x, z)
        torch.testing.assert_close(y, z)


def test_vmap_over_queries_alone():
    q, k, v = qkv()
    queries = torch.stack([q, -q, 2 * q], dim=2)

    def function(q):
        return flash_attn.flash_attn_func(q, k, v, causal=True, alibi_slopes=SLOPES)

    actual = torch.vmap(function, in_dims=2, out_dims=1)(queries)
    torch.testing.assert_close(actual[:, 1], function(-q))
    torch.testing.assert_close(actual[:, 2], function(2 * q))


def test_vmap_over_slopes_alone():
    q, k, v = qkv()
    slopes = torch.rand(3, HEADS)

    def function(slopes):
        return flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes)

    torch.testing.assert_close(torch.vmap(function)(slopes)[1], function(slopes[1]))


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
        out = OPS._flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)[0]
    (dq,) = torch.autograd.grad(out.sum(), q, create_graph=True)
    with pytest.raises(RuntimeError, match="gradients of gradients are not supported"):
        dq.sum().backward()


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
    torch.testing.assert_close(lse.double(), expected_lse)
    for x, y in zip((q, k, v), expected, strict=True):
        torch.testing.assert_close(x.grad.double(), y)


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
    (x,) = leaves([torch.randn(BATCH, SQ, 3, HEADS, HEAD_DIM)])
    out = flash_attn.flash_attn_qkvpacked_func(x)
    with _Unrecognised() as mode:
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
    state = torch.get_rng_state()
    flash_attn.flash_attn_func(q, k, v, 1e-30)
    assert torch.equal(torch.get_rng_state(), state)


def test_backward_through_pages_is_refused():
    q = torch.randn(SQ, HEADS, HEAD_DIM, requires_grad=True)
    pages = torch.randn(4, 3, HEADS_K, HEAD_DIM)
    out = flash_attn.flash_attn_varlen_func(
        q, pages, pages, CU_Q, CU_K, 4, 5, block_table=int32(0, 1, 2, 3).view(2, 2)
    )
    with pytest.raises(RuntimeError, match="does not support a paged"):
        out.sum().backward()


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
    q, k, v = (torch.randn(BATCH, SQ, HEADS, HEAD_DIM) for _ in range(3))
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
