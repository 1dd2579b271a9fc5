"""Attention in float64, written to be believed rather than to be fast.

Every function states its mathematics as directly as PyTorch allows: whole score matrices, one
sequence at a time, gradients by autograd. Nothing here is shared with the library under test; the
conventions are those of docs/numerics.md.

Notation: batch b, query length sq, key length sk, query heads h, key heads hk, head dimension d.
All functions compute in `dtype`, float64 unless told otherwise; float32, bfloat16 or float16 give
the same computation done naively in that type, whose error is what the tolerances are derived from.
They compute on the CPU; their results are where their tensors are.
"""

from reference.attention import (
    _attention_by_pairs,
    attention,
    attention_scores,
    flash_gradients,
    gather_pages,
    s_dmask,
    varlen_attention,
    visible_keys,
    with_gradients,
)
from reference.cache import apply_rotary, kvcache_append, kvcache_attention
from reference.dropout import dropout_keep_mask, dropout_numbers, philox
from reference.on_the_cpu import on_the_cpu

__all__ = [
    "_attention_by_pairs",
    "apply_rotary",
    "attention",
    "attention_scores",
    "dropout_keep_mask",
    "dropout_numbers",
    "flash_gradients",
    "gather_pages",
    "kvcache_append",
    "kvcache_attention",
    "on_the_cpu",
    "philox",
    "s_dmask",
    "varlen_attention",
    "visible_keys",
    "with_gradients",
]
