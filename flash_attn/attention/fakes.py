"""Shapes of the ops' results, for tensors without data: compilation, export, meta tensors."""

from __future__ import annotations

import torch

from flash_attn.attention import cache, library  # noqa: F401
from flash_attn.attention.arguments import maybe_contiguous
from flash_attn.attention.registry import fake
from flash_attn.backends.interface import MIN_DROPOUT_P


def _check_devices(q, k, v):
    for name, x in (("k", k), ("v", v)):
        if x.device != q.device:
            raise RuntimeError(
                f"{name} must be on the same device as q ({q.device}), but is on {x.device}"
            )


def _forward_results(q, lse_shape, s_dmask_shape):
    return (
        torch.empty_like(maybe_contiguous(q)),
        q.new_empty(lse_shape, dtype=torch.float32),
        q.new_empty(s_dmask_shape),
        q.new_empty((2,), dtype=torch.int64),
    )


@fake("_flash_attn_forward")
def _(q, k, v, dropout_p, scale, causal, left, right, softcap, alibi_slopes, return_softmax, *_):
    _check_devices(q, k, v)
    batch, seqlen_q, num_heads, _ = q.shape
    lse_shape = (batch, num_heads, seqlen_q)
    has_s_dmask = return_softmax and dropout_p >= MIN_DROPOUT_P
    return _forward_results(q, lse_shape, (*lse_shape, k.shape[1]) if has_s_dmask else (0,))


@fake("_flash_attn_varlen_forward")
def _(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left=-1,
    window_size_right=-1,
    softcap=0.0,
    alibi_slopes=None,
    return_softmax=False,
    *_,
):
    _check_devices(q, k, v)
    total_q, num_heads, _ = q.shape
    s_dmask_shape = (0,)
    if return_softmax and dropout_p >= MIN_DROPOUT_P:
        s_dmask_shape = (cu_seqlens_q.shape[0] - 1, num_heads, max_seqlen_q, max_seqlen_k)
    return _forward_results(q, (num_heads, total_q), s_dmask_shape)


@fake("_flash_attn_backward")
@fake("_flash_attn_varlen_backward")
def _(dout, q, k, v, out, softmax_lse, *_):
    return torch.empty_like(softmax_lse, memory_format=torch.contiguous_format)


@fake("attention_backward")
def _(dout, q, k, v, out, softmax_lse, dsoftmax_lse, *rest):
    s_aux = rest[7]
    return (
        torch.empty_like(q),
        torch.empty_like(k),
        torch.empty_like(v),
        q.new_empty((0,)) if s_aux is None else torch.empty_like(s_aux),
    )


@fake("with_kvcache")
def _(q, k_cache, v_cache, *_):
    _check_devices(q, k_cache, v_cache)
    batch, seqlen_q, num_heads, _ = q.shape
    lse = q.new_empty((batch, num_heads, seqlen_q), dtype=torch.float32)
    return torch.empty_like(maybe_contiguous(q)), lse
