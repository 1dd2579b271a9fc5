"""Forward and the cache function by our Triton kernels: what to launch, on which memory."""

from __future__ import annotations

import functools
from typing import NamedTuple

from torch import Tensor

from flash_attn.backends.flaggems import runtime, tiles
from flash_attn.backends.flaggems.kernels.combine import combine_parts
from flash_attn.backends.flaggems.kernels.forward import attention_forward
from flash_attn.backends.flaggems.kernels.s_dmask import write_s_dmask
from flash_attn.backends.flaggems.launch import (
    LOG2E,
    check_lengths,
    dropout_numbers,
    launch,
    operand_unit,
    pieces,
    strides,
    window,
)
from flash_attn.backends.interface import Options, Sequences

MAX_SPLITS = 128


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
    max_seqlen_k = sequences.max_seqlen_k
    if sequences.block_table is None:
        seqlen_k = min(max_seqlen_k, k.shape[0])
    else:
        seqlen_k = capacity = cache_capacity(k, sequences.block_table)
        if sequences.seqused_k is None:
            seqlen_k = min(max_seqlen_k, capacity)
    keys = Keys(
        seqlen_k,
        sequences.cu_seqlens_k,
        sequences.seqused_k,
        sequences.leftpad_k,
        None,
        sequences.block_table,
    )
    seqlen_q = min(sequences.max_seqlen_q, q.shape[0])
    cu_seqlens_q = sequences.cu_seqlens_q
    num_splits = sequences.num_splits
    attend(q, k, v, out, softmax_lse, options, cu_seqlens_q, seqlen_q, keys, num_splits, s_dmask)


@functools.lru_cache(maxsize=1024)
def plan_splits(num_items: int, num_keys: int, num_units: int, block_n: int) -> int:
    """The number of parts into which keys are split, as src/attention/split.cpp chooses it.

    The time of the longest unit, in keys, is waves * (keys of a part + cost); the fewest parts that
    reach the least of it.

    Arguments:
        num_items: programs that there are without splitting.
        num_units: how many of them the device runs at once.
    """
    cost = 128
    most = max(1, min(-(-num_keys // block_n), num_units, MAX_SPLITS))
    best, best_time = 1, None
    for splits in range(1, most + 1):
        waves = -(-num_items * splits // num_units)
        keys = -(-num_keys // (splits * block_n)) * block_n
        time = waves * (keys + (cost if splits > 1 else 0))
        if best_time is None or time < best_time:
            best, best_time = splits, time
    return best


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
    check_lengths(seqlen_q, keys.seqlen)
    variable_length = cu_seqlens_q is not None
    num_heads, head_dim = q.shape[-2:]
    num_heads_k = k.shape[-2]
    group_size = num_heads // num_heads_k
    total_q = q.shape[0] if variable_length else 0
    batch = cu_seqlens_q.shape[0] - 1 if variable_length else q.shape[0]
    if batch == 0 or seqlen_q == 0:
        _fill_without_queries(out, softmax_lse, options)
        return
    where = runtime.current()
    capability = where.capability(q.device)
    left, right = window(options, seqlen_q, keys.seqlen)
    has_dropout = options.dropout_p > 0
    paged = keys.block_table is not None
    d0, d1 = pieces(head_dim)

    # Rows of a key head's query heads side by side, where they fit in a few tiles.
    rows = seqlen_q * group_size
    few = rows <= 64 and not has_dropout
    packed = few and group_size > 1
    if few:
        tile = tiles.few_rows(capability, d0 + d1, rows)
    else:
        rows = seqlen_q
        tile = tiles.forward(capability, d0 + d1, has_dropout)
    heads = num_heads_k if packed else num_heads
    num_tiles = -(-rows // tile.block_m)
    if has_dropout or not few:
        splits = 1
    elif num_splits > 0:
        splits = min(num_splits, MAX_SPLITS)
    else:
        visible = keys.seqlen
        if left >= 0 and right >= 0:
            visible = min(visible, seqlen_q + left + right)
        units = 2 * where.num_units(q.device)
        splits = plan_splits(batch * heads * num_tiles, visible, units, tile.block_n)
    partial_out = partial_lse = softmax_lse
    if splits > 1:
        num_rows = batch * heads * rows
        partial_out = softmax_lse.new_empty((splits, num_rows, head_dim))
        partial_lse = softmax_lse.new_empty((splits, num_rows))

    unit = operand_unit(q, k, v, out)
    lse_strides = softmax_lse.stride()
    lse_batch_stride, lse_head_stride = (0, lse_strides[0]) if variable_length else lse_strides[:2]
    slopes, s_aux = options.alibi_slopes, options.s_aux
    slopes_batch_stride = slopes_head_stride = 0
    if slopes is not None:
        slopes_head_stride = slopes.stride(-1)
        slopes_batch_stride = slopes.stride(0) if slopes.dim() == 2 else 0
    softcap, scale = options.softcap, options.softmax_scale
    threshold, dropout_scale = dropout_numbers(options.dropout_p)

    def given(x: Tensor | None) -> Tensor:
        return softmax_lse if x is None else x

    tensors = (
        given(cu_seqlens_q),
        given(keys.cu_seqlens),
        given(keys.seqused),
        given(keys.leftpad),
        given(keys.batch_idx),
        given(keys.block_table),
        given(slopes),
        given(s_aux),
        given(options.rng_state),
    )
    numbers = (
        *strides(q, unit),
        *strides(k, unit),
        *strides(v, unit),
        *strides(out, unit),
        lse_batch_stride,
        lse_head_stride,
        keys.block_table.stride(0) if paged else 0,
        slopes_batch_stride,
        slopes_head_stride,
        s_aux.stride(0) if s_aux is not None else 0,
        batch,
        num_heads,
        group_size,
        seqlen_q,
        keys.seqlen,
        keys.seqlen_new,
        total_q,
        k.shape[0] if keys.cu_seqlens is not None else 0,
        k.shape[1] if paged else 1,
        k.shape[0] if paged else 1,
        k.shape[0],
        num_tiles,
        splits,
        max(left, 0),
        max(right, 0),
        scale / softcap if softcap > 0 else scale * LOG2E,
        softcap * LOG2E,
        threshold,
        dropout_scale,
    )
    sequence_flags = {
        "VARLEN_Q": variable_length,
        "VARLEN_K": keys.cu_seqlens is not None,
        "HAS_SEQUSED": keys.seqused is not None,
        "HAS_LEFTPAD": keys.leftpad is not None,
        "HAS_BATCH_IDX": keys.batch_idx is not None,
        "PAGED": paged,
    }
    score_flags = {
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_SOFTCAP": softcap > 0,
        "HAS_ALIBI": slopes is not None,
    }
    head = {"HEAD_DIM": head_dim, "D0": d0, "D1": d1}
    launch(
        attention_forward,
        batch * heads * splits * num_tiles,
        q.device,
        (q, k, v, out, softmax_lse, partial_out, partial_lse, *tensors, *numbers),
        {
            "UNIT": unit,
            **sequence_flags,
            "PACKED": packed,
            "SPLIT": splits > 1,
            **score_flags,
            "HAS_SINK": s_aux is not None,
            "HAS_DROPOUT": has_dropout,
            "TRANSFORMED": softcap > 0 or slopes is not None or not scale > 0,
            **head,
            "BLOCK_M": tile.block_m,
            "BLOCK_N": tile.block_n,
        },
        tile,
    )
    if splits > 1:
        _, out_row_stride, out_head_stride = strides(out)
        launch(
            combine_parts,
            batch * heads * rows,
            q.device,
            (
                partial_out,
                partial_lse,
                out,
                softmax_lse,
                given(cu_seqlens_q),
                given(s_aux),
                *(strides(out)[0], out_row_stride, out_head_stride),
                *(lse_batch_stride, lse_head_stride),
                s_aux.stride(0) if s_aux is not None else 0,
                *(batch, num_heads, group_size, seqlen_q, total_q, splits),
            ),
            {
                "VARLEN_Q": variable_length,
                "PACKED": packed,
                "HAS_SINK": s_aux is not None,
                "HEAD_DIM": head_dim,
                "BLOCK_D": d0 if d1 == 0 else 2 * d0,
                "MAX_SPLITS": MAX_SPLITS,
            },
            tiles.COMBINE,
        )
    if s_dmask is not None:
        tile = tiles.S_DMASK
        num_tiles = -(-s_dmask.shape[2] // tile.block_m)
        launch(
            write_s_dmask,
            batch * num_heads * num_tiles,
            q.device,
            (
                *(q, k, s_dmask, *tensors, *numbers[:6], *s_dmask.stride()[:3], *numbers[14:]),
                *(num_tiles, s_dmask.shape[2], s_dmask.shape[3]),
            ),
            {
                "UNIT": unit,
                **sequence_flags,
                **score_flags,
                **head,
                "BLOCK_M": tile.block_m,
                "BLOCK_N": tile.block_n,
            },
            tile,
        )


def _fill_without_queries(out: Tensor, softmax_lse: Tensor, options: Options) -> None:
    """What there is when no row belongs to a sequence."""
    out.zero_()
    if options.s_aux is None:
        softmax_lse.fill_(float("inf"))
    else:
        softmax_lse.copy_(options.s_aux[:, None].expand(softmax_lse.shape))
