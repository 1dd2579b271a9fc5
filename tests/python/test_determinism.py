"""The same numbers, bit for bit: for any number of threads, every time, and in any company.

The CPU needs no switch for it. A GPU has one for dq, and a number of splits to be given."""

import pytest
import torch
from checks import BF16, DEVICE, DTYPES, FP32, Case, assert_close, case_id, dtype_id

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_backward

IS_CPU = DEVICE.type == "cpu"
DETERMINISTIC = {} if IS_CPU else {"deterministic": True}

CASES = [
    Case(dtype=dtype, **fields)
    for dtype in DTYPES
    for fields in (
        {"sq": 300, "sk": 300, "causal": True},
        {"sq": 257, "sk": 500, "heads_k": 2, "window_size": (100, 30), "alibi": "h"},
        {"sq": 3, "sk": 3000, "heads": 8, "heads_k": 1, "head_dim": 40},
        {"sq": 400, "sk": 64, "dropout_p": 0.3, "softcap": 2.0, "sinks": True},
        {"batch": 7, "sq": 33, "sk": 90, "heads": 3, "heads_k": 3, "head_dim": 128},
    )
]


def results(case, tensors, dout, options, s_aux):
    torch.manual_seed(7)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse, _ = flash_attn.flash_attn_func(
        *leaves, case.dropout_p, **options, s_aux=s_aux, return_attn_probs=True
    )
    return out, lse, *torch.autograd.grad((out, lse), leaves, (dout, torch.ones_like(lse)))


def assert_same(a, b):
    for x, y in zip(a, b, strict=True):
        assert torch.equal(x, y), float((x.double() - y.double()).abs().max())


@pytest.mark.cpu
@pytest.mark.parametrize("case", CASES, ids=case_id)
def test_any_number_of_threads(case):
    arguments = case.inputs(), torch.randn(case.batch, case.sq, case.heads, case.head_dim)
    tensors, dout = arguments[0], arguments[1].to(case.dtype)
    options, s_aux = case.options(), case.sink_values()
    torch.set_num_threads(1)
    expected = results(case, tensors, dout, options, s_aux)
    for threads in (2, 3, 5):
        torch.set_num_threads(threads)
        assert_same(results(case, tensors, dout, options, s_aux), expected)


@pytest.mark.parametrize("case", CASES, ids=case_id)
@pytest.mark.parametrize(
    "deterministic",
    (False, True) if IS_CPU else (True,),
    ids=lambda x: "deterministic" if x else "",
)
def test_every_time(case, deterministic):
    """On the CPU the switch changes nothing."""
    torch.set_num_threads(2)
    tensors, options, s_aux = case.inputs(), case.options(), case.sink_values()
    dout = torch.randn(case.batch, case.sq, case.heads, case.head_dim).to(case.dtype)
    expected = results(case, tensors, dout, options | DETERMINISTIC, s_aux)
    options["deterministic"] = deterministic
    for _ in range(3):
        assert_same(results(case, tensors, dout, options, s_aux), expected)


@pytest.mark.cpu
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("num_splits", (0, 1, 4))
def test_cache_with_any_number_of_threads(dtype, num_splits):
    q = torch.randn(3, 2, 8, 64).to(dtype)
    k_cache, v_cache = (torch.randn(3, 2500, 2, 64).to(dtype) for _ in range(2))
    lengths = torch.tensor([2500, 17, 1300], dtype=torch.int32)

    def call():
        return flash_attn.flash_attn_with_kvcache(
            *(q, k_cache, v_cache),
            cache_seqlens=lengths,
            num_splits=num_splits,
            causal=True,
            return_softmax_lse=True,
        )

    torch.set_num_threads(1)
    expected = call()
    for threads in (2, 4):
        torch.set_num_threads(threads)
        assert_same(call(), expected)


# -------------------------------------------------------------------------------------------------
# A sequence's result does not depend on the others


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_alone_or_in_a_batch(dtype, causal):
    q, dout = (torch.randn(5, 70, 4, 64).to(dtype) for _ in range(2))
    k, v = (torch.randn(5, 130, 2, 64).to(dtype) for _ in range(2))

    def call(rows):
        leaves = [x[rows].detach().requires_grad_() for x in (q, k, v)]
        out, lse, _ = flash_attn.flash_attn_func(
            *leaves, causal=causal, return_attn_probs=True, **DETERMINISTIC
        )
        return out, lse, *torch.autograd.grad(out, leaves, dout[rows])

    whole = call(slice(None))
    for i in range(5):
        assert_same([x[i : i + 1] for x in whole], call(slice(i, i + 1)))
    order = torch.tensor([3, 0, 4, 1, 2])
    assert_same([x[order] for x in whole], call(order))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_alone_or_in_a_packed_batch(dtype, causal):
    lengths_q, lengths_k = (30, 0, 1, 130, 64), (90, 20, 513, 100, 64)
    q = [torch.randn(n, 4, 64).to(dtype) for n in lengths_q]
    k, v = ([torch.randn(n, 2, 64).to(dtype) for n in lengths_k] for _ in range(2))
    dout = [torch.randn(n, 4, 64).to(dtype) for n in lengths_q]

    def call(sequences):
        counts_q = torch.tensor([0] + [len(q[i]) for i in sequences]).cumsum(0).int()
        counts_k = torch.tensor([0] + [len(k[i]) for i in sequences]).cumsum(0).int()
        leaves = [torch.cat([x[i] for i in sequences]).requires_grad_() for x in (q, k, v)]
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            *(*leaves, counts_q, counts_k, 130, 513),
            causal=causal,
            return_attn_probs=True,
            **DETERMINISTIC,
        )
        gradients = torch.autograd.grad(out, leaves, torch.cat([dout[i] for i in sequences]))
        by_q, by_k = counts_q.diff().tolist(), counts_k.diff().tolist()
        parts = [out.split(by_q), lse.split(by_q, 1), gradients[0].split(by_q)]
        parts += [gradients[1].split(by_k), gradients[2].split(by_k)]
        return dict(zip(sequences, zip(*parts, strict=True), strict=True))

    whole = call((0, 1, 2, 3, 4))
    for order in ((4, 2, 0, 3, 1), (3, 0), (1,), (2,), (4,), (3,)):
        for sequence, parts in call(order).items():
            if order == (2,) and not IS_CPU:  # a single row goes to the kernels for decoding
                for x, y in zip(parts, whole[sequence], strict=True):
                    torch.testing.assert_close(x, y, rtol=0.016, atol=0.02 * float(y.abs().max()))
            else:
                assert_same(parts, whole[sequence])


@pytest.mark.parametrize("num_splits", (0, 1, 3) if IS_CPU else (1, 3))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_alone_or_in_a_batch_of_caches(dtype, num_splits):
    lengths = torch.tensor([3000, 5, 1029, 0], dtype=torch.int32)
    q = torch.randn(4, 1, 8, 64).to(dtype)
    k_cache, v_cache = (torch.randn(4, 3000, 2, 64).to(dtype) for _ in range(2))

    def call(rows):
        return flash_attn.flash_attn_with_kvcache(
            *(q[rows], k_cache[rows], v_cache[rows]),
            cache_seqlens=lengths[rows],
            num_splits=num_splits,
            return_softmax_lse=True,
        )

    whole = call(slice(None))
    for i in range(4):
        assert_same([x[i : i + 1] for x in whole], call(slice(i, i + 1)))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_room_behind_a_cache_does_not_matter(dtype):
    """The same keys in a longer cache: the parts depend on the length, not on the capacity."""
    lengths = torch.tensor([2100, 60], dtype=torch.int32)
    q = torch.randn(2, 1, 4, 64).to(dtype)
    k_cache, v_cache = (torch.randn(2, 8000, 4, 64).to(dtype) for _ in range(2))

    def call(capacity):
        return flash_attn.flash_attn_with_kvcache(
            *(q, k_cache[:, :capacity], v_cache[:, :capacity]),
            cache_seqlens=lengths,
            num_splits=1,
            return_softmax_lse=True,
        )

    assert_same(call(2100), call(8000))


def test_head_does_not_depend_on_the_others():
    q, k, v = Case(sq=90, sk=200, heads=6, heads_k=3).inputs()
    whole = flash_attn.flash_attn_func(q, k, v, causal=True)
    for head in range(3):
        part = flash_attn.flash_attn_func(
            q[:, :, 2 * head : 2 * head + 2],
            *(x[:, :, head : head + 1] for x in (k, v)),
            causal=True,
        )
        assert torch.equal(part, whole[:, :, 2 * head : 2 * head + 2])


# -------------------------------------------------------------------------------------------------
# Splitting the keys and merging by the log-sum-exps, as ring attention does


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=dtype_id)
@pytest.mark.parametrize("cuts", ((100,), (1, 64, 130), (0, 200)), ids=str)
def test_split_and_merge(dtype, cuts):
    q, k, v = Case(sq=60, sk=200, heads_k=2, dtype=dtype).inputs()
    whole, whole_lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    outs, lses = [], []
    for begin, end in zip((0, *cuts), (*cuts, 200), strict=True):
        out, lse, _ = flash_attn.flash_attn_func(
            q, k[:, begin:end], v[:, begin:end], return_attn_probs=True
        )
        # A part without keys has lse +inf, by FlashAttention's convention: it counts nothing.
        lses.append(torch.where(lse == torch.inf, -torch.inf, lse).double())
        outs.append(out.double())
    lse = torch.logsumexp(torch.stack(lses), 0)
    merged = sum(
        out * torch.exp(part - lse).transpose(1, 2)[..., None]
        for out, part in zip(outs, lses, strict=True)
    )
    torch.testing.assert_close(lse.float(), whole_lse, rtol=1e-5, atol=1e-5)
    # The parts are rounded to the dtype before they are merged: one rounding each.
    assert_close(whole, merged, merged.to(dtype), "out")


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=dtype_id)
def test_gradients_of_parts_add_up(dtype):
    """With the out and the lse of the whole, backward over parts of the keys gives parts of dq."""
    q, k, v = Case(sq=60, sk=200, heads_k=2, dtype=dtype).inputs()
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    dout = torch.randn_like(out)

    def backward(begin, end):
        part_k, part_v = k[:, begin:end], v[:, begin:end]
        dq, dk, dv = torch.empty_like(q), torch.empty_like(part_k), torch.empty_like(part_v)
        _flash_attn_backward(
            *(dout, q, part_k, part_v, out, lse, dq, dk, dv),
            *(0.0, 64**-0.5, False, -1, -1, 0.0, None, False),
        )
        return dq.float(), dk, dv

    whole = backward(0, 200)
    first, second = backward(0, 64), backward(64, 200)
    rounding = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(
        first[0] + second[0], whole[0], rtol=rounding, atol=rounding * float(whole[0].abs().max())
    )
    for i in (1, 2):
        parts = torch.cat([first[i], second[i]], 1)
        limit = rounding * float(whole[i].float().abs().max())
        torch.testing.assert_close(parts, whole[i], rtol=rounding, atol=limit)
