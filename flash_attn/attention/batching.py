"""The ops under `torch.vmap`: the mapped dimension becomes part of the heads.

Heads are computed independently of each other whatever the layout, dense or variable length, so
that one rule serves both, and what belongs to a head (ALiBi slopes, sinks) may be mapped too. With
dropout every element of the mapped dimension gets its own mask.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.attention import library  # noqa: F401
from flash_attn.attention.registry import batched
from flash_attn.backends.interface import MIN_DROPOUT_P

# The dimension of the heads, counted from the end, of every argument and result that has heads.
_HEADS = {
    "q": -2,
    "k": -2,
    "v": -2,
    "out": -2,
    "dout": -2,
    "softmax_lse": -2,
    "dsoftmax_lse": -2,
    "alibi_slopes": -1,
    "s_aux": -1,
}


def _fold(x: Tensor, in_dim: int | None, heads: int, size: int) -> Tensor:
    if in_dim is None:
        x = x.unsqueeze(heads - 1).expand(*[-1] * (x.dim() + heads), size, *[-1] * -heads)
    else:
        x = x.movedim(in_dim, heads - 1)
    return x.flatten(heads - 1, heads)


def _unfold(x: Tensor, heads: int, size: int) -> tuple[Tensor, int | None]:
    if x.numel() == 0 and x.dim() == 1:  # a result that was not asked for
        return x, None
    x = x.unflatten(heads, (size, x.shape[heads] // size))
    return x, x.dim() + heads - 1


def _register(name: str, heads_of_results: list[int | None]) -> None:
    op = getattr(torch.ops.flash_attn, name)
    names = [argument.name for argument in op.default._schema.arguments]

    @batched(name)
    def _(info, in_dims, *values):
        arguments = dict(zip(names, values, strict=False))  # without trailing defaults
        in_dims = dict(zip(names, in_dims, strict=False))
        if info.randomness == "same" and arguments["dropout_p"] >= MIN_DROPOUT_P:
            raise RuntimeError(
                "flash_attn: vmap with dropout needs randomness='different', which gives every "
                "element a mask of its own"
            )
        for key, x in arguments.items():
            if not isinstance(x, Tensor):
                continue
            if key in _HEADS:
                arguments[key] = _fold(x, in_dims[key], _HEADS[key], info.batch_size)
            elif key == "rng_state" and in_dims[key] is not None:
                arguments[key] = x.select(in_dims[key], 0)  # heads differ, and so do their masks
            elif in_dims[key] is not None:
                raise RuntimeError(f"flash_attn: {key} cannot be mapped by vmap")
        results = [
            (x, None) if heads is None else _unfold(x, heads, info.batch_size)
            for x, heads in zip(op(*arguments.values()), heads_of_results, strict=True)
        ]
        return tuple(x for x, _ in results), tuple(out_dim for _, out_dim in results)


# out, softmax_lse, S_dmask, rng_state; dq, dk, dv, ds_aux
_register("_flash_attn_forward", [-2, -2, -3, None])
_register("_flash_attn_varlen_forward", [-2, -2, -3, None])
_register("attention_backward", [-2, -2, -2, -1])
