"""Rotary embedding against the float64 reference: values, gradients, in place, packed, compiled."""

import pytest
import torch
from checks import DTYPES, FP32, dtype_id, interleaved, sliced, transposed
from rotary_checks import OFFSETS, POSITIONS, check_rotation, expected_rotation, tables

from flash_attn.layers.rotary import (
    apply_rotary_emb,
    apply_rotary_emb_func,
    apply_rotary_emb_kv_,
    apply_rotary_emb_qkv_,
    apply_rotary_emb_torch,
    rotate_half,
)
from flash_attn.ops.triton.rotary import apply_rotary


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize("offsets", OFFSETS)
@pytest.mark.parametrize("rotary_dim", [32, 22, 64])
def test_values_and_gradients(rotary_dim, offsets, pairs, dtype):
    x = torch.randn(3, 41, 4, 64).to(dtype).requires_grad_()
    cos, sin = tables(rotary_dim, dtype)
    offsets, options = OFFSETS[offsets], {"interleaved": pairs == "interleaved"}
    out = apply_rotary_emb(x, cos, sin, seqlen_offsets=offsets, **options)
    check_rotation(out, x.detach(), cos, sin, offsets=offsets, **options)

    dout = torch.randn(out.shape).to(dtype)
    (dx,) = torch.autograd.grad(out, x, dout)
    check_rotation(dx, dout, cos, sin, offsets=offsets, conjugate=True, **options)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize("offsets", OFFSETS)
def test_packed_sequences(offsets, pairs, dtype):
    cu_seqlens = torch.tensor([0, 13, 13, 50], dtype=torch.int32)
    x = torch.randn(55, 4, 64).to(dtype).requires_grad_()  # five rows behind the last sequence
    cos, sin = tables(32, dtype)
    offsets, interleaved = OFFSETS[offsets], pairs == "interleaved"
    packing = {"cu_seqlens": cu_seqlens, "max_seqlen": 37}
    out = apply_rotary_emb(x, cos, sin, interleaved, seqlen_offsets=offsets, **packing)
    options = {"offsets": offsets, "cu_seqlens": cu_seqlens, "interleaved": interleaved}
    check_rotation(out, x.detach(), cos, sin, **options)
    dout = torch.randn(out.shape).to(dtype)
    (dx,) = torch.autograd.grad(out, x, dout)
    check_rotation(dx, dout, cos, sin, conjugate=True, **options)

    in_place = x.detach().clone()
    result = apply_rotary(
        in_place, cos, sin, offsets, **packing, interleaved=interleaved, inplace=True
    )
    assert result is in_place
    assert torch.equal(in_place, out.detach())


@pytest.mark.parametrize("make", [transposed, sliced, interleaved], ids=lambda make: make.__name__)
def test_layouts(make):
    x = make(2, 19, 3, 32)
    cos, sin = tables(16)
    check_rotation(apply_rotary_emb(x, cos, sin), x, cos, sin)
    before = x.clone()
    apply_rotary_emb(x, cos, sin, inplace=True)
    check_rotation(x, before, cos, sin)


def test_last_dimension_is_not_contiguous():
    cos, sin = tables(16)
    x = torch.randn(2, 19, 32, 3).transpose(2, 3).requires_grad_()
    out = apply_rotary_emb(x, cos, sin)
    check_rotation(out, x.detach(), cos, sin)
    dout = torch.randn(2, 19, 32, 3).transpose(2, 3)
    check_rotation(torch.autograd.grad(out, x, dout)[0], dout, cos, sin, conjugate=True)
    in_place = x.detach().clone(memory_format=torch.preserve_format)
    assert in_place.stride(-1) != 1
    apply_rotary_emb(in_place, cos, sin, inplace=True)
    check_rotation(in_place, x.detach(), cos, sin)


@pytest.mark.parametrize("table_dtype", [*DTYPES, torch.float64], ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_tables_of_another_dtype(dtype, table_dtype):
    x = torch.randn(2, 19, 3, 32).to(dtype)
    cos, sin = tables(32, table_dtype)
    check_rotation(apply_rotary_emb(x, cos, sin), x, cos.float(), sin.float())


def test_tables_that_are_views():
    # The parts of complex numbers have a stride of two.
    cos_sin = torch.polar(torch.ones(POSITIONS, 8), torch.rand(POSITIONS, 8))
    x = torch.randn(2, 19, 3, 16)
    check_rotation(apply_rotary_emb(x, cos_sin.real, cos_sin.imag), x, cos_sin.real, cos_sin.imag)


def test_conjugate_is_the_inverse():
    x = torch.randn(2, 19, 3, 32)
    cos, sin = tables(32)
    there = apply_rotary(x, cos, sin, seqlen_offsets=5, interleaved=True)
    back = apply_rotary(there, cos, sin, seqlen_offsets=5, interleaved=True, conjugate=True)
    torch.testing.assert_close(back, x)


@pytest.mark.parametrize("shape", [(0, 5, 2, 16), (2, 0, 2, 16), (2, 5, 0, 16)], ids=str)
def test_nothing_to_rotate(shape):
    cos, sin = tables(16)
    assert apply_rotary_emb(torch.randn(shape), cos, sin).shape == shape


def test_nan_stays_in_its_pair():
    x = torch.randn(1, 4, 2, 32)
    x[0, 2, 1, 3] = torch.nan
    cos, sin = tables(32)
    nan = apply_rotary_emb(x, cos, sin).isnan()
    assert nan.nonzero().tolist() == [[0, 2, 1, 3], [0, 2, 1, 19]]


# --------------------------------------------------------------------------------------------------
# In place


def rotated_squares(x, rotate, weights):
    return torch.autograd.grad((rotate(x) ** 2 * weights).sum(), x)[0]


def test_in_place_gradient_through_the_result_and_through_x():
    x = torch.randn(2, 9, 3, 16, requires_grad=True)
    cos, sin = tables(16)
    weights = torch.randn(x.shape)
    expected = rotated_squares(x, lambda x: apply_rotary_emb(x * 2, cos, sin), weights)

    def result(x):
        hidden = x * 2
        out = apply_rotary_emb(hidden, cos, sin, inplace=True)
        assert out is hidden
        return out

    def ignored(x):  # a caller may go on with its own tensor
        hidden = x * 2
        apply_rotary_emb(hidden, cos, sin, inplace=True)
        return hidden

    def base(x):
        hidden = x * 2
        apply_rotary_emb(hidden[:], cos, sin, inplace=True)
        return hidden

    for rotate in (result, ignored, base):
        torch.testing.assert_close(rotated_squares(x, rotate, weights), expected)


def test_in_place_on_a_leaf_and_on_parts_that_autograd_guards():
    cos, sin = tables(16)
    start = torch.randn(2, 9, 3, 16)
    leaf = start.clone().requires_grad_()
    out = apply_rotary_emb(leaf, cos, sin, inplace=True)
    assert out.data_ptr() == leaf.data_ptr()
    dout = torch.randn(out.shape)
    out.backward(dout)
    check_rotation(out.detach(), start, cos, sin)
    check_rotation(leaf.grad, dout, cos, sin, conjugate=True)

    whole = torch.stack([start, start]).requires_grad_()
    first, second = (whole * 1).unbind(0)
    out = apply_rotary_emb(first, cos, sin, inplace=True)
    (gradient,) = torch.autograd.grad((out * dout + second).sum(), whole)
    check_rotation(gradient[0], dout, cos, sin, conjugate=True)
    assert (gradient[1] == 1).all()


def test_in_place_on_something_needed_is_an_error_not_a_wrong_gradient():
    cos, sin = tables(16)
    x = torch.randn(2, 9, 3, 16, requires_grad=True)
    hidden = x.exp()  # whose gradient needs it
    apply_rotary_emb(hidden, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        hidden.sum().backward()


def test_in_place_without_gradient_is_noticed():
    cos, sin = tables(16)
    x, factor = torch.randn(2, 9, 3, 16), torch.ones((), requires_grad=True)
    product = factor * x  # whose gradient needs x
    apply_rotary_emb(x, cos, sin, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.sum().backward()
    with torch.inference_mode():  # tensors without a version
        apply_rotary_emb(torch.randn(2, 9, 3, 16), cos, sin, inplace=True)


def test_gradient_that_is_shared_is_not_written_to():
    cos, sin = tables(16)
    x = torch.randn(2, 9, 3, 16, requires_grad=True)
    dout = torch.randn(x.shape)
    before = dout.clone()
    apply_rotary_emb(x * 1, cos, sin, inplace=True).backward(dout)
    assert torch.equal(dout, before)
    apply_rotary_emb(x * 1, cos, sin, inplace=True).sum().backward()  # an expanded gradient


# --------------------------------------------------------------------------------------------------
# Packed q, k, v


@pytest.mark.parametrize("own_tables", [False, True], ids=["one_table", "two_tables"])
@pytest.mark.parametrize("form", ["qkv", "grouped", "qkv_strided", "qkv_varlen", "grouped_varlen"])
def test_qkv(form, own_tables):
    cos, sin = tables(16)
    cos_k, sin_k = tables(16) if own_tables else (None, None)
    cu_seqlens, options = None, {"interleaved": True}
    if "varlen" in form:
        cu_seqlens = torch.tensor([0, 4, 17], dtype=torch.int32)
        options |= {"cu_seqlens": cu_seqlens, "max_seqlen": 13}
    else:
        options |= {"seqlen_offsets": 2}
    leading = (17,) if "varlen" in form else (2, 17)
    if form.startswith("grouped"):
        qkv = torch.randn(*leading, 4 + 2 * 2, 16)
        options["num_heads_q"] = 4
        split = (4, 2, 2)
    elif form == "qkv_strided":
        qkv = torch.randn(*leading, 4, 3, 16).transpose(-2, -3)
    else:
        qkv = torch.randn(*leading, 3, 4, 16)

    def parts(qkv):
        return qkv.split(split, dim=-2) if form.startswith("grouped") else qkv.unbind(dim=-3)

    leaf = qkv.clone().requires_grad_()
    hidden = leaf * 1
    out = apply_rotary_emb_qkv_(hidden, cos, sin, cos_k, sin_k, **options)
    assert out is hidden
    dout = torch.randn(out.shape)
    (dqkv,) = torch.autograd.grad(out, leaf, dout)

    q_tables, k_tables = (cos, sin), (cos_k, sin_k) if own_tables else (cos, sin)
    common = {
        "interleaved": True,
        "cu_seqlens": cu_seqlens,
        "offsets": 0 if cu_seqlens is not None else 2,
    }
    for actual, given, conjugate in ((out.detach(), qkv, False), (dqkv, dout, True)):
        (q, k, v), (q0, k0, v0) = parts(actual), parts(given)
        check_rotation(q, q0, *q_tables, conjugate=conjugate, **common)
        check_rotation(k, k0, *k_tables, conjugate=conjugate, **common)
        assert torch.equal(v, v0)


def test_kv():
    cos, sin = tables(16)
    kv = torch.randn(2, 17, 2, 4, 16)
    leaf = kv.clone().requires_grad_()
    out = apply_rotary_emb_kv_(leaf * 1, cos, sin, seqlen_offsets=torch.tensor([1, 5]))
    dout = torch.randn(out.shape)
    (dkv,) = torch.autograd.grad(out, leaf, dout)
    for actual, given, conjugate in ((out.detach(), kv, False), (dkv, dout, True)):
        check_rotation(
            actual[:, :, 0], given[:, :, 0], cos, sin, offsets=[1, 5], conjugate=conjugate
        )
        assert torch.equal(actual[:, :, 1], given[:, :, 1])


# --------------------------------------------------------------------------------------------------
# float64, and other ways to compute the same


@pytest.mark.cpu  # one element after the other
@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_gradcheck(pairs):
    cos, sin = tables(8, torch.float64)
    options = {"interleaved": pairs == "interleaved"}
    cu_seqlens = torch.tensor([0, 2, 5], dtype=torch.int32)
    dense = torch.randn(2, 5, 2, 10, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(6, 2, 10, dtype=torch.float64, requires_grad=True)
    qkv = torch.randn(2, 5, 3, 2, 8, dtype=torch.float64, requires_grad=True)
    offsets = torch.tensor([1, 3])
    for function, x in (
        (lambda x: apply_rotary(x, cos, sin, offsets, **options), dense),
        (lambda x: apply_rotary(x, cos, sin, 2, cu_seqlens, 3, **options), packed),
        (lambda x: apply_rotary(x * 1, cos, sin, inplace=True, **options), dense),
        (lambda x: apply_rotary_emb_qkv_(x * 1, cos, sin, **options), qkv),
    ):
        assert torch.autograd.gradcheck(function, x)
        assert torch.autograd.gradgradcheck(function, x)


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_float64_agrees_with_the_reference(pairs):
    cos, sin = tables(16, torch.float64)
    x = torch.randn(3, 41, 2, 20, dtype=torch.float64)
    options = {"interleaved": pairs == "interleaved"}
    for offsets in OFFSETS.values():
        out = apply_rotary(x, cos, sin, offsets, **options)
        torch.testing.assert_close(
            out, expected_rotation(x, cos, sin, offsets=offsets, **options), rtol=0, atol=1e-15
        )


@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
def test_plain_torch_function(pairs):
    cos, sin = tables(16)
    x = torch.randn(2, 41, 2, 20)
    options = {"interleaved": pairs == "interleaved"}
    out = apply_rotary_emb_torch(x, cos[:41], sin[:41], **options)
    check_rotation(out, x, cos, sin, **options)
    by_batch = apply_rotary_emb_torch(
        x, cos[:41].expand(2, -1, -1), sin[:41].expand(2, -1, -1), **options
    )
    assert torch.equal(by_batch, out)
    quarter = rotate_half(x, pairs == "interleaved")
    assert torch.equal(rotate_half(quarter, pairs == "interleaved"), -x)


def test_old_name():
    assert apply_rotary_emb_func is apply_rotary_emb


# --------------------------------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
def test_bad_input(dtype):
    cos, sin = tables(16, dtype, positions=10)
    x = torch.randn(2, 7, 3, 16, dtype=dtype)
    with pytest.raises((RuntimeError, IndexError)):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=4)
    with pytest.raises((RuntimeError, IndexError)):
        apply_rotary_emb(x, cos, sin, seqlen_offsets=torch.tensor([0, 4]))
    with pytest.raises(RuntimeError):
        apply_rotary_emb(x[..., :8].contiguous(), cos, sin)
    with pytest.raises(RuntimeError):
        apply_rotary_emb(x, cos, sin[:, :4])
    before = x.clone()
    with pytest.raises(RuntimeError):
        apply_rotary_emb(x, cos[:5], sin[:5], inplace=True)
    assert torch.equal(x, before)
    with pytest.raises(RuntimeError, match="max_seqlen must be passed"):
        apply_rotary_emb(x[0], cos, sin, cu_seqlens=torch.tensor([0, 7], dtype=torch.int32))
    with pytest.raises(RuntimeError, match="num_heads_q must be given"):
        apply_rotary_emb_qkv_(x, cos, sin)
    with pytest.raises(RuntimeError, match="qkv must have shape"):
        apply_rotary_emb_qkv_(x[:, :, None], cos, sin)
    with pytest.raises(RuntimeError, match="kv must have shape"):
        apply_rotary_emb_kv_(x[:, :, None], cos, sin)
    with pytest.raises(RuntimeError, match="rotary_dim must be <= headdim"):
        apply_rotary_emb_torch(x[..., :8], cos[:7], sin[:7])
