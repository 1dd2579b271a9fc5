"""Sequences of varying length: packed side by side, in pages, behind padding."""

import math

import pytest
import reference
import torch
from checks import FP16, FP32, assert_attention_close, assert_close, cumulative

import flash_attn
from flash_attn.flash_attn_interface import _flash_attn_varlen_forward

LENGTHS_Q, LENGTHS_K = (5, 0, 40, 1), (33, 20, 0, 70)


def _inputs(dtype, head_dim, heads=4, heads_k=2, lengths_q=LENGTHS_Q, lengths_k=LENGTHS_K):
    """q with seven rows, k and v with three, that belong to no sequence."""
    q = torch.randn(sum(lengths_q) + 7, heads, head_dim).to(dtype)
    k, v = torch.randn(2, sum(lengths_k) + 3, heads_k, head_dim).to(dtype)
    return q, k, v


@pytest.mark.parametrize("dtype, head_dim", [(FP32, 24), (FP16, 96)])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"causal": True, "softcap": 2.0},
        {"window_size": (10, 4), "s_aux": torch.tensor([0.3, -2.0, 1.0, 0.0])},
        {"causal": True, "alibi_slopes": torch.rand(4, 4)},
    ],
    ids=("plain", "causal", "window-sinks", "alibi"),
)
def test_against_the_reference(dtype, head_dim, options):
    q, k, v = _inputs(dtype, head_dim)
    k[sum(LENGTHS_K) :] = v[sum(LENGTHS_K) :] = math.nan
    q[sum(LENGTHS_Q) :] = math.inf
    cu_q, cu_k = cumulative(*LENGTHS_Q), cumulative(*LENGTHS_K)
    out, lse, _ = flash_attn.flash_attn_varlen_func(
        *(q, k, v, cu_q, cu_k, max(LENGTHS_Q), max(LENGTHS_K)), **options, return_attn_probs=True
    )
    rest = lse[:, sum(LENGTHS_Q) :]
    s_aux = options.get("s_aux")
    expected = torch.full_like(rest, math.inf) if s_aux is None else s_aux[:, None].expand_as(rest)
    assert torch.equal(rest, expected)
    assert torch.count_nonzero(out[sum(LENGTHS_Q) :]) == 0
    end = sum(LENGTHS_Q)
    assert_attention_close(
        (out[:end], lse[:, :end]),
        reference.varlen_attention,
        (q[:end], k, v),
        cu_seqlens_q=cu_q,
        cu_seqlens_k=cu_k,
        **options,
    )


def test_dropout_counts_inside_the_sequence():
    q, k, v = _inputs(FP32, 16, heads=2)
    cu_q, cu_k = cumulative(*LENGTHS_Q), cumulative(*LENGTHS_K)
    state = torch.tensor([5, 6])
    out, _, s_dmask, _ = torch.ops.flash_attn._flash_attn_varlen_forward(
        *(q, k, v, cu_q, cu_k, 40, 70, 0.4, 0.25, True),
        return_softmax=True,
        rng_state=state,
    )
    expected, _ = reference.varlen_attention(
        *(q, k, v, cu_q, cu_k),
        softmax_scale=0.25,
        causal=True,
        dropout_p=0.4,
        rng_state=state,
    )
    torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
    assert s_dmask.shape == (4, 2, 40, 70) and s_dmask.isfinite().all()
    assert torch.count_nonzero(s_dmask[0, :, 5:]) == torch.count_nonzero(s_dmask[1]) == 0


@pytest.mark.parametrize("page_size", (1, 16, 48))
@pytest.mark.parametrize("num_splits", (0, 1, 3))
def test_pages_in_use_behind_padding(page_size, num_splits):
    """Pages in any order, used in part, with left padding; NaN in all other slots."""
    lengths_q = (1, 3, 1, 0)
    used, leftpad = torch.tensor([30, 65, 2, 9]).int(), torch.tensor([0, 31, 2, 5]).int()
    columns = -(-70 // page_size)
    table = torch.randperm(4 * columns + 2)[: 4 * columns].view(4, columns).int()
    q = torch.randn(sum(lengths_q) + 2, 4, 40)
    caches = torch.full((2, 4 * columns + 2, page_size, 2, 40), math.nan)
    for i in range(4):
        rows = torch.arange(int(leftpad[i]), int(used[i]))
        caches[:, table[i].long()[rows // page_size], rows % page_size] = torch.randn(
            2, len(rows), 2, 40
        )
    cu_q, cu_k = cumulative(*lengths_q), cumulative(70, 70, 70, 70)
    out, lse, *_ = _flash_attn_varlen_forward(
        *(q, *caches, cu_q, cu_k, 3, 70, 0.0, 40**-0.5, True),
        block_table=table,
        leftpad_k=leftpad,
        seqused_k=used,
        num_splits=num_splits,
    )
    expected, expected_lse = reference.varlen_attention(
        *(q, *caches, cu_q, cu_k),
        block_table=table,
        leftpad_k=leftpad,
        seqused_k=used,
        causal=True,
    )
    assert_close(out, expected, expected.float(), "out")
    assert_close(lse, expected_lse, expected_lse.float(), "lse")
