"""The FlagGems backend on a GPU: what only there can be seen.

The tests of FlagGems' own attention show what our table of requests keeps from users: one that
fails says that FlagGems has changed, and the rule of policy.py that it shows can go.
"""

import importlib.util

import pytest
import torch

import flash_attn
from flash_attn import use_backend

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("flag_gems") is None, reason="needs FlagGems"
)


def tensors(sq, sk, heads=2, head_dim=64):
    shapes = ((1, sq, heads, head_dim), (1, sk, heads, head_dim), (1, sk, heads, head_dim))
    return [torch.randn(shape, dtype=torch.float16) for shape in shapes]


def own(q, k, v, causal=False, dropout_p=0.0, left=None, right=None):
    """FlagGems' output."""
    import flag_gems

    return flag_gems.flash_attention_forward(
        *(q, k, v, None, None, q.shape[1], k.shape[1], dropout_p, causal, False),
        scale=q.shape[-1] ** -0.5,
        window_size_left=left,
        window_size_right=right,
        disable_splitkv=True,
    )[0]


def ours(*tensors, **options):
    with use_backend("flaggems"):
        return flash_attn.flash_attn_func(*tensors, **options)


def close(x, y):
    return torch.allclose(x.float(), y.float(), atol=5e-3, rtol=5e-3)


@pytest.mark.parametrize("sq", (128, 256))
def test_it_is_right_where_the_table_says_so(sq):
    q, k, v = tensors(sq, 384)
    assert close(own(q, k, v), ours(q, k, v))
    assert close(own(q, k, v, causal=True), ours(q, k, v, causal=True))


def test_it_ignores_a_window_of_one_side():
    q, k, v = tensors(128, 256)
    assert not close(own(q, k, v, left=20), ours(q, k, v, window_size=(20, -1)))


def test_it_addresses_values_with_the_strides_of_keys():
    q, k, _ = tensors(128, 128)
    v = torch.randn(1, 2, 128, 64, dtype=torch.float16).transpose(1, 2)
    assert not close(own(q, k, v), ours(q, k, v))


def test_the_native_backend_and_this_one_agree_bit_for_bit_on_dropout():
    q, k, v = tensors(150, 170)
    made = []
    for backend in ("native", "flaggems"):
        torch.manual_seed(5)
        with use_backend(backend):
            made.append(
                flash_attn.flash_attn_func(q, k, v, 0.3, causal=True, return_attn_probs=True)
            )
    (out, lse, s_dmask), (other_out, other_lse, other_s_dmask) = made
    assert close(out, other_out) and torch.allclose(lse, other_lse, atol=1e-4)
    assert torch.equal(torch.signbit(s_dmask), torch.signbit(other_s_dmask))


def test_vendors_are_nvidia_here_and_requests_ours():
    from flash_attn.backends.flaggems import own_operator, runtime
    from flash_attn.backends.interface import Options

    where = runtime.current()
    q, k, v = tensors(128, 128)
    assert where.is_nvidia and where.device_type == "cuda"
    assert not own_operator.serves(where, q, k, v, Options(0.125), True, True)


def test_a_captured_graph_replays():
    q, k, v = tensors(100, 100)
    expected = ours(q, k, v, causal=True)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        out = ours(q, k, v, causal=True)
    out.zero_()
    graph.replay()
    assert torch.equal(out, expected)


@pytest.mark.parametrize("seqlen", (64, 1024))  # of the longer one keys have descriptors
def test_the_driver_launches_what_triton_does(monkeypatch, seqlen):
    from flash_attn.backends.flaggems import driver_launch, launch, plan, plan_backward

    def results():
        launch._launch_of.cache_clear()
        plan.plan_forward.cache_clear()
        plan_backward.plan_backward.cache_clear()
        for _ in range(3):  # compiled, found, and kept
            inputs = [x.clone().requires_grad_() for x in leaves]
            out = ours(*inputs, causal=True)
            gradients = torch.autograd.grad(out, inputs, dout)
        return out, *gradients

    leaves = tensors(seqlen, seqlen)
    dout = torch.randn_like(leaves[0])
    monkeypatch.setattr(launch, "_compiled", {})
    own_results = results()
    assert all(compiled.function is not None for compiled in launch._compiled.values())
    monkeypatch.setattr(launch, "_compiled", {})
    monkeypatch.setattr(driver_launch, "function_of", lambda *_: None)
    for x, y in zip(own_results, results(), strict=True):
        assert torch.equal(x, y)


def test_hooks_of_launches_are_called(monkeypatch):
    from triton import knobs

    q, k, v = tensors(64, 64)
    expected = [ours(q, k, v) for _ in range(3)][-1]
    called = []
    monkeypatch.setattr(knobs.runtime, "launch_enter_hook", called.append)
    assert torch.equal(ours(q, k, v), expected)
    assert len(called) == 1


def test_compiles_as_a_whole():
    q, k, v = (x.requires_grad_() for x in tensors(64, 64))
    with use_backend("flaggems"):
        call = torch.compile(flash_attn.flash_attn_func, fullgraph=True)
        out = call(q, k, v, causal=True)
        expected = flash_attn.flash_attn_func(q, k, v, causal=True)
        assert close(out, expected)
        gradients = [
            torch.autograd.grad(x.float().square().sum(), (q, k, v)) for x in (out, expected)
        ]
    for x, y in zip(*gradients, strict=True):
        assert close(x, y)


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (100, 30)},
    "softcap": {"softcap": 20.0},
    "alibi": {"causal": True, "alibi_slopes": True},
    "dropout": {"dropout_p": 0.2},
}


@pytest.mark.skipif(
    torch.cuda.is_available() and torch.cuda.get_device_capability() != (9, 0), reason="Hopper's"
)
@pytest.mark.parametrize("varlen", (False, True))
@pytest.mark.parametrize("head_dim", (56, 64, 128, 248))
@pytest.mark.parametrize("name", OPTIONS)
def test_the_kernels_of_hopper_agree_with_the_others(monkeypatch, name, head_dim, varlen):
    """Forward and backward, and that they are bitwise reproducible."""
    from flash_attn.backends.flaggems import launch, plan, plan_backward, tiles

    q, k, v = tensors(700, 900, 6, head_dim)
    k, v = k[:, :, :2], v[:, :, :2]
    options = OPTIONS[name] | {"s_aux": torch.randn(6), "return_attn_probs": True}
    if "alibi_slopes" in options:
        options["alibi_slopes"] = torch.rand(6)
    lengths = ()
    if varlen:  # behind the last sequence are rows of none, whose keys and values are NaN
        q, k, v = (x[0] for x in (q, k, v))
        cu_q, cu_k = (torch.tensor(x).int() for x in ((0, 1, 300, 680), (0, 130, 130, 777)))
        k[777:], v[777:] = float("nan"), float("nan")
        lengths = (cu_q, cu_k, 520, 700)
    operands = [x.requires_grad_() for x in (q, k, v)]
    dout = torch.randn_like(q)
    attend = flash_attn.flash_attn_varlen_func if varlen else flash_attn.flash_attn_func

    def call():
        torch.manual_seed(3)
        with use_backend("flaggems"):
            out, lse, _ = attend(*operands, *lengths, **options)
        return out, lse, *torch.autograd.grad(out, operands, dout)

    made, used, run = [], [], launch.Launch.__call__
    monkeypatch.setattr(
        launch.Launch, "__call__", lambda x, *y: used.append(x.kernel.__name__) or run(x, *y)
    )
    for serves in (True, False):
        if not serves:
            monkeypatch.setattr(tiles, "has_gluon", lambda capability: False)
        plan.plan_forward.cache_clear()
        plan_backward.plan_backward.cache_clear()
        used.clear()
        made.append(call())
        assert ("attention_forward_hopper" in used) == serves
        assert ("backward_dkdv_hopper" in used) == serves
        for _ in range(10):
            assert all(map(torch.equal, call(), made[-1]))
    plan.plan_forward.cache_clear()
    plan_backward.plan_backward.cache_clear()
    for x, y in zip(*made, strict=True):
        assert not x.isnan().any()
        assert close(x, y)
