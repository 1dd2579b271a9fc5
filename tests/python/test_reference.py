"""The reference against PyTorch, against itself computed in another way, and against the C++ core's
definition of the dropout function."""

import math

import pytest
import reference
import torch
from checks import FP32, assert_close

pytestmark = pytest.mark.cpu


def inputs(sq, sk, heads=4, heads_k=2, head_dim=16):
    shapes = ((2, sq, heads, head_dim), (2, sk, heads_k, head_dim), (2, sk, heads_k, head_dim))
    return [torch.randn(shape, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("sq,sk", ((7, 7), (5, 9), (9, 9)))
@pytest.mark.parametrize("causal", (False, True))
def test_is_the_attention_of_torch(sq, sk, causal):
    q, k, v = inputs(sq, sk)
    bias = torch.zeros(sq, sk).masked_fill(~reference.visible_keys(sq, sk, causal), -math.inf)
    expected = torch.nn.functional.scaled_dot_product_attention(
        *(x.transpose(1, 2) for x in (q, k, v)), attn_mask=bias.double(), enable_gqa=True
    )
    out, lse = reference.attention(q, k, v, causal=causal)
    torch.testing.assert_close(out, expected.transpose(1, 2))
    scores = reference.attention_scores(q, k) + bias
    torch.testing.assert_close(lse, torch.logsumexp(scores, -1))


def test_masks_by_hand():
    def rows(*arguments):
        return [
            "".join("x" if x else "." for x in row) for row in reference.visible_keys(*arguments)
        ]

    assert rows(2, 4, True) == ["xxx.", "xxxx"]
    assert rows(4, 2, True) == ["..", "..", "x.", "xx"]
    assert rows(3, 5, False, (1, 1)) == [".xxx.", "..xxx", "...xx"]
    assert rows(3, 3, False, (-1, 0)) == rows(3, 3, True)
    assert rows(3, 3, True, (1, 2)) == ["x..", "xx.", ".xx"]
    assert rows(5, 2, False, (0, 3)) == ["x.", "xx", "xx", "xx", ".x"]


OPTIONS = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (2, 1)},
    "softcap": {"softcap": 1.3},
    "alibi": {"alibi_slopes": torch.tensor([0.5, 0.25, 0.1, 0.0])},
    "dropout": {"dropout_p": 0.3},
    "sinks": {"s_aux": torch.randn(4, dtype=torch.float64)},
    "all": {
        "causal": True,
        "window_size": (4, 0),
        "softcap": 2.0,
        "dropout_p": 0.3,
        "alibi_slopes": torch.rand(2, 4),
        "s_aux": torch.randn(4, dtype=torch.float64),
    },
}


def options_of(name, sq, sk):
    options = dict(OPTIONS[name])
    if options.get("dropout_p"):
        options["keep_mask"] = reference.dropout_keep_mask(0.3, (1, 2), 2, 4, sq, sk)
    return options


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sq,sk", ((7, 7), (5, 9), (9, 5)))
def test_gradients_by_the_formulas_are_those_of_autograd(name, sq, sk):
    q, k, v = (x.requires_grad_() for x in inputs(sq, sk))
    options = options_of(name, sq, sk)
    s_aux = options.pop("s_aux", None)
    leaves = [q, k, v]
    if s_aux is not None:
        s_aux = s_aux.clone().requires_grad_()
        leaves.append(s_aux)
    out, lse = reference.attention(q, k, v, s_aux=s_aux, **options)
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), leaves, (dout, dlse))
    visible = reference.visible_keys(
        sq, sk, options.pop("causal", False), options.pop("window_size", (-1, -1))
    )
    options = {
        "softmax_scale": None,
        "softcap": 0.0,
        "alibi_slopes": None,
        "dropout_p": 0.0,
        "keep_mask": None,
        **options,
    }
    with torch.no_grad():
        actual = reference.flash_gradients(
            q, k, v, s_aux, out, lse, dout, dlse, visible=visible, **options
        )
    for a, b in zip(actual, expected, strict=False):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("sq,sk", ((7, 7), (5, 9), (9, 5)))
def test_pair_by_pair_is_the_same(name, sq, sk):
    """The path for NaN and infinities, on numbers."""
    q, k, v = inputs(sq, sk)
    options = options_of(name, sq, sk)
    expected = reference.attention(q, k, v, **options)
    visible = reference.visible_keys(
        sq, sk, options.pop("causal", False), options.pop("window_size", (-1, -1))
    )
    options = {
        "softmax_scale": None,
        "softcap": 0.0,
        "alibi_slopes": None,
        "s_aux": None,
        "dropout_p": 0.0,
        "keep_mask": None,
        **options,
    }
    actual = reference._attention_by_pairs(q, k, v, visible=visible, **options)
    for a, b in zip(actual, expected, strict=True):
        torch.testing.assert_close(a, b)


def test_nan_reaches_only_those_who_see_it():
    q, k, v = inputs(5, 5, heads=1, heads_k=1)
    k[0, 3, 0, 2] = math.nan
    out, lse = reference.attention(q, k, v, causal=True)
    assert out[0, :3].isfinite().all() and out[0, 3:].isnan().all() and out[1].isfinite().all()
    assert lse[0, 0, :3].isfinite().all() and lse[0, 0, 3:].isnan().all()


def test_a_sink_is_a_key_without_a_value():
    q, k, v = inputs(5, 6, heads=1, heads_k=1)
    q[..., 0] = 1.0
    sink_key = torch.zeros(2, 1, 1, 16, dtype=torch.float64)
    sink_key[..., 0] = 0.7 * 4.0  # a score of 0.7 for every query
    with_key = reference.attention(
        q, torch.cat([k, sink_key], 1), torch.cat([v, torch.zeros_like(sink_key)], 1)
    )
    with_sink = reference.attention(q, k, v, s_aux=torch.tensor([0.7], dtype=torch.float64))
    for a, b in zip(with_sink, with_key, strict=True):
        torch.testing.assert_close(a, b)


def test_rotary_by_complex_numbers():
    x = torch.randn(5, 3, 12, dtype=torch.float64)
    angles = torch.rand(9, 4, dtype=torch.float64)
    positions = torch.tensor([0, 3, 4, 8, 1])
    factor = torch.polar(torch.ones(5, 4, dtype=torch.float64), angles[positions])[:, None]
    for interleaved in (False, True):
        for conjugate in (False, True):
            actual = reference.apply_rotary(
                *(x, angles.cos(), angles.sin()),
                positions=positions,
                interleaved=interleaved,
                conjugate=conjugate,
            )
            pairs = x[..., :8].unflatten(-1, (4, 2) if interleaved else (2, 4))
            z = torch.complex(*pairs.unbind(-1 if interleaved else -2))
            z = z * (factor.conj() if conjugate else factor)
            rotated = torch.stack([z.real, z.imag], -1 if interleaved else -2).flatten(-2)
            torch.testing.assert_close(actual, torch.cat([rotated, x[..., 8:]], -1))


def test_cache_is_attention_over_the_longer_keys():
    q, k, v = inputs(3, 3)
    k_cache, v_cache = torch.randn(2, 2, 20, 2, 16, dtype=torch.float64)
    out, lse = reference.kvcache_attention(
        q, k_cache, v_cache, k, v, cache_seqlens=[4, 9], causal=True
    )
    for i, length in enumerate((4, 9)):
        keys = torch.cat([k_cache[i, :length], k[i]])[None]
        values = torch.cat([v_cache[i, :length], v[i]])[None]
        expected = reference.attention(q[i : i + 1], keys, values, causal=True)
        assert torch.equal(out[i : i + 1], expected[0])
        assert torch.equal(lse[i : i + 1], expected[1])


# The first numbers of Philox-4x32-7, counter 0 and all ones: the known answers of its authors'
# test vectors (Random123, kat_vectors).
PHILOX_ANSWERS = (
    ((0,) * 4, (0,) * 2, (0x5F6FB709, 0x0D893F64, 0x4F121F81, 0x4F730A48)),
    (
        (0xFFFFFFFF,) * 4,
        (0xFFFFFFFF,) * 2,
        (0x5207DDC2, 0x45165E59, 0x4D8EE751, 0x8C52F662),
    ),
)


@pytest.mark.parametrize("counter,key,answer", PHILOX_ANSWERS, ids=("zeros", "ones"))
def test_philox_known_answers(counter, key, answer):
    assert tuple(int(word) for word in reference.philox(counter, key)) == answer


def test_dropout_mask_of_parts():
    """A pure function of batch, head, row and column: parts of a larger mask are the same."""
    whole = reference.dropout_keep_mask(0.4, (7, 9), 3, 4, 50, 90)
    part = reference.dropout_keep_mask(0.4, (7, 9), 1, 2, 20, 33, first_batch=2)
    assert torch.equal(whole[2:, :2, :20, :33], part)
    assert whole.float().mean() == pytest.approx(0.6, abs=0.01)


def test_a_wrong_number_is_noticed():
    """The comparison itself: NaN, infinities, shapes, and errors a few times the naive one."""
    x = torch.randn(10, 10, dtype=torch.float64)
    near = x.float()
    assert_close(near, x, near, "x")
    for wrong in (math.nan, math.inf, float(x[3, 3]) + 1e-5):
        bad = near.clone()
        bad[3, 3] = wrong
        with pytest.raises(AssertionError):
            assert_close(bad, x, near, "x")
    with pytest.raises(AssertionError):
        assert_close(near[:5], x, near, "x")
    bad = x.clone()
    bad[3, 3] = math.inf
    with pytest.raises(AssertionError):
        assert_close(near, bad, bad.to(FP32), "x")
