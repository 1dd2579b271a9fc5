"""`scaled_dot_product_attention` on the CPU through `flash_attn`, if one asks for it.

Nothing here acts on import:

    import flash_attn.sdpa
    from torch.nn.attention import activate_flash_attention_impl, restore_flash_attention_impl

    flash_attn.sdpa.register()
    activate_flash_attention_impl("FlashAttention-Plus")
    ...
    restore_flash_attention_impl()

From then on torch's flash attention of the CPU, which `scaled_dot_product_attention` chooses when
there is no dropout, is this library's, compiled and differentiated code included. What this library
does not have (masks given as tensors, float64, causal attention of unequal lengths, whose alignment
differs) stays with torch's kernels.
"""

import warnings

import torch
from torch import Tensor

from flash_attn.backends import Options, backend_for

__all__ = ["NAME", "activate", "register"]

NAME = "FlashAttention-Plus"
_FORWARD = "_scaled_dot_product_flash_attention_for_cpu"
_BACKWARD = "_scaled_dot_product_flash_attention_for_cpu_backward"
_CPU = torch._C.DispatchKeySet(torch._C.DispatchKey.CPU)


class Activation:
    """While it lives, torch's operators are overridden; `remove` ends that."""

    def __init__(self, library: torch.library.Library):
        self._library = library

    def remove(self) -> None:
        """Gives torch its own kernels back."""
        self._library._destroy()


def register() -> None:
    """Adds `NAME` to what `torch.nn.attention.activate_flash_attention_impl` can activate.

    Raises:
        RuntimeError: this torch has no such registry.
    """
    from torch.nn import attention

    if not hasattr(attention, "register_flash_attention_impl"):
        raise RuntimeError(
            f"torch {torch.__version__} has no registry of flash attention implementations: "
            "call flash_attn.sdpa.activate() instead"
        )
    attention.register_flash_attention_impl(NAME, register_fn=activate)


def activate() -> Activation:
    """Overrides torch's flash attention of the CPU.

    Returns:
        An object whose `remove()` undoes it.

    Raises:
        RuntimeError: this torch cannot hand out the kernels that are overridden.
    """
    if not hasattr(torch.library, "get_kernel"):
        raise RuntimeError(
            f"torch {torch.__version__} is too old: it has no torch.library.get_kernel"
        )
    torch_forward, torch_backward = (
        torch.library.get_kernel(f"aten::{name}", "CPU") for name in (_FORWARD, _BACKWARD)
    )

    def forward(query, key, value, dropout_p=0.0, is_causal=False, *, attn_mask=None, scale=None):
        if not _serves(query, key, value, is_causal, attn_mask):
            return torch_forward.call_boxed(
                _CPU, query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        tensors = tuple(map(_rows, (query, key, value)))
        options = _options(query, is_causal, scale)
        # Results are laid out as torch's are, which compiled code relies on.
        out, lse, _ = backend_for(query).forward(
            *tensors, options, out=torch.empty_like(tensors[0])
        )
        return out.transpose(1, 2), lse.transpose(1, 2).contiguous().transpose(1, 2)

    def backward(
        grad_out,
        query,
        key,
        value,
        out,
        logsumexp,
        dropout_p,
        is_causal,
        *,
        attn_mask=None,
        scale=None,
    ):
        if not _serves(query, key, value, is_causal, attn_mask):
            tensors = (grad_out, query, key, value, out, logsumexp)
            return torch_backward.call_boxed(
                _CPU, *tensors, dropout_p, is_causal, attn_mask=attn_mask, scale=scale
            )
        rows = tuple(map(_rows, (grad_out, query, key, value, out)))
        gradients = tuple(x.new_empty(x.shape) for x in rows[1:4])
        backend_for(query).backward(
            *rows,
            logsumexp.contiguous(),
            *gradients,
            _options(query, is_causal, scale),
        )
        return tuple(gradient.transpose(1, 2) for gradient in gradients)

    library = torch.library.Library("aten", "IMPL", "CPU")
    with warnings.catch_warnings():  # torch warns of what is done here on purpose
        warnings.simplefilter("ignore", UserWarning)
        library.impl(_FORWARD, forward, "CPU")
        library.impl(_BACKWARD, backward, "CPU")
    return Activation(library)


def _serves(query: Tensor, key: Tensor, value: Tensor, is_causal: bool, attn_mask) -> bool:
    """Whether this library computes what torch defines: causal is aligned at the top left there."""
    return (
        attn_mask is None
        and query.dtype in (torch.float32, torch.bfloat16, torch.float16)
        and query.shape[-1] == value.shape[-1] <= 256
        and not (is_causal and query.shape[-2] != key.shape[-2])
    )


def _rows(x: Tensor) -> Tensor:
    """(b, h, s, d), as torch has it, to (b, s, h, d)."""
    x = x.transpose(1, 2)
    return x if x.stride(-1) == 1 else x.contiguous()


def _options(query: Tensor, is_causal: bool, scale: float | None) -> Options:
    return Options(query.shape[-1] ** -0.5 if scale is None else scale, is_causal)
