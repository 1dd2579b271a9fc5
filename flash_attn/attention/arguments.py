"""What the functions, the autograd functions and the ops do to their arguments."""

from __future__ import annotations

import os

import torch
from torch import Tensor, is_grad_enabled
from torch._C import (
    _are_functorch_transforms_active,
    _is_any_autocast_enabled,
    _is_tracing,
    _len_torch_dispatch_stack,
)
from torch._C._functorch import is_dead_tensor_wrapper, unwrap_if_dead
from torch.autograd import _profiler_enabled
from torch.compiler import is_compiling

from flash_attn.backends.interface import MIN_DROPOUT_P, Options, Sequences

_DETERMINISTIC = os.environ.get("FLASH_ATTENTION_DETERMINISTIC", "0") == "1"


def is_plain(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether nothing needs to see the call, so that it may bypass torch's dispatcher."""
    return (
        type(q) is type(k) is type(v) is Tensor
        and not is_compiling()
        and _len_torch_dispatch_stack() == 0
        and not _are_functorch_transforms_active()
        and not (
            is_dead_tensor_wrapper(q)  # kept from a transform that has ended
            or is_dead_tensor_wrapper(k)
            or is_dead_tensor_wrapper(v)
        )
        and not (q.is_meta or k.is_meta or v.is_meta)
        and not _profiler_enabled()
        and not _is_tracing()
    )


def is_direct(q: Tensor, k: Tensor, v: Tensor) -> bool:
    """Whether the call may go to the backend with the tensors as they are.

    That is what makes a small call fast: one look instead of `prepare` and `is_plain`.
    """
    return (
        is_plain(q, k, v)
        and not _is_any_autocast_enabled()
        and q.is_contiguous()  # a flag, and faster to ask for than a stride
        and k.is_contiguous()
        and v.is_contiguous()
    )


def maybe_contiguous(x: Tensor | None) -> Tensor | None:
    """x with a contiguous last dimension, copied only when it has none."""
    return x.contiguous() if x is not None and x.stride()[-1] != 1 else x


def prepare(*tensors: Tensor) -> list[Tensor]:
    """The tensors with a contiguous last dimension, and in autocast's dtype when it is on.

    Autocast treats them as it treats those of `scaled_dot_product_attention`. Tensors kept from a
    function transform that has ended are unwrapped.
    """
    if not is_compiling():
        tensors = [unwrap_if_dead(x) for x in tensors]
    if _is_any_autocast_enabled():
        device = tensors[0].device.type
        if torch.is_autocast_enabled(device):
            dtype = torch.get_autocast_dtype(device)
            tensors = [x.to(dtype) if _autocasts(x) else x for x in tensors]
    return [maybe_contiguous(x) for x in tensors]


def _autocasts(x: Tensor) -> bool:
    return x.is_floating_point() and x.dtype != torch.float64


def prepare_for_cache(k_cache: Tensor, *tensors: Tensor | None) -> list[Tensor | None]:
    """As `prepare`, but autocast's dtype is the cache's, which is written and cannot be cast."""
    if _is_any_autocast_enabled() and torch.is_autocast_enabled(k_cache.device.type):
        dtype = k_cache.dtype
        tensors = [x.to(dtype) if x is not None and _autocasts(x) else x for x in tensors]
    return [maybe_contiguous(x) for x in tensors]


# Parts of packed tensors, and their leading dimensions: dense, and variable length.
_PARTS = {"qkv": 3, "kv": 2}
_DENSE, _VARLEN = "batch_size, seqlen", "total"


def unpack(packed: Tensor, name: str, varlen: bool = False) -> tuple[Tensor, ...]:
    """The queries, keys and values in the tensor `name` ("qkv" or "kv"), as views."""
    parts = _PARTS[name]
    if packed.dim() != (4 if varlen else 5) or packed.shape[-3] != parts:
        raise RuntimeError(
            f"{name} must have shape ({_VARLEN if varlen else _DENSE}, {parts}, num_heads, "
            f"head_dim), but got {tuple(packed.shape)}"
        )
    return packed.unbind(-3)


def default_scale(q: Tensor) -> float:
    """The factor of the scores: d ** -0.5."""
    head_dim = q.shape[-1]
    return head_dim**-0.5 if head_dim else 1.0  # an empty head is refused later


def window(window_size) -> tuple[int, int]:
    """The two sides of a window given as tuple, list or tensor of two integers."""
    if isinstance(window_size, Tensor):
        window_size = window_size.tolist()
    try:
        left, right = window_size
    except (TypeError, ValueError):
        raise RuntimeError(f"window_size must be (left, right), but got {window_size!r}") from None
    return left, right


def max_seqlen(value: Tensor, bound: int) -> int:
    """A longest length in a tensor as a number; `bound` where reading it would synchronise."""
    readable = not is_compiling() and type(value) is Tensor and value.is_cpu
    return int(value) if readable else bound


def cache_lengths(
    q: Tensor, k_cache: Tensor, k: Tensor | None, block_table: Tensor | None, length: int
) -> Tensor:
    """The length that all sequences have, as the cache's function takes it: (b,), int32.

    On an accelerator it is checked before it goes there, where nobody reads it any more.
    """
    if not q.is_cpu and not is_compiling():
        pages = 1 if block_table is None else block_table.shape[-1]
        capacity = pages * k_cache.shape[-3]
        new = 0 if k is None else k.shape[-3]
        if not 0 <= length <= capacity:
            raise RuntimeError(
                f"cache_seqlens is {length}, but must be in [0, {capacity}], the length of the KV "
                "cache"
            )
        if new <= capacity < length + new:  # new keys that never fit are refused for that
            raise RuntimeError(
                f"cache_seqlens is {length}: with {new} new keys it passes the end of the KV "
                f"cache, which has room for {capacity}"
            )
    return torch.full((q.shape[0],), length, dtype=torch.int32, device=q.device)


def needs_grad(*tensors: Tensor | None) -> bool:
    """Whether a gradient may be asked for."""
    if is_grad_enabled():
        for x in tensors:
            if x is not None and x.requires_grad:
                return True
    return False


def records(*tensors: Tensor | None) -> bool:
    """Whether an autograd function records the call: compilers and transforms see the op."""
    return needs_grad(*tensors) and not is_compiling() and not _are_functorch_transforms_active()


def draw_rng_state(device: torch.device) -> Tensor:
    """Seed and offset of one call with dropout, from torch's generator of the device."""
    return torch.randint(0, 2**63 - 1, (2,), dtype=torch.int64, device=device)


def options(
    q: Tensor,
    dropout_p: float,
    softmax_scale: float | None,
    causal: bool,
    window_size,
    softcap: float,
    alibi_slopes: Tensor | None,
    deterministic: bool,
    s_aux: Tensor | None,
) -> Options:
    """The options of a call as a public function receives them."""
    if type(window_size) is not tuple or len(window_size) != 2:
        window_size = window(window_size)
    window_left, window_right = window_size
    if softmax_scale is None:
        softmax_scale = default_scale(q)
    rng_state = None
    if dropout_p:
        if 0 < dropout_p < MIN_DROPOUT_P:
            dropout_p = 0.0
        elif 0 < dropout_p < 1:
            rng_state = draw_rng_state(q.device)
    fields = (
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        alibi_slopes,
        s_aux if s_aux is None else s_aux.float(),
        dropout_p,
        rng_state,
        deterministic,
    )
    return tuple.__new__(Options, fields)  # half the time of Options(...)


def sequences(
    q: Tensor,
    k: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int | Tensor,
    max_seqlen_k: int | Tensor,
    block_table: Tensor | None = None,
) -> Sequences:
    """The sequences of a variable-length call as a public function receives them."""
    if isinstance(max_seqlen_q, Tensor):
        max_seqlen_q = max_seqlen(max_seqlen_q, q.shape[0])
    if isinstance(max_seqlen_k, Tensor):
        bound = k.shape[0] if block_table is None else block_table.shape[1] * k.shape[1]
        max_seqlen_k = max_seqlen(max_seqlen_k, bound)
    return Sequences(
        cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, block_table=block_table
    )


def is_deterministic(asked: bool) -> bool:
    """Whether dq shall be bitwise reproducible: by argument, torch's setting or environment."""
    return asked or _DETERMINISTIC or torch.are_deterministic_algorithms_enabled()
