"""Rotary position embedding: functions and the module that keeps the tables.

Conventions and the formula are those of `flash_attn.ops.rotary.apply_rotary`. The functions whose
name ends in an underscore work in place and return their first argument.
"""

import torch
from torch import Tensor, nn

from flash_attn.ops.rotary import apply_rotary, rotary_options, rotate_in_place

__all__ = [
    "RotaryEmbedding",
    "apply_rotary_emb",
    "apply_rotary_emb_func",
    "apply_rotary_emb_kv_",
    "apply_rotary_emb_qkv_",
    "apply_rotary_emb_torch",
    "rotate_half",
]


def rotate_half(x: Tensor, interleaved: bool = False) -> Tensor:
    """Every pair (x1, x2) of the last dimension as (-x2, x1): a rotation by a quarter turn."""
    if interleaved:
        return torch.stack((-x[..., 1::2], x[..., ::2]), dim=-1).flatten(-2)
    x1, x2 = x.chunk(2, dim=-1)
    return torch.cat((-x2, x1), dim=-1)


def apply_rotary_emb_torch(
    x: Tensor, cos: Tensor, sin: Tensor, interleaved: bool = False
) -> Tensor:
    """The rotation in plain torch operations, in the dtype of its arguments.

    Args:
        x: (b, s, h, d).
        cos, sin: (s, rotary_dim / 2) or (b, s, rotary_dim / 2).
        interleaved: pairs are (2i, 2i + 1); otherwise (i, i + rotary_dim / 2).

    Returns:
        As x. Differentiable in all three.
    """
    rotary_dim = 2 * cos.shape[-1]
    if rotary_dim > x.shape[-1]:
        raise RuntimeError(f"rotary_dim must be <= headdim, got {rotary_dim} and {x.shape[-1]}")
    cos, sin = (
        (t.repeat_interleave(2, dim=-1) if interleaved else t.repeat(*[1] * (t.dim() - 1), 2))
        for t in (cos, sin)
    )
    rotated, rest = x[..., :rotary_dim], x[..., rotary_dim:]
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    return torch.cat((rotated * cos + rotate_half(rotated, interleaved) * sin, rest), dim=-1)


def apply_rotary_emb(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    inplace: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotates the first rotary_dim elements of every row of x. Differentiable in x.

    Args:
        x: (b, s, h, d), or (t, h, d) with cu_seqlens.
        cos, sin: (positions, rotary_dim / 2) with rotary_dim <= d.
        interleaved: pairs are (2i, 2i + 1) (GPT-J); otherwise (i, i + rotary_dim / 2) (GPT-NeoX).
        inplace: write to x and return it.
        seqlen_offsets: the position of the first row of each sequence: int, or (b,) int32 or int64.
        cu_seqlens: (b + 1,), int32.
        max_seqlen: needed with cu_seqlens.

    Returns:
        As x.

    Raises:
        RuntimeError: shapes or dtypes do not fit, or a position has no row in cos and sin.
    """
    return apply_rotary(x, cos, sin, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, inplace)


apply_rotary_emb_func = apply_rotary_emb  # the name of FlashAttention 2.0


def apply_rotary_emb_qkv_(
    qkv: Tensor,
    cos: Tensor,
    sin: Tensor,
    cos_k: Tensor | None = None,
    sin_k: Tensor | None = None,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    num_heads_q: int | None = None,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotates q and k of a packed qkv in place. Differentiable in qkv.

    Args:
        qkv: (b, s, 3, h, d), or (b, s, h + 2 * hk, d) with num_heads_q = h; with cu_seqlens, t in
            place of b, s.
        cos, sin: (positions, rotary_dim / 2) with rotary_dim <= d.
        cos_k, sin_k: tables of their own for k, as xPos has them.
        interleaved, seqlen_offsets, cu_seqlens, max_seqlen: as in `apply_rotary_emb`.

    Returns:
        qkv.

    Raises:
        RuntimeError: shapes or dtypes do not fit, or a position has no row in cos and sin.
    """
    leading = 2 if cu_seqlens is None else 1
    packed = qkv.dim() == leading + 3
    if packed and qkv.shape[-3] != 3:
        raise RuntimeError(f"qkv must have shape (..., 3, nheads, headdim), got {tuple(qkv.shape)}")
    if not packed and num_heads_q is None:
        raise RuntimeError("num_heads_q must be given when qkv has shape (..., h + 2 * hk, d)")
    cos_k, sin_k = cos if cos_k is None else cos_k, sin if sin_k is None else sin_k

    def parts(qkv: Tensor):
        if packed:
            q, k = qkv[..., 0, :, :], qkv[..., 1, :, :]
            mergeable = qkv.stride(-3) == qkv.shape[-2] * qkv.stride(-2)
            both = qkv[..., :2, :, :].flatten(-3, -2) if mergeable else None
        else:
            num_heads = qkv.shape[-2]
            end_k = num_heads - (num_heads - num_heads_q) // 2
            q, k = qkv[..., :num_heads_q, :], qkv[..., num_heads_q:end_k, :]
            both = qkv[..., :end_k, :]
        if both is not None and cos_k is cos and sin_k is sin:
            return [(both, cos, sin)]
        return [(q, cos, sin), (k, cos_k, sin_k)]

    options = rotary_options(qkv, seqlen_offsets, cu_seqlens, max_seqlen, interleaved)
    return rotate_in_place(qkv, parts, options)


def apply_rotary_emb_kv_(
    kv: Tensor,
    cos: Tensor,
    sin: Tensor,
    interleaved: bool = False,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
) -> Tensor:
    """Rotates k of a packed kv in place. Differentiable in kv.

    Args:
        kv: (b, s, 2, h, d); with cu_seqlens (t, 2, h, d).
        cos, sin, interleaved, seqlen_offsets, cu_seqlens, max_seqlen: as in `apply_rotary_emb`.

    Returns:
        kv.

    Raises:
        RuntimeError: shapes or dtypes do not fit, or a position has no row in cos and sin.
    """
    if kv.shape[-3] != 2:
        raise RuntimeError(f"kv must have shape (..., 2, nheads, headdim), got {tuple(kv.shape)}")
    options = rotary_options(kv, seqlen_offsets, cu_seqlens, max_seqlen, interleaved)
    return rotate_in_place(kv, lambda kv: [(kv[..., 0, :, :], cos, sin)], options)


class RotaryEmbedding(nn.Module):
    """Rotary position embedding (RoFormer, arXiv:2104.09864) with tables that grow on demand.

    Position p turns pair i by the angle p * base ** (-2i / dim). With `scale_base` the rotation
    also scales q up and k down with the position (xPos, arXiv:2212.10554; 512 is a good value).

    Args:
        dim: rotary_dim, the number of elements of each row that are rotated.
        base: see above.
        interleaved: pairs are (2i, 2i + 1) (GPT-J); otherwise (i, i + dim / 2) (GPT-NeoX).
        scale_base: None for no scaling.
    """

    def __init__(
        self,
        dim: int,
        base: float = 10000.0,
        interleaved: bool = False,
        scale_base: float | None = None,
        device: torch.device | str | None = None,
    ):
        super().__init__()
        self.dim = dim
        self.base = float(base)
        self.interleaved = interleaved
        self.scale_base = scale_base
        self.register_buffer("inv_freq", self._compute_inv_freq(device), persistent=False)
        self.register_buffer("scale", self._compute_scale(device), persistent=False)
        self._seq_len_cached = 0
        self._cos_cached: Tensor | None = None
        self._sin_cached: Tensor | None = None
        self._cos_k_cached: Tensor | None = None
        self._sin_k_cached: Tensor | None = None

    def _compute_inv_freq(self, device=None) -> Tensor:
        exponent = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32) / self.dim
        return 1.0 / self.base**exponent

    def _compute_scale(self, device=None) -> Tensor | None:
        if self.scale_base is None:
            return None
        index = torch.arange(0, self.dim, 2, device=device, dtype=torch.float32)
        return (index + 0.4 * self.dim) / (1.4 * self.dim)

    def _update_cos_sin_cache(self, seqlen: int, device=None, dtype=None) -> None:
        """Makes the tables cover positions 0 to seqlen - 1 in this dtype on this device."""
        cached = self._cos_cached
        if (
            cached is not None
            and seqlen <= self._seq_len_cached
            and cached.device == device
            and cached.dtype == dtype
            and not (self.training and cached.is_inference())
        ):
            return
        self._seq_len_cached = seqlen
        # Angles are computed in float32 whatever the module was cast to: positions are large, and
        # bfloat16 holds integers up to 256 only.
        inv_freq, scale = self.inv_freq, self.scale
        if inv_freq.dtype != torch.float32 or inv_freq.device != device:
            inv_freq, scale = self._compute_inv_freq(device), self._compute_scale(device)
        angle = torch.outer(torch.arange(seqlen, device=device, dtype=torch.float32), inv_freq)
        cos, sin = angle.cos(), angle.sin()
        if scale is None:
            self._cos_cached, self._sin_cached = cos.to(dtype), sin.to(dtype)
            return
        # Only the ratio of the factors of a query and a key matters; counting from the middle keeps
        # both near 1.
        centred = torch.arange(seqlen, device=device, dtype=torch.float32) - seqlen // 2
        factor = scale ** (centred / self.scale_base)[:, None]
        self._cos_cached, self._sin_cached = (cos * factor).to(dtype), (sin * factor).to(dtype)
        self._cos_k_cached, self._sin_k_cached = (cos / factor).to(dtype), (sin / factor).to(dtype)

    def forward(
        self,
        qkv: Tensor,
        kv: Tensor | None = None,
        seqlen_offset: int | Tensor = 0,
        max_seqlen: int | None = None,
        num_heads_q: int | None = None,
        cu_seqlens: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Rotates q and k in place.

        Args:
            qkv: without kv: (b, s, 3, h, d), or (b, s, h + 2 * hk, d) with num_heads_q = h. With
                kv: q, (b, s, h, d).
            kv: (b, s, 2, hk, d).
            seqlen_offset: the position of the first row: int, or (b,) int32 or int64.
            max_seqlen: positions that the tables shall cover. Give it with a tensor offset:
                otherwise the tensor is read, which synchronises an accelerator.
            cu_seqlens: (b + 1,), int32, for packed sequences: t in place of b, s above. max_seqlen
                is then the length of the longest.

        Returns:
            qkv, or (q, kv).
        """
        if max_seqlen is not None:
            positions = max_seqlen
        elif isinstance(seqlen_offset, Tensor):
            positions = qkv.shape[1] + int(seqlen_offset.max())
        else:
            positions = qkv.shape[1] + seqlen_offset
        self._update_cos_sin_cache(positions, device=qkv.device, dtype=qkv.dtype)
        cos_k, sin_k = self._cos_k_cached, self._sin_k_cached
        options = {"interleaved": self.interleaved, "seqlen_offsets": seqlen_offset}
        if cu_seqlens is not None:
            options |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        if kv is None:
            return apply_rotary_emb_qkv_(
                qkv,
                self._cos_cached,
                self._sin_cached,
                cos_k,
                sin_k,
                num_heads_q=num_heads_q,
                **options,
            )
        q = apply_rotary_emb(qkv, self._cos_cached, self._sin_cached, inplace=True, **options)
        if cos_k is None:
            cos_k, sin_k = self._cos_cached, self._sin_cached
        return q, apply_rotary_emb_kv_(kv, cos_k, sin_k, **options)
