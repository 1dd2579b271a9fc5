"""Rotary embedding and the append to a cache by our Triton kernels."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.backends.flaggems import tiles
from flash_attn.backends.flaggems.kernels.rotary import append_rows, rotate_rows
from flash_attn.backends.flaggems.launch import check_lengths, launch, operand_unit, strides


def _columns(head_dim: int, half: int) -> int:
    """Columns that move at once: a power of two, all pairs of the rotated part."""
    wanted = half if half > 0 else min(head_dim, 128)
    return max(16, 1 << (wanted - 1).bit_length())


def _rows(num_rows: int) -> int:
    return min(32, max(1, 1 << (num_rows - 1).bit_length()))


def rotate(
    x: Tensor,
    out: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int = 0,
    interleaved: bool = False,
    conjugate: bool = False,
    advances: bool = True,
) -> None:
    """Writes x to out, rotated; see `Backend.rotary`. Unless it `advances`, a sequence has one
    position."""
    variable_length = cu_seqlens is not None
    total = x.shape[0] if variable_length else 0
    batch = cu_seqlens.shape[0] - 1 if variable_length else x.shape[0]
    seqlen = min(max_seqlen, total) if variable_length else x.shape[1]
    num_heads, head_dim = x.shape[-2:]
    check_lengths(seqlen)
    half = cos.shape[1]
    in_place = out.data_ptr() == x.data_ptr()
    if batch == 0 or seqlen == 0 or half == 0:  # nothing rotates
        if not in_place:
            out.copy_(x)
        return
    rows = _rows(seqlen)
    num_tiles = -(-seqlen // rows)
    unit = operand_unit(x, out)
    by_sequence = isinstance(seqlen_offsets, Tensor)
    launch(
        rotate_rows,
        batch * num_heads * num_tiles,
        x.device,
        (
            x,
            out,
            cos,
            sin,
            seqlen_offsets if by_sequence else x,
            cu_seqlens if variable_length else x,
            *strides(x, unit),
            *strides(out, unit),
            *(cos.stride(0), sin.stride(0), batch, num_heads, seqlen, total, cos.shape[0]),
            0 if by_sequence else seqlen_offsets,
            num_tiles,
        ),
        {
            "UNIT": unit,
            "VARLEN": variable_length,
            "HAS_OFFSETS": by_sequence,
            "ADVANCES": advances,
            "IN_PLACE": in_place,
            "INTERLEAVED": interleaved,
            "CONJUGATE": conjugate,
            "HEAD_DIM": head_dim,
            "HALF": half,
            "BLOCK_HALF": _columns(head_dim, half),
            "ROWS": rows,
        },
        tiles.ROWS,
    )


def append(
    k: Tensor,
    v: Tensor,
    k_cache: Tensor,
    v_cache: Tensor,
    cache_seqlens: Tensor,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    rotary_interleaved: bool,
    cache_batch_idx: Tensor | None,
    block_table: Tensor | None,
) -> None:
    """Writes k, rotated where there are tables, and v into the caches at each sequence's length."""
    batch, seqlen_new, num_heads_k, head_dim = k.shape
    paged = block_table is not None
    capacity = k_cache.shape[1] * (block_table.shape[1] if paged else 1)
    check_lengths(capacity, seqlen_new)
    if batch == 0 or seqlen_new == 0:
        return
    half = 0 if rotary_cos is None else rotary_cos.shape[1]
    rows = _rows(seqlen_new)
    num_tiles = -(-seqlen_new // rows)
    unit = operand_unit(k, v, k_cache, v_cache)
    launch(
        append_rows,
        batch * num_heads_k * num_tiles,
        k.device,
        (
            k,
            v,
            k_cache,
            v_cache,
            rotary_cos if half else k,
            rotary_sin if half else k,
            cache_seqlens,
            cache_seqlens if cache_batch_idx is None else cache_batch_idx,
            block_table if paged else cache_seqlens,
            *strides(k, unit),
            *strides(v, unit),
            *strides(k_cache, unit),
            *strides(v_cache, unit),
            *((rotary_cos.stride(0), rotary_sin.stride(0)) if half else (0, 0)),
            block_table.stride(0) if paged else 0,
            *(num_heads_k, seqlen_new, capacity, k_cache.shape[0]),
            *((k_cache.shape[1], k_cache.shape[0]) if paged else (1, 1)),
            rotary_cos.shape[0] if half else 0,
            num_tiles,
        ),
        {
            "UNIT": unit,
            "HAS_BATCH_IDX": cache_batch_idx is not None,
            "PAGED": paged,
            "ROTATES": half > 0,
            "INTERLEAVED": rotary_interleaved,
            "HEAD_DIM": head_dim,
            "HALF": half,
            "BLOCK_HALF": _columns(head_dim, half),
            "ROWS": rows,
        },
        tiles.ROWS,
    )


def rotated_queries(
    q: Tensor,
    cos: Tensor,
    sin: Tensor,
    cache_seqlens: Tensor,
    interleaved: bool,
    by_row: bool,
) -> Tensor:
    """The queries that meet a cache: row i at its sequence's length + i, or all rows there."""
    out = torch.empty_like(q)
    rotate(q, out, cos, sin, cache_seqlens, interleaved=interleaved, advances=by_row)
    return out
