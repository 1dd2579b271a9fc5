"""Libraries that split a sequence over devices: they call internals and merge blocks by lse.

A test makes a client's calls as the client makes them: positionally, by keyword, through
inspection, in its shapes.
"""

import inspect

import pytest
import torch
from checks import BF16, CLOSE, FP32, cumulative, randn
from client_calls import BATCH, HEAD_DIM, HEADS, check_out, qkv, reference_gradients

import flash_attn
from flash_attn import flash_attn_interface

TOLERANCE = CLOSE or {"rtol": 1e-4, "atol": 1e-5}

# --------------------------------------------------------------------------------------------------
# diffusers


def test_diffusers_imports():
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from flash_attn.flash_attn_interface import (
        _wrapped_flash_attn_backward,
        _wrapped_flash_attn_forward,
        _wrapped_flash_attn_varlen_backward,
        _wrapped_flash_attn_varlen_forward,
    )

    for function in (
        flash_attn_func,
        flash_attn_varlen_func,
        _wrapped_flash_attn_backward,
        _wrapped_flash_attn_forward,
        _wrapped_flash_attn_varlen_backward,
        _wrapped_flash_attn_varlen_forward,
    ):
        assert callable(function)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_diffusers_context_parallel(causal):
    q, k, v = (x.requires_grad_() for x in qkv(19, heads_k=HEADS))
    scale, dropout_p = HEAD_DIM**-0.5, 1e-30  # which asks for the lse, not for dropout

    with torch.set_grad_enabled(True):
        out, lse, _, rng_state = flash_attn_interface._wrapped_flash_attn_forward(
            q, k, v, dropout_p, scale, causal, -1, -1, 0.0, None, True
        )
    lse = lse.permute(0, 2, 1)
    assert lse.shape == (BATCH, 19, HEADS)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    check_out(out, q, k, v, causal=causal)
    dout = randn(*out.shape)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_attn_interface._wrapped_flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.permute(0, 2, 1).contiguous(),
        *gradients,
        dropout_p,
        scale,
        causal,
        -1,
        -1,
        0.0,
        None,
        False,
        rng_state,
    )
    expected = reference_gradients(q, k, v, dout, causal=causal)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, **TOLERANCE)


def test_diffusers_varlen():
    q, k, v = qkv(19, 23, heads_k=HEADS)
    lengths = [23, 9]
    keep = torch.arange(23) < torch.tensor(lengths)[:, None]
    out = flash_attn.flash_attn_varlen_func(
        q=q.flatten(0, 1),
        k=k[keep],
        v=v[keep],
        cu_seqlens_q=cumulative(19, 19),
        cu_seqlens_k=cumulative(*lengths),
        max_seqlen_q=19,
        max_seqlen_k=23,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ).unflatten(0, (BATCH, -1))
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        check_out(out[part], q[part], k[part, :length], v[part, :length])


# --------------------------------------------------------------------------------------------------
# TransformerEngine: internals by keyword


def test_transformer_engine_imports():
    from flash_attn_2_cuda import varlen_bwd

    assert callable(varlen_bwd)
    assert flash_attn_interface.flash_attn_gpu.varlen_bwd is varlen_bwd
    assert flash_attn_interface.USE_TRITON_ROCM is False


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("packed", [False, True], ids=["bshd", "thd"])
def test_transformer_engine_tile(packed, causal):
    q, k, v = qkv(16)
    lengths = [9, 7]
    padding = [cumulative(*lengths), cumulative(*lengths), 9, 9] if packed else []
    if packed:
        q, k, v = (x[:1].flatten(0, 1) for x in (q, k, v))
        forward = flash_attn_interface._flash_attn_varlen_forward
        backward = flash_attn_interface._flash_attn_varlen_backward
    else:
        forward = flash_attn_interface._flash_attn_forward
        backward = flash_attn_interface._flash_attn_backward
    common = {
        "softmax_scale": 0.2,
        "dropout_p": 0.0,
        "window_size_left": -1,
        "window_size_right": 0 if causal else -1,
        "alibi_slopes": None,
        "softcap": 0.0,
    }
    extra = {"block_table": None} if packed else {}
    outputs = forward(q, k, v, *padding, causal=causal, return_softmax=False, **common, **extra)
    out, lse, s_dmask, rng_state = outputs
    assert s_dmask.numel() == 0 and rng_state.dtype == torch.int64
    assert lse.shape == ((HEADS, 16) if packed else (BATCH, HEADS, 16))

    dout = randn(*out.shape)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        *padding,
        causal=causal,
        deterministic=False,
        rng_state=rng_state,
        **common,
    )
    tensors = [out, q, k, v, dout, dq, dk, dv]
    if packed:
        ends = cumulative(*lengths)
        parts = [[x[None, slice(*ends[i : i + 2])] for x in tensors] for i in (0, 1)]
    else:
        parts = [tensors]
    for out, q, k, v, dout, *actual in parts:
        check_out(out, q, k, v, causal=causal, softmax_scale=0.2)
        expected = reference_gradients(q, k, v, dout, causal=causal, softmax_scale=0.2)
        for gradient, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, **TOLERANCE)


# --------------------------------------------------------------------------------------------------
# ring-flash-attention and yunchang: internals with inspected defaults, blocks merged by their lse


def default_arguments(function):
    assert inspect.isfunction(function)
    spec = inspect.getfullargspec(function)
    defaults = spec.defaults or ()
    padded = (None,) * (len(spec.args) - len(defaults)) + defaults
    arguments = dict(zip(spec.args, padded, strict=True))
    if "softcap" in arguments:
        arguments["softcap"] = 0.0
    return arguments


def merged(out, lse, block_out, block_lse):
    block_out, block_lse = block_out.float(), block_lse.transpose(-2, -1).unsqueeze(-1)
    if out is None:
        return block_out, block_lse
    logsigmoid = torch.nn.functional.logsigmoid
    out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
    return out, lse - logsigmoid(lse - block_lse)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_ring_attention(dtype):
    """The second of two processes: its own keys causally, then all keys of the first."""
    q, k, v = qkv(16, 32, dtype=dtype)
    blocks = [(k[:, 16:].contiguous(), v[:, 16:].contiguous(), True), (k[:, :16], v[:, :16], False)]
    common = {"softmax_scale": 0.2, "dropout_p": 0, "alibi_slopes": None}
    common |= {"window_size_left": -1, "window_size_right": -1}
    out = lse = None
    for block_k, block_v, causal in blocks:
        arguments = default_arguments(flash_attn_interface._flash_attn_forward)
        assert "window_size" not in arguments
        arguments |= {"q": q, "k": block_k, "v": block_v, "causal": causal, **common}
        arguments["return_softmax"] = False
        outputs = flash_attn_interface._flash_attn_forward(**arguments)
        assert len(outputs) == 4
        out, lse = merged(out, lse, *outputs[:2])
    out = out.to(dtype)
    lse = lse.squeeze(dim=-1).transpose(1, 2)
    check_out(out, q, k, v, causal=True, softmax_scale=0.2)

    dout = torch.randn(out.shape).to(dtype)
    dq = torch.zeros(q.shape)
    dk_dv = []
    for block_k, block_v, causal in blocks:
        buffers = [torch.empty(x.shape, dtype=x.dtype) for x in (q, block_k, block_v)]
        arguments = default_arguments(flash_attn_interface._flash_attn_backward)
        arguments |= {"dout": dout, "q": q, "k": block_k, "v": block_v, "causal": causal, **common}
        arguments |= {"out": out, "softmax_lse": lse, "deterministic": False}
        arguments |= dict(zip(("dq", "dk", "dv"), buffers, strict=True))
        flash_attn_interface._flash_attn_backward(**arguments)
        dq += buffers[0]
        dk_dv.insert(0, buffers[1:])
    dk, dv = (torch.cat(parts, dim=1) for parts in zip(*dk_dv, strict=True))
    expected = reference_gradients(q, k, v, dout, causal=True, softmax_scale=0.2)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.05, "atol": 0.05}
    for actual, wanted in zip((dq.to(dtype), dk, dv), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance)


def test_ring_attention_varlen():
    lengths = [10, 6]
    q, k, v = (x[:1].flatten(0, 1) for x in qkv(16))
    cu_seqlens = cumulative(*lengths)
    common = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": 10,
        "max_seqlen_k": 10,
        "dropout_p": 0,
        "softmax_scale": 0.2,
        "causal": True,
        "alibi_slopes": None,
        "window_size_left": -1,
        "window_size_right": -1,
    }
    arguments = default_arguments(flash_attn_interface._flash_attn_varlen_forward)
    arguments |= {"q": q, "k": k, "v": v, "return_softmax": False, **common}
    out, lse, _, _ = flash_attn_interface._flash_attn_varlen_forward(**arguments)
    dout = randn(*out.shape)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    arguments = default_arguments(flash_attn_interface._flash_attn_varlen_backward)
    arguments |= {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, **common}
    arguments |= {"dq": dq, "dk": dk, "dv": dv, "deterministic": False}
    flash_attn_interface._flash_attn_varlen_backward(**arguments)
    for index in (0, 1):
        part = slice(*cu_seqlens[index : index + 2].tolist())
        q_part, k_part, v_part = (x[None, part] for x in (q, k, v))
        check_out(out[None, part], q_part, k_part, v_part, causal=True, softmax_scale=0.2)
        expected = reference_gradients(
            q_part, k_part, v_part, dout[None, part], causal=True, softmax_scale=0.2
        )
        for actual, wanted in zip((dq, dk, dv), expected, strict=True):
            torch.testing.assert_close(actual[None, part], wanted, **TOLERANCE)
