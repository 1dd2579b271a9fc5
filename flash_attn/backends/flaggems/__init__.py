"""The FlagGems backend: Triton kernels for every accelerator that FlagGems reaches.

The core checks the arguments, with the texts of the other backends; policy.py says whether an
operator of FlagGems or a kernel of ours serves a request; attention.py, backward.py and rotary.py
launch our kernels. FlagGems and Triton are imported by the first call.
"""

from __future__ import annotations

from torch import Tensor, empty_like

from flash_attn.backends.flaggems import runtime
from flash_attn.backends.interface import Options, Sequences


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
    runtime.current()
    from flash_attn.backends.flaggems import attention

    if out is None:
        out = empty_like(q)
    softmax_lse = attention.row_vector(q, sequences is not None)
    s_dmask = None
    if return_s_dmask and options.dropout_p > 0:
        if sequences is None:
            shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        else:
            batch = sequences.cu_seqlens_q.shape[0] - 1
            shape = (batch, q.shape[1], sequences.max_seqlen_q, sequences.max_seqlen_k)
        s_dmask = q.new_empty(shape)
    attention.forward(q, k, v, out, softmax_lse, options, sequences, s_dmask)
    return out, softmax_lse if return_lse else None, s_dmask


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
    runtime.current()
    from flash_attn.backends.flaggems import gradients

    return gradients.backward(
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
    runtime.current()
    from flash_attn.backends.flaggems import attention, embedding

    if out is None:
        out = empty_like(q)
    softmax_lse = attention.row_vector(q, False)
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
    runtime.current()
    from flash_attn.backends.flaggems import embedding

    if out is None:
        out = empty_like(x)
    embedding.rotate(
        x, out, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen or 0, interleaved, conjugate
    )
    return out
