"""Rotary embedding, and attention over a cache."""

import torch

from reference.attention import attention, gather_pages
from reference.on_the_cpu import on_the_cpu


@on_the_cpu
def apply_rotary(
    x, cos, sin, *, positions, interleaved=False, conjugate=False, dtype=torch.float64
):
    """Rotate the first 2 * cos.shape[1] elements of each row of x (s, h, d) by its position.

    positions: (s,) integers. interleaved pairs (2i, 2i + 1), otherwise (i, i + rotary_dim / 2).
    """
    x = x.to(dtype)
    half = cos.shape[1]
    positions = torch.as_tensor(positions, dtype=torch.int64)
    cos = cos.to(dtype)[positions][:, None, :]  # (s, 1, rotary_dim / 2)
    sin = sin.to(dtype)[positions][:, None, :]
    if conjugate:
        sin = -sin
    if interleaved:
        first, second = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    else:
        first, second = x[..., :half], x[..., half : 2 * half]
    rotated_first = first * cos - second * sin
    rotated_second = first * sin + second * cos
    if interleaved:
        rotated = torch.stack([rotated_first, rotated_second], dim=-1).flatten(-2)
    else:
        rotated = torch.cat([rotated_first, rotated_second], dim=-1)
    return torch.cat([rotated, x[..., 2 * half :]], dim=-1)


def _lengths(cache_seqlens, batch, default):
    if cache_seqlens is None:
        return [default] * batch
    if isinstance(cache_seqlens, int):
        return [cache_seqlens] * batch
    return [int(x) for x in cache_seqlens]


@on_the_cpu
def kvcache_append(
    k_cache,
    v_cache,
    k,
    v,
    *,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    block_table=None,
    rotary_interleaved=True,
    dtype=torch.float64,
):
    """The caches after k and v (b, snew, hk, d) have been written at each sequence's length.

    Returns new caches in `dtype`; the ones given are not changed.
    """
    k_cache, v_cache = k_cache.to(dtype, copy=True), v_cache.to(dtype, copy=True)
    batch = k.shape[0]
    page_size = k_cache.shape[1]
    for sequence, length in enumerate(_lengths(cache_seqlens, batch, 0)):
        rows = torch.arange(k.shape[1]) + length
        k_new, v_new = k[sequence].to(dtype), v[sequence].to(dtype)
        if rotary_cos is not None:
            k_new = apply_rotary(
                k_new,
                rotary_cos,
                rotary_sin,
                positions=rows,
                interleaved=rotary_interleaved,
                dtype=dtype,
            )
        if block_table is not None:
            place = (block_table[sequence].to(torch.int64)[rows // page_size], rows % page_size)
        elif cache_batch_idx is not None:
            place = (torch.full_like(rows, int(cache_batch_idx[sequence])), rows)
        else:
            place = (torch.full_like(rows, sequence), rows)
        k_cache[place] = k_new
        v_cache[place] = v_new
    return k_cache, v_cache


@on_the_cpu
def kvcache_attention(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    *,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens=None,
    cache_batch_idx=None,
    cache_leftpad=None,
    block_table=None,
    causal=False,
    window_size=(-1, -1),
    rotary_interleaved=True,
    alibi_slopes=None,
    dtype=torch.float64,
    **options,
):
    """Attention over a cache, after k and v, when given, have been appended.

    q (b, sq, h, d); caches (bc, sk, hk, d) or (pages, page_size, hk, d). Returns out (b, sq, h, d)
    and lse (b, h, sq); `kvcache_append` gives the caches.
    """
    batch, sq = q.shape[:2]
    capacity = k_cache.shape[1]
    if block_table is not None:
        capacity *= block_table.shape[1]
    lengths = _lengths(cache_seqlens, batch, capacity)
    new = 0
    if k is not None:
        new = k.shape[1]
        k_cache, v_cache = kvcache_append(
            k_cache,
            v_cache,
            k,
            v,
            rotary_cos=rotary_cos,
            rotary_sin=rotary_sin,
            cache_seqlens=cache_seqlens,
            cache_batch_idx=cache_batch_idx,
            block_table=block_table,
            rotary_interleaved=rotary_interleaved,
            dtype=dtype,
        )
    advances = causal or any(int(side) >= 0 for side in window_size)
    outs, lses = [], []
    for sequence, length in enumerate(lengths):
        q_rows = q[sequence]
        if rotary_cos is not None:
            q_rows = apply_rotary(
                q_rows,
                rotary_cos,
                rotary_sin,
                positions=[length + (i if advances else 0) for i in range(sq)],
                interleaved=rotary_interleaved,
                dtype=dtype,
            )
        if block_table is not None:
            k_rows = gather_pages(k_cache, block_table[sequence], length + new)
            v_rows = gather_pages(v_cache, block_table[sequence], length + new)
        else:
            row = sequence if cache_batch_idx is None else int(cache_batch_idx[sequence])
            k_rows, v_rows = k_cache[row, : length + new], v_cache[row, : length + new]
        first = 0 if cache_leftpad is None else int(cache_leftpad[sequence])
        k_rows, v_rows = k_rows[first:], v_rows[first:]
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[sequence]
        out, lse = attention(
            q_rows[None],
            k_rows[None],
            v_rows[None],
            causal=causal,
            window_size=window_size,
            alibi_slopes=slopes,
            dtype=dtype,
            **options,
        )
        outs.append(out)
        lses.append(lse)
    if batch == 0:
        return torch.zeros(q.shape, dtype=dtype), torch.zeros(0, q.shape[2], sq, dtype=dtype)
    return torch.cat(outs), torch.cat(lses)
