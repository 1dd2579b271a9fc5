"""The public functions of attention.

Method: FlashAttention-2 (Dao, "FlashAttention-2: Faster Attention with Better Parallelism and Work
Partitioning", arXiv:2307.08691). The conventions of every number are those of `docs/numerics.md`.
"""

from __future__ import annotations

from torch import Tensor

from flash_attn.attention import arguments, autograd
from flash_attn.attention.arguments import is_direct, prepare, records
from flash_attn.attention.cache import with_kvcache
from flash_attn.attention.calls import run_forward
from flash_attn.backends import backend_for


def _with_s_dmask(q: Tensor, results):
    out, softmax_lse, s_dmask = results
    return out, softmax_lse, q.new_empty((0,)) if s_dmask is None else s_dmask


def flash_attn_func(
    q,
    k,
    v,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    s_aux=None,
):
    """Softmax attention of q over k and v, exact, in memory linear in the sequence length.

    Query i and key j are aligned at the bottom right: query i stands at i + sk - sq. The scores are
    scaled, soft-capped, biased (ALiBi) and masked, in this order; then come softmax and dropout.
    A query that sees no key gives 0, with softmax_lse +inf and gradients 0.

    Arguments:
        q: (b, sq, h, d), float32 (CPU), float16 or bfloat16, d at most 256.
        k, v: (b, sk, hk, d), dtype of q. hk divides h; query head i uses key head i // (h // hk).
        dropout_p: probability in [0, 1) that an attention weight is dropped; below 2**-20 it is 0.
            Random numbers come from torch's generator. Pass 0 in evaluation.
        softmax_scale: factor of the scores, d ** -0.5 by default.
        causal: hide the keys after the query: key j is seen iff j <= i + sk - sq.
        window_size: (left, right), tuple, list or tensor: keys seen before and after the query,
            both ends included; a negative number is no bound.
        softcap: when positive, scores become softcap * tanh(score / softcap).
        alibi_slopes: (h,) or (b, h), float32: -slope * |i + sk - sq - j| is added to the scores.
        deterministic: make dq bitwise reproducible on every device, as
            `torch.use_deterministic_algorithms(True)` and FLASH_ATTENTION_DETERMINISTIC=1 do. All
            other results always are.
        return_attn_probs: return softmax_lse and S_dmask too.
        s_aux: (h,), any floating dtype: attention sinks, scores that take part in the softmax of
            every query of a head and have no value.

    Returns:
        out: (b, sq, h, d), dtype of q; or, with return_attn_probs, the tuple
        (out, softmax_lse, S_dmask):
        softmax_lse: (b, h, sq), float32: natural logarithm of the sum of exp(score).
        S_dmask: (b, h, sq, sk), dtype of q: exp(score - row maximum), negative where dropped; (0,)
        without dropout. For tests.
        Gradients: of out and softmax_lse with respect to q, k, v and s_aux.

    Raises:
        RuntimeError: shapes, dtypes or devices do not fit, or a number is out of range.
        ConstraintError (an AssertionError and a RuntimeError): d or the head counts do not fit.
        ImportError: no backend for the device is installed.
    """
    direct = is_direct(q, k, v)
    if not direct:
        q, k, v = prepare(q, k, v)
    recorded = records(q, k, v, s_aux)
    if (
        direct
        and not (recorded or dropout_p or softcap or return_attn_probs)
        and alibi_slopes is None
        and s_aux is None
    ):
        if softmax_scale is None:
            softmax_scale = arguments.default_scale(q)
        if type(window_size) is not tuple or len(window_size) != 2:
            window_size = arguments.window(window_size)
        return backend_for(q).plain_forward(q, k, v, softmax_scale, causal, *window_size)
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
    if recorded:
        return autograd.attention(
            q, k, v, options.s_aux, (options, None, return_attn_probs, direct)
        )
    results = run_forward(q, k, v, options, None, return_attn_probs, return_attn_probs, direct)
    return _with_s_dmask(q, results) if return_attn_probs else results[0]


def flash_attn_kvpacked_func(
    q,
    kv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    s_aux=None,
):
    """`flash_attn_func` with keys and values in one tensor, whose gradient is one tensor too.

    Arguments:
        q: (b, sq, h, d).
        kv: (b, sk, 2, hk, d): keys, then values.
        The others, results and errors are those of `flash_attn_func`.
    """
    direct = is_direct(q, kv, kv)
    if not direct:
        q, kv = prepare(q, kv)
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
    if records(q, kv, s_aux):
        return autograd.attention_kvpacked(
            q, kv, options.s_aux, (options, None, return_attn_probs, direct)
        )
    k, v = arguments.unpack(kv, "kv")
    results = run_forward(q, k, v, options, None, return_attn_probs, return_attn_probs, direct)
    return _with_s_dmask(q, results) if return_attn_probs else results[0]


def flash_attn_qkvpacked_func(
    qkv,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    s_aux=None,
):
    """`flash_attn_func` with queries, keys and values in one tensor, and so their gradients.

    Arguments:
        qkv: (b, s, 3, h, d): queries, keys, values.
        The others, results and errors are those of `flash_attn_func`.
    """
    direct = is_direct(qkv, qkv, qkv)
    if not direct:
        (qkv,) = prepare(qkv)
    options = arguments.options(
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        s_aux,
    )
    if records(qkv, s_aux):
        return autograd.attention_qkvpacked(
            qkv, options.s_aux, (options, None, return_attn_probs, direct)
        )
    q, k, v = arguments.unpack(qkv, "qkv")
    results = run_forward(q, k, v, options, None, return_attn_probs, return_attn_probs, direct)
    return _with_s_dmask(q, results) if return_attn_probs else results[0]


def flash_attn_varlen_func(
    q,
    k,
    v,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    block_table=None,
    s_aux=None,
):
    """`flash_attn_func` for sequences of different lengths, packed one after the other.

    Arguments:
        q: (tq, h, d).
        k, v: (tk, hk, d); or, with block_table, pages (pages, page_size, hk, d) of any size.
        cu_seqlens_q, cu_seqlens_k: (b + 1,), int32: where each sequence begins, and the last ends.
            With block_table, cu_seqlens_k gives the lengths only.
        max_seqlen_q, max_seqlen_k: the longest lengths, int or 0-d tensor.
        block_table: (b, pages of a sequence), int32: the pages of each sequence. No gradient.
        The others and the errors are those of `flash_attn_func`.

    Returns:
        out: (tq, h, d), dtype of q; or, with return_attn_probs, the tuple
        (out, softmax_lse, S_dmask):
        softmax_lse: (h, tq), float32.
        S_dmask: (b, h, max_seqlen_q, max_seqlen_k), or (0,) without dropout.
        Rows of out beyond cu_seqlens_q[-1] are 0, and so are the gradients of such rows.
    """
    direct = is_direct(q, k, v)
    if not direct:
        q, k, v = prepare(q, k, v)
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
    if records(q, k, v, s_aux):
        return autograd.attention(
            q, k, v, options.s_aux, (options, sequences, return_attn_probs, direct)
        )
    results = run_forward(q, k, v, options, sequences, return_attn_probs, return_attn_probs, direct)
    return _with_s_dmask(q, results) if return_attn_probs else results[0]


def flash_attn_varlen_kvpacked_func(
    q,
    kv,
    cu_seqlens_q,
    cu_seqlens_k,
    max_seqlen_q,
    max_seqlen_k,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    s_aux=None,
):
    """`flash_attn_varlen_func` with keys and values in one tensor, and so their gradients.

    Arguments:
        q: (tq, h, d).
        kv: (tk, 2, hk, d): keys, then values.
        The others, results and errors are those of `flash_attn_varlen_func`.
    """
    direct = is_direct(q, kv, kv)
    if not direct:
        q, kv = prepare(q, kv)
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
    sequences = arguments.sequences(q, kv, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    if records(q, kv, s_aux):
        return autograd.attention_kvpacked(
            q, kv, options.s_aux, (options, sequences, return_attn_probs, direct)
        )
    k, v = arguments.unpack(kv, "kv", varlen=True)
    results = run_forward(q, k, v, options, sequences, return_attn_probs, return_attn_probs, direct)
    return _with_s_dmask(q, results) if return_attn_probs else results[0]


def flash_attn_varlen_qkvpacked_func(
    qkv,
    cu_seqlens,
    max_seqlen,
    dropout_p=0.0,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    alibi_slopes=None,
    deterministic=False,
    return_attn_probs=False,
    s_aux=None,
):
    """`flash_attn_varlen_func` with queries, keys and values in one tensor, and so their gradients.

    Arguments:
        qkv: (t, 3, h, d): queries, keys, values.
        cu_seqlens: (b + 1,), int32: where each sequence begins, and the last ends.
        max_seqlen: the longest length, int or 0-d tensor.
        The others, results and errors are those of `flash_attn_varlen_func`.
    """
    direct = is_direct(qkv, qkv, qkv)
    if not direct:
        (qkv,) = prepare(qkv)
    options = arguments.options(
        qkv,
        dropout_p,
        softmax_scale,
        causal,
        window_size,
        softcap,
        alibi_slopes,
        deterministic,
        s_aux,
    )
    sequences = arguments.sequences(qkv, qkv, cu_seqlens, cu_seqlens, max_seqlen, max_seqlen)
    if records(qkv, s_aux):
        return autograd.attention_qkvpacked(
            qkv, options.s_aux, (options, sequences, return_attn_probs, direct)
        )
    q, k, v = arguments.unpack(qkv, "qkv", varlen=True)
    results = run_forward(q, k, v, options, sequences, return_attn_probs, return_attn_probs, direct)
    return _with_s_dmask(q, results) if return_attn_probs else results[0]


def flash_attn_with_kvcache(
    q,
    k_cache,
    v_cache,
    k=None,
    v=None,
    rotary_cos=None,
    rotary_sin=None,
    cache_seqlens: int | Tensor | None = None,
    cache_batch_idx: Tensor | None = None,
    cache_leftpad: Tensor | None = None,
    block_table: Tensor | None = None,
    softmax_scale=None,
    causal=False,
    window_size=(-1, -1),
    softcap=0.0,
    rotary_interleaved=True,
    alibi_slopes=None,
    num_splits=0,
    return_softmax_lse=False,
    s_aux=None,
):
    """Attention of q over a cache of keys and values, to which k and v are appended first.

    The keys of a sequence are the valid ones of the cache and the new ones, left padding excepted.
    With rotary tables the new keys are rotated by their positions before they are written, and q is
    rotated too: row i at cache_seqlens + i when causal or windowed, else all rows at cache_seqlens.
    Not differentiable: the results do not require gradients.

    Arguments:
        q: (b, sq, h, d).
        k_cache, v_cache: (bc, sk, hk, d), or pages (pages, page_size, hk, d) with block_table, any
            page size. Written in place; the last dimension must be contiguous.
        k, v: (b, snew, hk, d): what is written at cache_seqlens; needs cache_seqlens.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), dtype of q, rotary_dim divisible by 16.
        cache_seqlens: int, or (b,), int32: valid keys in the cache before k; None is all of them.
        cache_batch_idx: (b,), int32: the row of the cache that each sequence uses.
        cache_leftpad: (b,), int32: the first valid key of each sequence.
        block_table: (b, pages of a sequence), int32: the pages of each sequence.
        rotary_interleaved: pairs are (2i, 2i + 1), else (i, i + rotary_dim / 2).
        num_splits: parts into which the keys are split; 0 chooses.
        return_softmax_lse: return softmax_lse too.
        The others are those of `flash_attn_func`.

    Returns:
        out: (b, sq, h, d), dtype of q; or, with return_softmax_lse, (out, softmax_lse), the latter
        (b, h, sq), float32.

    Raises:
        RuntimeError: as `flash_attn_func`, and when the new keys do not fit the cache.
    """
    q, k, v, rotary_cos, rotary_sin = arguments.prepare_for_cache(
        k_cache, q, k, v, rotary_cos, rotary_sin
    )
    if softmax_scale is None:
        softmax_scale = arguments.default_scale(q)
    window_left, window_right = arguments.window(window_size)
    if cache_seqlens is not None and not isinstance(cache_seqlens, Tensor):
        cache_seqlens = arguments.cache_lengths(q, k_cache, k, block_table, cache_seqlens)
    out, softmax_lse = with_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        rotary_cos,
        rotary_sin,
        cache_seqlens,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        rotary_interleaved,
        alibi_slopes,
        num_splits,
        None if s_aux is None else s_aux.float(),
    )
    return (out, softmax_lse) if return_softmax_lse else out
