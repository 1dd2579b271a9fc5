"""The backward pass: from tensors to the kernels of kernels/backward*.py, by plan_backward.py.

Everything is bitwise reproducible, whether that is asked for or not. Memory beyond the gradients:
two float32 a query row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.backends.flaggems import runtime
from flash_attn.backends.flaggems.launch import compile_together
from flash_attn.backends.flaggems.plan_backward import BackwardCall, plan_backward
from flash_attn.backends.interface import Options, Sequences


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
    sequences: Sequences | None,
    dsoftmax_lse: Tensor | None,
    ds_aux: Tensor | None,
    softmax_d: Tensor | None = None,
) -> Tensor:
    """Attention backward; see `Backend.backward`. softmax_d is written and returned."""
    device = q.device
    if softmax_d is None:
        softmax_d = torch.empty(softmax_lse.shape, dtype=torch.float32, device=device)
    scale, causal, left, right, softcap, slopes, s_aux, dropout_p, rng_state, _ = options
    cu_seqlens_q = cu_seqlens_k = seqused_k = None
    batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
    if sequences is not None:
        cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, seqused_k = sequences[:5]
        batch = cu_seqlens_q.shape[0] - 1
    plan = plan_backward(
        BackwardCall(
            runtime.current().capability(device),
            q.dtype,
            q.shape,
            k.shape,
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            dout.stride(),
            dq.stride(),
            dk.stride(),
            dv.stride(),
            softmax_lse.stride(),
            None if dsoftmax_lse is None else dsoftmax_lse.stride(),
            softmax_d.stride(),
            (q.data_ptr() | k.data_ptr() | v.data_ptr() | dout.data_ptr()) % 16 == 0,
            batch,
            seqlen_q,
            seqlen_k,
            scale,
            causal,
            left,
            right,
            softcap,
            dropout_p,
            None if slopes is None else slopes.stride(),
            None if ds_aux is None else (s_aux.stride(0), ds_aux.stride(0)),
            sequences is not None,
            seqused_k is not None,
        )
    )
    workspace = torch.empty(plan.workspace_shape, dtype=torch.float32, device=device)
    optional = cu_seqlens_q, cu_seqlens_k, seqused_k, slopes, rng_state
    of_dkdv = q, k, v, dout, workspace, dk, dv, *optional
    of_dq = q, k, v, dout, workspace, dq, *optional
    compile_together(device, (plan.dkdv, of_dkdv), (plan.dq, of_dq))
    plan.prepare(
        device,
        *(out, dout, softmax_lse, out if dsoftmax_lse is None else dsoftmax_lse),
        *(softmax_d, workspace, dq, dk, dv),
        *((out, out) if sequences is None else (cu_seqlens_q, cu_seqlens_k)),
    )
    plan.dkdv(device, *of_dkdv)
    plan.dq(device, *of_dq)
    if plan.sink is not None:
        plan.sink(device, s_aux, ds_aux, softmax_lse, softmax_d)
    return softmax_d
