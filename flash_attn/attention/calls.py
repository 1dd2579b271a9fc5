"""One forward and one backward call: to the backend, or through the op when something sees it."""

from __future__ import annotations

import torch
from torch import Tensor
from torch._C import _are_functorch_transforms_active

from flash_attn.attention import library
from flash_attn.attention.arguments import is_deterministic, is_plain, needs_grad
from flash_attn.attention.gradients import transformable_forward, transformable_varlen_forward
from flash_attn.backends import Options, Sequences, backend_for


def run_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sequences: Sequences | None,
    return_s_dmask: bool,
    return_lse: bool = True,
    direct: bool = False,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Returns (out, softmax_lse, s_dmask).

    Without dropout s_dmask is None or empty; without return_lse softmax_lse may be None. `direct`:
    what `is_direct` says of the tensors.
    """
    if direct or is_plain(q, k, v):
        return backend_for(q).forward(q, k, v, options, sequences, return_s_dmask, None, return_lse)
    transformed = _are_functorch_transforms_active() and needs_grad(q, k, v, options.s_aux)
    if sequences is None:
        call = torch.ops.flash_attn._flash_attn_forward
        if transformed:
            call = transformable_forward
        return call(
            q,
            k,
            v,
            options.dropout_p,
            options.softmax_scale,
            options.causal,
            options.window_left,
            options.window_right,
            options.softcap,
            options.alibi_slopes,
            return_s_dmask,
            options.s_aux,
            options.rng_state,
            options.deterministic,
        )[:3]
    call = torch.ops.flash_attn._flash_attn_varlen_forward
    if transformed:
        call = transformable_varlen_forward
    return call(
        q,
        k,
        v,
        sequences.cu_seqlens_q,
        sequences.cu_seqlens_k,
        sequences.max_seqlen_q,
        sequences.max_seqlen_k,
        options.dropout_p,
        options.softmax_scale,
        options.causal,
        options.window_left,
        options.window_right,
        options.softcap,
        options.alibi_slopes,
        return_s_dmask,
        sequences.block_table,
        sequences.leftpad_k,
        sequences.seqused_k,
        False,
        sequences.num_splits,
        options.s_aux,
        options.rng_state,
        options.deterministic,
    )[:3]


def run_backward(
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
    sequences: Sequences | None,
    dsoftmax_lse: Tensor | None,
    ds_aux: Tensor | None,
) -> None:
    """Writes dq, dk, dv and ds_aux."""
    if sequences is not None:
        library.refuse_cache(sequences.block_table, sequences.leftpad_k)
    if is_plain(dout, q, k):
        if is_deterministic(False) and not options.deterministic:
            options = options._replace(deterministic=True)
        backend_for(q).backward(
            dout, q, k, v, out, softmax_lse, dq, dk, dv, options, sequences, dsoftmax_lse, ds_aux
        )
        return
    leading = (dout, q, k, v, out, softmax_lse, dq, dk, dv)
    arguments = (
        options.dropout_p,
        options.softmax_scale,
        options.causal,
        options.window_left,
        options.window_right,
        options.softcap,
        options.alibi_slopes,
        options.deterministic,
        options.rng_state,
    )
    gradients = (options.s_aux, dsoftmax_lse, ds_aux)
    if sequences is None:
        torch.ops.flash_attn._flash_attn_backward(*leading, *arguments, *gradients)
        return
    torch.ops.flash_attn._flash_attn_varlen_backward(
        *leading, *sequences[:4], *arguments, False, *gradients, sequences.seqused_k
    )
