"""Attention without projections, as modules.

`Flash...` modules call the functions of `flash_attn`; `SelfAttention` and `CrossAttention` do the
same in plain torch operations. Dropout acts in training mode only. Notation: batch b, query length
sq, key length sk, query heads h, key heads hk, head dimension d, packed tokens t.
"""

import torch
from torch import Tensor, nn

from flash_attn.flash_attn_interface import (
    flash_attn_func,
    flash_attn_kvpacked_func,
    flash_attn_qkvpacked_func,
    flash_attn_varlen_kvpacked_func,
    flash_attn_varlen_qkvpacked_func,
)


def get_alibi_slopes(nheads: int) -> list[float]:
    """The slopes of ALiBi (arXiv:2108.12409): one for each head, a geometric series.

    For n heads, n a power of two, 2 ** (-8 / n), 2 ** (-16 / n), ... For other numbers the series
    of the power of two below comes first, then every second slope of the series of the one above.
    """

    def series(n: int) -> list[float]:
        return [2.0 ** (-8.0 * i / n) for i in range(1, n + 1)]

    power = 1 << (nheads.bit_length() - 1)
    return series(power) + series(2 * power)[0::2][: nheads - power]


class _Attention(nn.Module):
    """What all modules here are made of."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
        deterministic: bool = False,
    ):
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)
        self.window_size = window_size
        if alibi_slopes is not None:
            alibi_slopes = torch.as_tensor(alibi_slopes, dtype=torch.float32)
        self.register_buffer("alibi_slopes", alibi_slopes, persistent=False)
        self.deterministic = deterministic

    def _apply(self, fn, *args, **kwargs):
        # Slopes are float32 by definition: they move with the module but are not cast with it.
        slopes = self.alibi_slopes
        super()._apply(fn, *args, **kwargs)
        if slopes is not None and self.alibi_slopes.dtype != slopes.dtype:
            self.alibi_slopes = slopes.to(self.alibi_slopes.device)
        return self

    def _options(self, causal: bool | None) -> dict:
        return {
            "dropout_p": self.drop.p if self.training else 0.0,
            "softmax_scale": self.softmax_scale,
            "causal": self.causal if causal is None else causal,
            "window_size": self.window_size,
            "alibi_slopes": self.alibi_slopes,
            "deterministic": self.deterministic,
        }

    def extra_repr(self) -> str:
        words = [f"causal={self.causal}"]
        if self.softmax_scale is not None:
            words.append(f"softmax_scale={self.softmax_scale}")
        if tuple(self.window_size) != (-1, -1):
            words.append(f"window_size={tuple(self.window_size)}")
        return ", ".join(words)


class FlashAttention(_Attention):
    """Attention of given q, k and v.

    Args:
        num_heads: query heads.
        head_dim: 1 to 256.
        dropout: the probability of dropping an attention weight, in training mode.
        causal: a query sees no key behind it; aligned at the last query and key.
        window_size: (left, right): how far a query sees; -1 is infinite.
        alibi_slopes: (num_heads,) or (b, num_heads), or None.
    """

    def __init__(
        self,
        num_heads: int,
        head_dim: int,
        dropout: float = 0.0,
        causal: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        alibi_slopes: Tensor | None = None,
    ):
        super().__init__(
            causal=causal,
            attention_dropout=dropout,
            window_size=window_size,
            alibi_slopes=alibi_slopes,
        )
        self.num_heads = num_heads
        self.head_dim = head_dim

    def reset_parameters(self) -> None:
        """There are none; the method is there for code that resets every module."""

    def forward(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """q (b, sq, h, d), k and v (b, sk, hk, d) with hk a divisor of h. Returns (b, sq, h, d).

        Raises:
            RuntimeError: q does not have the module's heads and head dimension, or what
                `flash_attn_func` raises.
        """
        if q.shape[-2:] != (self.num_heads, self.head_dim):
            raise RuntimeError(
                f"q must have shape (batch, seqlen, {self.num_heads}, {self.head_dim}), "
                f"got {tuple(q.shape)}"
            )
        return flash_attn_func(q, k, v, **self._options(None))

    def extra_repr(self) -> str:
        return f"{self.num_heads}, {self.head_dim}, {super().extra_repr()}"


class FlashSelfAttention(_Attention):
    """Attention of a packed qkv.

    Args:
        causal: a query sees no key behind it.
        softmax_scale: what scores are multiplied with; None for d ** -0.5.
        attention_dropout: the probability of dropping an attention weight, in training mode.
        window_size: (left, right): how far a query sees; -1 is infinite.
        alibi_slopes: (h,) or (b, h), or None.
        deterministic: bitwise reproducible gradients.
    """

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attention of every sequence with itself.

        Args:
            qkv: (b, s, 3, h, d), or (t, 3, h, d) with cu_seqlens.
            causal: overrides the module's.
            cu_seqlens: (b + 1,), int32: where each sequence begins along t.
            max_seqlen: the length of the longest; needed with cu_seqlens.

        Returns:
            (b, s, h, d), or (t, h, d).
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_qkvpacked_func(qkv, **options)
        return flash_attn_varlen_qkvpacked_func(qkv, cu_seqlens, max_seqlen, **options)


class FlashCrossAttention(_Attention):
    """Attention of q and a packed kv. Arguments as of `FlashSelfAttention`."""

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
        alibi_slopes: Tensor | None = None,
        window_size: tuple[int, int] = (-1, -1),
        deterministic: bool = False,
    ):
        super().__init__(
            causal, softmax_scale, attention_dropout, window_size, alibi_slopes, deterministic
        )

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        cu_seqlens_k: Tensor | None = None,
        max_seqlen_k: int | None = None,
    ) -> Tensor:
        """Attention of every sequence of q with the sequence of kv.

        Args:
            q: (b, sq, h, d), or (tq, h, d) with cu_seqlens.
            kv: (b, sk, 2, hk, d), or (tk, 2, hk, d) with cu_seqlens; hk divides h.
            causal: overrides the module's; aligned at the last query and key.
            cu_seqlens, cu_seqlens_k: (b + 1,), int32: where each sequence begins along tq and tk.
            max_seqlen, max_seqlen_k: the lengths of the longest; needed with cu_seqlens.

        Returns:
            As q.
        """
        options = self._options(causal)
        if cu_seqlens is None:
            return flash_attn_kvpacked_func(q, kv, **options)
        return flash_attn_varlen_kvpacked_func(
            q, kv, cu_seqlens, cu_seqlens_k, max_seqlen, max_seqlen_k, **options
        )


def _attention(
    q: Tensor, kv: Tensor, scale: float | None, hidden: Tensor | None, drop: nn.Dropout
) -> Tensor:
    """q (b, sq, h, d), kv (b, sk, 2, hk, d), hidden bool, to be broadcast to (b, h, sq, sk)."""
    k, v = kv.repeat_interleave(q.shape[2] // kv.shape[3], dim=3).unbind(dim=2)
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    scores = torch.einsum("bihd,bjhd->bhij", q, k * scale).float()
    if hidden is not None:
        # Not -inf: a row that sees nothing would have NaN gradients. Such a row is zeroed below.
        scores = scores.masked_fill(hidden, torch.finfo(scores.dtype).min)
    weights = torch.softmax(scores, dim=-1)
    if hidden is not None:
        weights = weights.masked_fill(hidden, 0.0)
    return torch.einsum("bhij,bjhd->bihd", drop(weights.to(v.dtype)), v)


class SelfAttention(nn.Module):
    """`FlashSelfAttention` in plain torch operations: memory grows with the length squared.

    Arguments as there.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        qkv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """qkv (b, s, 3, h, d) to (b, s, h, d).

        key_padding_mask: (b, s), bool: True for keys that may be seen. A query without any gives 0.
        """
        causal = self.causal if causal is None else causal
        seqlen = qkv.shape[1]
        hidden = None if key_padding_mask is None else ~key_padding_mask.bool()[:, None, None, :]
        if causal:
            behind = torch.ones(seqlen, seqlen, dtype=torch.bool, device=qkv.device).triu(1)
            hidden = behind if hidden is None else hidden | behind
        return _attention(qkv[:, :, 0], qkv[:, :, 1:], self.softmax_scale, hidden, self.drop)


class CrossAttention(nn.Module):
    """`FlashCrossAttention` in plain torch operations: memory grows with the lengths' product.

    Arguments as there.
    """

    def __init__(
        self,
        causal: bool = False,
        softmax_scale: float | None = None,
        attention_dropout: float = 0.0,
    ):
        super().__init__()
        self.causal = causal
        self.softmax_scale = softmax_scale
        self.drop = nn.Dropout(attention_dropout)

    def forward(
        self,
        q: Tensor,
        kv: Tensor,
        causal: bool | None = None,
        key_padding_mask: Tensor | None = None,
    ) -> Tensor:
        """q (b, sq, h, d) and kv (b, sk, 2, hk, d) to (b, sq, h, d); hk divides h.

        key_padding_mask: (b, sk), bool: True for keys that may be seen; with causal, they are the
            first ones of each sequence, and the last of them is aligned with the last query. A
            query that sees none gives 0.
        """
        causal = self.causal if causal is None else causal
        hidden = None if key_padding_mask is None else ~key_padding_mask.bool()[:, None, None, :]
        if causal:
            query = torch.arange(q.shape[1], device=q.device)[:, None]
            key = torch.arange(kv.shape[1], device=q.device)
            length = kv.shape[1]
            if key_padding_mask is not None:
                length = key_padding_mask.sum(-1)[:, None, None, None]
            behind = key > query + length - q.shape[1]
            hidden = behind if hidden is None else hidden | behind
        return _attention(q, kv, self.softmax_scale, hidden, self.drop)
