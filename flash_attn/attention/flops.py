"""Floating-point operations of the ops, for `torch.utils.flop_counter`.

Counted as torch counts `scaled_dot_product_attention`: two matrix products forward and five
backward, over all pairs of a query and a key of one sequence, visible or not. So a model's count
does not change with its attention function.
"""

from __future__ import annotations

from torch import Tensor, ops
from torch.utils.flop_counter import register_flop_formula

from flash_attn.attention import cache, library  # noqa: F401

_op = ops.flash_attn


def _lengths(cu_seqlens: Tensor, max_seqlen: int) -> list[int]:
    if type(cu_seqlens) is Tensor and not cu_seqlens.is_meta:
        return cu_seqlens.diff().tolist()
    return [max_seqlen] * (cu_seqlens.shape[0] - 1)  # lengths without data: their bound


def _varlen(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, matmuls: int) -> int:
    lengths_q = _lengths(cu_seqlens_q, max_seqlen_q)
    lengths_k = _lengths(cu_seqlens_k, max_seqlen_k)
    pairs = sum(sq * sk for sq, sk in zip(lengths_q, lengths_k, strict=True))
    return 2 * matmuls * q.shape[-2] * q.shape[-1] * pairs


def _dense(q, k, matmuls: int) -> int:
    batch, seqlen_q, num_heads, head_dim = q.shape
    return 2 * matmuls * batch * num_heads * seqlen_q * k.shape[1] * head_dim


@register_flop_formula(_op._flash_attn_forward, get_raw=True)
def _(q, k, v, *args, out_val=None, **kwargs) -> int:
    return _dense(q, k, 2)


@register_flop_formula(_op._flash_attn_varlen_forward, get_raw=True)
def _(q, k, v, *args, out_val=None, **kwargs) -> int:
    return _varlen(q, *args[:4], 2)


@register_flop_formula(_op._flash_attn_backward, get_raw=True)
def _(dout, q, k, *args, out_val=None, **kwargs) -> int:
    return _dense(q, k, 5)


@register_flop_formula(_op._flash_attn_varlen_backward, get_raw=True)
def _(dout, q, k, v, out, softmax_lse, dq, dk, dv, *args, out_val=None, **kwargs) -> int:
    return _varlen(q, *args[:4], 5)


@register_flop_formula(_op.attention_backward, get_raw=True)
def _(dout, q, k, *args, out_val=None, **kwargs) -> int:
    cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k = args[13:17]
    if cu_seqlens_q is None:
        return _dense(q, k, 5)
    return _varlen(q, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, 5)


@register_flop_formula(_op.with_kvcache, get_raw=True)
def _(q, k_cache, v_cache, k, v, *args, out_val=None, **kwargs) -> int:
    _, _, cache_seqlens, _, _, block_table = args[:6]
    batch, seqlen_q, num_heads, head_dim = q.shape
    if cache_seqlens is not None and type(cache_seqlens) is Tensor and not cache_seqlens.is_meta:
        seqlen_new = 0 if k is None else k.shape[1]
        keys = int(cache_seqlens.sum()) + batch * seqlen_new
    elif block_table is not None:
        keys = batch * block_table.shape[1] * k_cache.shape[1]
    else:
        keys = batch * k_cache.shape[1]
    return 4 * num_heads * head_dim * seqlen_q * keys
