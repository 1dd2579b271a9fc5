"""The backward kernels against the reference."""

import math

import pytest
import reference
import torch
from checks import (
    FP16,
    FP32,
    Case,
    assert_close,
    case_id,
    check_backward,
    check_varlen_backward,
    cumulative,
    pairwise,
)

import flash_attn
from flash_attn.backends import Options, Sequences, flaggems
from flash_attn.backends.flaggems import check, launch, plan_backward, runtime, tiles

FEATURES = {
    "dtype": (FP32, FP16),
    "lengths": ((50, 50), (30, 60), (60, 30), (1, 70)),
    "heads": ((1, 1), (4, 2), (3, 1)),
    "head_dim": (16, 33, 40, 64),
    "causal": (False, True),
    "window_size": ((-1, -1), (20, 5), (9, -1), (-1, 3)),
    "softcap": (0.0, 3.0),
    "alibi": ("", "h", "bh"),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.2),
    "lse_gradient": (False, True),
    "layout": ("dense", "transposed", "sliced", "expanded"),
}


def _pairs():
    for row in pairwise(**FEATURES):
        (sq, sk), (heads, heads_k) = row.pop("lengths"), row.pop("heads")
        yield Case(batch=1, sq=sq, sk=sk, heads=heads, heads_k=heads_k, **row)


SPECIAL = [
    *(
        Case(batch=1, sq=40, sk=40, heads=1, heads_k=1, head_dim=d, causal=True, dtype=FP16)
        for d in (1, 80, 96, 128, 160, 192, 224, 256)
    ),
    *(Case(batch=b, sq=sq, sk=sk, sinks=True) for b, sq, sk in ((2, 0, 5), (2, 5, 0), (0, 5, 5))),
    Case(sq=40, sk=0, head_dim=16),
    Case(batch=1, sq=33, sk=50, head_dim=16, softmax_scale=-0.3, causal=True),
    Case(batch=1, sq=33, sk=50, head_dim=16, softmax_scale=0.0, lse_gradient=True),
    Case(batch=1, sq=100, sk=10, heads=1, heads_k=1, head_dim=16, window_size=(0, 0)),
    Case(batch=1, sq=10, sk=100, heads=1, heads_k=1, head_dim=16, window_size=(20, -1)),
]


@pytest.fixture(autouse=True)
def _small_tiles(monkeypatch):
    monkeypatch.setattr(tiles, "backward_dkdv", lambda *_: tiles.Tile(16, 32, 4, 1))
    monkeypatch.setattr(tiles, "backward_dq", lambda *_: tiles.Tile(32, 32, 4, 1))


@pytest.mark.parametrize("case", [*_pairs(), *SPECIAL], ids=case_id)
def test_against_the_reference(case):
    check_backward(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, sq=70, sk=90, heads=2, heads_k=1),
        Case(batch=2, sq=40, sk=90, heads=1, heads_k=1, causal=True, layout="transposed"),
        Case(batch=1, sq=90, sk=70, heads=2, heads_k=2, head_dim=56, window_size=(9, 30)),
        Case(
            batch=1, sq=70, sk=90, heads=1, heads_k=1, dropout_p=0.3, softcap=2.0, layout="sliced"
        ),
        Case(batch=1, sq=90, sk=70, heads=1, heads_k=1, causal=True),  # rows that see nothing
    ],
    ids=case_id,
)
def test_on_hopper(case, monkeypatch):
    """What reads through tensor descriptors, where the call allows it, with the tiles there."""
    monkeypatch.setattr(runtime._runtime, "capability", lambda device: 90)
    monkeypatch.setattr(tiles, "has_gluon", lambda capability: False)
    monkeypatch.setattr(tiles, "backward_dkdv", lambda *_: tiles.Tile(64, 64, 8, 2))
    described = []
    make = launch.descriptor
    monkeypatch.setattr(launch, "descriptor", lambda *x: described.append(x) or make(*x))
    monkeypatch.setattr(plan_backward, "LEAST_DESCRIBED_ROWS", 1)
    check_backward(case)
    assert bool(described) == (not case.causal or case.sq <= case.sk)


LENGTHS_Q, LENGTHS_K = (5, 0, 40, 1, 33), (33, 20, 0, 70, 20)


def _varlen_inputs(dtype=FP16, head_dim=32, rest_q=0, rest_k=0):
    q = torch.randn(sum(LENGTHS_Q) + rest_q, 2, head_dim).to(dtype)
    k, v = torch.randn(2, sum(LENGTHS_K) + rest_k, 1, head_dim).to(dtype)
    return q, k, v, cumulative(*LENGTHS_Q), cumulative(*LENGTHS_K), 40, 70


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 2.0},
        {"window_size": (10, 4)},
        {"causal": True, "alibi_slopes": torch.rand(5, 2)},
    ],
    ids=("plain", "causal-softcap", "window", "alibi"),
)
def test_variable_length(options):
    check_varlen_backward(*_varlen_inputs(), **options)


def _gradients(tensors, sequences, options, dsoftmax_lse=None):
    """out, lse and [dq, dk, dv, softmax_d] of the backend, its outputs full of NaN before."""
    q, k, v = tensors
    out, lse, _ = flaggems.forward(q, k, v, options, sequences)
    dout = torch.randn_like(out)
    results = [torch.full_like(x, math.nan) for x in (q, k, v)]
    softmax_d = flaggems.backward(
        *(dout, q, k, v, out, lse, *results, options, sequences, dsoftmax_lse, None)
    )
    return dout, [*results, softmax_d]


@pytest.mark.parametrize("causal", (False, True))
def test_padding_is_not_read(causal, monkeypatch):
    """Rows of no sequence, and keys beyond seqused_k, are NaN; their gradients are 0."""
    for name in ("forward", "backward"):  # lengths are not checked where they are on a GPU
        monkeypatch.setattr(check, name, lambda *_: None)
    q, k, v, cu_q, cu_k, *most = _varlen_inputs(head_dim=64, rest_q=9, rest_k=40)
    cu_q, cu_k = cu_q + 2, cu_k + 35  # rows before the first sequence and after the last
    used = torch.tensor([30, 20, 0, 50, 3]).int()
    valid_q, valid_k = torch.zeros(len(q)).bool(), torch.zeros(len(k)).bool()
    valid_q[2 : 2 + sum(LENGTHS_Q)] = True
    for begin, length in zip(cu_k[:-1].tolist(), used.tolist(), strict=True):
        valid_k[begin : begin + length] = True
    q[~valid_q], k[~valid_k], v[~valid_k] = math.nan, math.inf, math.nan
    options = Options(0.2, causal, dropout_p=0.2, rng_state=torch.tensor([3, 4]))
    dout, results = _gradients((q, k, v), Sequences(cu_q, cu_k, *most, used), options)
    for x, valid in zip(results, (valid_q, valid_k, valid_k), strict=False):
        assert torch.count_nonzero(x[~valid]) == 0
    assert torch.count_nonzero(results[3][:, ~valid_q]) == 0

    inside = slice(2, 2 + sum(LENGTHS_Q))
    zeroed = [x.masked_fill(~valid_k[:, None, None], 0.0)[35:] for x in (k, v)]
    rest = {
        "cu_seqlens_q": cu_q - 2,
        "cu_seqlens_k": cu_k - 35,
        "seqused_k": used,
        "causal": causal,
        "softmax_scale": 0.2,
        "dropout_p": options.dropout_p,
        "rng_state": (3, 4),
    }
    inputs = (reference.varlen_attention, [q[inside], *zeroed], dout[inside])
    _, _, expected = reference.with_gradients(*inputs, **rest)
    _, _, naive = reference.with_gradients(*inputs, **rest, dtype=q.dtype)
    results = [results[0][inside], results[1][35:], results[2][35:]]
    for name, x, want, plain in zip(("dq", "dk", "dv"), results, expected, naive, strict=True):
        assert_close(x, want, plain, name)


def test_rows_of_a_sequence_that_see_nothing_may_hold_anything():
    """As the next one, with sequences of varying length."""
    q, k, v, cu_q, cu_k, *most = _varlen_inputs(FP32, head_dim=64)
    begins, lengths = cu_q[:-1].tolist(), zip(LENGTHS_Q, LENGTHS_K, strict=True)
    hidden = torch.zeros(len(q)).bool()
    for begin, (sq, sk) in zip(begins, lengths, strict=True):
        hidden[begin : begin + max(sq - sk, 0)] = True
    assert hidden.any()
    options, sequences = Options(0.125, True), Sequences(cu_q, cu_k, *most)
    out, lse, _ = flaggems.forward(q, k, v, options, sequences)
    dout = torch.randn_like(out)
    made = []
    for value in (0.0, math.nan):
        q[hidden], dout[hidden] = value, value
        made.append([torch.empty_like(x) for x in (q, k, v)])
        flaggems.backward(dout, q, k, v, out, lse, *made[-1], options, sequences)
    for zeros, nans in zip(*made, strict=True):
        assert torch.equal(zeros, nans)


@pytest.mark.parametrize("described", (False, True))
def test_rows_that_see_nothing_may_hold_anything(described, monkeypatch):
    """NaN in rows of q and dout that see no key reaches nothing."""
    monkeypatch.setattr(runtime._runtime, "capability", lambda device: 90 if described else 0)
    monkeypatch.setattr(plan_backward, "LEAST_DESCRIBED_ROWS", 1)
    q, k, v = (torch.randn(1, n, 1, 16) for n in (70, 40, 40))
    q[:, :30] = math.nan
    options = Options(0.25, True)
    out, lse, _ = flaggems.forward(q, k, v, options)
    dout = torch.randn_like(out)
    dout[:, :30] = math.nan
    results = [torch.empty_like(x) for x in (q, k, v)]
    flaggems.backward(dout, q, k, v, out, lse, *results, options)
    assert all(x.isfinite().all() for x in results)
    assert torch.count_nonzero(results[0][:, :30]) == 0


def test_numbers_that_are_not_finite():
    """NaN in a row of dout stays in that row of dq, and reaches all keys."""
    q, k, v = (torch.randn(1, 40, 1, 16) for _ in range(3))
    options = Options(0.25)
    out, lse, _ = flaggems.forward(q, k, v, options)
    dout = torch.randn_like(out)
    dout[0, 5, 0, 3] = math.nan
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    flaggems.backward(dout, q, k, v, out, lse, dq, dk, dv, options)
    assert dq[0, 5].isnan().all() and dk.isnan().all() and dv[..., 3].isnan().all()
    rest = [i for i in range(40) if i != 5]
    assert dq[0, rest].isfinite().all() and dv[..., :3].isfinite().all()


def test_programs_visit_every_tile_once():
    """Whatever number of pairs is worked on at once, the result is the same, bit for bit."""
    q, k, v = (torch.randn(3, 40, 1, 16) for _ in range(3))
    options = Options(0.25, True)
    torch.manual_seed(1)
    _, expected = _gradients((q, k, v), None, options)
    for size in (1, 11_000):
        with pytest.MonkeyPatch.context() as patch:
            plan_backward.plan_backward.cache_clear()
            patch.setattr(plan_backward, "_CACHE_BYTES", size)
            torch.manual_seed(1)
            _, results = _gradients((q, k, v), None, options)
        assert all(map(torch.equal, results, expected))


def test_forward_and_backward_drop_the_same():
    """With values of 1 and one of them 0, dv shows what the forward pass kept."""
    q, k = torch.zeros(2, 1, 40, 1, 16)
    v = torch.eye(40, 16)[None, :, None].requires_grad_()
    torch.manual_seed(2)
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    (dv,) = torch.autograd.grad(out, v, torch.ones_like(out))
    kept = (~torch.signbit(s_dmask[0, 0])).float()
    torch.testing.assert_close(dv[0, :, 0, 0], kept.sum(0) / 40 / 0.5)
