"""The functions below the public ones that other libraries call, as in FlashAttention-2.

They make inputs contiguous in the last dimension and otherwise take them as they are. Arguments of
our own come last.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.attention import library
from flash_attn.attention.arguments import is_plain, needs_grad


def round_multiple(x: int, m: int) -> int:
    """The smallest multiple of m from x on."""
    return (x + m - 1) // m * m


def _get_block_size_n(device, head_dim: int, is_dropout: bool, is_causal: bool) -> int:
    """Columns of S_dmask that share a row maximum: all of them."""
    return 1 << 30


def _flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    return_softmax: bool,
    s_aux: Tensor | None = None,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention forward.

    Arguments:
        q: (b, sq, h, d). k, v: (b, sk, hk, d).
        return_softmax: fill S_dmask (with dropout only).
        s_aux: attention sinks, (h,), float32.
        rng_state: seed and offset of the dropout function, (2,), int64; drawn when None.
        The others are those of `flash_attn_func`.

    Returns:
        out (as q), softmax_lse (b, h, sq) float32, S_dmask (b, h, sq, sk) or (0,), rng_state (2,)
        int64.
    """
    call = library.forward
    if not is_plain(q, k, v) or needs_grad(q, k, v, s_aux):
        call = torch.ops.flash_attn._flash_attn_forward
    return call(
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
        s_aux,
        rng_state,
    )


def _flash_attn_varlen_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int = -1,
    window_size_right: int = -1,
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    return_softmax: bool = False,
    block_table: Tensor | None = None,
    leftpad_k: Tensor | None = None,
    seqused_k: Tensor | None = None,
    zero_tensors: bool = False,
    num_splits: int = 0,
    s_aux: Tensor | None = None,
    rng_state: Tensor | None = None,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Attention forward for sequences of different lengths.

    Arguments:
        q: (tq, h, d). k, v: (tk, hk, d), or (pages, page_size, hk, d) with block_table.
        cu_seqlens_q, cu_seqlens_k: (b + 1,), int32.
        max_seqlen_q, max_seqlen_k: the longest lengths.
        block_table: pages of each sequence, (b, pages), int32.
        leftpad_k: rows before the first key of each sequence, (b,), int32.
        seqused_k: keys in use of each sequence, (b,), int32.
        zero_tensors: accepted; every element of every result is written in any case.
        num_splits: parts into which the keys are split; 0 chooses.
        The others are those of `_flash_attn_forward`.

    Returns:
        out (as q), softmax_lse (h, tq) float32, S_dmask (b, h, max_seqlen_q, max_seqlen_k) or (0,),
        rng_state (2,) int64.
    """
    call = library.varlen_forward
    if not is_plain(q, k, v) or needs_grad(q, k, v, s_aux):
        call = torch.ops.flash_attn._flash_attn_varlen_forward
    return call(
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
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        return_softmax,
        block_table,
        leftpad_k,
        seqused_k,
        zero_tensors,
        num_splits,
        s_aux,
        rng_state,
    )


def _flash_attn_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    s_aux: Tensor | None = None,
    dsoftmax_lse: Tensor | None = None,
    ds_aux: Tensor | None = None,
) -> Tensor:
    """Attention backward: writes dq, dk, dv (those that are given) whole.

    Arguments:
        dout, out: as q. softmax_lse: as `_flash_attn_forward` returned it.
        dq, dk, dv: as q, k, v, with a contiguous last dimension, or None.
        rng_state: as the forward function returned it; needed with dropout.
        dsoftmax_lse: gradient of softmax_lse, or None for zero.
        ds_aux: (h,), float32; receives the gradient of s_aux.

    Returns:
        softmax_d: row sums of dout * out, less dsoftmax_lse; (b, h, sq), float32.
    """
    call = library.backward
    if not is_plain(dout, q, k):
        call = torch.ops.flash_attn._flash_attn_backward
    return call(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
        s_aux,
        dsoftmax_lse,
        ds_aux,
    )


def _flash_attn_varlen_backward(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float,
    softmax_scale: float,
    causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    rng_state: Tensor | None = None,
    zero_tensors: bool = False,
    s_aux: Tensor | None = None,
    dsoftmax_lse: Tensor | None = None,
    ds_aux: Tensor | None = None,
    seqused_k: Tensor | None = None,
) -> Tensor:
    """Attention backward for sequences of different lengths; see `_flash_attn_backward`.

    Gradients of rows that belong to no sequence are 0. Returns softmax_d, (h, tq), float32.
    """
    call = library.varlen_backward
    if not is_plain(dout, q, k):
        call = torch.ops.flash_attn._flash_attn_varlen_backward
    return call(
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        deterministic,
        rng_state,
        zero_tensors,
        s_aux,
        dsoftmax_lse,
        ds_aux,
        seqused_k,
    )
