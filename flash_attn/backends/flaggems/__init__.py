"""The FlagGems backend: Triton kernels for every accelerator that FlagGems reaches.

The core checks the arguments, with the texts of the other backends; policy.py says whether an
operator of FlagGems or a kernel of ours serves a request; attention.py, backward.py and rotary.py
launch our kernels. FlagGems and Triton are imported by the first call.
"""

from __future__ import annotations

import functools
import importlib
from types import ModuleType

import torch
from torch import Tensor, empty_like

from flash_attn.backends.allocation import row_vector
from flash_attn.backends.flaggems import check, own_operator, runtime
from flash_attn.backends.interface import Options, Sequences


@functools.cache
def _is_type_of(device: torch.device, device_type: str) -> bool:
    """Remembered, as asking a device for its type makes a string."""
    return device.type == device_type


def _runtime_of(x: Tensor) -> runtime.Runtime:
    """The runtime, which must know the device of x."""
    where = runtime.current()
    if not _is_type_of(x.device, where.device_type):
        raise RuntimeError(
            f"flash_attn: FlagGems serves devices of type {where.device_type} ({where.vendor}) "
            f"here, but the tensors are on {x.device}"
        )
    return where


@functools.cache
def _kernels_of(module: str) -> ModuleType:
    """A module that imports Triton, which the runtime is to have found: attention, for instance."""
    return importlib.import_module(f"flash_attn.backends.flaggems.{module}")


def plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
) -> Tensor:
    """Attention forward without options; see `Backend.plain_forward`."""
    options = Options(softmax_scale, causal, window_left, window_right)
    return forward(q, k, v, options, return_lse=False)[0]


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sequences: Sequences | None = None,
    return_s_dmask: bool = False,
    out: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention forward; see `Backend.forward`."""
    where = _runtime_of(q)
    softmax_lse = row_vector(q, sequences is not None)
    result = empty_like(q) if out is None else out
    s_dmask = None
    if return_s_dmask and options.dropout_p > 0:
        if sequences is None:
            shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        else:
            batch = sequences.cu_seqlens_q.shape[0] - 1
            shape = (batch, q.shape[1], sequences.max_seqlen_q, sequences.max_seqlen_k)
        s_dmask = q.new_empty(shape)
    check.forward(q, k, v, result, softmax_lse, options, sequences, s_dmask)
    inference = out is None and not return_lse
    if own_operator.serves(where, q, k, v, options, sequences is None, inference):
        return own_operator.forward(where, q, k, v, options), None, None
    _kernels_of("attention").forward(q, k, v, result, softmax_lse, options, sequences, s_dmask)
    return result, softmax_lse if return_lse else None, s_dmask


def backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor,
    dk: Tensor,
    dv: Tensor,
    options: Options,
    sequences: Sequences | None = None,
    dsoftmax_lse: Tensor | None = None,
    ds_aux: Tensor | None = None,
) -> Tensor:
    """Attention backward; see `Backend.backward`."""
    _runtime_of(q)
    softmax_d = row_vector(q, sequences is not None)
    check.backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        softmax_d,
        options,
        sequences,
        dsoftmax_lse,
        ds_aux,
    )
    return _kernels_of("gradients").backward(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        options,
        sequences,
        dsoftmax_lse,
        ds_aux,
        softmax_d,
    )


def kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    options: Options,
    rotary_cos: Tensor | None = None,
    rotary_sin: Tensor | None = None,
    rotary_interleaved: bool = True,
    cache_seqlens: Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    num_splits: int = 0,
    out: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """Attention over a cache, appended to first; see `Backend.kvcache`."""
    _runtime_of(q)
    if out is None:
        out = empty_like(q)
    softmax_lse = row_vector(q, False)
    check.kvcache(
        q,
        k_cache,
        v_cache,
        out,
        softmax_lse,
        k,
        v,
        options,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        num_splits,
    )
    attention, embedding = _kernels_of("attention"), _kernels_of("embedding")
    if k is not None:
        embedding.append(
            k,
            v,
            k_cache,
            v_cache,
            cache_seqlens,
            rotary_cos,
            rotary_sin,
            rotary_interleaved,
            cache_batch_idx,
            block_table,
        )
        if rotary_cos is not None:
            by_row = options.causal or options.window_left >= 0 or options.window_right >= 0
            q = embedding.rotated_queries(
                q, rotary_cos, rotary_sin, cache_seqlens, rotary_interleaved, by_row
            )
    keys = attention.Keys(
        attention.cache_capacity(k_cache, block_table),
        None,
        cache_seqlens,
        cache_leftpad,
        cache_batch_idx,
        block_table,
        0 if k is None else k.shape[1],
    )
    attention.attend(
        q, k_cache, v_cache, out, softmax_lse, options, None, q.shape[1], keys, num_splits
    )
    return out, softmax_lse


def rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    *,
    out: Tensor | None = None,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotary position embedding; see `Backend.rotary`."""
    _runtime_of(x)
    if out is None:
        out = empty_like(x)
    rows = (seqlen_offsets, cu_seqlens, max_seqlen or 0, interleaved, conjugate)
    check.rotary(x, out, cos, sin, *rows)
    _kernels_of("embedding").rotate(x, out, cos, sin, *rows)
    return out
