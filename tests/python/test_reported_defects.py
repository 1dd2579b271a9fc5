"""Defects that users of FlashAttention reported: none of them may be here.

Each test names the report in Dao-AILab/flash-attention that it comes from (another repository where
it says so), reduced to what a CPU does in a moment, and compares with the reference or with the
property that was missing.
"""

import math

import pytest
import reference
import torch
from checks import (
    BF16,
    CLOSE,
    DEVICE,
    DTYPES,
    FP16,
    Case,
    assert_attention_close,
    assert_close,
    check_backward,
    check_forward,
    check_gradients,
    check_varlen_backward,
    cumulative,
    dtype_id,
    randn,
)

import flash_attn

HALVES = (BF16, FP16)

# -------------------------------------------------------------------------------------------------
# Masks


# 1778: more queries than keys, causal or windowed: rows that are 0 and rows that are not
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize(
    "options", ({"causal": True}, {"window_size": (40, 10)}, {"window_size": (-1, 3)}), ids=str
)
def test_more_queries_than_keys(dtype, options):
    check_backward(Case(sq=200, sk=100, dtype=dtype, **options))
    q, k, v = Case(sq=200, sk=100, dtype=dtype).inputs()
    out = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.count_nonzero(out[:, :100]) == 0
    assert (out[:, 100:].abs().amax((2, 3)) > 0).all()


# 895: a window side longer than sk hides keys when there are more queries than keys
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("window_size", ((0, 150), (-1, 160), (150, 150), (5, 1 << 31)), ids=str)
def test_window_longer_than_the_keys(dtype, window_size):
    check_forward(Case(sq=180, sk=100, window_size=window_size, dtype=dtype))
    check_backward(Case(sq=180, sk=100, window_size=window_size, dtype=dtype))


# 1133: (S - 1, 0) hides nothing of a causal sequence of S
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_window_as_long_as_the_sequence(dtype):
    q, k, v = Case(sq=129, sk=129, dtype=dtype).inputs()
    causal = flash_attn.flash_attn_func(q, k, v, causal=True)
    for window_size in ((-1, 0), (129, 0), (128, 0)):
        out = flash_attn.flash_attn_func(q, k, v, window_size=window_size)
        assert torch.equal(out, causal)
    assert not torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(127, 0)), causal)


# 2199: a window as a list, with more queries than keys: rows of zeros where keys are visible
def test_window_as_a_list():
    q, k, v = Case(sq=129, sk=65, batch=1).inputs()
    actual = flash_attn.flash_attn_func(q, k, v, window_size=[32, 64], return_attn_probs=True)
    assert_attention_close(actual[:2], reference.attention, (q, k, v), window_size=(32, 64))


# 1116: a negative side other than -1 is infinite, too
def test_any_negative_side_is_infinite():
    q, k, v = Case().inputs()
    expected = flash_attn.flash_attn_func(q, k, v, causal=True)
    assert torch.equal(
        flash_attn.flash_attn_func(q, k, v, causal=True, window_size=(-1, -3)), expected
    )
    assert torch.equal(flash_attn.flash_attn_func(q, k, v, window_size=(-9, 0)), expected)


# 881: variable length, not causal, queries and keys of different lengths
def test_variable_lengths_that_differ():
    q = randn(60, 4, 64)
    k, v = randn(97, 4, 64), randn(97, 4, 64)
    check_varlen_backward(q, k, v, cumulative(10, 50), cumulative(80, 17), 50, 80)


# -------------------------------------------------------------------------------------------------
# Variable length


# 1537: max_seqlen_q = 1 with sequences of length 0 and grouped heads
@pytest.mark.parametrize("convert", (int, torch.tensor), ids=("int", "tensor"))
def test_at_most_one_query_each(convert):
    cu_q, cu_k = cumulative(1, 0, 1), cumulative(3, 0, 5)
    q = torch.rand(2, 9, 64).to(BF16)
    k, v = (torch.rand(8, 3, 64).to(BF16) for _ in range(2))
    actual = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, convert(1), convert(5)),
        softmax_scale=1.0,
        causal=True,
        return_attn_probs=True,
    )
    assert_attention_close(
        actual[:2],
        reference.varlen_attention,
        (q, k, v, cu_q, cu_k),
        softmax_scale=1.0,
        causal=True,
    )


# 1619: fewer tokens than sequences, with grouped heads
def test_fewer_tokens_than_sequences():
    cu_seqlens = cumulative(0, 0, 0, 1)
    q = randn(1, 21, 120).to(BF16)
    k, v = (randn(1, 7, 120).to(BF16) for _ in range(2))
    out = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_seqlens, cu_seqlens, 1, 1), softmax_scale=math.sqrt(120)
    )
    assert torch.equal(out, v.repeat_interleave(3, 1))


# 1713: sequences with keys but without queries: is their result written to somebody else?
def test_no_queries_between_others():
    q = randn(300, 2, 64)
    k, v = randn(300, 2, 64), randn(300, 2, 64)
    check_varlen_backward(q, k, v, cumulative(150, 0, 150), cumulative(100, 100, 100), 150, 100)


# 1773: a sequence longer than max_seqlen_k is an error, not an illegal access
@pytest.mark.cpu  # lengths on a GPU are not read
def test_max_seqlen_too_small():
    q = randn(20, 2, 64)
    with pytest.raises(RuntimeError, match="max_seqlen_k is 12"):
        flash_attn.flash_attn_varlen_func(q, q, q, cumulative(7, 13), cumulative(7, 13), 13, 12)


# 1661: fewer rows in cu_seqlens_q than in q
def test_queries_of_no_sequence():
    q, kv = randn(40, 2, 64), randn(30, 2, 2, 64)
    out = flash_attn.flash_attn_varlen_kvpacked_func(
        q, kv, cumulative(15, 10), cumulative(10, 20), 15, 20
    )
    assert torch.count_nonzero(out[25:]) == 0


# 1786: more sequences than a grid dimension has room for
def test_very_many_sequences():
    count, length = 70_000, 2
    qkv = randn(count * length, 3, 1, 8)
    cu_seqlens = torch.arange(0, count * length + 1, length, dtype=torch.int32)
    out = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, length)
    dense = flash_attn.flash_attn_qkvpacked_func(qkv.view(count, length, 3, 1, 8))
    torch.testing.assert_close(out.view_as(dense), dense, **CLOSE)
    last, _ = reference.attention(*(x[None] for x in qkv[-length:].unbind(1)))
    torch.testing.assert_close(
        out[-length:].double(), last[0], **(CLOSE or {"rtol": 1e-5, "atol": 1e-5})
    )


# 2842: the log-sum-exp of a sequence without keys is written to the row of another one
def test_lse_of_sequences_without_keys():
    cu_q, cu_k = cumulative(1, 1, 1), cumulative(0, 70, 0)
    q = randn(3, 4, 64)
    k, v = randn(70, 2, 64), randn(70, 2, 64)
    actual = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, 1, 70), return_attn_probs=True
    )
    assert_attention_close(actual[:2], reference.varlen_attention, (q, k, v, cu_q, cu_k))


# vllm-project/flash-attention 87: the log-sum-exp of one query each with grouped heads and splits
def test_lse_layout_of_grouped_single_queries():
    q = randn(5, 8, 64)
    k, v = randn(5 * 1500, 2, 64), randn(5 * 1500, 2, 64)
    cu_q, cu_k = cumulative(*[1] * 5), cumulative(*[1500] * 5)
    actual = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, 1, 1500), return_attn_probs=True
    )
    assert actual[1].shape == (8, 5)
    assert_attention_close(actual[:2], reference.varlen_attention, (q, k, v, cu_q, cu_k))


# -------------------------------------------------------------------------------------------------
# Layouts and sizes


# 355: gradients are wrong when dout is not contiguous
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_that_is_not_contiguous(dtype):
    tensors = [x.requires_grad_() for x in Case(dtype=dtype).inputs()]
    out = flash_attn.flash_attn_func(*tensors, causal=True)
    dense = randn(2, 67, 4, 64).to(dtype)
    layouts = (
        dense.transpose(1, 2).contiguous().transpose(1, 2),
        dense.permute(3, 2, 1, 0).contiguous().permute(3, 2, 1, 0),
        torch.stack([dense, dense], -1)[..., 0],
        torch.cat([dense, dense], 2)[:, :, :4],
    )
    expected = torch.autograd.grad(out, tensors, dense, retain_graph=True)
    for dout in layouts:
        assert not dout.is_contiguous()
        gradients = torch.autograd.grad(out, tensors, dout, retain_graph=True)
        assert all(torch.equal(a, b) for a, b in zip(gradients, expected, strict=True))


# 325, 364 and 91: "dout tensor must have contiguous last dimension" after .sum().backward()
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_expanded_gradient(dtype):
    tensors = [x.requires_grad_() for x in Case(sq=5, sk=5, head_dim=8, dtype=dtype).inputs()]
    flash_attn.flash_attn_func(*tensors, causal=True).sum().backward()
    again = [x.detach().requires_grad_() for x in tensors]
    out = flash_attn.flash_attn_func(*again, causal=True)
    out.backward(torch.ones_like(out))
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(tensors, again, strict=True))


# 2777: "dq must have contiguous last dimension" for inputs transposed in the last dimension
def test_inputs_transposed_in_the_last_dimension():
    tensors = [randn(2, 4, 64, 30).transpose(2, 3).transpose(1, 2) for _ in range(3)]
    assert all(x.stride(-1) != 1 for x in tensors)
    leaves = [x.detach().requires_grad_() for x in tensors]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    dout = torch.randn_like(out)
    check_gradients(
        (out, lse, torch.autograd.grad(out, leaves, dout)),
        reference.attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
    )


# 818: keys contiguous, values not
def test_keys_and_values_of_different_layouts():
    q, k = randn(2, 53, 4, 64), randn(2, 53, 4, 64)
    v = randn(2, 4, 53, 64).transpose(1, 2)
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_func(*leaves, return_attn_probs=True)
    dout = randn(2, 4, 53, 64).transpose(1, 2)
    check_gradients(
        (out, lse, torch.autograd.grad(out, leaves, dout)),
        reference.attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
    )


# 772, 1500, 2214, 2260, 2611: offsets beyond 2^31 elements wrap around
def test_strides_beyond_two_to_the_31():
    """Virtual memory of 5 GB, of which a few pages are touched."""
    rows, step = 3, 1 << 30
    whole = torch.empty((rows - 1) * step + 64 * 64, dtype=BF16)
    x = whole.as_strided((rows, 4, 2, 64), (step, 128, 64, 1), 0)
    x.copy_(randn(rows, 4, 2, 64))
    dense = x.contiguous().requires_grad_()
    strided = x.detach().requires_grad_()
    expected, out = (flash_attn.flash_attn_func(y, y, y, causal=True) for y in (dense, strided))
    assert torch.equal(out, expected)
    (a,) = torch.autograd.grad(expected, dense, x.detach())
    (b,) = torch.autograd.grad(out, strided, x.detach())
    assert torch.equal(a, b)
    q, new = randn(rows, 1, 2, 64).to(BF16), randn(rows, 1, 2, 64).to(BF16)
    caches = x.clone(), x.clone()
    for k_cache, v_cache in ((x, x.clone()), caches):
        flash_attn.flash_attn_with_kvcache(q, k_cache, v_cache, new, new, cache_seqlens=3)
    assert torch.equal(x, caches[0])


# 2260: many sequences of one query and key
def test_large_batch_of_single_keys():
    tensors = [randn(8300, 1, 4, 8).requires_grad_() for _ in range(3)]
    out = flash_attn.flash_attn_func(*tensors)
    torch.testing.assert_close(out, tensors[2])
    gradients = torch.autograd.grad(out.sum(), tensors)
    torch.testing.assert_close(gradients[2], torch.ones_like(gradients[2]))
    assert all(x.isfinite().all() for x in gradients)


# 1347: head dimensions that are not multiples of 8, whose softmax_scale is the caller's
@pytest.mark.parametrize("head_dim", (4, 7, 12, 59, 120, 193))
def test_head_dimensions_that_are_no_multiples_of_eight(head_dim):
    check_forward(Case(head_dim=head_dim))
    check_backward(Case(head_dim=head_dim))


# 1300: head dimension 4: another result than plain attention
def test_head_dimension_four():
    q = torch.tensor([0.1, 0.1, 0.3, 0.1]).half()[None, :, None, None].expand(1, 4, 1, 4)
    out = flash_attn.flash_attn_qkvpacked_func(torch.stack([q, q, q], 2))
    expected, _ = reference.attention(q, q, q)
    naive, _ = reference.attention(q, q, q, dtype=FP16)
    assert_close(out, expected, naive, "out")


# -------------------------------------------------------------------------------------------------
# The log-sum-exp


# 141, 404, 889, 1137, 1817: the gradient of the log-sum-exp is silently zero
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("function", ("dense", "qkvpacked", "kvpacked", "varlen"))
def test_gradient_of_the_log_sum_exp(function, dtype):
    q, k, v = Case(batch=1, dtype=dtype).inputs()
    lengths = cumulative(67)
    leaf = torch.stack([q, k, v], 2).requires_grad_()
    a, b, c = leaf.unbind(2)
    options = {"causal": True, "return_attn_probs": True}
    if function == "dense":
        _, lse, _ = flash_attn.flash_attn_func(a, b, c, **options)
    elif function == "qkvpacked":
        _, lse, _ = flash_attn.flash_attn_qkvpacked_func(leaf, **options)
    elif function == "kvpacked":
        _, lse, _ = flash_attn.flash_attn_kvpacked_func(a, leaf[:, :, 1:], **options)
    else:
        _, lse, _ = flash_attn.flash_attn_varlen_qkvpacked_func(leaf[0], lengths, 67, **options)
    (gradient,) = torch.autograd.grad(lse.square().sum(), leaf)
    tensors = [x.detach() for x in (q, k, v)]
    dlse = (2 * lse.detach()).view(1, 4, 67)
    zeros = torch.zeros_like(q)
    _, _, expected = reference.with_gradients(
        reference.attention, tensors, zeros, dlse, causal=True
    )
    _, _, naive = reference.with_gradients(
        reference.attention, tensors, zeros, dlse, causal=True, dtype=dtype
    )
    for name, part, want, plain in zip(
        ("dq", "dk", "dv"), gradient.unbind(2), expected, naive, strict=True
    ):
        assert_close(part, want, plain, name, dtype=dtype)
    assert torch.count_nonzero(gradient[:, :, 2]) == 0 and gradient[:, :, 0].abs().max() > 0


# The bias of causal ALiBi counts only up to a constant a row in FlashAttention-2, which the
# log-sum-exp lacks then; the documented one is -slope * |i + off - j|.
@pytest.mark.parametrize("sq,sk", ((60, 60), (20, 90), (90, 20)))
def test_alibi_in_the_log_sum_exp(sq, sk):
    q, k, v = Case(sq=sq, sk=sk).inputs()
    slopes = torch.tensor([0.5, 0.25, 0.125, 0.0625])
    actual = flash_attn.flash_attn_func(
        q, k, v, causal=True, alibi_slopes=slopes, return_attn_probs=True
    )
    assert_attention_close(
        actual[:2], reference.attention, (q, k, v), causal=True, alibi_slopes=slopes
    )


# -------------------------------------------------------------------------------------------------
# Dropout and softcap


# FlashAttention-2 compares 8-bit numbers: p = 0.001 drops nothing or one in 255.
def test_small_probabilities_of_dropout():
    q, k, v = (randn(2, 700, 2, 8) for _ in range(3))
    _, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.001, return_attn_probs=True)
    dropped = int(torch.signbit(s_dmask[:, :, :700, :700]).sum())
    expected = 0.001 * 4 * 700 * 700
    assert abs(dropped - expected) < 6 * math.sqrt(expected) + 4 * 700 * 700 * 2**-16


# 1025: "softcapping does not support dropout for now"
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_softcap_with_dropout(dtype):
    check_backward(Case(softcap=2.0, dropout_p=0.3, causal=True, dtype=dtype))


# 2402 and 2544: the gradient of the softcap, dense and of variable length
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradient_of_softcap(dtype):
    check_backward(Case(sq=113, sk=203, softcap=15.0, softmax_scale=3.0, dtype=dtype))
    q = randn(90, 4, 64).to(dtype)
    k, v = (randn(90, 4, 64).to(dtype) for _ in range(2))
    cu = cumulative(40, 50)
    check_varlen_backward(q, k, v, cu, cu, 50, 50, softcap=15.0, softmax_scale=3.0)


# 1357: S_dmask is empty without dropout, and not aligned with the rest with it
def test_s_dmask_covers_the_whole_matrix():
    q, k, v = Case(sq=31, sk=97).inputs()
    _, _, empty = flash_attn.flash_attn_func(q, k, v, return_attn_probs=True)
    assert empty.shape == (0,)
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 1e-4, return_attn_probs=True)
    assert out.shape == q.shape
    assert s_dmask.shape[2] >= 31 and s_dmask.shape[3] >= 97 and s_dmask.isfinite().all()
    largest = s_dmask[:, :, :31, :97].abs().amax(-1)
    torch.testing.assert_close(largest, torch.ones_like(largest))


# aws-neuron-sdk 1156: NaN when dropout leaves a row without any entry
def test_dropout_of_a_whole_row():
    q, k, v = Case(sq=64, sk=64).inputs()
    out = flash_attn.flash_attn_func(q, k, v, 0.95, causal=True)
    assert out.isfinite().all() and (out.abs().amax(-1) == 0).any()


# 1251: forward and backward have different dropout masks
def test_forward_and_backward_drop_the_same():
    v = randn(1, 40, 2, 40)
    q, k = randn(1, 50, 2, 40), randn(1, 40, 2, 40)
    v.requires_grad_()
    out, _, s_dmask = flash_attn.flash_attn_func(q, k, v, 0.5, return_attn_probs=True)
    # out is linear in v: dv of a unit dout is a row of the dropped probabilities
    dout = torch.zeros_like(out)
    dout[0, 17, 1, 0] = 1.0
    (dv,) = torch.autograd.grad(out, v, dout)
    kept = ~torch.signbit(s_dmask[0, 1, 17, :40])
    assert torch.equal(dv[0, :, 1, 0] != 0, kept)


# -------------------------------------------------------------------------------------------------
# Determinism


# 414, 429, 988, 2244: dq differs from run to run
@pytest.mark.parametrize("deterministic", (False, True) if DEVICE.type == "cpu" else (True,))
def test_dq_is_the_same_every_time(deterministic):
    tensors = [randn(2, 300, 4, 64).to(BF16).requires_grad_() for _ in range(3)]
    dout = randn(2, 300, 4, 64).to(BF16)

    def gradients():
        out = flash_attn.flash_attn_func(*tensors, causal=True, deterministic=deterministic)
        return torch.autograd.grad(out, tensors, dout)

    first = gradients()
    for _ in range(5):
        assert all(torch.equal(a, b) for a, b in zip(gradients(), first, strict=True))


def assert_same(x, y):
    """Bitwise; on a GPU, where it depends on the batch how keys are split, up to rounding."""
    if DEVICE.type == "cpu":
        assert torch.equal(x, y)
    else:
        torch.testing.assert_close(x, y, **CLOSE)


# 47: the same sequence gives different results in batches of different sizes
def test_batch_size_does_not_matter():
    q, k, v = (randn(1, n, 2, 64).to(BF16) for n in (50, 3500, 3500))
    alone = flash_attn.flash_attn_func(q, k, v)
    together = flash_attn.flash_attn_func(*(x.expand(6, -1, -1, -1) for x in (q, k, v)))
    for x in together:
        assert_same(x[None], alone)


# vllm 51902: a neighbour that grows from 9 to 10 rows changes a decode row
def test_neighbours_do_not_matter():
    q = randn(30, 14, 64).to(BF16)
    k, v = (randn(1500, 2, 64).to(BF16) for _ in range(2))
    rows = []
    for more in (1, 9, 10, 17, 29):
        out = flash_attn.flash_attn_varlen_func(
            *(q[: 1 + more], k[: 1402 + more], v[: 1402 + more]),
            *(cumulative(1, more), cumulative(1402, more), more, 1402),
            causal=True,
        )
        rows.append(out[0])
    for row in rows:
        assert_same(row, rows[0])
