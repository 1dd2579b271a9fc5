"""Memory that backends allocate, in the way that takes the least of a small call."""

from __future__ import annotations

import torch
from torch import Tensor

# An empty tensor of each device, by index (-1 is the CPU, and accelerators are of one type):
# `new_empty` of a tensor of the right dtype is the cheapest way to a new one.
_FLOAT32 = {-1: torch.empty(0, dtype=torch.float32, device="cpu")}


def _like_float32(q: Tensor) -> Tensor:
    """An empty float32 tensor on the device of q."""
    try:
        return _FLOAT32[q.get_device()]
    except KeyError:
        with torch.inference_mode(False):
            return _FLOAT32.setdefault(
                q.get_device(), torch.empty(0, dtype=torch.float32, device=q.device)
            )


def row_vector(q: Tensor, variable_length: bool) -> Tensor:
    """An uninitialised float32 for each query row: (b, h, sq), or (h, tq) for variable length."""
    try:
        if variable_length:
            total_q, num_heads, _ = q.shape
            return _like_float32(q).new_empty(num_heads, total_q)
        batch, seqlen_q, num_heads, _ = q.shape
        return _like_float32(q).new_empty(batch, num_heads, seqlen_q)
    except ValueError:
        expected = (
            "(total_q, num_heads, head_dim)"
            if variable_length
            else "(batch_size, seqlen_q, num_heads, head_dim)"
        )
        raise RuntimeError(f"q must have shape {expected}, but got {tuple(q.shape)}") from None
