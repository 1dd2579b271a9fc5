"""Gradients in eager mode, as `torch.autograd.Function`s.

`attention`, `attention_kvpacked` and `attention_qkvpacked` record calls of the public functions.
Those of packed tensors exist for their backward: it writes all gradients into one tensor. The
classes below are FlashAttention-2's, for libraries that apply them: they take the arguments of
the class of the same name, in its order, and `s_aux`.
"""

from __future__ import annotations

import functools

import torch
from torch import empty_like, is_grad_enabled

from flash_attn.attention import arguments
from flash_attn.attention.arguments import maybe_contiguous, unpack
from flash_attn.attention.calls import run_backward, run_forward
from flash_attn.attention.library import NO_SECOND_DERIVATIVE
from flash_attn.backends import chosen_in_block, use_backend


def _first_derivative(backward):
    """A backward whose results raise when they are differentiated: they would seem constant."""

    @functools.wraps(backward)
    def wrapper(ctx, *gradients):
        if not is_grad_enabled():
            return backward(ctx, *gradients)
        with torch.no_grad():
            results = backward(ctx, *gradients)
        refuse = torch._C._functions.DelayedError(NO_SECOND_DERIVATIVE.encode(), len(results))
        return refuse(*(x if x is None else x.requires_grad_() for x in results))

    return wrapper


def _forward(ctx, q, k, v, options, sequences, return_attn_probs, direct=False):
    out, softmax_lse, s_dmask = run_forward(
        q, k, v, options, sequences, return_attn_probs, True, direct
    )
    ctx.set_materialize_grads(False)
    ctx.backend = chosen_in_block()  # autograd computes gradients of a GPU in a thread of its own
    # Tensors are saved as such: a change in place is noticed, and saved-tensor hooks see them.
    tensors = ()
    _, _, _, _, _, alibi_slopes, s_aux, _, rng_state, _ = options
    if not (alibi_slopes is s_aux is rng_state is sequences is None):
        tensors = (alibi_slopes, s_aux, rng_state)
        options = options._replace(alibi_slopes=None, s_aux=None, rng_state=None)
        if sequences is not None:
            tensors += (sequences.cu_seqlens_q, sequences.cu_seqlens_k)
            sequences = sequences._replace(cu_seqlens_q=None, cu_seqlens_k=None)
    ctx.options, ctx.sequences = options, sequences
    ctx.save_for_backward(q, k, v, out, softmax_lse, *tensors)
    if not return_attn_probs:
        return out
    if s_dmask is None:
        s_dmask = q.new_empty((0,))
    ctx.mark_non_differentiable(s_dmask)
    return out, softmax_lse, s_dmask


def _backward(ctx, saved, dout, dsoftmax_lse, dq, dk, dv):
    """Writes dq, dk and dv, and returns the gradient of s_aux."""
    q, k, v, out, softmax_lse, *tensors = saved
    options, sequences = ctx.options, ctx.sequences
    ds_aux = None
    if tensors:
        alibi_slopes, s_aux, rng_state, *cu_seqlens = tensors
        options = options._replace(alibi_slopes=alibi_slopes, s_aux=s_aux, rng_state=rng_state)
        if cu_seqlens:
            sequences = sequences._replace(cu_seqlens_q=cu_seqlens[0], cu_seqlens_k=cu_seqlens[1])
        if s_aux is not None:
            ds_aux = empty_like(s_aux)
    if dout is None:  # only softmax_lse was used
        dout = torch.zeros_like(out)
    dout = maybe_contiguous(dout)
    call = (dout, q, k, v, out, softmax_lse, dq, dk, dv, options, sequences, dsoftmax_lse, ds_aux)
    if ctx.backend is None:
        run_backward(*call)
    else:
        with use_backend(ctx.backend):
            run_backward(*call)
    return ds_aux


def _backward_of_three(ctx, dout, dsoftmax_lse):
    """Gradients of q, k, v and s_aux."""
    saved = ctx.saved_tensors
    dq, dk, dv = empty_like(saved[0]), empty_like(saved[1]), empty_like(saved[2])
    return dq, dk, dv, _backward(ctx, saved, dout, dsoftmax_lse, dq, dk, dv)


def _backward_of_kv(ctx, dout, dsoftmax_lse):
    """Gradients of q, kv and s_aux."""
    saved = ctx.saved_tensors
    q, k = saved[:2]
    dq = empty_like(q)
    dkv = k.new_empty((*k.shape[:-2], 2, *k.shape[-2:]))
    return dq, dkv, _backward(ctx, saved, dout, dsoftmax_lse, dq, *dkv.unbind(-3))


def _backward_of_qkv(ctx, dout, dsoftmax_lse):
    """Gradients of qkv and s_aux."""
    saved = ctx.saved_tensors
    q = saved[0]
    dqkv = q.new_empty((*q.shape[:-2], 3, *q.shape[-2:]))
    return dqkv, _backward(ctx, saved, dout, dsoftmax_lse, *dqkv.unbind(-3))


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, s_aux, call):
        return _forward(ctx, q, k, v, *call)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        return *_backward_of_three(ctx, dout, dsoftmax_lse), None


class _AttentionKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, kv, s_aux, call):
        _, sequences, _, _ = call
        k, v = unpack(kv, "kv", sequences is not None)
        return _forward(ctx, q, k, v, *call)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        return *_backward_of_kv(ctx, dout, dsoftmax_lse), None


class _AttentionQKVPacked(torch.autograd.Function):
    @staticmethod
    def forward(ctx, qkv, s_aux, call):
        _, sequences, _, _ = call
        q, k, v = unpack(qkv, "qkv", sequences is not None)
        return _forward(ctx, q, k, v, *call)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        return *_backward_of_qkv(ctx, dout, dsoftmax_lse), None


def _lean(function):
    """`function.apply` without what takes the time of small calls, there and in the backward pass.

    There it is the look for function transforms, which the callers have had; in the backward pass
    the search for the function that the engine's `apply` shall call, which is `backward`.
    """
    function._backward_cls.apply = function.backward
    return super(torch.autograd.Function, function).apply


# Attention of (q, k, v), (q, kv) or (qkv,), then s_aux and (options, sequences, return_attn_probs,
# direct): s_aux once more than in the options, for its gradient; the rest as one argument, for each
# takes time of a small call. Returns what the public functions return.
attention = _lean(_Attention)
attention_kvpacked = _lean(_AttentionKVPacked)
attention_qkvpacked = _lean(_AttentionQKVPacked)


class FlashAttnFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        k,
        v,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled=True,
        s_aux=None,
    ):
        options = arguments.options(
            q,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            s_aux,
        )
        return _forward(ctx, q, k, v, options, None, return_softmax)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        dq, dk, dv, ds_aux = _backward_of_three(ctx, dout, dsoftmax_lse)
        return dq, dk, dv, *[None] * 9, ds_aux


class FlashAttnVarlenFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
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
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        block_table,
        is_grad_enabled=True,
        s_aux=None,
    ):
        options = arguments.options(
            q,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            s_aux,
        )
        sequences = arguments.sequences(
            q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table
        )
        return _forward(ctx, q, k, v, options, sequences, return_softmax)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        dq, dk, dv, ds_aux = _backward_of_three(ctx, dout, dsoftmax_lse)
        return dq, dk, dv, *[None] * 14, ds_aux


class FlashAttnKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        kv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled=True,
        s_aux=None,
    ):
        k, v = unpack(kv, "kv")
        options = arguments.options(
            q,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            s_aux,
        )
        return _forward(ctx, q, k, v, options, None, return_softmax)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        dq, dkv, ds_aux = _backward_of_kv(ctx, dout, dsoftmax_lse)
        return dq, dkv, *[None] * 9, ds_aux


class FlashAttnVarlenKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        q,
        kv,
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled=True,
        s_aux=None,
    ):
        k, v = unpack(kv, "kv", varlen=True)
        options = arguments.options(
            q,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            s_aux,
        )
        sequences = arguments.sequences(
            q, k, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k
        )
        return _forward(ctx, q, k, v, options, sequences, return_softmax)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        dq, dkv, ds_aux = _backward_of_kv(ctx, dout, dsoftmax_lse)
        return dq, dkv, *[None] * 13, ds_aux


class FlashAttnQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled=True,
        s_aux=None,
    ):
        q, k, v = unpack(qkv, "qkv")
        options = arguments.options(
            q,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            s_aux,
        )
        return _forward(ctx, q, k, v, options, None, return_softmax)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        dqkv, ds_aux = _backward_of_qkv(ctx, dout, dsoftmax_lse)
        return dqkv, *[None] * 9, ds_aux


class FlashAttnVarlenQKVPackedFunc(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx,
        qkv,
        cu_seqlens,
        max_seqlen,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        return_softmax,
        is_grad_enabled=True,
        s_aux=None,
    ):
        q, k, v = unpack(qkv, "qkv", varlen=True)
        options = arguments.options(
            q,
            dropout_p,
            softmax_scale,
            causal,
            window_size,
            softcap,
            alibi_slopes,
            deterministic,
            s_aux,
        )
        sequences = arguments.sequences(q, k, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
        return _forward(ctx, q, k, v, options, sequences, return_softmax)

    @staticmethod
    @_first_derivative
    def backward(ctx, dout, dsoftmax_lse=None, _=None):
        dqkv, ds_aux = _backward_of_qkv(ctx, dout, dsoftmax_lse)
        return dqkv, *[None] * 11, ds_aux
