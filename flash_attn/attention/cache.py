"""The op of attention over a cache, and the call that chooses between it and the backend."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.attention.arguments import is_plain, maybe_contiguous
from flash_attn.attention.registry import define
from flash_attn.backends import Options, backend_for


@define(
    "with_kvcache(Tensor q, Tensor(a!) k_cache, Tensor(b!) v_cache, Tensor? k, Tensor? v, "
    "Tensor? rotary_cos, Tensor? rotary_sin, Tensor? cache_seqlens, Tensor? cache_batch_idx, "
    "Tensor? cache_leftpad, Tensor? block_table, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, bool rotary_interleaved, "
    "Tensor? alibi_slopes, SymInt num_splits, Tensor? s_aux) -> (Tensor, Tensor)"
)
def _with_kvcache(
    q,
    k_cache,
    v_cache,
    k,
    v,
    rotary_cos,
    rotary_sin,
    cache_seqlens,
    cache_batch_idx,
    cache_leftpad,
    block_table,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    rotary_interleaved,
    alibi_slopes,
    num_splits,
    s_aux,
):
    return backend_for(q).kvcache(
        maybe_contiguous(q),
        k_cache,
        v_cache,
        maybe_contiguous(k),
        maybe_contiguous(v),
        Options(
            softmax_scale,
            causal,
            window_size_left,
            window_size_right,
            softcap,
            alibi_slopes,
            s_aux,
        ),
        maybe_contiguous(rotary_cos),
        maybe_contiguous(rotary_sin),
        rotary_interleaved,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        num_splits,
    )


def _mark_as_changed(cache: Tensor) -> None:
    """Lets autograd notice that something it saved for a gradient was written to."""
    if not (cache.requires_grad or cache.is_inference()):
        torch.autograd.graph.increment_version(cache)


def with_kvcache(
    q: Tensor, k_cache: Tensor, v_cache: Tensor, k: Tensor | None, *arguments
) -> tuple[Tensor, Tensor]:
    """Takes the arguments of the op in its order, and returns (out, softmax_lse)."""
    if not is_plain(q, k_cache, v_cache):
        return torch.ops.flash_attn.with_kvcache(q, k_cache, v_cache, k, *arguments)
    results = _with_kvcache(q, k_cache, v_cache, k, *arguments)
    if k is not None:
        _mark_as_changed(k_cache)
        _mark_as_changed(v_cache)
    return results
