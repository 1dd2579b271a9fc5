"""One call of every public function, on small inputs, for tests of what torch does with it."""

import pytest
import torch
import torch._dynamo.testing
from checks import DTYPE

import flash_attn

BATCH, SQ, SK, HEADS, HEADS_K, HEAD_DIM = 2, 7, 9, 4, 2, 16


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def randn(*shape, grad=True):
    return torch.randn(*shape).to(DTYPE).requires_grad_(grad)


def leaves(tensors):
    return [x.detach().clone().requires_grad_() for x in tensors]


# --------------------------------------------------------------------------------------------------
# One call of every public function: (function of the differentiable inputs, those inputs)


def qkv():
    return [
        randn(BATCH, SQ, HEADS, HEAD_DIM, grad=False),
        randn(BATCH, SK, HEADS_K, HEAD_DIM, grad=False),
        randn(BATCH, SK, HEADS_K, HEAD_DIM, grad=False),
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
            randn(BATCH, SQ, *heads, grad=False),
            randn(BATCH, SK, 2, HEADS_K, HEAD_DIM, grad=False),
        ],
        qkvpacked: lambda: [randn(BATCH, SQ, 3, *heads, grad=False)],
        varlen: lambda: [x[0] for x in qkv()],
        varlen_kvpacked: lambda: [
            randn(SQ, *heads, grad=False),
            randn(SQ, 2, HEADS_K, HEAD_DIM, grad=False),
        ],
        varlen_qkvpacked: lambda: [randn(SQ, 3, *heads, grad=False)],
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
        self.q = randn(2, 2, HEADS, HEAD_DIM, grad=False)
        self.caches = [randn(4, 12, HEADS_K, HEAD_DIM, grad=False) for _ in range(2)]
        self.new = [randn(2, 2, HEADS_K, HEAD_DIM, grad=False) for _ in range(2)]
        self.tables = [randn(12, 8, grad=False) for _ in range(2)]
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


class OpRecorder(torch.utils._python_dispatch.TorchDispatchMode):
    """A dispatch mode that remembers the ops that it saw."""

    def __init__(self):
        super().__init__()
        self.seen = set()

    def __torch_dispatch__(self, op, types, args=(), kwargs=None):
        self.seen.add(str(op))
        return op(*args, **(kwargs or {}))
