"""Attention and its gradients, by whole score matrices, one sequence at a time."""

import math

import torch

from reference.dropout import dropout_keep_mask
from reference.on_the_cpu import on_the_cpu

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


@on_the_cpu
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
    by_pairs=False,
    dtype=torch.float64,
):
    """Dense attention.

    q (b, sq, h, d), k and v (b, sk, hk, d), alibi_slopes (h,) or (b, h), s_aux (h,): one sink a
    head, keep_mask bool (b, h, sq, sk): the entries that dropout keeps, by_pairs: for gradients of
    an output that are not finite.
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
    if by_pairs or not all(bool(x.isfinite().all()) for x in (q, k, v)):
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
        with dout.device:  # autograd's threads do not know the default device
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


@on_the_cpu
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


@on_the_cpu
def gather_pages(pages, table, length):
    """Rows 0 .. length - 1 of one sequence: row r lies in page table[r // page_size]."""
    page_size = pages.shape[1]
    row = torch.arange(int(length))
    return pages[table.to(torch.int64)[row // page_size], row % page_size]


@on_the_cpu
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


# -------------------------------------------------------------------------------------------------
# Gradients


@on_the_cpu
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
