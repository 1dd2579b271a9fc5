"""Forward and the cache function by our Triton kernels: plans, on the memory of tensors."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

from flash_attn.backends.flaggems import runtime, tiles
from flash_attn.backends.flaggems.kernels.s_dmask import write_s_dmask
from flash_attn.backends.flaggems.launch import launch
from flash_attn.backends.flaggems.plan import LEAST_DESCRIBED_KEYS, Call, Plan, plan_forward
from flash_attn.backends.interface import Options, Sequences


class Keys(NamedTuple):
    """Where the keys of each sequence are; see `Sequences` and `Backend.kvcache`.

    Attributes:
        seqlen: rows of each sequence, of the longest when lengths vary.
        seqlen_new: keys beyond those that seqused counts.
    """

    seqlen: int
    cu_seqlens: Tensor | None = None
    seqused: Tensor | None = None
    leftpad: Tensor | None = None
    batch_idx: Tensor | None = None
    block_table: Tensor | None = None
    seqlen_new: int = 0


def cache_capacity(k: Tensor, block_table: Tensor | None) -> int:
    """Rows that a sequence has in a cache. Pages that are not there have none."""
    if block_table is None:
        return k.shape[1]
    return block_table.shape[1] * k.shape[1] if k.shape[0] > 0 else 0


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
    """Writes out, softmax_lse and s_dmask."""
    if sequences is None:
        attend(q, k, v, out, softmax_lse, options, None, q.shape[1], Keys(k.shape[1]), 0, s_dmask)
        return
    seqlen_k = sequences.max_seqlen_k
    if sequences.block_table is None:
        # The kernel is chosen by what the caller says alone: not by how full the batch is.
        seqlen_k = min(seqlen_k, max(k.shape[0], LEAST_DESCRIBED_KEYS))
    else:
        capacity = cache_capacity(k, sequences.block_table)
        seqlen_k = capacity if sequences.seqused_k is not None else min(seqlen_k, capacity)
    keys = Keys(
        seqlen_k,
        sequences.cu_seqlens_k,
        sequences.seqused_k,
        sequences.leftpad_k,
        None,
        sequences.block_table,
    )
    seqlen_q = min(sequences.max_seqlen_q, q.shape[0])
    cu_seqlens_q, num_splits = sequences.cu_seqlens_q, sequences.num_splits
    attend(q, k, v, out, softmax_lse, options, cu_seqlens_q, seqlen_q, keys, num_splits, s_dmask)


def attend(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    options: Options,
    cu_seqlens_q: Tensor | None,
    seqlen_q: int,
    keys: Keys,
    num_splits: int = 0,
    s_dmask: Tensor | None = None,
) -> None:
    """Attention of the rows of q over `keys`; writes out, softmax_lse and s_dmask."""
    batch = q.shape[0] if cu_seqlens_q is None else cu_seqlens_q.shape[0] - 1
    if batch == 0 or seqlen_q == 0:
        _fill_without_queries(out, softmax_lse, options)
        return
    seqlen_k, cu_seqlens_k, seqused, leftpad, batch_idx, block_table, seqlen_new = keys
    scale, causal, left, right, softcap, slopes, s_aux, dropout_p, rng_state, _ = options
    where, device = runtime.current(), q.device
    plan = plan_forward(
        Call(
            where.capability(device),
            where.num_units(device),
            q.dtype,
            q.shape,
            k.shape,
            q.stride(),
            k.stride(),
            v.stride(),
            out.stride(),
            softmax_lse.stride(),
            (q.data_ptr() | k.data_ptr() | v.data_ptr() | out.data_ptr()) % 16 == 0,
            batch,
            seqlen_q,
            seqlen_k,
            seqlen_new,
            num_splits,
            scale,
            causal,
            left,
            right,
            softcap,
            dropout_p,
            None if slopes is None else slopes.stride(),
            None if s_aux is None else s_aux.stride(0),
            None if block_table is None else block_table.stride(0),
            cu_seqlens_q is not None,
            cu_seqlens_k is not None,
            seqused is not None,
            leftpad is not None,
            batch_idx is not None,
        )
    )
    partial_out = partial_lse = None
    if plan.combine is not None:
        partial_out = softmax_lse.new_empty((plan.num_splits, plan.rows, q.shape[-1]))
        partial_lse = softmax_lse.new_empty((plan.num_splits, plan.rows))
    optional = (
        *(cu_seqlens_q, cu_seqlens_k, seqused, leftpad, batch_idx, block_table),
        *(slopes, s_aux, rng_state),
    )
    if plan.hopper:  # neither parts nor pages
        plan.attend(device, q, k, v, out, softmax_lse, *optional[:5], *optional[6:])
    else:
        plan.attend(device, q, k, v, out, softmax_lse, partial_out, partial_lse, *optional)
    if plan.combine is not None:
        plan.combine(device, partial_out, partial_lse, out, softmax_lse, cu_seqlens_q, s_aux)
    if s_dmask is not None:
        _write_s_dmask(q, k, s_dmask, optional, plan)


def _write_s_dmask(q: Tensor, k: Tensor, s_dmask: Tensor, optional: tuple, plan: Plan) -> None:
    """S_dmask, by arguments that are nearly those of the forward kernel."""
    tile = tiles.S_DMASK
    batch, num_heads, num_rows, num_columns = s_dmask.shape
    num_tiles = -(-num_rows // tile.block_m)
    before, behind = plan.s_dmask_numbers
    launch(
        write_s_dmask,
        batch * num_heads * num_tiles,
        q.device,
        (
            *(q, k, s_dmask, *optional),
            *(*before, *s_dmask.stride()[:3], *behind),
            *(num_tiles, num_rows, num_columns),
        ),
        plan.s_dmask_constants | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
        tile,
    )


def _fill_without_queries(out: Tensor, softmax_lse: Tensor, options: Options) -> None:
    """What there is when no row belongs to a sequence."""
    out.zero_()
    if options.s_aux is None:
        softmax_lse.fill_(float("inf"))
    else:
        softmax_lse.copy_(options.s_aux[:, None].expand(softmax_lse.shape))
