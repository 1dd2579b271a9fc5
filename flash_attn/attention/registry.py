"""Registration of the `flash_attn` ops with torch."""

from __future__ import annotations

import torch

library = torch.library.Library("flash_attn", "DEF")

# The layout of an output follows the layout of an input, so that a compiler must keep the latter.
_TAGS = (
    torch.Tag.pt2_compliant_tag,
    getattr(torch.Tag, "needs_exact_strides", torch.Tag.needs_fixed_stride_order),
)


def define(schema: str, differentiable: bool = False):
    """Decorates the kernel, for tensors on every device, of the op that `schema` declares.

    Gradients pass by an op that is not differentiable: its results do not require them.
    """

    def register(kernel):
        name = schema[: schema.index("(")]
        library.define(schema, tags=_TAGS)
        library.impl(name, kernel, "CompositeExplicitAutograd")
        if not differentiable:
            library.impl(name, torch.library.fallthrough_kernel, "Autograd")
        return kernel

    return register


def fake(name: str):
    """Decorates the function that computes the shapes of an op's results."""
    return torch.library.register_fake(f"flash_attn::{name}", lib=library)


def batched(name: str):
    """Decorates the op's rule for `torch.vmap`."""
    return torch.library.register_vmap(f"flash_attn::{name}", lib=library)
