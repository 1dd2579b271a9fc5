"""Comparing with the reference, and the inputs that are compared.

A tolerance is derived, not chosen: twice the error that the same computation makes when it is done
naively in the input's dtype, against float64, plus a floor that covers the rounding of the result
itself (a naive result can be exact by luck, for example when there is only one key).
"""

import itertools
import math
import random
from dataclasses import dataclass, replace

import reference
import torch

import flash_attn

# Where tensors are made unless said otherwise: pytest's option --device.
DEVICE = torch.get_default_device()

FP32, BF16, FP16 = torch.float32, torch.bfloat16, torch.float16
DTYPES = (FP32, BF16, FP16) if DEVICE.type == "cpu" else (BF16, FP16)
DTYPE = DTYPES[0]  # where one will do
DTYPE_NAMES = {FP32: "fp32", BF16: "bf16", FP16: "fp16"}


# For torch.testing.assert_close, where two calls shall give the same.
CLOSE = {} if DTYPE == FP32 else {"rtol": 2e-2, "atol": 2e-2}

# For the log-sum-exp, which is float32, of inputs whose exponentials may be approximated.
CLOSE_LSE = {} if DTYPE == FP32 else {"rtol": 1e-3, "atol": 1e-3}

# Where dropout's seeds come from: get_rng_state() and set_rng_state() of the device's generator.
RANDOM = torch if DEVICE.type == "cpu" else torch.get_device_module(DEVICE)


def dtype_id(dtype):
    return DTYPE_NAMES[dtype]


def randn(*shape, dtype=DTYPE, **options):
    """torch.randn in a dtype that the device's kernels know."""
    return torch.randn(*shape, **options).to(dtype)


def new_generator(seed):
    """Of random numbers on the device."""
    return torch.Generator(DEVICE).manual_seed(seed)


# -------------------------------------------------------------------------------------------------
# Comparison


def _largest(x):
    x = x[x.isfinite()]
    return float(x.abs().max()) if x.numel() else 0.0


def assert_close(actual, expected, naive, what, *, dtype=None, input_dtype=None):
    """|actual - expected| <= 2 * max |naive - expected| + floor, where both are finite.

    expected: float64. naive: the same computation in the input's dtype. NaN and infinities must be
    in the same places. The floor is one unit in the last place of `dtype` (actual's unless given)
    at the largest expected value, for the rounding of the result; sixteen of float32 there, but at
    least at 1, for sums in another order; and fractions of one of `input_dtype` (the same unless
    given): a sixteenth at 1 for exponentials, 1/256 at the largest value for products in parts.
    """
    dtype = dtype or actual.dtype
    input_dtype = input_dtype or dtype
    assert actual.shape == expected.shape, f"{what}: shape {actual.shape}, not {expected.shape}"
    actual, expected, naive = (
        x.detach().cpu().to(torch.float64) for x in (actual, expected, naive)
    )
    nan, expected_nan = actual.isnan(), expected.isnan()
    assert torch.equal(nan, expected_nan), (
        f"{what}: {int((nan & ~expected_nan).sum())} unexpected NaN, "
        f"{int((~nan & expected_nan).sum())} missing NaN"
    )
    infinite = expected.isinf()
    assert torch.equal(actual.isinf() | infinite, infinite), f"{what}: unexpected infinity"
    assert torch.equal(actual[infinite], expected[infinite]), f"{what}: infinities differ"
    finite = expected.isfinite()
    if not finite.any():
        return
    eps, input_eps = torch.finfo(dtype).eps, torch.finfo(input_dtype).eps
    naive_error = _largest(naive[finite] - expected[finite])
    largest = _largest(expected)
    floor = eps * largest + 16 * torch.finfo(FP32).eps * max(largest, 1.0)
    floor += input_eps * (1 / 16 + largest / 256)
    tolerance = 2 * naive_error + floor
    error = (actual[finite] - expected[finite]).abs().max()
    assert error <= tolerance, (
        f"{what}: error {error:.3e} above {tolerance:.3e} "
        f"(naive error {naive_error:.3e}, largest value {largest:.3e})"
    )


def assert_attention_close(actual, function, tensors, what="", *, lse_dtype=FP32, **options):
    """Compare (out, lse) with a function of the reference.

    lse is float32 whatever the dtype: its tolerance comes from a naive float32 computation, unless
    something that it depends on is rounded to the dtype on the way (lse_dtype). The exponentials
    of bfloat16 and float16 may be approximated to a fraction of their rounding.
    """
    out, lse = actual
    expected_out, expected_lse = function(*tensors, **options)
    naive_out, naive_lse = function(*tensors, **options, dtype=out.dtype)
    if lse_dtype != out.dtype:
        _, naive_lse = function(*tensors, **options, dtype=lse_dtype)
    assert_close(out, expected_out, naive_out, f"{what}out")
    if lse is not None:
        assert lse.dtype == FP32
        assert_close(
            *(lse, expected_lse, naive_lse, f"{what}lse"), dtype=lse_dtype, input_dtype=out.dtype
        )


# -------------------------------------------------------------------------------------------------
# Inputs


def dense(*shape, dtype=DTYPE):
    return torch.randn(*shape).to(dtype)


def transposed(batch, length, heads, head_dim, dtype=DTYPE):
    """(b, s, h, d) as a view of (b, h, s, d)."""
    return torch.randn(batch, heads, length, head_dim).to(dtype).transpose(1, 2)


def sliced(batch, length, heads, head_dim, dtype=DTYPE):
    """(b, s, h, d) out of the middle of something larger in every dimension; NaN around it."""
    whole = torch.full((batch + 2, length + 3, heads + 1, head_dim + 16), math.nan, dtype=dtype)
    view = whole[1 : batch + 1, 2 : length + 2, 1:, 8 : head_dim + 8]
    view.copy_(torch.randn(view.shape))
    return view


def expanded(batch, length, heads, head_dim, dtype=DTYPE):
    """(b, s, h, d) with stride 0 over the batch and the heads."""
    return torch.randn(1, length, 1, head_dim).to(dtype).expand(batch, length, heads, head_dim)


def interleaved(batch, length, heads, head_dim, dtype=DTYPE):
    """(b, s, h, d) as every third row of a packed tensor, like a part of qkv."""
    return torch.randn(batch, length, 3, heads, head_dim).to(dtype)[:, :, 1]


LAYOUTS = {
    "dense": dense,
    "transposed": transposed,
    "sliced": sliced,
    "expanded": expanded,
    "interleaved": interleaved,
}


@dataclass(frozen=True)
class Case:
    """One call of attention. Its id says what differs from the defaults."""

    batch: int = 2
    sq: int = 67
    sk: int = 67
    heads: int = 4
    heads_k: int = 4
    head_dim: int = 64
    dtype: torch.dtype = DTYPE
    causal: bool = False
    window_size: tuple = (-1, -1)
    softcap: float = 0.0
    alibi: str = ""  # "h" or "bh": the shape of the slopes
    sinks: bool = False
    dropout_p: float = 0.0
    softmax_scale: float | None = None
    layout: str = "dense"
    lse_gradient: bool = False

    def __str__(self):
        words = [
            DTYPE_NAMES[self.dtype],
            f"b{self.batch}",
            f"s{self.sq}x{self.sk}",
            f"h{self.heads}x{self.heads_k}",
            f"d{self.head_dim}",
        ]
        if self.causal:
            words.append("causal")
        if self.window_size != (-1, -1):
            words.append("window{}_{}".format(*self.window_size).replace("-1", "inf"))
        if self.softcap:
            words.append(f"softcap{self.softcap:g}")
        if self.alibi:
            words.append(f"alibi_{self.alibi}")
        if self.sinks:
            words.append("sinks")
        if self.dropout_p:
            words.append(f"dropout{self.dropout_p:g}")
        if self.softmax_scale is not None:
            words.append(f"scale{self.softmax_scale:g}")
        if self.layout != "dense":
            words.append(self.layout)
        if self.lse_gradient:
            words.append("dlse")
        return "-".join(words)

    def inputs(self):
        """q, k, v in the case's layout."""
        make = LAYOUTS[self.layout]
        return (
            make(self.batch, self.sq, self.heads, self.head_dim, dtype=self.dtype),
            make(self.batch, self.sk, self.heads_k, self.head_dim, dtype=self.dtype),
            make(self.batch, self.sk, self.heads_k, self.head_dim, dtype=self.dtype),
        )

    def options(self):
        """Keyword arguments that the functions under test and the reference share."""
        options = {
            "causal": self.causal,
            "window_size": self.window_size,
            "softcap": self.softcap,
            "softmax_scale": self.softmax_scale,
        }
        if self.alibi:
            shape = (self.heads,) if self.alibi == "h" else (self.batch, self.heads)
            options["alibi_slopes"] = torch.rand(shape) * 0.3
        return options

    def sink_values(self):
        return torch.randn(self.heads) if self.sinks else None


def case_id(case):
    return str(case) if isinstance(case, Case) else None


def with_dtypes(cases, dtypes=DTYPES):
    """Every case in every dtype."""
    return [replace(case, dtype=dtype) for case in cases for dtype in dtypes]


def pairwise(seed=0, **factors):
    """Dictionaries of one value a factor, in which every pair of values of two factors occurs.

    Greedy: of a few random rows, always take the one that covers the most pairs not yet covered.
    """
    generator = random.Random(seed)
    names = list(factors)
    missing = {
        (a, i, b, j)
        for a, b in itertools.combinations(range(len(names)), 2)
        for i in range(len(factors[names[a]]))
        for j in range(len(factors[names[b]]))
    }

    def pairs(row):
        return {(a, row[a], b, row[b]) for a, b in itertools.combinations(range(len(names)), 2)}

    rows = []
    while missing:
        candidates = []
        for a, i, b, j in generator.sample(sorted(missing), min(12, len(missing))):
            row = [generator.randrange(len(factors[name])) for name in names]
            row[a], row[b] = i, j
            candidates.append(row)
        best = max(candidates, key=lambda row: len(pairs(row) & missing))
        missing -= pairs(best)
        rows.append({name: factors[name][i] for name, i in zip(names, best, strict=True)})
    return rows


def keep_mask_of(s_dmask, sq, sk):
    """What dropout kept, read from the signs of S_dmask (which may be larger than sq x sk)."""
    return ~torch.signbit(s_dmask[:, :, :sq, :sk])


def keep_masks_of(s_dmask, cu_seqlens_q, cu_seqlens_k):
    """The same for each sequence of a variable length batch: a list of bool (1, h, sq, sk)."""
    lengths_q, lengths_k = cu_seqlens_q.diff().tolist(), cu_seqlens_k.diff().tolist()
    return [
        keep_mask_of(s_dmask[i : i + 1], sq, sk)
        for i, (sq, sk) in enumerate(zip(lengths_q, lengths_k, strict=True))
    ]


def check_forward(case, function=None):
    """Run flash_attn_func on the case, without gradients, and compare out and lse."""
    function = function or flash_attn.flash_attn_func
    q, k, v = case.inputs()
    options, s_aux = case.options(), case.sink_values()
    out, lse, s_dmask = function(
        q, k, v, case.dropout_p, **options, s_aux=s_aux, return_attn_probs=True
    )
    assert out.dtype == case.dtype
    keep_mask = keep_mask_of(s_dmask, case.sq, case.sk) if case.dropout_p > 0 else None
    if keep_mask is None:
        assert s_dmask.shape == (0,)
    assert_attention_close(
        (out, lse),
        reference.attention,
        (q, k, v),
        **options,
        s_aux=s_aux,
        dropout_p=case.dropout_p,
        keep_mask=keep_mask,
    )


def check_backward(case, function=None):
    """Run flash_attn_func on the case, differentiate it, and compare everything."""
    function = function or flash_attn.flash_attn_func
    tensors = [x.detach().requires_grad_() for x in case.inputs()]
    options, s_aux = case.options(), case.sink_values()
    names = ["dq", "dk", "dv"]
    if s_aux is not None:
        s_aux = s_aux.requires_grad_()
        names.append("ds_aux")
    out, lse, s_dmask = function(
        *tensors, case.dropout_p, **options, s_aux=s_aux, return_attn_probs=True
    )
    make_dout = LAYOUTS[case.layout]
    dout = make_dout(case.batch, case.sq, case.heads, case.head_dim, dtype=case.dtype)
    dlse = torch.randn(lse.shape) if case.lse_gradient else None
    keep_mask = keep_mask_of(s_dmask, case.sq, case.sk) if case.dropout_p > 0 else None
    leaves = tensors + ([s_aux] if s_aux is not None else [])
    outputs, output_gradients = [out], [dout]
    if dlse is not None:
        outputs.append(lse)
        output_gradients.append(dlse)
    gradients = torch.autograd.grad(outputs, leaves, output_gradients)
    check_gradients(
        (out, lse, gradients),
        reference.attention,
        tensors,
        s_aux,
        dout,
        dlse,
        names,
        **options,
        dropout_p=case.dropout_p,
        keep_mask=keep_mask,
    )


def check_gradients(actual, function, tensors, s_aux, dout, dlse, names, **options):
    """Compare (out, lse, gradients) with a function of the reference and its gradients."""
    out, lse, gradients = actual
    dtype = out.dtype
    inputs = list(tensors) + ([("s_aux", s_aux)] if s_aux is not None else [])
    expected = reference.with_gradients(function, inputs, dout, dlse, **options)
    naive = reference.with_gradients(function, inputs, dout, dlse, **options, dtype=dtype)
    naive_lse = naive[1]
    if dtype != FP32:
        detached = [x.detach() for x in tensors]
        sink = {} if s_aux is None else {"s_aux": s_aux.detach()}
        naive_lse = function(*detached, **sink, **options, dtype=FP32)[1]
    assert_close(out, expected[0], naive[0], "out")
    assert_close(lse, expected[1], naive_lse, "lse", dtype=FP32, input_dtype=dtype)
    for name, gradient, want, plain in zip(names, gradients, expected[2], naive[2], strict=True):
        assert_close(gradient, want, plain, name, dtype=dtype)


def cumulative(*lengths):
    return torch.tensor((0, *lengths), dtype=torch.int32).cumsum(0, dtype=torch.int32)


def check_varlen_backward(q, k, v, cu_q, cu_k, max_q, max_k, **options):
    """Run, differentiate and compare; returns out, lse and the gradients."""
    leaves = [x.detach().requires_grad_() for x in (q, k, v)]
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *(*leaves, cu_q, cu_k, max_q, max_k), **options, return_attn_probs=True
    )
    dout = torch.randn_like(out)
    gradients = torch.autograd.grad(out, leaves, dout)
    check_gradients(
        (out, lse, gradients),
        reference.varlen_attention,
        leaves,
        None,
        dout,
        None,
        ["dq", "dk", "dv"],
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        **options,
    )
    return out, lse, gradients
