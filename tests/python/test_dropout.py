"""Dropout: which entries are dropped is a pure function that the reference computes for itself."""

import math

import pytest
import reference
import torch
from checks import (
    CLOSE,
    CLOSE_LSE,
    DTYPES,
    FP32,
    RANDOM,
    Case,
    assert_close,
    check_gradients,
    dtype_id,
    keep_mask_of,
    keep_masks_of,
    randn,
)
from torch.utils.checkpoint import checkpoint

import flash_attn
from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_forward,
)


def forward(q, k, v, dropout_p, causal=False, **options):
    """out, lse, S_dmask, (seed, offset)."""
    out, lse, s_dmask, rng_state = _flash_attn_forward(
        q,
        k,
        v,
        dropout_p,
        q.shape[-1] ** -0.5,
        causal,
        options.get("window_size_left", -1),
        options.get("window_size_right", -1),
        options.get("softcap", 0.0),
        options.get("alibi_slopes"),
        True,
    )
    assert rng_state.dtype == torch.int64 and rng_state.shape == (2,)
    return out, lse, s_dmask, rng_state.tolist()


@pytest.mark.parametrize("dropout_p", (0.5, 0.1, 0.003, 0.97), ids=lambda p: f"p{p:g}")
@pytest.mark.parametrize(
    "batch,sq,sk,heads,heads_k",
    ((1, 1, 1, 1, 1), (2, 16, 32, 2, 2), (3, 75, 141, 4, 2), (1, 300, 33, 3, 1)),
    ids=("single", "block", "odd", "rows"),
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_mask_is_the_documented_one(dtype, batch, sq, sk, heads, heads_k, dropout_p):
    q, k, v = Case(
        batch=batch, sq=sq, sk=sk, heads=heads, heads_k=heads_k, head_dim=16, dtype=dtype
    ).inputs()
    _, _, s_dmask, rng_state = forward(q, k, v, dropout_p)
    expected = reference.dropout_keep_mask(dropout_p, rng_state, batch, heads, sq, sk)
    assert torch.equal(keep_mask_of(s_dmask, sq, sk), expected)


def test_mask_of_variable_length():
    """Rows and columns count from the start of the sequence, the batch index is the sequence's."""
    cu_q = torch.tensor([0, 5, 5, 45, 62], dtype=torch.int32)
    cu_k = torch.tensor([0, 33, 40, 40, 111], dtype=torch.int32)
    q, k, v = randn(62, 2, 32), randn(111, 2, 32), randn(111, 2, 32)
    _, _, s_dmask, rng_state = _flash_attn_varlen_forward(
        *(q, k, v, cu_q, cu_k, 40, 71, 0.3, 32**-0.5, False), return_softmax=True
    )
    for i, kept in enumerate(keep_masks_of(s_dmask, cu_q, cu_k)):
        expected = reference.dropout_keep_mask(
            0.3, rng_state.tolist(), 1, 2, *kept.shape[2:], first_batch=i
        )
        assert torch.equal(kept, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("sq,sk", ((40, 40), (30, 100), (100, 30)))
def test_s_dmask(dtype, sq, sk, causal):
    """+-exp(score - row maximum), finite everywhere, 0 where masked."""
    q, k, v = Case(sq=sq, sk=sk, heads_k=2, dtype=dtype).inputs()
    slopes = torch.rand(4) * 0.2
    options = {"softcap": 4.0, "alibi_slopes": slopes}
    _, _, s_dmask, rng_state = forward(q, k, v, 0.4, causal, **options)
    assert s_dmask.dtype == dtype and s_dmask.isfinite().all()
    assert s_dmask.shape[:2] == (2, 4) and s_dmask.shape[2] >= sq and s_dmask.shape[3] >= sk
    assert torch.count_nonzero(s_dmask[:, :, sq:]) == torch.count_nonzero(s_dmask[..., sk:]) == 0
    keep_mask = reference.dropout_keep_mask(0.4, rng_state, 2, 4, sq, sk)
    expected = reference.s_dmask(q, k, keep_mask, causal=causal, **options)
    naive = reference.s_dmask(q, k, keep_mask, causal=causal, **options, dtype=FP32).to(dtype)
    assert_close(s_dmask[:, :, :sq, :sk], expected, naive, "S_dmask")


def test_s_dmask_is_what_out_was_made_of():
    """The way of FlashAttention-2's users from S_dmask to out."""
    q, k, v = Case(sq=33, sk=47).inputs()
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.3, return_attn_probs=True)
    s_dmask = s_dmask[:, :, :33, :47].double()
    p = s_dmask.abs() / s_dmask.abs().sum(-1, keepdim=True)
    p = torch.where(torch.signbit(s_dmask), 0.0, p) / 0.7
    expected = torch.einsum("bhij,bjhd->bihd", p, v.double())
    torch.testing.assert_close(expected.to(out.dtype), out, **CLOSE)
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) * 64**-0.5
    torch.testing.assert_close(torch.logsumexp(scores, -1).float(), lse, **CLOSE_LSE)


@pytest.mark.parametrize("dropout_p", (0.5, 0.17, 0.01, 0.001, 0.999), ids=lambda p: f"p{p:g}")
def test_rate(dropout_p):
    """Half a million entries: their number is within five standard deviations of the expected."""
    q, k, v = (randn(2, 512, 2, 8) for _ in range(3))
    _, _, s_dmask, _ = forward(q, k, v, dropout_p)
    kept = keep_mask_of(s_dmask, 512, 512).double()
    deviation = math.sqrt(dropout_p * (1 - dropout_p) / kept.numel())
    # The probability itself is within 2^-16 of what was asked for.
    assert abs(float(kept.mean()) - (1 - dropout_p)) < 5 * deviation + 2**-16
    # and no row, column or head is special: all within six of theirs.
    for dims in ((0, 1, 2), (0, 1, 3), (0, 2, 3)):
        part = kept.mean(dims)
        limit = 6 * deviation * math.sqrt(part.numel()) + 2**-16
        assert float((part - (1 - dropout_p)).abs().max()) < limit


def test_probability_is_not_coarse():
    """Within 2^-16 of the one asked for, by the definition of the mask."""
    for dropout_p in (0.1, 0.17, 1 / 3, 2 / 255, 0.9999, 2.0**-20):
        threshold = math.floor((1 - dropout_p) * 65536 + 0.5)
        assert abs(threshold / 65536 - (1 - dropout_p)) <= 2**-17


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_expectation_is_the_plain_result(dtype):
    """Averaged over many masks, dropout changes nothing."""
    q, k, v = Case(batch=1, sq=8, sk=40, heads=2, heads_k=2, head_dim=16, dtype=dtype).inputs()
    plain, _ = reference.attention(q, k, v, dtype=FP32)
    many = [x.expand(2000, -1, -1, -1) for x in (q, k, v)]
    samples = flash_attn.flash_attn_func(*many, 0.3).float()
    deviation = samples.std(0) / math.sqrt(2000)
    rounding = 4 * torch.finfo(dtype).eps
    assert ((samples.mean(0) - plain[0]).abs() < 6 * deviation + rounding).all()


def test_seeds():
    """manual_seed decides; consecutive calls differ; a generator state can be restored."""
    q, k, v = Case().inputs()

    def call():
        return flash_attn.flash_attn_func(q, k, v, 0.3)

    torch.manual_seed(11)
    state = RANDOM.get_rng_state()
    first, second = call(), call()
    assert not torch.equal(first, second)
    torch.manual_seed(11)
    assert torch.equal(call(), first) and torch.equal(call(), second)
    RANDOM.set_rng_state(state)
    assert torch.equal(call(), first)
    torch.manual_seed(12)
    assert not torch.equal(call(), first)


def test_no_dropout_draws_nothing():
    """dropout_p = 0 leaves torch's generator alone."""
    q, k, v = Case().inputs()
    state = RANDOM.get_rng_state()
    flash_attn.flash_attn_func(q, k, v)
    assert torch.equal(RANDOM.get_rng_state(), state)


@pytest.mark.parametrize("dropout_p", (1e-30, 2.0**-21))
def test_tiny_probability_is_none(dropout_p):
    """What some callers pass to be given the log-sum-exp."""
    q, k, v = Case().inputs()
    plain, lse, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    out, lse_too, _ = flash_attn.flash_attn_func(q, k, v, dropout_p, return_attn_probs=True)
    assert torch.equal(out, plain) and torch.equal(lse, lse_too)


def test_lse_has_no_dropout():
    q, k, v = Case().inputs()
    _, plain, _ = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    _, lse, _ = flash_attn.flash_attn_func(q, k, v, 0.6, return_attn_probs=True)
    torch.testing.assert_close(lse, plain, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_backward_replays_the_mask(dtype):
    """Gradients under the mask that the reference makes of rng_state, through the internals."""
    q, k, v = Case(sq=50, sk=90, heads_k=2, dtype=dtype).inputs()
    out, lse, _, rng_state = forward(q, k, v, 0.35, True)
    dout = torch.randn(out.shape).to(dtype)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    _flash_attn_backward(
        *(dout, q, k, v, out, lse, dq, dk, dv, 0.35, 64**-0.5, True, -1, -1, 0.0, None, False),
        torch.tensor(rng_state),
    )
    check_gradients(
        (out, lse, (dq, dk, dv)),
        reference.attention,
        [q, k, v],
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
        causal=True,
        dropout_p=0.35,
        keep_mask=reference.dropout_keep_mask(0.35, rng_state, 2, 4, 50, 90),
    )


@pytest.mark.parametrize("use_reentrant", (False, True), ids=("", "reentrant"))
def test_activation_checkpointing(use_reentrant):
    """Recomputation draws the same mask."""
    tensors = [x.requires_grad_() for x in Case().inputs()]

    def attention(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, 0.3, causal=True)

    torch.manual_seed(5)
    out = attention(*tensors)
    expected = torch.autograd.grad(out.square().sum(), tensors)
    torch.manual_seed(5)
    again = checkpoint(attention, *tensors, use_reentrant=use_reentrant)
    again.square().sum().backward()
    assert torch.equal(out, again)
    assert all(torch.equal(x.grad, g) for x, g in zip(tensors, expected, strict=True))


def test_everything_dropped():
    """A row whose entries are all dropped has out 0 and an untouched log-sum-exp."""
    q, k, v = Case(sq=64, sk=1).inputs()
    out, lse, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.9, return_attn_probs=True)
    dropped = ~keep_mask_of(s_dmask, 64, 1)[..., 0].transpose(1, 2)
    assert dropped.any() and not dropped.all()
    assert torch.count_nonzero(out[dropped]) == 0 and lse.isfinite().all()
