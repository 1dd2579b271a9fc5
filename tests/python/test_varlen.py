"""Variable length against the reference, sequence by sequence."""

from dataclasses import dataclass

import pytest
import reference
import torch
from checks import (
    BF16,
    DTYPE,
    DTYPE_NAMES,
    DTYPES,
    FP32,
    assert_attention_close,
    assert_close,
    check_gradients,
    cumulative,
    dtype_id,
    keep_masks_of,
    new_generator,
    pairwise,
)

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

# Lengths of the queries and of the keys of each sequence.
BATCHES = {
    "one": ((67,), (67,)),
    "equal": ((40, 40, 40), (40, 40, 40)),
    "mixed": ((5, 64, 1, 130, 33), (70, 64, 129, 31, 33)),
    "zeros": ((0, 20, 7, 0, 33, 0), (9, 0, 50, 0, 33, 12)),
    "decode": ((1, 1, 1, 1), (200, 3, 64, 129)),
    "nothing": ((0, 0), (0, 0)),
    "no_queries": ((0, 0), (5, 3)),
    "no_keys": ((5, 3), (0, 0)),
    "longer_queries": ((90, 17), (20, 16)),
}


@dataclass(frozen=True)
class VarlenCase:
    batch: str = "mixed"
    heads: tuple = (4, 4)
    head_dim: int = 64
    dtype: torch.dtype = DTYPE
    causal: bool = False
    window_size: tuple = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""
    sinks: bool = False
    dropout_p: float = 0.0
    lse_gradient: bool = False

    def __str__(self):
        words = [self.batch, DTYPE_NAMES[self.dtype], "h{}x{}".format(*self.heads)]
        words.append(f"d{self.head_dim}")
        words += ["causal"] if self.causal else []
        words += ["window{}_{}".format(*self.window_size)] if self.window_size != (-1, -1) else []
        words += [f"softcap{self.softcap:g}"] if self.softcap else []
        words += [f"alibi_{self.alibi}"] if self.alibi else []
        words += ["sinks"] if self.sinks else []
        words += [f"dropout{self.dropout_p:g}"] if self.dropout_p else []
        words += ["dlse"] if self.lse_gradient else []
        return "-".join(words).replace("-1", "inf")

    def inputs(self):
        lengths_q, lengths_k = BATCHES[self.batch]
        heads, heads_k = self.heads
        q = torch.randn(sum(lengths_q), heads, self.head_dim).to(self.dtype)
        k = torch.randn(sum(lengths_k), heads_k, self.head_dim).to(self.dtype)
        v = torch.randn(sum(lengths_k), heads_k, self.head_dim).to(self.dtype)
        return q, k, v

    def lengths(self):
        lengths_q, lengths_k = BATCHES[self.batch]
        return (
            cumulative(*lengths_q),
            cumulative(*lengths_k),
            max(lengths_q),
            max(lengths_k),
        )

    def options(self):
        options = {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
        }
        if self.alibi:
            batch = len(BATCHES[self.batch][0])
            shape = self.heads[:1] if self.alibi == "h" else (batch, self.heads[0])
            options["alibi_slopes"] = torch.rand(shape) * 0.3
        return options


def run(case, q, k, v, s_aux, options):
    cu_q, cu_k, max_q, max_k = case.lengths()
    out, lse, s_dmask = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, max_q, max_k, case.dropout_p),
        **options,
        s_aux=s_aux,
        return_attn_probs=True,
    )
    keep_masks = keep_masks_of(s_dmask, cu_q, cu_k) if case.dropout_p > 0 else None
    return out, lse, keep_masks


def check_forward(case):
    q, k, v = case.inputs()
    s_aux = torch.randn(case.heads[0]) if case.sinks else None
    options = case.options()
    out, lse, keep_masks = run(case, q, k, v, s_aux, options)
    cu_q, cu_k, _, _ = case.lengths()
    assert_attention_close(
        (out, lse),
        reference.varlen_attention,
        (q, k, v, cu_q, cu_k),
        **options,
        s_aux=s_aux,
        dropout_p=case.dropout_p,
        keep_masks=keep_masks,
    )


def check_backward(case):
    tensors = [x.requires_grad_() for x in case.inputs()]
    s_aux = torch.randn(case.heads[0], requires_grad=True) if case.sinks else None
    options = case.options()
    out, lse, keep_masks = run(case, *tensors, s_aux, options)
    dout = torch.randn(out.shape).to(case.dtype)
    dlse = torch.randn(lse.shape) if case.lse_gradient else None
    leaves = tensors + ([] if s_aux is None else [s_aux])
    outputs, output_gradients = [out], [dout]
    if dlse is not None:
        outputs.append(lse)
        output_gradients.append(dlse)
    gradients = torch.autograd.grad(outputs, leaves, output_gradients)
    cu_q, cu_k, _, _ = case.lengths()
    check_gradients(
        (out, lse, gradients),
        reference.varlen_attention,
        tensors,
        s_aux,
        dout,
        dlse,
        ["dq", "dk", "dv", "ds_aux"][: len(leaves)],
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        **options,
        dropout_p=case.dropout_p,
        keep_masks=keep_masks,
    )


BATCH_CASES = [
    VarlenCase(batch=batch, dtype=dtype, causal=causal)
    for batch in BATCHES
    for dtype in DTYPES
    for causal in (False, True)
]

FEATURE_CASES = [
    VarlenCase(**row)
    for row in pairwise(
        seed=3,
        batch=("mixed", "zeros", "decode", "longer_queries"),
        dtype=DTYPES,
        heads=((4, 4), (6, 2), (4, 1)),
        head_dim=(64, 128, 33),
        causal=(False, True),
        window_size=((-1, -1), (24, 0), (-1, 9), (17, 31)),
        softcap=(0.0, 1.5),
        alibi=("", "h", "bh"),
        sinks=(False, True),
        dropout_p=(0.0, 0.17),
        lse_gradient=(False, True),
    )
]


@pytest.mark.parametrize("case", BATCH_CASES, ids=str)
def test_forward(case):
    check_forward(case)


@pytest.mark.parametrize("case", BATCH_CASES, ids=str)
def test_backward(case):
    check_backward(case)


@pytest.mark.parametrize("case", FEATURE_CASES, ids=str)
def test_features(case):
    check_forward(case)
    check_backward(case)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_packed_functions_are_the_same_function(dtype):
    case = VarlenCase(batch="equal", dtype=dtype)
    cu, _, longest, _ = case.lengths()
    qkv = torch.randn(120, 3, 4, 64).to(dtype)
    q, k, v = qkv.unbind(1)
    options = {"causal": True, "return_attn_probs": True}
    expected = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, **options)
    packed = flash_attn.flash_attn_varlen_qkvpacked_func(qkv, cu, longest, **options)
    kv_packed = flash_attn.flash_attn_varlen_kvpacked_func(
        q, qkv[:, 1:], cu, cu, longest, longest, **options
    )
    for other in (packed, kv_packed):
        for a, b in zip(expected, other, strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_gradients_of_packed_functions(dtype):
    case = VarlenCase(batch="equal", dtype=dtype)
    cu, _, longest, _ = case.lengths()
    qkv = torch.randn(120, 3, 4, 64).to(dtype).requires_grad_()
    q, k, v = (x.detach().requires_grad_() for x in qkv.unbind(1))
    kv = qkv.detach()[:, 1:].requires_grad_()
    dout = torch.randn(120, 4, 64).to(dtype)

    def gradients(function, tensors, *lengths):
        return torch.autograd.grad(function(*tensors, *lengths, causal=True), tensors, dout)

    dq, dk, dv = gradients(flash_attn.flash_attn_varlen_func, (q, k, v), cu, cu, longest, longest)
    (dqkv,) = gradients(flash_attn.flash_attn_varlen_qkvpacked_func, (qkv,), cu, longest)
    dq_of_kv, dkv = gradients(
        flash_attn.flash_attn_varlen_kvpacked_func, (q, kv), cu, cu, longest, longest
    )
    assert torch.equal(dqkv, torch.stack([dq, dk, dv], dim=1))
    assert torch.equal(dq_of_kv, dq)
    assert torch.equal(dkv, torch.stack([dk, dv], dim=1))


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_is_the_dense_function_on_equal_lengths(dtype):
    """Up to rounding: the layout decides nothing."""
    q, k, v = (torch.randn(3, 40, 4, 64).to(dtype) for _ in range(3))
    cu = cumulative(40, 40, 40)
    dense = flash_attn.flash_attn_func(q, k, v, causal=True)
    packed = flash_attn.flash_attn_varlen_func(
        *(x.flatten(0, 1) for x in (q, k, v)), cu, cu, 40, 40, causal=True
    )
    assert_close(packed.view_as(dense), dense.double(), dense, "variable length", dtype=dtype)


@pytest.mark.parametrize(
    "convert", (int, lambda n: n + 100, torch.tensor), ids=("int", "larger", "tensor")
)
def test_max_seqlen(convert):
    """An int or a 0-d tensor, and any upper bound: the result is the same."""
    case = VarlenCase(causal=True)
    q, k, v = case.inputs()
    cu_q, cu_k, max_q, max_k = case.lengths()
    expected = flash_attn.flash_attn_varlen_func(q, k, v, cu_q, cu_k, max_q, max_k, causal=True)
    out = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, convert(max_q), convert(max_k), causal=True
    )
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_strided_tokens(dtype):
    """Views of a packed projection, without copies."""
    case = VarlenCase(dtype=dtype)
    qkv = torch.randn(233, 3, 4, 64).to(dtype)
    q, k, v = qkv.unbind(1)
    cu, _, longest, _ = case.lengths()
    expected = flash_attn.flash_attn_varlen_func(
        *(x.contiguous() for x in (q, k, v)), cu, cu, longest, longest, causal=True
    )
    out = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, longest, longest, causal=True)
    assert torch.equal(out, expected)


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_tokens_of_no_sequence(dtype, causal):
    """Tokens beyond the last sequence: out 0, gradients 0."""
    cu_q, cu_k = cumulative(5, 30), cumulative(17, 20)
    q = torch.randn(41, 4, 64).to(dtype).requires_grad_()
    k = torch.randn(50, 2, 64).to(dtype).requires_grad_()
    v = torch.randn(50, 2, 64).to(dtype).requires_grad_()
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        q, k, v, cu_q, cu_k, 30, 20, causal=causal, return_attn_probs=True
    )
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, (q, k, v), dout)
    assert torch.count_nonzero(out[35:]) == 0
    for gradient, end in zip(gradients, (35, 37, 37), strict=True):
        assert torch.count_nonzero(gradient[end:]) == 0
    check_gradients(
        (out, lse, gradients),
        reference.varlen_attention,
        [q, k, v],
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        causal=causal,
    )


def paged(rows, page_size, lengths, generator):
    """Rows of sequences laid out in shuffled pages; NaN where no row lies."""
    counts = [-(-length // page_size) for length in lengths]
    pages = torch.full((sum(counts) + 3, page_size, *rows.shape[1:]), torch.nan, dtype=rows.dtype)
    order = torch.randperm(len(pages), generator=generator).tolist()
    table = torch.full((len(lengths), max(counts) + 1), 0, dtype=torch.int32)
    used = begin = 0
    for i, length in enumerate(lengths):
        for page in range(counts[i]):
            table[i, page] = order[used]
            rows_here = min(page_size, length - page * page_size)
            pages[order[used], :rows_here] = rows[begin : begin + rows_here]
            begin += rows_here
            used += 1
    return pages, table


@pytest.mark.parametrize("page_size", (1, 7, 16, 64, 256))
@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
def test_pages(dtype, page_size):
    """Pages of any size give what the same rows side by side give."""
    case = VarlenCase(dtype=dtype, heads=(4, 2), causal=True)
    q, k, v = case.inputs()
    cu_q, cu_k, max_q, max_k = case.lengths()
    lengths = BATCHES["mixed"][1]
    k_pages, table = paged(k, page_size, lengths, new_generator(1))
    v_pages, _ = paged(v, page_size, lengths, new_generator(1))
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *(q, k_pages, v_pages, cu_q, cu_k, max_q, max_k),
        causal=True,
        block_table=table,
        return_attn_probs=True,
    )
    assert_attention_close(
        (out, lse), reference.varlen_attention, (q, k, v, cu_q, cu_k), causal=True
    )
    assert_attention_close(
        (out, lse),
        reference.varlen_attention,
        (q, k_pages, v_pages, cu_q, cu_k),
        block_table=table,
        causal=True,
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=dtype_id)
@pytest.mark.parametrize("causal", (False, True), ids=("full", "causal"))
def test_used_keys_and_left_padding(dtype, causal):
    """seqused_k and leftpad_k of the internal function; NaN in every row that they leave out."""
    case = VarlenCase(dtype=dtype, heads=(4, 2))
    q, k, v = case.inputs()
    cu_q, cu_k, max_q, max_k = case.lengths()
    used = torch.tensor([70, 40, 100, 31, 0], dtype=torch.int32)
    padding = torch.tensor([3, 0, 99, 31, 0], dtype=torch.int32)
    for i, begin in enumerate(cu_k[:-1].tolist()):
        for x in (k, v):
            x[begin : begin + int(padding[i])] = torch.nan
            x[begin + int(used[i]) : int(cu_k[i + 1])] = torch.nan
    out, lse, _, _ = _flash_attn_varlen_forward(
        *(q, k, v, cu_q, cu_k, max_q, max_k, 0.0, 64**-0.5, causal),
        seqused_k=used,
        leftpad_k=padding,
    )
    assert_attention_close(
        (out, lse),
        reference.varlen_attention,
        (q, k, v, cu_q, cu_k),
        seqused_k=used,
        leftpad_k=padding,
        causal=causal,
    )


def test_return_values():
    case = VarlenCase(dtype=BF16)
    q, k, v = case.inputs()
    result = flash_attn.flash_attn_varlen_func(q, k, v, *case.lengths(), return_attn_probs=True)
    assert len(result) == 3
    assert result[0].dtype == BF16 and result[0].shape == q.shape
    assert result[1].dtype == FP32 and result[1].shape == (4, 233)
    assert result[2].shape == (0,)
