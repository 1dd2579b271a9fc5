"""NaN and infinities: in memory that a kernel must not look at they change nothing, bitwise; in
valid data they go where the reference has them, and nowhere else."""

import math

import pytest
import raw
import reference
import torch
from checks import (
    DTYPES,
    FP32,
    Case,
    assert_attention_close,
    check_gradients,
    cumulative,
    dtype_id,
    sliced,
)

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_varlen_backward

IS_CPU = torch.get_default_device().type == "cpu"
POISONS = (math.nan, math.inf, -math.inf)


# -------------------------------------------------------------------------------------------------
# Memory that does not belong to the call


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("head_dim", (64, 33, 7, 255))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_around_the_inputs(dtype, head_dim, poison):
    """Views cut out of poisoned memory, on every side, the last dimension included."""
    shapes = ((2, 37, 4, head_dim), (2, 53, 2, head_dim), (2, 53, 2, head_dim))
    clean = [torch.randn(shape).to(dtype) for shape in shapes]
    views = []
    for x in clean:
        batch, length, heads, _ = x.shape
        whole = torch.full((batch + 2, length + 4, heads + 2, head_dim + 32), poison).to(dtype)
        views.append(whole[1:-1, 2:-2, 1:-1, 16:-16].copy_(x))
    dout = torch.randn(shapes[0]).to(dtype)

    def results(tensors):
        tensors = [x.detach().requires_grad_() for x in tensors]
        out, lse, _ = flash_attn.flash_attn_func(*tensors, causal=True, return_attn_probs=True)
        return out, lse, *torch.autograd.grad(out, tensors, dout)

    for a, b in zip(results(views), results(clean), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_tokens_of_no_sequence(dtype, causal, poison):
    """Beyond cu_seqlens[-1], in q, k, v and dout; the gradients there are 0."""
    cu_q, cu_k = cumulative(40, 1, 63), cumulative(65, 30, 0)
    q, dout = (torch.randn(150, 4, 64).to(dtype) for _ in range(2))
    k, v = (torch.randn(130, 2, 64).to(dtype) for _ in range(2))

    def results():
        tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            *(*tensors, cu_q, cu_k, 63, 65), causal=causal, return_attn_probs=True
        )
        return out[:104], lse[:, :104], *torch.autograd.grad(out, tensors, dout)

    expected = results()
    for x, end in ((q, 104), (dout, 104), (k, 95), (v, 95)):
        x[end:] = poison
    actual = results()
    for a, b in zip(actual, expected, strict=True):
        assert torch.equal(a, b)
    for gradient, end in zip(actual[2:], (104, 95, 95), strict=True):
        assert torch.count_nonzero(gradient[end:]) == 0


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_other_sequences(dtype, poison):
    """One poisoned sequence between two others."""
    cu = cumulative(33, 64, 50)
    q, k, v, dout = (torch.randn(147, 4, 64).to(dtype) for _ in range(4))

    def results():
        tensors = [x.detach().clone().requires_grad_() for x in (q, k, v)]
        out, lse, _ = flash_attn.flash_attn_varlen_func(
            *(*tensors, cu, cu, 64, 64), return_attn_probs=True
        )
        rows = (out, lse.transpose(0, 1), *torch.autograd.grad(out, tensors, dout))
        return [torch.cat([x[:33], x[97:]]) for x in rows]

    expected = results()
    for x in (q, k, v, dout):
        x[33:97] = poison
    for a, b in zip(results(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("sq", (1, 5, 70))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_cache_beyond_its_length(dtype, sq, poison):
    """And before its left padding."""
    q = torch.randn(3, sq, 4, 64).to(dtype)
    caches = [torch.randn(3, 300, 2, 64).to(dtype) for _ in range(2)]
    lengths = torch.tensor([70, 129, 256], dtype=torch.int32)
    padding = torch.tensor([0, 3, 66], dtype=torch.int32)

    def results():
        return flash_attn.flash_attn_with_kvcache(
            *(q, *caches),
            cache_seqlens=lengths,
            cache_leftpad=padding,
            causal=True,
            return_softmax_lse=True,
        )

    expected = results()
    for cache in caches:
        for i in range(3):
            cache[i, : padding[i]] = poison
            cache[i, lengths[i] :] = poison
    for a, b in zip(results(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("poison", POISONS, ids=str)
@pytest.mark.parametrize("page_size", (1, 16, 48))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_pages_that_are_not_used(dtype, page_size, poison):
    """Whole pages, the ends of last pages, and the entries of the table behind the valid ones."""
    q = torch.randn(2, 1, 4, 64).to(dtype)
    lengths = torch.tensor([50, 97], dtype=torch.int32)
    columns = -(-100 // page_size)
    table = torch.randperm(2 * columns + 5).to(torch.int32)[: 2 * columns].view(2, columns)
    caches = [torch.randn(2 * columns + 5, page_size, 2, 64).to(dtype) for _ in range(2)]

    def results():
        return flash_attn.flash_attn_with_kvcache(
            *(q, *caches), cache_seqlens=lengths, block_table=table, return_softmax_lse=True
        )

    expected = results()
    used = torch.zeros(len(caches[0]), page_size, dtype=torch.bool)
    for i, length in enumerate(lengths.tolist()):
        rows = torch.arange(length)
        used[table[i].long()[rows // page_size], rows % page_size] = True
        table[i, -(-length // page_size) :] = -1
    for cache in caches:
        cache[~used] = poison
    for a, b in zip(results(), expected, strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_element_of_the_outputs_is_written(dtype):
    """Outputs full of NaN, in a strided buffer that keeps what is around them."""
    q = torch.randn(2, 37, 4, 33).to(dtype)
    k, v = (torch.randn(2, 20, 2, 33).to(dtype) for _ in range(2))
    for causal in (0, 1):  # causal: 17 rows see nothing
        out = sliced(2, 37, 4, 33, dtype=dtype).fill_(math.nan)
        whole = out._base
        lse = torch.full((2, 4, 37), math.nan)
        s_dmask = torch.full((2, 4, 40, 128), math.nan, dtype=dtype)
        raw.forward(
            q=q,
            k=k,
            v=v,
            out=out,
            softmax_lse=lse,
            s_dmask=s_dmask,
            causal=causal,
            dropout_p=0.3,
            rng_state=torch.tensor([1, 2]),
        )
        assert not out.isnan().any() and not lse.isnan().any() and not s_dmask.isnan().any()
        out.fill_(math.nan)
        assert whole.isnan().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_every_element_of_the_gradients_is_written(dtype):
    """Buffers full of NaN, tokens of no sequence and sequences without queries or keys included."""
    cu_q, cu_k = cumulative(20, 0, 30), cumulative(0, 17, 12)
    q, k, v = torch.randn(60, 4, 48), torch.randn(40, 2, 48), torch.randn(40, 2, 48)
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, 30, 17), causal=True, return_attn_probs=True
    )
    assert torch.count_nonzero(out[50:]) == 0
    gradients = [torch.full_like(x, math.nan) for x in (q, k, v)]
    _flash_attn_varlen_backward(
        *(torch.randn_like(out), q, k, v, out, lse, *gradients, cu_q, cu_k, 30, 17),
        *(0.0, 48**-0.5, True, -1, -1, 0.0, None, False),
    )
    dq, dk, dv = gradients
    assert all(x.isfinite().all() for x in gradients)
    assert torch.count_nonzero(dq[:20]) == 0 and torch.count_nonzero(dq[50:]) == 0
    for x in (dk, dv):
        assert torch.count_nonzero(x[:17]) == 0 and torch.count_nonzero(x[29:]) == 0


# -------------------------------------------------------------------------------------------------
# Rows without visible keys


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "options", ({"causal": True}, {"window_size": (3, 2)}, {"window_size": (-1, 0)}), ids=str
)
def test_rows_without_keys(dtype, options):
    """out 0, lse +inf, gradients 0, whatever dout and the gradient of lse hold there."""
    tensors = [x.requires_grad_() for x in Case(sq=100, sk=30, dtype=dtype).inputs()]
    out, lse, _ = flash_attn.flash_attn_func(*tensors, **options, return_attn_probs=True)
    blind = ~reference.visible_keys(
        100,
        30,
        options.get("causal", False),
        **({"window_size": options["window_size"]} if "window_size" in options else {}),
    ).any(-1)
    assert blind.any()
    assert torch.count_nonzero(out[:, blind]) == 0
    assert (lse[:, :, blind] == math.inf).all() and lse[:, :, ~blind].isfinite().all()
    dout, dlse = torch.randn_like(out), torch.randn_like(lse)
    expected = torch.autograd.grad((out, lse), tensors, (dout, dlse), retain_graph=True)
    assert torch.count_nonzero(expected[0][:, blind]) == 0
    assert all(x.isfinite().all() for x in expected)
    dout[:, blind], dlse[:, :, blind] = math.nan, math.nan
    gradients = torch.autograd.grad((out, lse), tensors, (dout, dlse))
    assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


# -------------------------------------------------------------------------------------------------
# Valid data


def compare(q, k, v, **options):
    out, lse, _ = flash_attn.flash_attn_func(q, k, v, **options, return_attn_probs=True)
    assert_attention_close((out, lse), reference.attention, (q, k, v), **options)


VISIBILITIES = (
    {},
    {"causal": True},
    {"window_size": (20, 0)},
    {"window_size": (10, 10)},
)


# On a GPU the kernels for many query rows multiply whole tiles, values of NaN under a mask too
# (docs/numerics.md).
HIDING_VALUES = VISIBILITIES if IS_CPU else VISIBILITIES[:1]


@pytest.mark.parametrize(
    "name,options",
    [(name, options) for name in "qk" for options in VISIBILITIES]
    + [("v", options) for options in HIDING_VALUES],
    ids=str,
)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_one_row(dtype, name, options):
    """Whoever sees the row is NaN, nobody else."""
    tensors = dict(zip("qkv", Case(sq=90, sk=150, dtype=dtype).inputs(), strict=True))
    tensors[name][1, 75, 2] = math.nan
    compare(**tensors, **options)


@pytest.mark.parametrize("options", HIDING_VALUES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_infinite_value(dtype, options):
    """An infinite element of v: infinite there for whoever sees it, in that element alone."""
    q, k, v = Case(sq=90, sk=150, dtype=dtype).inputs()
    v[1, 75, 2, 3] = math.inf
    v[0, 20, 1, 5] = -math.inf
    compare(q, k, v, **options)


@pytest.mark.parametrize("options", VISIBILITIES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_scores_of_minus_infinity(dtype, options):
    """A key of score -inf counts nothing; the others are as without it."""
    q, k, v = Case(sq=90, sk=150, dtype=dtype).inputs()
    q[..., 0] = q[..., 0].abs() + 0.1
    k[1, 75, 2, 0] = -math.inf
    compare(q, k, v, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_in_the_cache(dtype):
    q = torch.randn(2, 2, 4, 64).to(dtype)
    k_cache, v_cache = (torch.randn(2, 200, 2, 64).to(dtype) for _ in range(2))
    k_cache[0, 150, 1] = math.nan
    v_cache[1, 10, 0, 7] = math.nan
    for num_splits in (1, 3):
        actual = flash_attn.flash_attn_with_kvcache(
            *(q, k_cache, v_cache),
            cache_seqlens=torch.tensor([200, 100], dtype=torch.int32),
            num_splits=num_splits,
            return_softmax_lse=True,
        )
        assert_attention_close(
            actual,
            reference.kvcache_attention,
            (q, k_cache, v_cache),
            cache_seqlens=torch.tensor([200, 100]),
        )


@pytest.mark.parametrize("name", ("q", "k", "v", "dout"))
def test_gradients_of_nan(name):
    """NaN in one row reaches the gradients that depend on it, as in the reference."""
    tensors = dict(zip("qkv", Case(batch=1, sq=40, sk=60).inputs(), strict=True))
    tensors["dout"] = torch.randn(1, 40, 4, 64)
    tensors[name][0, 33, 2] = math.nan
    dout = tensors.pop("dout")
    leaves = [x.requires_grad_() for x in tensors.values()]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    gradients = torch.autograd.grad(out, leaves, dout)
    check_gradients(
        (out, lse, gradients),
        reference.attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
    )


@pytest.mark.cpu  # on a GPU it does, as above
@pytest.mark.parametrize("options", VISIBILITIES[1:], ids=str)
@pytest.mark.parametrize("name", ("q", "k", "v", "dout"))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_nan_does_not_reach_gradients_through_the_mask(dtype, name, options):
    """A pair that the mask hides adds nothing to any gradient, not even 0 times NaN."""
    tensors = dict(zip("qkv", Case(batch=1, sq=300, sk=310, dtype=dtype).inputs(), strict=True))
    tensors["dout"] = torch.randn(tensors["q"].shape).to(dtype)
    tensors[name][0, 133, 2, :9] = math.nan
    dout = tensors.pop("dout")
    leaves = [x.requires_grad_() for x in tensors.values()]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, **options, return_attn_probs=True)
    gradients = torch.autograd.grad(out, leaves, dout)
    assert all(x.isfinite().any() for x in gradients)
    check_gradients(
        (out, lse, gradients),
        reference.attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
        by_pairs=True,
        **options,
    )


@pytest.mark.parametrize("name", ("q", "k", "v", "dout"))
def test_gradients_of_nan_stay_in_their_sequence_and_head(name):
    tensors = dict(zip("qkv", Case(heads_k=2, sq=40, sk=60).inputs(), strict=True))
    tensors["dout"] = torch.randn(2, 40, 4, 64)
    tensors[name][1, 33, 1] = math.nan
    dout = tensors.pop("dout")
    leaves = [x.requires_grad_() for x in tensors.values()]
    out = flash_attn.flash_attn_func(*leaves, causal=True)
    dq, dk, dv = torch.autograd.grad(out, leaves, dout)
    group = 0 if name in ("q", "dout") else 1
    other = 1 - group
    assert out[0].isfinite().all() and out[1][:, 2 * other : 2 * other + 2].isfinite().all()
    for x in (dq[0], dk[0], dv[0], dk[1][:, other], dv[1][:, other]):
        assert x.isfinite().all()
    assert dq[1][:, 2 * other : 2 * other + 2].isfinite().all()


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softcap_makes_infinite_scores_finite(dtype):
    q, k, v = Case(sq=50, sk=70, dtype=dtype).inputs()
    q[..., 0] = q[..., 0].abs() + 0.1
    k[1, 35, 2, 0] = math.inf
    compare(q, k, v, softcap=5.0)


@pytest.mark.cpu
def test_float32_subnormals_and_extremes():
    """The largest and the smallest float32 numbers as values."""
    q, k, v = Case(sq=20, sk=30).inputs()
    v[0] = torch.finfo(FP32).max / 64
    v[1] *= 1e-38
    out = flash_attn.flash_attn_func(q, k, v)
    expected, _ = reference.attention(q, k, v)
    torch.testing.assert_close(out[0].double(), expected[0], rtol=1e-5, atol=0.0)
    torch.testing.assert_close(out[1].double(), expected[1], rtol=0.0, atol=1e-43)
