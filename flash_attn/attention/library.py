"""The attention ops, for tensors on every device.

Four have the names, arguments and results of FlashAttention-2's; arguments of our own come last.
`attention_backward` is ours: the gradients as new tensors, for dense and variable length.

The kernels are plain functions of real tensors. `internals` calls them directly when nothing needs
to see the op.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.attention.arguments import draw_rng_state, is_deterministic, maybe_contiguous
from flash_attn.attention.registry import define
from flash_attn.backends import Options, Sequences, backend_for
from flash_attn.backends.interface import MIN_DROPOUT_P

NO_SECOND_DERIVATIVE = "flash_attn: gradients of gradients are not supported"


def _dropout(dropout_p: float, rng_state: Tensor | None, device: torch.device):
    """Probability and random state of a call from outside, which may leave the latter to us."""
    if 0 <= dropout_p < MIN_DROPOUT_P:
        return 0.0, None
    if rng_state is None and dropout_p < 1:
        rng_state = draw_rng_state(device)
    return dropout_p, rng_state


def _four_results(q: Tensor, results, rng_state: Tensor | None, drawn: bool):
    """FlashAttention-2's results: none is None, and none is an argument."""
    out, softmax_lse, s_dmask = results
    if s_dmask is None:
        s_dmask = q.new_empty((0,))
    if rng_state is None:
        rng_state = torch.zeros((2,), dtype=torch.int64, device=q.device)
    elif not drawn:
        rng_state = rng_state.clone()
    return out, softmax_lse, s_dmask, rng_state


@define(
    "_flash_attn_forward(Tensor q, Tensor k, Tensor v, float dropout_p, float softmax_scale, "
    "bool causal, SymInt window_size_left, SymInt window_size_right, float softcap, "
    "Tensor? alibi_slopes, bool return_softmax, Tensor? s_aux=None, Tensor? rng_state=None, "
    "bool deterministic=False) -> (Tensor, Tensor, Tensor, Tensor)",
    differentiable=True,
)
def forward(
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
    s_aux=None,
    rng_state=None,
    deterministic=False,  # for the gradient
):
    q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
    given = rng_state
    dropout_p, rng_state = _dropout(dropout_p, rng_state, q.device)
    options = Options(
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
    )
    results = backend_for(q).forward(q, k, v, options, None, return_softmax)
    return _four_results(q, results, rng_state, given is None)


@define(
    "_flash_attn_varlen_forward(Tensor q, Tensor k, Tensor v, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
    "float softmax_scale, bool causal, SymInt window_size_left=-1, SymInt window_size_right=-1, "
    "float softcap=0., Tensor? alibi_slopes=None, bool return_softmax=False, "
    "Tensor? block_table=None, Tensor? leftpad_k=None, Tensor? seqused_k=None, "
    "bool zero_tensors=False, SymInt num_splits=0, Tensor? s_aux=None, Tensor? rng_state=None, "
    "bool deterministic=False) -> (Tensor, Tensor, Tensor, Tensor)",
    differentiable=True,
)
def varlen_forward(
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
    block_table=None,
    leftpad_k=None,
    seqused_k=None,
    zero_tensors=False,  # every element is written anyway
    num_splits=0,
    s_aux=None,
    rng_state=None,
    deterministic=False,  # for the gradient
):
    q, k, v = maybe_contiguous(q), maybe_contiguous(k), maybe_contiguous(v)
    given = rng_state
    dropout_p, rng_state = _dropout(dropout_p, rng_state, q.device)
    options = Options(
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
    )
    sequences = Sequences(
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k,
        leftpad_k,
        block_table,
        num_splits,
    )
    results = backend_for(q).forward(q, k, v, options, sequences, return_softmax)
    return _four_results(q, results, rng_state, given is None)


def refuse_cache(block_table: Tensor | None, leftpad_k: Tensor | None) -> None:
    """Raises when a backward pass is asked for keys in a cache."""
    if block_table is not None or leftpad_k is not None:
        raise RuntimeError(
            "The backward pass does not support a paged or left-padded key/value cache "
            "(block_table, leftpad_k)"
        )


def run_backward(
    dout, q, k, v, out, softmax_lse, dq, dk, dv, options, sequences, dsoftmax_lse, ds_aux
):
    """The backward call that all kernels below have in common; returns softmax_d."""
    if options.dropout_p < MIN_DROPOUT_P and options.dropout_p >= 0:
        options = options._replace(dropout_p=0.0, rng_state=None)
    options = options._replace(deterministic=is_deterministic(options.deterministic))
    if options.s_aux is not None and ds_aux is None:
        ds_aux = torch.empty_like(options.s_aux)
    return backend_for(q).backward(
        maybe_contiguous(dout),
        maybe_contiguous(q),
        maybe_contiguous(k),
        maybe_contiguous(v),
        maybe_contiguous(out),
        softmax_lse,
        torch.empty_like(q) if dq is None else dq,
        torch.empty_like(k) if dk is None else dk,
        torch.empty_like(v) if dv is None else dv,
        options,
        sequences,
        dsoftmax_lse,
        ds_aux,
    )


@define(
    "_flash_attn_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, float dropout_p, "
    "float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
    "float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None, "
    "Tensor? s_aux=None, Tensor? dsoftmax_lse=None, Tensor(d!)? ds_aux=None) -> Tensor"
)
def backward(
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
    rng_state=None,
    s_aux=None,
    dsoftmax_lse=None,
    ds_aux=None,
):
    options = Options(
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
        deterministic,
    )
    return run_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, options, None, dsoftmax_lse, ds_aux
    )


@define(
    "_flash_attn_varlen_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor(a!)? dq, Tensor(b!)? dk, Tensor(c!)? dv, Tensor cu_seqlens_q, "
    "Tensor cu_seqlens_k, SymInt max_seqlen_q, SymInt max_seqlen_k, float dropout_p, "
    "float softmax_scale, bool causal, SymInt window_size_left, SymInt window_size_right, "
    "float softcap, Tensor? alibi_slopes, bool deterministic, Tensor? rng_state=None, "
    "bool zero_tensors=False, Tensor? s_aux=None, Tensor? dsoftmax_lse=None, "
    "Tensor(d!)? ds_aux=None, Tensor? seqused_k=None) -> Tensor"
)
def varlen_backward(
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
    rng_state=None,
    zero_tensors=False,
    s_aux=None,
    dsoftmax_lse=None,
    ds_aux=None,
    seqused_k=None,
):
    options = Options(
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
        deterministic,
    )
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k)
    return run_backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, options, sequences, dsoftmax_lse, ds_aux
    )


@define(
    "attention_backward(Tensor dout, Tensor q, Tensor k, Tensor v, Tensor out, "
    "Tensor softmax_lse, Tensor? dsoftmax_lse, float dropout_p, float softmax_scale, bool causal, "
    "SymInt window_size_left, SymInt window_size_right, float softcap, Tensor? alibi_slopes, "
    "Tensor? s_aux, Tensor? rng_state, Tensor? cu_seqlens_q, Tensor? cu_seqlens_k, "
    "SymInt max_seqlen_q, SymInt max_seqlen_k, Tensor? seqused_k, bool deterministic) "
    "-> (Tensor, Tensor, Tensor, Tensor)"
)
def attention_backward(
    dout,
    q,
    k,
    v,
    out,
    softmax_lse,
    dsoftmax_lse,
    dropout_p,
    softmax_scale,
    causal,
    window_size_left,
    window_size_right,
    softcap,
    alibi_slopes,
    s_aux,
    rng_state,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    seqused_k,
    deterministic,
):
    options = Options(
        softmax_scale,
        causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
        deterministic,
    )
    sequences = None
    if cu_seqlens_q is not None:
        sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, seqused_k)
    dq, dk, dv = torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)
    ds_aux = q.new_empty((0,)) if s_aux is None else torch.empty_like(s_aux)
    run_backward(
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
        None if s_aux is None else ds_aux,
    )
    return dq, dk, dv, ds_aux
