"""torch.compile with CUDA graphs gives what eager execution gives."""

import calls
import pytest
import torch
import torch._dynamo.testing
import torch._inductor.config

import flash_attn

BF16 = torch.bfloat16


class Block(torch.nn.Module):
    """Attention between projections, as a model has it."""

    def __init__(self, **options):
        super().__init__()
        self.options = options
        self.qkv = torch.nn.Linear(256, 3 * 256, dtype=BF16)
        self.out = torch.nn.Linear(256, 256, dtype=BF16)

    def forward(self, x):
        # The method unflatten is one that Dynamo cannot trace where a default device is set.
        q, k, v = torch.unflatten(self.qkv(x), -1, (3, 4, 64)).unbind(2)
        return self.out(flash_attn.flash_attn_func(q, k, v, **self.options).flatten(-2))


MODES = ("default", "reduce-overhead", "max-autotune")
TRAININGS = (
    ("default", {"deterministic": True}),
    ("reduce-overhead", {"causal": True}),
    ("reduce-overhead", {"window_size": (40, 0), "softcap": 5.0}),
    ("max-autotune", {"causal": True, "deterministic": True}),
)


@pytest.fixture(autouse=True)
def _quick():
    """Compiled anew, in this process; what is tuned are the kernels around attention."""
    torch._dynamo.reset()
    with torch._inductor.config.patch(compile_threads=1, max_autotune_gemm_backends="ATEN"):
        yield


def assert_close(actual, expected):
    """Up to a few roundings of the largest value."""
    largest = float(expected.float().abs().max())
    torch.testing.assert_close(actual, expected, rtol=2e-2, atol=2e-2 * largest)


def steps(function, inputs):
    """Results and gradients of a few steps: CUDA graphs record the second and replay the others."""
    results = []
    for x in inputs:
        torch.compiler.cudagraph_mark_step_begin()
        function.zero_grad()
        x = x.clone().requires_grad_()
        out = function(x)
        out.float().square().sum().backward()
        results.append((out.detach().clone(), x.grad.clone()))
    return results


@pytest.mark.parametrize("mode, options", TRAININGS, ids=str)
def test_training(mode, options):
    block = Block(**options)
    inputs = [torch.randn(2, 100, 256).to(BF16) for _ in range(4)]
    expected = steps(block, inputs)
    compiled = torch.compile(block, fullgraph=True, mode=mode)
    for (out, grad), (want, want_grad) in zip(steps(compiled, inputs), expected, strict=True):
        assert_close(out, want)
        assert_close(grad, want_grad)


@pytest.mark.parametrize("mode", MODES)
def test_decoding(mode):
    q, k, v = (x.detach() for x in calls.leaves((2, 1, 4, 64), (2, 64, 2, 64), (2, 64, 2, 64)))
    new = torch.randn(2, 1, 2, 64).to(BF16)
    lengths = calls.int32(5, 20)

    def step(q, k, v, new, lengths):
        return flash_attn.flash_attn_with_kvcache(q, k, v, new, new, cache_seqlens=lengths) * 2

    compiled = torch.compile(step, fullgraph=True, mode=mode)
    caches = [(k.clone(), v.clone()) for _ in range(2)]
    with torch.no_grad():
        for i in range(5):
            torch.compiler.cudagraph_mark_step_begin()
            results = [
                function(q, *cache, new, lengths + i).clone()
                for function, cache in zip((step, compiled), caches, strict=True)
            ]
            torch.testing.assert_close(*results, rtol=1e-2, atol=1e-2)
    calls.assert_equal(*caches)


def test_dropout_is_drawn_anew_in_every_replay():
    q, k, v = calls.leaves(*[(1, 90, 2, 64)] * 3)
    compiled = torch.compile(
        lambda *x: flash_attn.flash_attn_func(*x, dropout_p=0.4),
        fullgraph=True,
        mode="reduce-overhead",
    )
    seen = []
    for _ in range(4):
        torch.compiler.cudagraph_mark_step_begin()
        seen.append(compiled(q, k, v).detach().clone())
    assert not any(torch.equal(seen[i], seen[i + 1]) for i in range(3))


def test_variable_lengths_do_not_recompile():
    counter = torch._dynamo.testing.CompileCounterWithBackend("inductor")
    compiled = torch.compile(
        flash_attn.flash_attn_varlen_func, fullgraph=True, dynamic=True, backend=counter
    )
    for lengths in ((30, 50), (70, 9), (128, 1)):
        q, k, v = (x.detach() for x in calls.leaves(*[(sum(lengths), 4, 64)] * 3))
        cu = calls.cumulative(lengths)
        arguments = (q, k, v, cu, cu, torch.tensor(max(lengths)), torch.tensor(max(lengths)))
        expected = flash_attn.flash_attn_varlen_func(*arguments)
        torch.testing.assert_close(compiled(*arguments), expected)
    assert counter.frame_count <= 2
