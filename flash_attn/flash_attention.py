"""The modules of FlashAttention's first generation, under their old names and signatures.

New code finds modules in `flash_attn.modules.mha`.
"""

import torch
from torch import Tensor, nn

from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import (
    flash_attn_qkvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


class FlashAttention(nn.Module):
    """Attention of a packed qkv.

    Args:
        softmax_scale: what scores are multiplied with; None for d ** -0.5.
        attention_dropout: the probability of dropping an attention weight, in training mode.
    """

    def __init__(self, softmax_scale: float | None = None, attention_dropout: float = 0.0):
        super().__init__()
        self.softmax_scale = softmax_scale
        self.dropout_p = attention_dropout

    def forward(
        self,
        qkv: Tensor,
        key_padding_mask: Tensor | None = None,
        causal: bool = False,
        cu_seqlens: Tensor | None = None,
        max_s: int | None = None,
        need_weights: bool = False,
    ) -> tuple[Tensor, None]:
        """Attention of every sequence with itself.

        Args:
            qkv: (b, s, 3, h, d), or (t, 3, h, d) with cu_seqlens.
            key_padding_mask: (b, s), bool: True for tokens that count; others give 0.
            causal: a query sees no key behind it.
            cu_seqlens: (b + 1,), int32: where each sequence begins along t.
            max_s: the length of the longest; needed with cu_seqlens.
            need_weights: must be False.

        Returns:
            (b, s, h, d) or (t, h, d), and None, the place of the weights.

        Raises:
            RuntimeError: weights are asked for, or max_s is missing.
        """
        if need_weights:
            raise RuntimeError("FlashAttention does not return attention weights")
        options = {
            "dropout_p": self.dropout_p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": causal,
        }
        if cu_seqlens is not None:
            if max_s is None:
                raise RuntimeError("max_s must be given with cu_seqlens")
            return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_s, **options), None
        if key_padding_mask is None:
            return flash_attn_qkvpacked_func(qkv, **options), None
        tokens, indices, cu_seqlens, max_s, _ = unpad_input(qkv, key_padding_mask)
        out = flash_attn_varlen_qkvpacked_func(tokens, cu_seqlens, max_s, **options)
        return pad_input(out, indices, *qkv.shape[:2]), None


class FlashMHA(nn.Module):
    """Multi-head self-attention.

    Args:
        embed_dim: size of a token.
        num_heads: heads; divides embed_dim.
        bias: whether the projections Wqkv and out_proj have one.
        batch_first: must be True.
        attention_dropout: the probability of dropping an attention weight, in training mode.
        causal: a query sees no key behind it.

    Raises:
        ValueError: batch_first is False, or num_heads does not divide embed_dim.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        bias: bool = True,
        batch_first: bool = True,
        attention_dropout: float = 0.0,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        if not batch_first:
            raise ValueError("FlashMHA takes the batch first")
        if embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}")
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.head_dim = embed_dim // num_heads
        self.causal = causal
        self.Wqkv = nn.Linear(embed_dim, 3 * embed_dim, bias=bias, device=device, dtype=dtype)
        self.inner_attn = FlashAttention(attention_dropout=attention_dropout)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=bias, device=device, dtype=dtype)

    def forward(
        self, x: Tensor, key_padding_mask: Tensor | None = None, need_weights: bool = False
    ) -> tuple[Tensor, None]:
        """Attends.

        Args:
            x: (b, s, embed_dim).
            key_padding_mask: (b, s), bool: True for tokens that count.
            need_weights: must be False.

        Returns:
            As x, and None, the place of the weights.
        """
        qkv = torch.unflatten(self.Wqkv(x), -1, (3, self.num_heads, self.head_dim))
        context, weights = self.inner_attn(
            qkv, key_padding_mask=key_padding_mask, causal=self.causal, need_weights=need_weights
        )
        return self.out_proj(context.flatten(-2)), weights
