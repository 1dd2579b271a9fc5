"""The core's checks of a call: what every backend refuses, in the same words."""

from __future__ import annotations

import functools

from torch import Tensor

from flash_attn import _core
from flash_attn.backends.interface import Options, Sequences

# For the arguments of the core that only its own kernels use: threads, stream, workspace.
_NO_LAUNCH = (0, 0, 0, 0)


@functools.cache
def _check(operation: str):
    return _core._function(f"{operation}_check")


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    options: Options,
    sequences: Sequences | None,
    s_dmask: Tensor | None,
) -> None:
    """Raises RuntimeError or ConstraintError for a wrong forward call."""
    _check("forward")(
        q,
        k,
        v,
        out,
        softmax_lse,
        options.softmax_scale,
        options.window_left,
        options.window_right,
        options.causal,
        *_NO_LAUNCH,
        options.softcap,
        options.alibi_slopes,
        options.s_aux,
        options.dropout_p,
        options.rng_state,
        s_dmask,
        *(sequences or ()),
    )


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
    softmax_d: Tensor,
    options: Options,
    sequences: Sequences | None,
    dsoftmax_lse: Tensor | None,
    ds_aux: Tensor | None,
) -> None:
    """Raises RuntimeError or ConstraintError for a wrong backward call."""
    _check("backward")(
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
        options.softmax_scale,
        options.window_left,
        options.window_right,
        options.causal,
        options.deterministic,
        *_NO_LAUNCH,
        options.softcap,
        options.alibi_slopes,
        options.s_aux,
        ds_aux,
        dsoftmax_lse,
        options.dropout_p,
        options.rng_state,
        *(sequences or ())[:5],
    )


def kvcache(
    q: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    options: Options,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    cache_seqlens: Tensor | None,
    cache_batch_idx: Tensor | None,
    cache_leftpad: Tensor | None,
    block_table: Tensor | None,
    num_splits: int,
) -> None:
    """Raises RuntimeError or ConstraintError for a wrong call of the cache function."""
    _check("kvcache")(
        q,
        k_cache,
        v_cache,
        out,
        softmax_lse,
        options.softmax_scale,
        options.window_left,
        options.window_right,
        options.causal,
        *_NO_LAUNCH,
        cache_seqlens,
        k,
        v,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        options.softcap,
        options.alibi_slopes,
        options.s_aux,
        num_splits,
    )


def rotary(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor,
    cu_seqlens: Tensor | None,
    max_seqlen: int,
    interleaved: bool,
    conjugate: bool,
) -> None:
    """Raises RuntimeError for a wrong call of rotary."""
    by_sequence = isinstance(seqlen_offsets, Tensor)
    _check("rotary")(
        x,
        out,
        cos,
        sin,
        0 if by_sequence else seqlen_offsets,
        interleaved,
        conjugate,
        0,
        0,
        seqlen_offsets if by_sequence else None,
        cu_seqlens,
        max_seqlen,
    )
