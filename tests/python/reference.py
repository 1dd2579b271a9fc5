"""Attention in float64, written to be believed rather than to be fast.

Every function states its mathematics as directly as PyTorch allows: whole score matrices, one
sequence at a time, gradients by autograd. Nothing here is shared with the library under test; the
conventions are those of docs/numerics.md.

Notation: batch b, query length sq, key length sk, query heads h, key heads hk, head dimension d.
All functions compute in `dtype`, float64 unless told otherwise; float32, bfloat16 or float16 give
the same computation done naively in that type, whose error is what the tolerances are derived from.
"""

import math

import numpy as np
import torch

# -------------------------------------------------------------------------------------------------
# Masks and scores


def visible_keys(sq, sk, causal=False, window_size=(-1, -1)):
    """Which keys a query sees: bool (sq, sk).

    Query i sees key j iff i + off - left <= j <= i + off + right with off = sk - sq, both ends
    included. A negative side is infinite, causal is right = 0.
    """
    left, right = (int(side) for side in window_size)
    if causal:
        right = 0
    diagonal = torch.arange(sq)[:, None] + (sk - sq)
    key = torch.arange(sk)[None, :]
    visible = torch.ones(sq, sk, dtype=torch.bool)
    if left >= 0:
        visible &= key >= diagonal - left
    if right >= 0:
        visible &= key <= diagonal + right
    return visible


def alibi_bias(alibi_slopes, batch, sq, sk, dtype):
    """-slope * |i + off - j|: (b, h, sq, sk), from slopes (h,) or (b, h), at least in float32."""
    distance = (torch.arange(sq)[:, None] + (sk - sq) - torch.arange(sk)[None, :]).abs()
    slopes = alibi_slopes.to(torch.promote_types(dtype, torch.float32))
    slopes = slopes.expand(batch, slopes.shape[-1])
    return -slopes[:, :, None, None] * distance


def attention_scores(q, k, *, softmax_scale=None, softcap=0.0, alibi_slopes=None):
    """Scores before the mask: (b, h, sq, sk). q (b, sq, h, d), k (b, sk, hk, d)."""
    batch, sq, heads, head_dim = q.shape
    sk, heads_k = k.shape[1], k.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    k = k.repeat_interleave(heads // heads_k, dim=2)  # query head i uses key head i // (h / hk)
    scores = scale * torch.einsum("bihd,bjhd->bhij", q, k)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes, batch, sq, sk, scores.dtype)
    return scores


# -------------------------------------------------------------------------------------------------
# Attention


def attention(
    q,
    k,
    v,
    *,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    s_aux=None,
    dropout_p=0.0,
    keep_mask=None,
    dtype=torch.float64,
):
    """Dense attention.

    q (b, sq, h, d), k and v (b, sk, hk, d), alibi_slopes (h,) or (b, h), s_aux (h,): one sink a
    head, keep_mask bool (b, h, sq, sk): the entries that dropout keeps.
    Returns out (b, sq, h, d) and lse (b, h, sq), both in `dtype`. A row that sees no key has out 0
    and lse +inf, or lse = sink where there is one.
    """
    q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
    options = {
        "softmax_scale": softmax_scale,
        "softcap": softcap,
        "alibi_slopes": alibi_slopes,
        "visible": visible_keys(q.shape[1], k.shape[1], causal, window_size),
        "dropout_p": dropout_p,
        "keep_mask": keep_mask,
    }
    if not all(bool(x.isfinite().all()) for x in (q, k, v)):
        # A query does not look at the keys that it does not see. With numbers that follows from
        # p = 0; with NaN or inf it does not, so these inputs go pair by pair.
        return _attention_by_pairs(q, k, v, s_aux, **options)
    if dtype == torch.float64:
        return _attention(q, k, v, s_aux, **options)
    return _WithFlashGradients.apply(q, k, v, s_aux, options)


def _attention(
    q, k, v, s_aux, *, softmax_scale, softcap, alibi_slopes, visible, dropout_p, keep_mask
):
    scores = attention_scores(
        q, k, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes
    )
    p, lse = _softmax(scores, visible, s_aux)
    p = _dropout(p, dropout_p, keep_mask)
    v = v.repeat_interleave(q.shape[2] // k.shape[2], dim=2)
    out = torch.einsum("bhij,bjhd->bihd", p.to(v.dtype), v)
    return out, lse


def _softmax(scores, visible, s_aux):
    """Softmax over visible scores and the sink: p (b, h, sq, sk) of the keys, lse (b, h, sq)."""
    batch, heads, sq, _ = scores.shape
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32))
    sees_nothing = ~visible.any(dim=-1)  # (sq,)
    scores = scores.masked_fill(~visible, -math.inf)
    terms = scores
    if s_aux is not None:
        sink = s_aux.to(scores.dtype)[None, :, None, None].expand(batch, heads, sq, 1)
        terms = torch.cat([scores, sink], dim=-1)
    else:
        # Any finite number will do here: p is exp(-inf) = 0 and lse is replaced below.
        terms = terms.masked_fill(sees_nothing[:, None], 0.0)
    lse = torch.logsumexp(terms, dim=-1) if terms.shape[-1] else scores.new_zeros(batch, heads, sq)
    p = torch.exp(scores - lse[..., None])
    if s_aux is None:
        lse = lse.masked_fill(sees_nothing, math.inf)
    return p, lse


def _dropout(p, dropout_p, keep_mask):
    if keep_mask is None:
        return p
    return p * keep_mask / (1.0 - dropout_p)


def _attention_by_pairs(
    q, k, v, s_aux, *, softmax_scale, softcap, alibi_slopes, visible, dropout_p, keep_mask
):
    """As `_attention`, with every (query, key) pair that is not visible taken out of the sums."""
    batch, sq, heads, head_dim = q.shape
    sk, heads_k = k.shape[1], k.shape[2]
    scale = head_dim**-0.5 if softmax_scale is None else softmax_scale
    pair = visible[None, None, :, :, None]
    k = k.repeat_interleave(heads // heads_k, dim=2)
    v = v.repeat_interleave(heads // heads_k, dim=2)
    q_pairs = q.transpose(1, 2)[:, :, :, None, :].masked_fill(~pair, 0.0)  # (b, h, sq, sk, d)
    k_pairs = k.transpose(1, 2)[:, :, None, :, :].masked_fill(~pair, 0.0)
    v_pairs = v.transpose(1, 2)[:, :, None, :, :].masked_fill(~pair, 0.0)
    scores = scale * (q_pairs * k_pairs).sum(-1)
    if softcap > 0:
        scores = softcap * torch.tanh(scores / softcap)
    if alibi_slopes is not None:
        scores = scores + alibi_bias(alibi_slopes, batch, sq, sk, scores.dtype)
    p, lse = _softmax(scores, visible, s_aux)
    p = _dropout(p, dropout_p, keep_mask)
    out = (p.to(v.dtype)[..., None] * v_pairs).sum(-2).transpose(1, 2)
    return out, lse


class _WithFlashGradients(torch.autograd.Function):
    """`_attention` with the gradients that every FlashAttention computes, written out.

    p is computed again from lse, and D = rowsum(dO * O) takes the place of rowsum(p * dP). In exact
    arithmetic that is the same, which test_reference.py checks; in a short type it is not:
    autograd, which keeps p, is exact where these differences cancel. So this, not autograd, is the
    naive computation that errors are measured against.
    """

    @staticmethod
    def forward(ctx, q, k, v, s_aux, options):
        out, lse = _attention(q, k, v, s_aux, **options)
        ctx.save_for_backward(q, k, v, s_aux, out, lse)
        ctx.options = options
        return out, lse

    @staticmethod
    def backward(ctx, dout, dlse):
        q, k, v, s_aux, out, lse = ctx.saved_tensors
        return *flash_gradients(q, k, v, s_aux, out, lse, dout, dlse, **ctx.options), None


def flash_gradients(
    q,
    k,
    v,
    s_aux,
    out,
    lse,
    dout,
    dlse,
    *,
    softmax_scale,
    softcap,
    alibi_slopes,
    visible,
    dropout_p,
    keep_mask,
):
    """dq, dk, dv and ds_aux (or None) by the formulas of FlashAttention, in the dtype of q."""
    dtype, group_size = q.dtype, q.shape[2] // k.shape[2]
    scale = q.shape[3] ** -0.5 if softmax_scale is None else softmax_scale
    k_heads, v_heads = (x.repeat_interleave(group_size, dim=2) for x in (k, v))
    scores = attention_scores(
        q, k, softmax_scale=softmax_scale, softcap=softcap, alibi_slopes=alibi_slopes
    )
    scores = scores.to(lse.dtype).masked_fill(~visible, -math.inf)
    p = torch.exp(scores - lse[..., None])
    dropped = _dropout(p, dropout_p, keep_mask)
    dv = torch.einsum("bhij,bihd->bjhd", dropped.to(dtype), dout)
    dp = torch.einsum("bihd,bjhd->bhij", dout, v_heads).to(lse.dtype)
    dp = _dropout(dp, dropout_p, keep_mask)
    row_sums = (dout * out).to(lse.dtype).sum(-1).transpose(1, 2) - dlse  # D
    ds = p * (dp - row_sums[..., None])
    if softcap > 0:
        plain = attention_scores(q, k, softmax_scale=softmax_scale).to(lse.dtype)
        ds = ds * (1 - torch.tanh(plain / softcap) ** 2)
    ds = ds.to(dtype)
    dq = scale * torch.einsum("bhij,bjhd->bihd", ds, k_heads)
    dk = scale * torch.einsum("bhij,bihd->bjhd", ds, q)
    dk, dv = (x.unflatten(2, (-1, group_size)).sum(3) for x in (dk, dv))
    ds_aux = None
    if s_aux is not None:
        weight = torch.exp(s_aux.to(lse.dtype)[:, None] - lse)
        ds_aux = -(weight * row_sums).sum((0, 2)).to(s_aux.dtype)
    return dq, dk, dv, ds_aux


def varlen_attention(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    *,
    block_table=None,
    seqused_k=None,
    leftpad_k=None,
    alibi_slopes=None,
    dropout_p=0.0,
    rng_state=None,
    keep_masks=None,
    dtype=torch.float64,
    **options,
):
    """Variable length: each sequence by itself through `attention`.

    q (tq, h, d), k and v (tk, hk, d), or (pages, page_size, hk, d) with block_table; cu_seqlens
    (b + 1), seqused_k and leftpad_k (b,): keys in use, and those before the first valid one.
    rng_state (seed, offset), or keep_masks: a list of bool (1, h, sq, sk), say what dropout keeps.
    Returns out (tq, h, d) and lse (h, tq). Rows of no sequence have out 0 and lse +inf.
    """
    begins_q = [int(x) for x in cu_seqlens_q]
    begins_k = [int(x) for x in cu_seqlens_k]
    heads = q.shape[1]
    outs, lses = [], []
    for sequence in range(len(begins_q) - 1):
        q_rows = q[begins_q[sequence] : begins_q[sequence + 1]]
        length = begins_k[sequence + 1] - begins_k[sequence]
        if seqused_k is not None:
            length = int(seqused_k[sequence])
        first = 0 if leftpad_k is None else int(leftpad_k[sequence])
        if block_table is not None:
            k_rows = gather_pages(k, block_table[sequence], length)
            v_rows = gather_pages(v, block_table[sequence], length)
        else:
            k_rows = k[begins_k[sequence] : begins_k[sequence] + length]
            v_rows = v[begins_k[sequence] : begins_k[sequence] + length]
        k_rows, v_rows = k_rows[first:], v_rows[first:]
        keep_mask = None
        if keep_masks is not None:
            keep_mask = keep_masks[sequence]
        elif rng_state is not None and dropout_p > 0:
            keep_mask = dropout_keep_mask(
                dropout_p, rng_state, 1, heads, len(q_rows), len(k_rows), first_batch=sequence
            )
        slopes = alibi_slopes
        if slopes is not None and slopes.dim() == 2:
            slopes = slopes[sequence]
        out, lse = attention(
            q_rows[None],
            k_rows[None],
            v_rows[None],
            alibi_slopes=slopes,
            dropout_p=dropout_p,
            keep_mask=keep_mask,
            dtype=dtype,
            **options,
        )
        outs.append(out[0])
        lses.append(lse[0])
    rest = len(q) - begins_q[-1]
    outs.append(torch.zeros(rest, *q.shape[1:], dtype=dtype))
    lses.append(torch.full((heads, rest), math.inf, dtype=lses[0].dtype if lses else dtype))
    return torch.cat(outs), torch.cat(lses, dim=1)


def gather_pages(pages, table, length):
    """Rows 0 .. length - 1 of one sequence: row r lies in page table[r // page_size]."""
    page_size = pages.shape[1]
    row = torch.arange(int(length))
    return pages[table.to(torch.int64)[row // page_size], row % page_size]


# -------------------------------------------------------------------------------------------------
# Rotary embedding and the cache


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


# -------------------------------------------------------------------------------------------------
# Gradients


def with_gradients(function, tensors, dout, dlse=None, *, dtype=torch.float64, **options):
    """Run `function(*tensors, **options, dtype=dtype)` and differentiate it by autograd.

    tensors: those to differentiate by; a value of `options` may be one of them by being listed in
    `tensors` as a pair (name, tensor). dout and dlse: gradients of out and lse.
    Returns out, lse and the list of gradients in the order of `tensors`, all in `dtype`.
    """
    leaves, positional, named = [], [], {}
    for tensor in tensors:
        name, value = tensor if isinstance(tensor, tuple) else (None, tensor)
        leaf = value.detach().to(dtype, copy=True).requires_grad_()
        leaves.append(leaf)
        if name is None:
            positional.append(leaf)
        else:
            named[name] = leaf
    out, lse = function(*positional, **named, **options, dtype=dtype)
    outputs, gradients = [out], [dout.to(out.dtype)]
    if dlse is not None:
        outputs.append(lse)
        gradients.append(dlse.to(lse.dtype))
    total = sum(
        (output * gradient).sum() for output, gradient in zip(outputs, gradients, strict=True)
    )
    result = torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)
    return out.detach(), lse.detach(), list(result)


# -------------------------------------------------------------------------------------------------
# Dropout


def philox(counter, key):
    """Philox-4x32 with 7 rounds (Salmon et al., 2011): four uint32 arrays from four, and a key."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (int(word) for word in key)
    for _ in range(7):
        low_product = c0 * np.uint64(0xD2511F53)
        high_product = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (high_product >> shift) ^ c1 ^ np.uint64(k0),
            high_product & mask,
            (low_product >> shift) ^ c3 ^ np.uint64(k1),
            low_product & mask,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_numbers(rng_state, batch, heads, sq, sk, *, first_batch=0):
    """The 16-bit number of every entry: numpy int64 (b, h, sq, sk).

    One block of Philox gives eight of them: the rows r and r + 8 of sixteen, from the low and the
    high half of a word, and the columns c, c + 8, c + 16, c + 24 of thirty-two, one from each word.
    """
    seed, offset = (int(x) & 0xFFFFFFFFFFFFFFFF for x in rng_state)
    key = philox((offset & 0xFFFFFFFF, offset >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[:2]
    row = np.arange(sq)[None, None, :, None]
    column = np.arange(sk)[None, None, None, :]
    words = philox(
        np.broadcast_arrays(
            row // 16 * 8 + row % 8,
            column // 32 * 8 + column % 8,
            np.arange(heads)[None, :, None, None],
            (first_batch + np.arange(batch))[:, None, None, None],
        ),
        key,
    )
    word = np.choose(np.broadcast_to(column // 8 % 4, words[0].shape), words)
    number = np.where(row // 8 % 2 == 1, word >> np.uint64(16), word & np.uint64(0xFFFF))
    return number.astype(np.int64)


def dropout_keep_mask(dropout_p, rng_state, batch, heads, sq, sk, *, first_batch=0):
    """Which entries dropout keeps: bool (b, h, sq, sk). rng_state: seed and offset."""
    if dropout_p < 2.0**-20:
        return torch.ones(batch, heads, sq, sk, dtype=torch.bool)
    threshold = math.floor((1.0 - dropout_p) * 65536.0 + 0.5)
    numbers = dropout_numbers(rng_state, batch, heads, sq, sk, first_batch=first_batch)
    return torch.from_numpy(numbers < threshold)


def s_dmask(
    q, k, keep_mask, *, causal=False, window_size=(-1, -1), dtype=torch.float64, **score_options
):
    """exp(score - row maximum), negative where dropped, 0 where masked: (b, h, sq, sk)."""
    scores = attention_scores(q.to(dtype), k.to(dtype), **score_options)
    visible = visible_keys(q.shape[1], k.shape[1], causal, window_size)
    scores = scores.masked_fill(~visible, -math.inf)
    if scores.shape[-1] == 0:
        return scores
    maximum = scores.amax(dim=-1, keepdim=True)
    maximum = maximum.masked_fill(maximum == -math.inf, 0.0)
    magnitude = torch.exp(scores - maximum)
    return torch.where(keep_mask, magnitude, -magnitude)
