"""Gradients of the forward ops, for calls that pass through torch's dispatcher."""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.attention.library import NO_SECOND_DERIVATIVE, refuse_cache
from flash_attn.attention.registry import library
from flash_attn.backends import chosen_in_block, use_backend


class _Gradients(torch.autograd.Function):
    """The op `attention_backward`, with a gradient that is refused: without it, it would be 0."""

    generate_vmap_rule = True

    @staticmethod
    def forward(*arguments):
        return torch.ops.flash_attn.attention_backward(*arguments)

    @staticmethod
    def setup_context(ctx, inputs, output):
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(NO_SECOND_DERIVATIVE)


def _setup_context(names: list[str]):
    def setup_context(ctx, inputs, output):
        given = dict(zip(names, inputs, strict=True))
        out, softmax_lse, s_dmask, rng_state = output
        ctx.mark_non_differentiable(s_dmask, rng_state)
        ctx.set_materialize_grads(False)
        ctx.backend = chosen_in_block()
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
        with use_backend(ctx.backend):
            dq, dk, dv, ds_aux = _Gradients.apply(
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


def _register(name: str) -> type[torch.autograd.Function]:
    """Registers the gradient of a forward op, and returns it as an autograd function as well.

    `torch.func` cannot differentiate through a registered gradient, but through a function.
    """
    schema = getattr(torch.ops.flash_attn, name).default._schema
    names = [argument.name for argument in schema.arguments]
    setup_context, backward = _setup_context(names), _formula(names)
    torch.library.register_autograd(
        f"flash_attn::{name}", backward, setup_context=setup_context, lib=library
    )

    class Transformable(torch.autograd.Function):
        generate_vmap_rule = True

        @staticmethod
        def forward(*arguments):
            return getattr(torch.ops.flash_attn, name)(*arguments)

    Transformable.setup_context = staticmethod(setup_context)
    Transformable.backward = staticmethod(backward)
    return Transformable


transformable_forward = _register("_flash_attn_forward").apply
transformable_varlen_forward = _register("_flash_attn_varlen_forward").apply
