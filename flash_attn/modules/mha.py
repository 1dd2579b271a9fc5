"""Multi-head attention: projections, attention, and generation with a key and value cache."""

import torch
import torch.utils.checkpoint
from torch import Tensor, nn

from flash_attn.bert_padding import pad_input, unpad_input
from flash_attn.flash_attn_interface import flash_attn_with_kvcache
from flash_attn.layers.rotary import RotaryEmbedding
from flash_attn.modules.attention import (
    CrossAttention,
    FlashAttention,
    FlashCrossAttention,
    FlashSelfAttention,
    SelfAttention,
    get_alibi_slopes,
)
from flash_attn.utils.generation import InferenceParams

__all__ = [
    "MHA",
    "CrossAttention",
    "FlashAttention",
    "FlashCrossAttention",
    "FlashMHA",
    "FlashSelfAttention",
    "SelfAttention",
    "get_alibi_slopes",
]


def _update_kv_cache(kv: Tensor, inference_params: InferenceParams, layer_idx: int) -> Tensor:
    """Writes keys and values to the cache of a layer, which is made if it is not there.

    Args:
        kv: (b, s, 2, hk, d), the tokens that follow those in the cache.

    Returns:
        (b, seqlen_offset + s, 2, hk, d): a view of the cache, all tokens so far.
    """
    caches = inference_params.key_value_memory_dict
    if layer_idx not in caches:
        caches[layer_idx] = kv.new_empty(
            inference_params.max_batch_size, inference_params.max_seqlen, *kv.shape[2:]
        )
    rows = caches[layer_idx][inference_params.batch_size_offset :][: kv.shape[0]]
    start, end = inference_params.seqlen_offset, inference_params.seqlen_offset + kv.shape[1]
    if rows.shape[0] < kv.shape[0] or rows.shape[1] < end:
        raise RuntimeError(
            f"The cache of layer {layer_idx} has shape {tuple(caches[layer_idx].shape)}: "
            f"there is no room for rows {inference_params.batch_size_offset} to "
            f"{inference_params.batch_size_offset + kv.shape[0]}, positions {start} to {end}"
        )
    rows[:, start:end] = kv
    return rows[:, :end]


class MHA(nn.Module):
    """Multi-head self-attention and cross-attention with their projections.

    Parameters are called as in FlashAttention-2, so that its checkpoints load: Wqkv, or Wq and Wkv
    for cross-attention, out_proj, and dwconv_qkv or dwconv_q and dwconv_kv.

    Args:
        embed_dim: size of a token.
        num_heads: query heads; divides embed_dim.
        num_heads_kv: key heads (GQA, MQA); divides num_heads. None for num_heads.
        cross_attn: keys and values come from x_kv.
        qkv_proj_bias, out_proj_bias: whether the projections have a bias.
        dropout: the probability of dropping an attention weight, in training mode.
        softmax_scale: what scores are multiplied with; None for head_dim ** -0.5.
        causal: a query sees no key behind it.
        layer_idx: the name of this layer's cache; needed for generation.
        dwconv: a causal depthwise convolution over three tokens behind the input projection.
        rotary_emb_dim: how many elements of a head are rotated by its position; 0 for none.
        rotary_emb_base, rotary_emb_scale_base, rotary_emb_interleaved: see `RotaryEmbedding`.
        use_alibi: a bias that is linear in the distance (arXiv:2108.12409).
        window_size: (left, right): how far a query sees; -1 is infinite.
        fused_bias_fc: accepted for FlashAttention-2's sake, without effect.
        use_flash_attn: attention through `flash_attn`; otherwise in plain torch operations, without
            ALiBi, windows and packed sequences.
        return_residual: return x beside the result.
        checkpointing: compute attention again in the backward pass instead of keeping its tensors.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_heads_kv: int | None = None,
        cross_attn: bool = False,
        qkv_proj_bias: bool = True,
        out_proj_bias: bool = True,
        dropout: float = 0.0,
        softmax_scale: float | None = None,
        causal: bool = False,
        layer_idx: int | None = None,
        dwconv: bool = False,
        rotary_emb_dim: int = 0,
        rotary_emb_base: float = 10000.0,
        rotary_emb_scale_base: float | None = None,
        rotary_emb_interleaved: bool = False,
        use_alibi: bool = False,
        window_size: tuple[int, int] = (-1, -1),
        fused_bias_fc: bool = False,
        use_flash_attn: bool = False,
        return_residual: bool = False,
        checkpointing: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_heads = num_heads
        self.num_heads_kv = num_heads if num_heads_kv is None else num_heads_kv
        self.cross_attn = cross_attn
        self.causal = causal
        self.layer_idx = layer_idx
        self.dwconv = dwconv
        self.rotary_emb_dim = rotary_emb_dim
        self.use_flash_attn = use_flash_attn
        self.return_residual = return_residual
        self.checkpointing = checkpointing
        if embed_dim % num_heads != 0:
            raise ValueError(f"embed_dim {embed_dim} must be divisible by num_heads {num_heads}")
        if num_heads % self.num_heads_kv != 0:
            raise ValueError(
                f"num_heads {num_heads} must be divisible by num_heads_kv {self.num_heads_kv}"
            )
        if cross_attn and rotary_emb_dim > 0:
            raise ValueError("MHA with rotary embedding does not support cross-attention")
        if not use_flash_attn and (use_alibi or tuple(window_size) != (-1, -1)):
            raise ValueError("use_alibi and window_size need use_flash_attn")
        self.head_dim = embed_dim // num_heads

        factory = {"device": device, "dtype": dtype}
        kv_dim = 2 * self.head_dim * self.num_heads_kv
        if cross_attn:
            self.Wq = nn.Linear(embed_dim, embed_dim, bias=qkv_proj_bias, **factory)
            self.Wkv = nn.Linear(embed_dim, kv_dim, bias=qkv_proj_bias, **factory)
        else:
            self.Wqkv = nn.Linear(embed_dim, embed_dim + kv_dim, bias=qkv_proj_bias, **factory)
        if dwconv and not cross_attn and self.num_heads_kv == num_heads:
            self.dwconv_qkv = _depthwise_conv(embed_dim + kv_dim, **factory)
        elif dwconv:
            self.dwconv_q = _depthwise_conv(embed_dim, **factory)
            self.dwconv_kv = _depthwise_conv(kv_dim, **factory)
        if rotary_emb_dim > 0:
            self.rotary_emb = RotaryEmbedding(
                rotary_emb_dim,
                base=rotary_emb_base,
                scale_base=rotary_emb_scale_base,
                interleaved=rotary_emb_interleaved,
                device=device,
            )

        inner = {
            "causal": causal,
            "softmax_scale": softmax_scale,
            "attention_dropout": dropout,
        }
        if use_flash_attn:
            slopes = torch.tensor(get_alibi_slopes(num_heads), device=device) if use_alibi else None
            inner |= {"alibi_slopes": slopes, "window_size": window_size}
        self.inner_attn = (FlashSelfAttention if use_flash_attn else SelfAttention)(**inner)
        self.inner_cross_attn = (FlashCrossAttention if use_flash_attn else CrossAttention)(**inner)
        self.out_proj = nn.Linear(embed_dim, embed_dim, bias=out_proj_bias, **factory)

    def reset_parameters(self) -> None:
        """Initialises the projections as torch does."""
        for module in self.children():
            if isinstance(module, nn.Linear | nn.Conv1d):
                module.reset_parameters()

    def allocate_inference_cache(
        self, batch_size: int, max_seqlen: int, dtype: torch.dtype | None = None
    ) -> Tensor:
        """(batch_size, max_seqlen, 2, hk, d), a cache for `InferenceParams`."""
        weight = self.out_proj.weight
        return torch.empty(
            (batch_size, max_seqlen, 2, self.num_heads_kv, self.head_dim),
            dtype=weight.dtype if dtype is None else dtype,
            device=weight.device,
        )

    def forward(
        self,
        x: Tensor,
        x_kv: Tensor | None = None,
        key_padding_mask: Tensor | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        mixer_subset: slice | Tensor | None = None,
        inference_params: InferenceParams | None = None,
        **kwargs,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """Attends.

        Args:
            x: (b, s, embed_dim), or (t, embed_dim) with cu_seqlens.
            x_kv: (b, sk, embed_dim) or (tk, embed_dim): cross-attention only. None for x.
            key_padding_mask: (b, sk), bool: True for keys that may be seen. With use_flash_attn,
                self-attention computes the masked tokens not at all and returns 0 for them.
            cu_seqlens: (b + 1,), int32: where each sequence begins along t. Needs use_flash_attn.
            max_seqlen: the length of the longest; needed with cu_seqlens.
            mixer_subset: cross-attention only: which tokens of x make queries (x[:, mixer_subset]).
            inference_params: generation: attend to the cache, and put keys and values into it.
            **kwargs: for inner_attn or inner_cross_attn; for example cu_seqlens_k and max_seqlen_k,
                packed cross-attention's.

        Returns:
            As x (its subset); with return_residual a pair of that and x.

        Raises:
            RuntimeError: the options do not go together, or the cache is too small.
        """
        packed = cu_seqlens is not None
        if packed and (max_seqlen is None or not self.use_flash_attn or self.dwconv):
            raise RuntimeError(
                "cu_seqlens needs max_seqlen and use_flash_attn, and excludes dwconv"
            )
        if packed and key_padding_mask is not None:
            raise RuntimeError("cu_seqlens and key_padding_mask exclude each other")
        if inference_params is not None and (packed or key_padding_mask is not None or self.dwconv):
            raise RuntimeError("inference_params excludes cu_seqlens, key_padding_mask and dwconv")
        if not self.cross_attn and (x_kv is not None or mixer_subset is not None):
            raise RuntimeError("x_kv and mixer_subset are for cross-attention")

        if key_padding_mask is not None and self.use_flash_attn and not self.cross_attn:
            if self.dwconv:
                raise RuntimeError("key_padding_mask with use_flash_attn excludes dwconv")
            tokens, indices, cu_seqlens, max_seqlen, _ = unpad_input(x, key_padding_mask)
            context = self._self_attention(
                tokens, None, cu_seqlens=cu_seqlens, max_seqlen=max_seqlen, **kwargs
            )
            out = pad_input(self._project_out(context), indices, *x.shape[:2])
            return (out, x) if self.return_residual else out

        if packed:
            kwargs |= {"cu_seqlens": cu_seqlens, "max_seqlen": max_seqlen}
        elif not self.use_flash_attn and key_padding_mask is not None:
            kwargs["key_padding_mask"] = key_padding_mask
        if self.cross_attn:
            x_q = x if mixer_subset is None else x[:, mixer_subset]
            x_kv = x if x_kv is None else x_kv
            unpad_mask = key_padding_mask if self.use_flash_attn else None
            context = self._cross_attention(x_q, x_kv, unpad_mask, inference_params, **kwargs)
        else:
            context = self._self_attention(x, inference_params, **kwargs)
        out = self._project_out(context)
        return (out, x) if self.return_residual else out

    def _project_out(self, context: Tensor) -> Tensor:
        return self.out_proj(context.flatten(-2))

    def _inner(self, module: nn.Module, *tensors: Tensor, **kwargs) -> Tensor:
        if not self.checkpointing:
            return module(*tensors, **kwargs)
        return torch.utils.checkpoint.checkpoint(module, *tensors, use_reentrant=False, **kwargs)

    def _self_attention(self, x, inference_params, **kwargs) -> Tensor:
        qkv = self.Wqkv(x)
        grouped = self.num_heads_kv != self.num_heads
        if self.dwconv and not grouped:
            qkv = _convolve(self.dwconv_qkv, qkv)
        elif self.dwconv:
            q, kv = qkv.tensor_split((self.embed_dim,), dim=-1)
            qkv = torch.cat((_convolve(self.dwconv_q, q), _convolve(self.dwconv_kv, kv)), dim=-1)
        # The function and not the method, which Dynamo cannot trace where a default device is set.
        qkv = torch.unflatten(qkv, -1, (-1, self.head_dim))  # (..., h + 2 hk, d)

        rotated_by_cache = self._rotates_in_cache(inference_params)
        if self.rotary_emb_dim > 0 and not rotated_by_cache:
            qkv = self._rotate(qkv, inference_params, **kwargs)
        q, kv = qkv[..., : self.num_heads, :], qkv[..., self.num_heads :, :]
        kv = torch.unflatten(kv, -2, (2, self.num_heads_kv))
        if inference_params is not None:
            return self._attend_to_cache(q, kv, inference_params, rotated_by_cache, **kwargs)
        if not grouped:
            qkv = torch.unflatten(qkv, -2, (3, self.num_heads))
            return self._inner(self.inner_attn, qkv, **kwargs)
        if not self.use_flash_attn:
            # Not inner_cross_attn, which aligns a padding mask with the last query.
            kv = kv.repeat_interleave(self.num_heads // self.num_heads_kv, dim=-2)
            qkv = torch.cat((q.unsqueeze(-3), kv), dim=-3)
            return self._inner(self.inner_attn, qkv, **kwargs)
        if "cu_seqlens" in kwargs:
            kwargs |= {"cu_seqlens_k": kwargs["cu_seqlens"], "max_seqlen_k": kwargs["max_seqlen"]}
        return self._inner(self.inner_cross_attn, q, kv, **kwargs)

    def _cross_attention(self, x_q, x_kv, unpad_mask, inference_params, **kwargs) -> Tensor:
        if unpad_mask is not None:
            x_kv, _, cu_seqlens_k, max_seqlen_k, _ = unpad_input(x_kv, unpad_mask)
        q, kv = self.Wq(x_q), self.Wkv(x_kv)
        if self.dwconv:
            if unpad_mask is not None:
                raise RuntimeError("key_padding_mask with use_flash_attn excludes dwconv")
            q, kv = _convolve(self.dwconv_q, q), _convolve(self.dwconv_kv, kv)
        q = torch.unflatten(q, -1, (self.num_heads, self.head_dim))
        kv = torch.unflatten(kv, -1, (2, self.num_heads_kv, self.head_dim))
        if inference_params is not None:
            return self._attend_to_cache(q, kv, inference_params, False, **kwargs)
        if unpad_mask is None:
            return self._inner(self.inner_cross_attn, q, kv, **kwargs)
        batch, seqlen = q.shape[:2]
        context = self._inner(
            self.inner_cross_attn,
            q.flatten(0, 1),
            kv,
            cu_seqlens=torch.arange(batch + 1, dtype=torch.int32, device=q.device) * seqlen,
            max_seqlen=seqlen,
            cu_seqlens_k=cu_seqlens_k,
            max_seqlen_k=max_seqlen_k,
            **kwargs,
        )
        return torch.unflatten(context, 0, (batch, seqlen))

    # ----------------------------------------------------------------------------------------------
    # Positions and the cache

    def _rotates_in_cache(self, inference_params: InferenceParams | None) -> bool:
        """Whether `flash_attn_with_kvcache` rotates q and k: it takes one table for both, and
        multiples of 16."""
        return (
            inference_params is not None
            and inference_params.seqlen_offset > 0
            and self.use_flash_attn
            and self.rotary_emb_dim > 0
            and self.rotary_emb_dim % 16 == 0
            and self.rotary_emb.scale is None
        )

    def _rotate(
        self,
        qkv: Tensor,
        inference_params: InferenceParams | None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        **_,
    ) -> Tensor:
        if inference_params is None:
            return self.rotary_emb(
                qkv, max_seqlen=max_seqlen, num_heads_q=self.num_heads, cu_seqlens=cu_seqlens
            )
        offset = _cache_seqlens(inference_params, qkv.shape[0])
        return self.rotary_emb(
            qkv,
            seqlen_offset=offset,
            max_seqlen=inference_params.max_seqlen,
            num_heads_q=self.num_heads,
        )

    def _update_kv_cache(self, kv: Tensor, inference_params: InferenceParams) -> Tensor:
        """See the function of the same name."""
        if self.layer_idx is None:
            raise RuntimeError("Generation requires layer_idx in the constructor")
        return _update_kv_cache(kv, inference_params, self.layer_idx)

    def _attend_to_cache(
        self,
        q: Tensor,
        kv: Tensor,
        inference_params: InferenceParams,
        rotate: bool,
        **kwargs,
    ) -> Tensor:
        """Puts kv into the cache and attends to it all. `rotate`: rotate q and k before."""
        if inference_params.seqlen_offset == 0 or not self.use_flash_attn:
            return self.inner_cross_attn(q, self._update_kv_cache(kv, inference_params), **kwargs)
        caches = inference_params.key_value_memory_dict
        if self.layer_idx not in caches:
            raise RuntimeError(
                f"seqlen_offset is {inference_params.seqlen_offset}, but layer {self.layer_idx} "
                "has no cache: the prompt must be passed with seqlen_offset = 0 first"
            )
        cache = caches[self.layer_idx][inference_params.batch_size_offset :][: q.shape[0]]
        cos = sin = None
        if rotate:
            self.rotary_emb._update_cos_sin_cache(
                inference_params.max_seqlen, device=q.device, dtype=q.dtype
            )
            cos, sin = self.rotary_emb._cos_cached, self.rotary_emb._sin_cached
        inner = self.inner_cross_attn
        return flash_attn_with_kvcache(
            q,
            cache[:, :, 0],
            cache[:, :, 1],
            kv[:, :, 0],
            kv[:, :, 1],
            rotary_cos=cos,
            rotary_sin=sin,
            cache_seqlens=_cache_seqlens(inference_params, q.shape[0]),
            softmax_scale=inner.softmax_scale,
            causal=inner.causal,
            window_size=inner.window_size,
            rotary_interleaved=rotate and self.rotary_emb.interleaved,
            alibi_slopes=inner.alibi_slopes,
        )


def _cache_seqlens(inference_params: InferenceParams, batch: int) -> int | Tensor:
    """Tokens in the cache: one number, or (batch,) int32."""
    lengths = inference_params.lengths_per_sample
    if lengths is None:
        return inference_params.seqlen_offset
    return lengths[:batch].to(torch.int32)


def _depthwise_conv(channels: int, **factory) -> nn.Conv1d:
    return nn.Conv1d(channels, channels, kernel_size=3, padding=2, groups=channels, **factory)


def _convolve(conv: nn.Conv1d, x: Tensor) -> Tensor:
    """x (b, s, channels). Causal: what the padding adds at the end is cut off."""
    return conv(x.transpose(1, 2))[..., : x.shape[1]].transpose(1, 2).contiguous()


class FlashMHA(MHA):
    """Multi-head self-attention through `flash_attn`.

    Parameters are Wqkv and out_proj, each with a bias, as in FlashAttention's first generation.

    Args:
        embed_dim: size of a token.
        num_heads: heads; divides embed_dim.
        dropout: the probability of dropping an attention weight, in training mode.
        causal: a query sees no key behind it.
        layer_idx: the name of this layer's cache; needed for generation.
    """

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        dropout: float = 0.0,
        causal: bool = False,
        layer_idx: int | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ):
        super().__init__(
            embed_dim,
            num_heads,
            dropout=dropout,
            causal=causal,
            layer_idx=layer_idx,
            use_flash_attn=True,
            device=device,
            dtype=dtype,
        )

    def forward(
        self,
        x: Tensor,
        key_padding_mask: Tensor | None = None,
        inference_params: InferenceParams | None = None,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
    ) -> Tensor:
        """Attends.

        Args:
            x: (b, s, embed_dim), or (t, embed_dim) with cu_seqlens.
            key_padding_mask: (b, s), bool: True for tokens that count; others give 0.
            inference_params: generation: attend to the cache, and put keys and values into it.
            cu_seqlens: (b + 1,), int32: where each sequence begins along t.
            max_seqlen: the length of the longest; needed with cu_seqlens.

        Returns:
            As x.

        Raises:
            RuntimeError: the options do not go together, or the cache is too small.
        """
        return super().forward(
            x,
            key_padding_mask=key_padding_mask,
            inference_params=inference_params,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
        )
