"""The raw entry points, `flash_attn_2_cuda`, in the order of FlashAttention-2's arguments."""

import inspect

import pytest
import torch
from checks import CLOSE, cumulative, randn
from client_calls import BATCH, HEAD_DIM, HEADS, HEADS_K, check_out, qkv, reference_gradients

from flash_attn import flash_attn_interface

RAW_ARGUMENTS = {
    "fwd": "q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left, "
    "window_size_right, softcap, return_softmax, generator",
    "varlen_fwd": "q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, "
    "alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, "
    "window_size_left, window_size_right, softcap, return_softmax, generator, num_splits",
    "bwd": "dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale, "
    "is_causal, window_size_left, window_size_right, softcap, deterministic, generator, rng_state",
    "varlen_bwd": "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, "
    "alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, "
    "window_size_left, window_size_right, softcap, deterministic, generator, rng_state",
    "fwd_kvcache": "q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, "
    "leftpad_k, block_table, alibi_slopes, out, softmax_scale, is_causal, window_size_left, "
    "window_size_right, softcap, is_rotary_interleaved, num_splits",
}


@pytest.mark.parametrize("name", RAW_ARGUMENTS)
def test_raw_order_of_arguments(name):
    function = getattr(flash_attn_interface.flash_attn_gpu, name)
    assert ", ".join(inspect.signature(function).parameters) == RAW_ARGUMENTS[name]


@pytest.mark.parametrize("given", [False, True], ids=["allocated", "given"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_raw_dense(dropout_p, given):
    import flash_attn_2_cuda as raw

    q, k, v = qkv(17, 23)
    slopes = torch.rand(HEADS)
    mine = [torch.full_like(x, torch.nan) for x in (q, q, k, v)] if given else [None] * 4
    out, lse, s_dmask, rng_state = results = raw.fwd(
        q, k, v, mine[0], slopes, dropout_p, 0.2, True, 9, -1, 15.0, True, None
    )
    assert type(results) is list and rng_state.shape == (2,)
    options = {
        "softmax_scale": 0.2,
        "causal": True,
        "window_size": (9, -1),
        "softcap": 15.0,
        "alibi_slopes": slopes,
        "dropout_p": dropout_p,
    }
    if dropout_p > 0:
        options["keep_mask"] = ~torch.signbit(s_dmask[:, :, :17, :23])
    else:
        assert s_dmask.shape == (0,)
    check_out(out, q, k, v, **options)
    dout = randn(out.shape)
    dq, dk, dv, softmax_d = results = raw.bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *mine[1:],
        slopes,
        dropout_p,
        0.2,
        True,
        9,
        -1,
        15.0,
        False,
        None,
        rng_state,
    )
    assert type(results) is list
    if given:
        assert out is mine[0]
        assert all(a is b for a, b in zip(results, mine[1:], strict=False))
    for actual, wanted in zip(
        (dq, dk, dv), reference_gradients(q, k, v, dout, **options), strict=True
    ):
        torch.testing.assert_close(actual, wanted, **(CLOSE or {"rtol": 1e-4, "atol": 1e-5}))
    torch.testing.assert_close(
        softmax_d, (dout.float() * out.float()).sum(-1).transpose(1, 2), rtol=1e-4, atol=1e-4
    )


def test_raw_varlen():
    import flash_attn_2_cuda as raw

    q, k, v = (x.flatten(0, 1) for x in qkv(8))
    cu_q, cu_k = cumulative(10, 6), cumulative(4, 12)
    out, lse, s_dmask, rng_state = raw.varlen_fwd(
        q,
        k,
        v,
        None,
        cu_q,
        cu_k,
        None,
        None,
        None,
        None,
        10,
        12,
        0.0,
        0.2,
        False,
        False,
        -1,
        -1,
        0.0,
        False,
        None,
    )
    assert lse.shape == (HEADS, 16) and s_dmask.shape == (0,)
    dout = randn(out.shape)
    dq, dk, dv, softmax_d = raw.varlen_bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        None,
        cu_q,
        cu_k,
        None,
        10,
        12,
        0.0,
        0.2,
        False,
        False,
        -1,
        -1,
        0.0,
        False,
        None,
        rng_state,
    )
    assert softmax_d.shape == (HEADS, 16)
    for row in (0, 1):
        rows, keys = slice(*cu_q[row : row + 2]), slice(*cu_k[row : row + 2])
        q_row, k_row, v_row, dout_row = (
            q[None, rows],
            k[None, keys],
            v[None, keys],
            dout[None, rows],
        )
        check_out(out[None, rows], q_row, k_row, v_row, softmax_scale=0.2)
        expected = reference_gradients(q_row, k_row, v_row, dout_row, softmax_scale=0.2)
        actual = (dq[None, rows], dk[None, keys], dv[None, keys])
        for gradient, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, **(CLOSE or {"rtol": 1e-4, "atol": 1e-5}))


def test_raw_kvcache():
    import flash_attn_2_cuda as raw

    q, k, v = qkv(1)
    k_cache, v_cache = (randn(BATCH, 20, HEADS_K, HEAD_DIM) for _ in range(2))
    lengths = torch.tensor([7, 19], dtype=torch.int32)
    mine = torch.empty_like(q)
    out, lse = results = raw.fwd_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        lengths,
        None,
        None,
        None,
        None,
        None,
        None,
        mine,
        0.2,
        True,
        -1,
        -1,
        0.0,
        False,
        0,
    )
    assert type(results) is list and out is mine and lse.shape == (BATCH, HEADS, 1)
    for row, length in enumerate(lengths.tolist()):
        part = slice(row, row + 1)
        assert torch.equal(k_cache[row, length], k[row, 0])
        keys, values = k_cache[part, : length + 1], v_cache[part, : length + 1]
        check_out(out[part], q[part], keys, values, softmax_scale=0.2)


def test_raw_errors():
    import flash_attn_2_cuda as raw

    q, k, v = qkv(8)
    tail = (0.2, False, -1, -1, 0.0, False)
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        raw.fwd(q, k, v, None, None, 0.0, *tail, torch.Generator())
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        raw.bwd(q, q, k, v, q, q, None, None, None, None, 0.0, *tail, torch.Generator(), None)
    with pytest.raises(RuntimeError, match="Input tensor must have contiguous last dimension"):
        raw.fwd(q.transpose(1, 3), k, v, None, None, 0.0, *tail, None)
