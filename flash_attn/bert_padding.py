"""Between padded batches and packed tokens.

A padded batch is (batch, seqlen, ...) with a mask (batch, seqlen); the packed form keeps the tokens
of the mask one behind the other, (total, ...), with their cumulative sequence lengths, as the
variable length functions take it. All functions are differentiable and run on any device.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = [
    "index_first_axis",
    "index_first_axis_residual",
    "index_put_first_axis",
    "pad_input",
    "unpad_input",
    "unpad_input_for_concatenated_sequences",
]


def __getattr__(name: str):
    # FlashAttention-2's module leaks these two of einops, and other libraries import them.
    if name in ("rearrange", "repeat"):
        try:
            import einops
        except ImportError as error:
            raise ImportError(
                f"flash_attn.bert_padding.{name} is einops.{name}: install einops to use it"
            ) from error
        return getattr(einops, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def index_first_axis(input: Tensor, indices: Tensor) -> Tensor:
    """Rows of `input`.

    Args:
        input: (rows, ...).
        indices: (n,), integers: the rows to take.

    Returns:
        (n, ...): `input[indices]`.
    """
    return input.index_select(0, indices.long())


def index_put_first_axis(values: Tensor, indices: Tensor, first_axis_dim: int) -> Tensor:
    """The inverse of `index_first_axis`: rows at their places among zeros.

    Args:
        values: (n, ...).
        indices: (n,), integers, no two equal: where each row goes.
        first_axis_dim: how many rows the result has.

    Returns:
        (first_axis_dim, ...): zero but for `result[indices] = values`.
    """
    output = values.new_zeros(first_axis_dim, *values.shape[1:])
    return output.index_copy(0, indices.long(), values)


def index_first_axis_residual(input: Tensor, indices: Tensor) -> tuple[Tensor, Tensor]:
    """`index_first_axis(input, indices)` and `input` itself, for a residual connection."""
    return index_first_axis(input, indices), input


def _packing(lengths: Tensor) -> tuple[Tensor, int]:
    """Lengths (n,) to cumulative lengths (n + 1,), int32, and the greatest length."""
    cu_seqlens = F.pad(torch.cumsum(lengths, dim=0, dtype=torch.int32), (1, 0))
    return cu_seqlens, int(lengths.max()) if lengths.numel() else 0


def unpad_input(
    hidden_states: Tensor, attention_mask: Tensor, unused_mask: Tensor | None = None
) -> tuple[Tensor, Tensor, Tensor, int, Tensor]:
    """Packs the tokens of a padded batch that a mask selects.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask: (batch, seqlen), bool or integer: 1 where a token is valid.
        unused_mask: (batch, seqlen), bool or integer: 1 where a token has a place in the packed
            form though it is not used.

    Returns:
        hidden_states: (total, ...), the tokens of either mask.
        indices: (total,), int64: their places in the flattened (batch * seqlen) input.
        cu_seqlens: (batch + 1,), int32: where each sequence begins in the packed form.
        max_seqlen_in_batch: the greatest number of tokens of a sequence.
        seqused: (batch,), int32: the number of valid tokens of each sequence.
    """
    all_masks = attention_mask if unused_mask is None else attention_mask + unused_mask
    cu_seqlens, max_seqlen = _packing(all_masks.sum(dim=-1, dtype=torch.int32))
    indices = all_masks.flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        max_seqlen,
        attention_mask.sum(dim=-1, dtype=torch.int32),
    )


def unpad_input_for_concatenated_sequences(
    hidden_states: Tensor, attention_mask_in_length: Tensor
) -> tuple[Tensor, Tensor, Tensor, int]:
    """Packs a batch whose rows hold several sequences each, one behind the other.

    Args:
        hidden_states: (batch, seqlen, ...).
        attention_mask_in_length: (batch, seqlen), integers: the lengths of the sequences of each
            row, in order; zeros are passed over. `[[2, 3, 0, 0, 0, 0]]` is a row of six tokens: a
            sequence of two, one of three, and one token of padding.

    Returns:
        hidden_states: (total, ...), the tokens that belong to a sequence.
        indices: (total,), int64: their places in the flattened (batch * seqlen) input.
        cu_seqlens: (sequences + 1,), int32: where each sequence begins in the packed form.
        max_seqlen_in_batch: the length of the longest sequence.
    """
    lengths = attention_mask_in_length.flatten()
    cu_seqlens, max_seqlen = _packing(lengths[lengths != 0])
    used = attention_mask_in_length.sum(dim=-1, keepdim=True)
    positions = torch.arange(attention_mask_in_length.shape[-1], device=used.device)
    indices = (positions < used).flatten().nonzero().flatten()
    return (
        index_first_axis(hidden_states.flatten(0, 1), indices),
        indices,
        cu_seqlens,
        max_seqlen,
    )


def pad_input(hidden_states: Tensor, indices: Tensor, batch: int, seqlen: int) -> Tensor:
    """The inverse of `unpad_input`.

    Args:
        hidden_states: (total, ...).
        indices: (total,), integers: the places of the tokens in the flattened padded batch.
        batch, seqlen: the shape of the padded batch.

    Returns:
        (batch, seqlen, ...), zero where there is no token.
    """
    return index_put_first_axis(hidden_states, indices, batch * seqlen).unflatten(
        0, (batch, seqlen)
    )
