"""The GPU computes what the CPU does, and drops the very same entries."""

from dataclasses import replace

import pytest
import reference
import torch
from checks import BF16, FP16, Case, assert_close, pairwise

from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_forward,
)

CASES = [
    replace(Case(), **row)
    for row in pairwise(
        seed=11,
        dtype=(BF16, FP16),
        sq=(1, 70, 131, 300),
        sk=(1, 128, 203, 515),
        heads=(6,),
        heads_k=(6, 2, 1),
        head_dim=(32, 64, 96, 128, 256, 33, 72),
        causal=(False, True),
        window_size=((-1, -1), (50, 20)),
        softcap=(0.0, 2.0),
        alibi=("", "bh"),
        dropout_p=(0.0, 0.17, 0.5),
    )
]


def inputs_of(case):
    """q, k, v, dout, the slopes of ALiBi and the state of the generator, on the CPU."""
    generator = torch.Generator("cpu").manual_seed(1)

    def randn(*shape):
        return torch.randn(shape, generator=generator, device="cpu")

    q = randn(case.batch, case.sq, case.heads, case.head_dim).to(case.dtype)
    k = randn(case.batch, case.sk, case.heads_k, case.head_dim).to(case.dtype)
    v = randn(case.batch, case.sk, case.heads_k, case.head_dim).to(case.dtype)
    dout = randn(*q.shape).to(case.dtype)
    slopes = randn(case.batch, case.heads).abs() * 0.3 if case.alibi else None
    state = torch.tensor([1234567890123456789, 42], device="cpu") if case.dropout_p else None
    return q, k, v, dout, slopes, state


def results_on(device, case, inputs):
    """Results of forward and backward."""
    q, k, v, dout, slopes, state = (None if x is None else x.to(device) for x in inputs)
    left, right = case.window_size
    numbers = (case.dropout_p, case.head_dim**-0.5, case.causal, left, right, case.softcap)
    out, lse, s_dmask, _ = _flash_attn_forward(q, k, v, *numbers, slopes, True, rng_state=state)
    gradients = [torch.empty_like(x) for x in (q, k, v)]
    _flash_attn_backward(
        *(dout, q, k, v, out, lse, *gradients, *numbers, slopes, False), rng_state=state
    )
    results = (out, lse, s_dmask, *gradients)
    names = ("out", "lse", "S_dmask", "dq", "dk", "dv")
    return {name: x.cpu() for name, x in zip(names, results, strict=True)}


def remainders(case, inputs, out):
    """What float32 leaves of terms that cancel: with one key dP = D, so that dq and dk are 0."""
    q, k, _, dout, _, _ = (None if x is None else x.double() for x in inputs)
    rounding = 32 * torch.finfo(torch.float32).eps * case.head_dim**-0.5
    rounding *= float((dout * out).abs().sum(-1).max())  # of dP - D, times the scale
    terms = case.sq * case.heads // case.heads_k
    return {
        "dq": rounding * float(k.abs().max()),
        "dk": rounding * float(q.abs().max()) * terms**0.5,
    }


@pytest.mark.parametrize("case", CASES, ids=str)
def test_attention(case):
    inputs = inputs_of(case)
    cpu, gpu = (results_on(device, case, inputs) for device in ("cpu", "cuda"))
    if case.dropout_p:
        same = torch.signbit(cpu["S_dmask"]) == torch.signbit(gpu["S_dmask"])
        assert same.all(), "the masks differ"
    smallest = remainders(case, inputs, cpu["out"])
    for name, x in cpu.items():
        y = gpu[name]
        assert torch.equal(x.isfinite(), y.isfinite()), name
        if x.numel() == 0:  # S_dmask without dropout
            continue
        x, y = (t.double().where(t.isfinite(), 0.0) for t in (x, y))
        # Two computations of that precision: each is off by a few units of its largest value.
        limit = 8 * torch.finfo(case.dtype).eps * max(x.abs().max(), 1e-3)
        limit = 1e-3 if name == "lse" else max(limit, smallest.get(name, 0.0))
        assert (x - y).abs().max() <= limit, name


@pytest.mark.parametrize("dropout_p", (0.001, 0.1, 0.5, 0.9))
@pytest.mark.parametrize("state", ((0, 0), (-1, -1), (2**63 - 1, 2**62), (7, 1 << 33)), ids=str)
def test_masks_of_sequences(state, dropout_p):
    """Rows and columns are counted inside each sequence, and the sequence's number counts."""
    lengths_q, lengths_k = (33, 0, 150, 1), (70, 5, 200, 129)
    cu_q, cu_k = (
        torch.tensor((0, *x), dtype=torch.int32).cumsum(0, dtype=torch.int32)
        for x in (lengths_q, lengths_k)
    )
    q = torch.randn(sum(lengths_q), 3, 64).to(BF16)
    k, v = torch.randn(2, sum(lengths_k), 3, 64).to(BF16)
    _, _, s_dmask, _ = _flash_attn_varlen_forward(
        *(q, k, v, cu_q, cu_k, max(lengths_q), max(lengths_k), dropout_p, 0.125, False),
        return_softmax=True,
        rng_state=torch.tensor(state),
    )
    for i, (sq, sk) in enumerate(zip(lengths_q, lengths_k, strict=True)):
        expected = reference.dropout_keep_mask(dropout_p, state, 1, 3, sq, sk, first_batch=i)
        assert torch.equal(~torch.signbit(s_dmask[i : i + 1, :, :sq, :sk]), expected)


def test_the_naive_error_bounds_a_long_row():
    """65,536 keys: sums are long, offsets pass 16 bits."""
    q = torch.randn(1, 3, 2, 64).to(BF16)
    k, v = torch.randn(2, 1, 65536 + 7, 2, 64).to(BF16)
    out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, 0.125, True, -1, -1, 0.0, None, False)
    expected, expected_lse = reference.attention(q, k, v, causal=True)
    naive, _ = reference.attention(q, k, v, causal=True, dtype=BF16)
    assert_close(out, expected, naive, "out")
    assert_close(lse, expected_lse, expected_lse, "lse", input_dtype=BF16)
