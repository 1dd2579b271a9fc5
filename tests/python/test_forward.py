"""Forward against the reference: every feature, dtype, head dimension, shape and layout."""

from dataclasses import replace

import pytest
import torch
from checks import (
    BF16,
    DTYPES,
    FP16,
    FP32,
    LAYOUTS,
    Case,
    case_id,
    check_forward,
    dtype_id,
    pairwise,
    randn,
    with_dtypes,
)

import flash_attn

HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160, 192, 224, 256)  # the documented ones
ODD_HEAD_DIMS = (1, 2, 3, 8, 17, 33, 72, 100, 127, 255)

# (sq, sk): equal, longer, shorter, single rows, and around the multiples that kernels like.
LENGTHS = (
    (1, 1),
    (1, 2),
    (2, 1),
    (1, 300),
    (300, 1),
    (3, 5),
    (16, 16),
    (31, 33),
    (64, 64),
    (65, 63),
    (127, 129),
    (128, 128),
    (113, 203),
    (203, 113),
    (256, 511),
    (17, 1025),
)

WINDOWS = (
    (-1, 0),
    (0, -1),
    (0, 0),
    (5, 0),
    (0, 5),
    (7, 3),
    (64, 64),
    (-1, 20),
    (20, -1),
    (-7, 3),  # any negative side is infinite
    (1000, 2),  # a side longer than everything is infinite too
    (3, 1000),
    (1 << 40, 1),
)

FEATURES = {
    "dtype": DTYPES,
    "lengths": ((77, 77), (40, 130), (130, 40), (1, 190), (5, 64)),
    "heads": ((4, 4), (6, 2), (4, 1)),
    "head_dim": (64, 128, 40, 33),
    "causal": (False, True),
    "window_size": ((-1, -1), (24, 0), (-1, 9), (17, 31)),
    "softcap": (0.0, 1.5),
    "alibi": ("", "h", "bh"),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.17),
    "softmax_scale": (None, 0.31),
    "layout": tuple(LAYOUTS),
}


def feature_case(lengths, heads, **fields):
    return Case(sq=lengths[0], sk=lengths[1], heads=heads[0], heads_k=heads[1], **fields)


@pytest.mark.parametrize(
    "case",
    with_dtypes([Case(head_dim=d, sq=50, sk=70) for d in HEAD_DIMS + ODD_HEAD_DIMS]),
    ids=case_id,
)
def test_head_dim(case):
    check_forward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes([Case(sq=sq, sk=sk, causal=c) for sq, sk in LENGTHS for c in (False, True)]),
    ids=case_id,
)
def test_lengths(case):
    check_forward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes(
        [
            Case(batch=batch, sq=sq, sk=sk, causal=causal, sinks=sinks)
            for batch, sq, sk in ((2, 0, 5), (2, 5, 0), (2, 0, 0), (0, 5, 5), (0, 0, 0))
            for causal, sinks in ((False, False), (True, True))
        ]
    ),
    ids=case_id,
)
def test_empty(case):
    check_forward(case)


@pytest.mark.parametrize(
    "case",
    [
        Case(sq=sq, sk=sk, window_size=window, dtype=dtype)
        for window in WINDOWS
        for sq, sk, dtype in ((70, 70, FP32), (40, 110, BF16), (110, 40, FP16), (1, 90, FP32))
    ],
    ids=case_id,
)
def test_window(case):
    check_forward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes(
        [
            Case(heads=h, heads_k=hk, sq=sq, causal=True)
            for h, hk in ((1, 1), (2, 1), (8, 2), (6, 3), (12, 4), (7, 1), (32, 1))
            for sq in (1, 67)
        ]
    ),
    ids=case_id,
)
def test_heads(case):
    check_forward(case)


@pytest.mark.parametrize(
    "case",
    with_dtypes([Case(layout=layout, heads_k=2, causal=True, sk=90) for layout in LAYOUTS]),
    ids=case_id,
)
def test_layout(case):
    check_forward(case)


@pytest.mark.parametrize(
    "case", [feature_case(**row) for row in pairwise(seed=1, **FEATURES)], ids=case_id
)
def test_features(case):
    check_forward(case)


@pytest.mark.parametrize("scale", (0.0, 1.0, -0.7, 20.0), ids=lambda x: f"scale{x:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softmax_scale(dtype, scale):
    check_forward(Case(dtype=dtype, softmax_scale=scale, causal=True))


@pytest.mark.parametrize("softcap", (0.1, 10.0, 1e4), ids=lambda x: f"softcap{x:g}")
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softcap(dtype, softcap):
    check_forward(Case(dtype=dtype, softcap=softcap, softmax_scale=1.0))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_many_keys(dtype):
    """Enough keys that a few queries are split over them."""
    for sq, heads_k in ((1, 1), (3, 4), (65, 2)):
        check_forward(Case(dtype=dtype, sq=sq, sk=5000, heads_k=heads_k, head_dim=32, causal=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_many_sequences_and_heads(dtype):
    check_forward(Case(dtype=dtype, batch=300, sq=2, sk=3, heads=5, heads_k=1, head_dim=8))
    check_forward(Case(dtype=dtype, batch=1, sq=2, sk=3, heads=600, heads_k=200, head_dim=8))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("dropout_p", (0.0, 0.2), ids=("", "dropout"))
def test_packed_functions_are_the_same_function(dtype, dropout_p):
    """qkv and kv packed are views of the same numbers: bitwise the same results."""
    qkv = torch.randn(2, 40, 3, 4, 64).to(dtype)
    q, k, v = qkv.unbind(2)
    options = {"causal": True, "window_size": (19, 0), "return_attn_probs": True}
    torch.manual_seed(3)
    expected = flash_attn.flash_attn_func(q, k, v, dropout_p, **options)
    torch.manual_seed(3)
    packed = flash_attn.flash_attn_qkvpacked_func(qkv, dropout_p, **options)
    torch.manual_seed(3)
    kv_packed = flash_attn.flash_attn_kvpacked_func(q, qkv[:, :, 1:], dropout_p, **options)
    for other in (packed, kv_packed):
        for a, b in zip(expected, other, strict=True):
            assert torch.equal(a, b)


def test_kvpacked_with_fewer_heads():
    q, kv = randn(2, 33, 6, 32), randn(2, 47, 2, 2, 32)
    expected = flash_attn.flash_attn_func(q, kv[:, :, 0], kv[:, :, 1])
    assert torch.equal(flash_attn.flash_attn_kvpacked_func(q, kv), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("sq,sk", ((60, 60), (20, 90), (90, 20)))
def test_causal_is_a_window_without_a_right_side(dtype, sq, sk):
    q, k, v = Case(sq=sq, sk=sk, dtype=dtype).inputs()
    causal = flash_attn.flash_attn_func(q, k, v, causal=True)
    for window in ((-1, 0), (sk + sq, 0)):
        assert torch.equal(causal, flash_attn.flash_attn_func(q, k, v, window_size=window))
    assert torch.equal(
        causal, flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(-1, 7))
    )


@pytest.mark.parametrize(
    "window", ((5, 2), [5, 2], torch.tensor([5, 2])), ids=("tuple", "list", "tensor")
)
def test_window_types(window):
    q, k, v = Case().inputs()
    expected = flash_attn.flash_attn_func(q, k, v, window_size=(5, 2))
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=window), expected)


def test_return_values():
    q, k, v = Case(dtype=BF16).inputs()
    out = flash_attn.flash_attn_func(q, k, v)
    assert isinstance(out, torch.Tensor) and out.dtype == BF16 and out.shape == q.shape
    result = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert len(result) == 3
    assert result[1].dtype == FP32 and result[1].shape == (2, 4, 67)
    assert result[2].shape == (0,)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_last_dimension_may_be_strided(dtype):
    """The public functions make the last dimension contiguous themselves."""
    tensors = [torch.randn(2, 30, 4, 32, 2).to(dtype)[..., 0] for _ in range(3)]
    expected = flash_attn.flash_attn_func(*(x.contiguous() for x in tensors), causal=True)
    assert torch.equal(flash_attn.flash_attn_func(*tensors, causal=True), expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_inputs_are_not_changed(dtype):
    tensors = Case(dtype=dtype, layout="transposed").inputs()
    copies = [x.clone() for x in tensors]
    flash_attn.flash_attn_func(*tensors, 0.1, causal=True, softcap=3.0)
    assert all(torch.equal(a, b) for a, b in zip(tensors, copies, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("size", (30.0, 1e-3), ids=("large", "small"))
def test_large_and_small_scores(dtype, size):
    """Scores up to about a thousand, or nearly equal ones: no overflow, no lost bits."""
    case = Case(dtype=dtype, causal=True, sk=150)
    q, k, v = case.inputs()

    def scaled(q, k, v, *args, **options):
        return flash_attn.flash_attn_func(q, k, v, *args, **options)

    scaled_case = replace(case, softmax_scale=size * 64**-0.5)
    check_forward(scaled_case, scaled)
    out = flash_attn.flash_attn_func(q * size, k, v * size)
    assert out.isfinite().all()


def test_slopes_shared_by_the_batch_are_the_same_as_repeated_ones():
    q, k, v = Case(causal=True).inputs()
    slopes = torch.rand(4)
    a = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes)
    b = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes.expand(2, 4))
    c = flash_attn.flash_attn_func(q, k, v, alibi_slopes=slopes.repeat(2, 1))
    assert torch.equal(a, b) and torch.equal(a, c)


@pytest.mark.parametrize("dtype", (*DTYPES, torch.float64), ids=str)
def test_sinks_of_any_floating_dtype(dtype):
    q, k, v = Case().inputs()
    sinks = torch.tensor([0.5, -1.0, 2.0, 0.0])  # exact in every dtype
    expected = flash_attn.flash_attn_func(q, k, v, s_aux=sinks)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, s_aux=sinks.to(dtype)), expected)


def test_sink_of_minus_infinity_is_no_sink():
    q, k, v = Case(sq=90, sk=40, causal=True).inputs()
    plain = flash_attn.flash_attn_func(q, k, v, causal=True)
    sinks = torch.full((4,), -torch.inf)
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, causal=True, s_aux=sinks), plain)
