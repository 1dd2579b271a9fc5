"""The forward kernel on dense inputs, and the parts of split keys, against the reference."""

import math

import pytest
import reference
import torch
from checks import (
    FP16,
    FP32,
    Case,
    assert_attention_close,
    case_id,
    check_forward,
    keep_mask_of,
    pairwise,
)

import flash_attn
from flash_attn.backends import Options, flaggems
from flash_attn.backends.flaggems import attention, launch, plan, tiles

FEATURES = {
    "dtype": (FP32, FP16),
    "lengths": ((50, 50), (37, 70), (70, 37), (1, 90)),
    "heads": ((2, 2), (4, 2), (6, 1)),
    "head_dim": (16, 33, 40, 64, 96),
    "causal": (False, True),
    "window_size": ((-1, -1), (20, 5), (9, -1), (-1, 3)),
    "softcap": (0.0, 3.0),
    "alibi": ("", "h", "bh"),
    "sinks": (False, True),
    "layout": ("dense", "transposed", "sliced"),
}


def _pairs():
    for row in pairwise(**FEATURES):
        (sq, sk), (heads, heads_k) = row.pop("lengths"), row.pop("heads")
        yield Case(sq=sq, sk=sk, heads=heads, heads_k=heads_k, **row)


SPECIAL = [
    *(Case(heads=1, heads_k=1, head_dim=d, dtype=FP16) for d in (1, 80, 160, 192, 224, 256)),
    Case(sq=0),
    Case(sk=0, sinks=True),
    Case(batch=0),
    Case(sq=40, sk=0),
    Case(sq=33, sk=33, softmax_scale=-0.3, causal=True),
    Case(sq=33, sk=33, softmax_scale=0.0),
    Case(sq=33, sk=70, layout="expanded"),
    Case(sq=33, sk=70, layout="interleaved", dtype=FP16),
]


@pytest.mark.parametrize("case", [*_pairs(), *SPECIAL], ids=case_id)
def test_against_the_reference(case):
    check_forward(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(sq=70, sk=100, heads_k=2, causal=True, dtype=FP16),
        Case(sq=70, sk=70, layout="transposed", head_dim=24, window_size=(20, 5)),
        Case(batch=1, sq=65, sk=130, layout="interleaved", dtype=FP16, head_dim=128),
    ],
    ids=case_id,
)
def test_tensor_descriptors(monkeypatch, case):
    """What is read on Hopper; NaN of other tensors and of what lies around is not."""
    monkeypatch.setattr(plan, "LEAST_DESCRIBED_KEYS", 1)
    monkeypatch.setattr(tiles, "has_descriptors", lambda capability: True)
    made, make = [], launch.descriptor
    monkeypatch.setattr(launch, "descriptor", lambda *x: made.append(x) or make(*x))
    check_forward(case)
    assert len(made) == 2


@pytest.mark.parametrize(
    "case",
    [
        Case(batch=1, sq=40, sk=70, heads=2, heads_k=1, head_dim=16, causal=True, dropout_p=0.3),
        Case(batch=2, sq=33, sk=20, heads=1, heads_k=1, head_dim=16, dropout_p=0.1, softcap=2.0),
    ],
    ids=case_id,
)
def test_dropout(case):
    """S_dmask says what was dropped, which the reference takes from there; then, what it should."""
    torch.manual_seed(3)
    check_forward(case)
    q, k, v = case.inputs()
    options = Options(0.25, case.causal, softcap=case.softcap, dropout_p=case.dropout_p)
    for state in ((1, 2), (0x0123456789ABCDEF, -0x0123456789ABCDF0)):
        given = options._replace(rng_state=torch.tensor(state))
        _, _, s_dmask = flaggems.forward(q, k, v, given, return_s_dmask=True)
        expected = reference.dropout_keep_mask(
            case.dropout_p, state, case.batch, case.heads, case.sq, case.sk
        )
        visible = reference.visible_keys(case.sq, case.sk, case.causal)
        kept = keep_mask_of(s_dmask, case.sq, case.sk)
        assert torch.equal(kept[..., visible], expected[..., visible])
        magnitudes = reference.s_dmask(
            q, k, expected, causal=case.causal, softmax_scale=0.25, softcap=case.softcap
        )
        torch.testing.assert_close(s_dmask.double(), magnitudes, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "heads, sq, splits",
    [((4, 4), 1, 2), ((8, 2), 3, 2), ((8, 2), 3, 5), ((6, 1), 9, 5), ((3, 1), 1, 200)],
)
def test_split_keys(heads, sq, splits):
    """The same whatever the parts are, empty ones included."""
    case = Case(
        sq=sq,
        sk=150,
        heads=heads[0],
        heads_k=heads[1],
        head_dim=40,
        causal=True,
        window_size=(100, 0),
        alibi="bh",
        sinks=True,
    )
    q, k, v = case.inputs()
    slopes, s_aux = torch.rand(2, heads[0]), case.sink_values()
    out, lse = torch.empty_like(q), torch.empty(2, heads[0], sq)
    options = Options(0.2, True, 100, 0, alibi_slopes=slopes, s_aux=s_aux)
    attention.attend(q, k, v, out, lse, options, None, sq, attention.Keys(150), splits)
    assert_attention_close(
        (out, lse),
        reference.attention,
        (q, k, v),
        causal=True,
        window_size=(100, 0),
        alibi_slopes=slopes,
        s_aux=s_aux,
        softmax_scale=0.2,
    )


def test_number_of_splits_is_that_of_the_core():
    """From the fewest that reach the least time; without units to fill there is one."""
    assert plan.plan_splits(1000, 4096, 132, 64) == 1
    assert plan.plan_splits(1, 64, 132, 64) == 1
    assert 16 <= plan.plan_splits(1, 65536, 132, 64) <= 132
    assert plan.plan_splits(1, 10**6, 10**4, 64) <= plan.MAX_SPLITS


def test_numbers_that_are_not_finite():
    """NaN stays in its row; an infinite score gives NaN, and a log-sum-exp that is infinite."""
    q, k, v = (torch.rand(1, 40, 1, 16) for _ in range(3))
    q[0, 3] = math.nan
    q[0, 5] = math.inf
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert out[0, 3].isnan().all() and lse[0, 0, 3].isnan()
    assert out[0, 5].isnan().all() and lse[0, 0, 5] == math.inf
    rest = [i for i in range(40) if i not in (3, 5)]
    assert out[0, rest].isfinite().all() and lse[0, 0, rest].isfinite().all()
