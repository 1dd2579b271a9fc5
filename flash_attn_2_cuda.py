"""FlashAttention-2's extension module: the raw entry points, in its positional order.

The name is FlashAttention-2's, the tensors may be on any device that `flash_attn` serves. Arguments
are checked as everywhere; in contrast to the public functions, tensors must have a contiguous last
dimension. Notation: batch b, query length sq, key length sk, query heads h, key heads hk, head
dimension d, packed queries tq, packed keys tk.
"""

import torch
from torch import Tensor

from flash_attn.attention.arguments import draw_rng_state, is_deterministic
from flash_attn.backends import Options, Sequences, backend_for
from flash_attn.backends.interface import MIN_DROPOUT_P

__all__ = ["bwd", "fwd", "fwd_kvcache", "varlen_bwd", "varlen_fwd"]


def fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None = None,
) -> list[Tensor]:
    """Attention forward.

    Args:
        q: (b, sq, h, d).
        k, v: (b, sk, hk, d).
        out: as q, to be written to, or None.
        alibi_slopes: (h,) or (b, h), float32, or None.
        return_softmax: with dropout, return S_dmask.
        generator: must be None.

    Returns:
        out, softmax_lse (b, h, sq), S_dmask (b, h, sq, sk) or (0,), rng_state (2,), int64.
    """
    options = _forward_options(
        q,
        alibi_slopes,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        generator,
    )
    return _forward(q, k, v, out, options, None, return_softmax)


def varlen_fwd(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    seqused_k: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    return_softmax: bool,
    generator: None = None,
    num_splits: int = 0,
) -> list[Tensor]:
    """Attention forward of packed sequences.

    Args:
        q: (tq, h, d).
        k, v: (tk, hk, d), or (pages, page_size, hk, d) with block_table.
        out: as q, to be written to, or None.
        cu_seqlens_q, cu_seqlens_k: (b + 1,), int32.
        seqused_k: (b,), int32: keys in use of each sequence, or None.
        leftpad_k: (b,), int32: rows before the first key of each sequence, or None.
        block_table: (b, pages of a sequence), int32, or None.
        alibi_slopes: (h,) or (b, h), float32, or None.
        zero_tensors: without effect: every element is written.
        return_softmax: with dropout, return S_dmask.
        generator: must be None.

    Returns:
        out, softmax_lse (h, tq), S_dmask or (0,), rng_state (2,), int64.
    """
    options = _forward_options(
        q,
        alibi_slopes,
        p_dropout,
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        generator,
    )
    sequences = Sequences(
        cu_seqlens_q,
        cu_seqlens_k,
        max_seqlen_q,
        max_seqlen_k,
        seqused_k,
        leftpad_k,
        block_table,
        num_splits,
    )
    return _forward(q, k, v, out, options, sequences, return_softmax)


def bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    alibi_slopes: Tensor | None,
    p_dropout: float,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """Attention backward.

    Args:
        dout, out: as q.
        q: (b, sq, h, d).
        k, v: (b, sk, hk, d).
        softmax_lse: (b, h, sq), float32, as `fwd` returned it.
        dq, dk, dv: as q, k, v, to be written to, or None.
        generator: must be None.
        rng_state: (2,), int64, as `fwd` returned it; needed with dropout.

    Returns:
        dq, dk, dv, softmax_d (b, h, sq).
    """
    _no_generator(generator)
    options = Options(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        None,
        p_dropout,
        rng_state,
        deterministic,
    )
    return _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, options, None)


def varlen_bwd(
    dout: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    softmax_lse: Tensor,
    dq: Tensor | None,
    dk: Tensor | None,
    dv: Tensor | None,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    alibi_slopes: Tensor | None,
    max_seqlen_q: int,
    max_seqlen_k: int,
    p_dropout: float,
    softmax_scale: float,
    zero_tensors: bool,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    deterministic: bool,
    generator: None = None,
    rng_state: Tensor | None = None,
) -> list[Tensor]:
    """Attention backward of packed sequences.

    Args:
        dout, out: as q.
        q: (tq, h, d).
        k, v: (tk, hk, d).
        softmax_lse: (h, tq), float32, as `varlen_fwd` returned it.
        dq, dk, dv: as q, k, v, to be written to, or None.
        cu_seqlens_q, cu_seqlens_k: (b + 1,), int32.
        zero_tensors: without effect: every element is written.
        generator: must be None.
        rng_state: (2,), int64, as `varlen_fwd` returned it; needed with dropout.

    Returns:
        dq, dk, dv, softmax_d (h, tq).
    """
    _no_generator(generator)
    options = Options(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        None,
        p_dropout,
        rng_state,
        deterministic,
    )
    sequences = Sequences(cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)
    return _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, options, sequences)


def fwd_kvcache(
    q: Tensor,
    kcache: Tensor,
    vcache: Tensor,
    k: Tensor | None,
    v: Tensor | None,
    seqlens_k: Tensor | None,
    rotary_cos: Tensor | None,
    rotary_sin: Tensor | None,
    cache_batch_idx: Tensor | None,
    leftpad_k: Tensor | None,
    block_table: Tensor | None,
    alibi_slopes: Tensor | None,
    out: Tensor | None,
    softmax_scale: float,
    is_causal: bool,
    window_size_left: int,
    window_size_right: int,
    softcap: float,
    is_rotary_interleaved: bool,
    num_splits: int,
) -> list[Tensor]:
    """Attention over a cache, to which k and v are appended in place first.

    Args:
        q: (b, sq, h, d).
        kcache, vcache: (rows, sk, hk, d), or (pages, page_size, hk, d) with block_table.
        k, v: (b, new keys, hk, d), or None.
        seqlens_k: (b,), int32: keys in the cache before appending, or None for all.
        rotary_cos, rotary_sin: (positions, rotary_dim / 2), or None.
        cache_batch_idx: (b,), int32: row of the cache of each sequence, or None.
        leftpad_k: (b,), int32: rows before the first key of each sequence, or None.
        block_table: (b, pages of a sequence), int32, or None.
        alibi_slopes: (h,) or (b, h), float32, or None.
        out: as q, to be written to, or None.

    Returns:
        out, softmax_lse (b, h, sq).
    """
    options = Options(
        softmax_scale, is_causal, window_size_left, window_size_right, softcap, alibi_slopes
    )
    results = backend_for(q).kvcache(
        q,
        kcache,
        vcache,
        k,
        v,
        options,
        rotary_cos,
        rotary_sin,
        is_rotary_interleaved,
        seqlens_k,
        cache_batch_idx,
        leftpad_k,
        block_table,
        num_splits,
        out,
    )
    return list(results)


def _no_generator(generator: None) -> None:
    if generator is not None:
        raise RuntimeError(
            "flash-attn: the RNG `generator` argument is no longer supported and must be None; "
            "dropout draws from torch's default generator of the device"
        )


def _forward_options(
    q,
    alibi_slopes,
    p_dropout,
    softmax_scale,
    is_causal,
    window_size_left,
    window_size_right,
    softcap,
    generator,
) -> Options:
    _no_generator(generator)
    rng_state = None
    if 0 <= p_dropout < MIN_DROPOUT_P:
        p_dropout = 0.0
    elif 0 < p_dropout < 1:
        rng_state = draw_rng_state(q.device)
    return Options(
        softmax_scale,
        is_causal,
        window_size_left,
        window_size_right,
        softcap,
        alibi_slopes,
        None,
        p_dropout,
        rng_state,
    )


def _forward(q, k, v, out, options, sequences, return_softmax) -> list[Tensor]:
    out, softmax_lse, s_dmask = backend_for(q).forward(
        q, k, v, options, sequences, return_softmax, out
    )
    if s_dmask is None:
        s_dmask = q.new_empty((0,))
    rng_state = options.rng_state
    if rng_state is None:
        rng_state = torch.zeros((2,), dtype=torch.int64, device=q.device)
    return [out, softmax_lse, s_dmask, rng_state]


def _backward(dout, q, k, v, out, softmax_lse, dq, dk, dv, options, sequences) -> list[Tensor]:
    if 0 <= options.dropout_p < MIN_DROPOUT_P:
        options = options._replace(dropout_p=0.0, rng_state=None)
    options = options._replace(deterministic=is_deterministic(options.deterministic))
    dq = torch.empty_like(q) if dq is None else dq
    dk = torch.empty_like(k) if dk is None else dk
    dv = torch.empty_like(v) if dv is None else dv
    softmax_d = backend_for(q).backward(
        dout, q, k, v, out, softmax_lse, dq, dk, dv, options, sequences
    )
    return [dq, dk, dv, softmax_d]
