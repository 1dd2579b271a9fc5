"""Gradients of the forward ops, for calls that pass through torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.attention.library import refuse_cache
from flash_attn.attention.registry import library


def _setup_context(names: list[str]):
    def setup_context(ctx, inputs, output):
        given = dict(zip(names, inputs, strict=True))
        out, softmax_lse, s_dmask, rng_state = output
        ctx.mark_non_differentiable(s_dmask, rng_state)
        ctx.set_materialize_grads(False)
        ctx.numbers = {name: x for name, x in given.items() if not isinstance(x, Tensor)}
        tensors = {name: x for name, x in given.items() if isinstance(x, Tensor)}
        tensors |= {"out": out, "softmax_lse": softmax_lse, "rng_state": rng_state}
        ctx.names = list(tensors)
        ctx.save_for_backward(*tensors.values())

    return setup_context


def _formula(names: list[str]):
    def backward(ctx, dout, dsoftmax_lse, *_):
        given = ctx.numbers | dict(zip(ctx.names, ctx.saved_tensors, strict=True))
        refuse_cache(given.get("block_table"), given.get("leftpad_k"))
        out = given["out"]
        dq, dk, dv, ds_aux = torch.ops.flash_attn.attention_backward(
            torch.zeros_like(out) if dout is None else dout,
            given["q"],
            given["k"],
            given["v"],
            out,
            given["softmax_lse"],
            dsoftmax_lse,
            given["dropout_p"],
            given["softmax_scale"],
            given["causal"],
            given["window_size_left"],
            given["window_size_right"],
            given["softcap"],
            given["alibi_slopes"],
            given["s_aux"],
            given["rng_state"],
            given.get("cu_seqlens_q"),
            given.get("cu_seqlens_k"),
            given.get("max_seqlen_q", 0),
            given.get("max_seqlen_k", 0),
            given.get("seqused_k"),
            given["deterministic"],
        )
        gradients = {"q": dq, "k": dk, "v": dv}
        if given["s_aux"] is not None:
            gradients["s_aux"] = ds_aux
        return tuple(gradients.get(name) for name in names)

    return backward


def _refuse(ctx, *_):
    raise RuntimeError("flash_attn: gradients of gradients are not supported")


def _register() -> None:
    for op in ("_flash_attn_forward", "_flash_attn_varlen_forward"):
        schema = getattr(torch.ops.flash_attn, op).default._schema
        names = [argument.name for argument in schema.arguments]
        torch.library.register_autograd(
            f"flash_attn::{op}", _formula(names), setup_context=_setup_context(names), lib=library
        )
    torch.library.register_autograd("flash_attn::attention_backward", _refuse, lib=library)


_register()
