"""What a backend is.

A backend is a module (`flash_attn.backends.native` is one) with the five functions of `Backend`. It
computes on the tensors that it is given and nothing else: gradients, `torch.library` ops, random
numbers and the choice among backends are the business of its callers. Every tensor has a contiguous
last dimension; everything else about the arguments is for the backend to check.
"""

from __future__ import annotations

from typing import NamedTuple, Protocol

from torch import Tensor

# Dropout with a smaller probability is no dropout.
MIN_DROPOUT_P = 2.0**-20


class Options(NamedTuple):
    """What a call computes, the same for forward and backward.

    Attributes:
        softmax_scale: factor of the scores.
        causal: hide the keys after the query, aligned at the bottom right.
        window_left, window_right: keys visible on either side; negative is infinite.
        softcap: bound of the scores; 0 is off.
        alibi_slopes: (h,) or (b, h), float32, or None.
        s_aux: attention sinks, (h,), float32, or None.
        dropout_p: probability that an entry is dropped; 0, or from MIN_DROPOUT_P to 1.
        rng_state: seed and offset of the dropout function, (2,), int64; given iff dropout_p > 0.
        deterministic: ask for a bitwise reproducible dq.
    """

    softmax_scale: float
    causal: bool = False
    window_left: int = -1
    window_right: int = -1
    softcap: float = 0.0
    alibi_slopes: Tensor | None = None
    s_aux: Tensor | None = None
    dropout_p: float = 0.0
    rng_state: Tensor | None = None
    deterministic: bool = False


class Sequences(NamedTuple):
    """Where the sequences of a variable-length call lie.

    Attributes:
        cu_seqlens_q, cu_seqlens_k: first row of each sequence and end of the last, (b + 1,), int32.
        max_seqlen_q, max_seqlen_k: bounds of the lengths.
        seqused_k: keys in use of each sequence, (b,), int32, or None for all.
        leftpad_k: rows before the first key of each sequence, (b,), int32, or None. Forward only.
        block_table: pages of each sequence, (b, pages), int32, or None. Forward only.
        num_splits: parts into which the keys are split; 0 leaves it to the backend. Forward only.
    """

    cu_seqlens_q: Tensor
    cu_seqlens_k: Tensor
    max_seqlen_q: int
    max_seqlen_k: int
    seqused_k: Tensor | None = None
    leftpad_k: Tensor | None = None
    block_table: Tensor | None = None
    num_splits: int = 0


class Backend(Protocol):
    """The functions of a backend. Shapes are those of the public functions of the same purpose."""

    def forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        options: Options,
        sequences: Sequences | None = None,
        return_s_dmask: bool = False,
        out: Tensor | None = None,
        return_lse: bool = True,
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Returns (out, softmax_lse, s_dmask).

        softmax_lse is None without return_lse, s_dmask unless asked for with dropout.
        """

    def plain_forward(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        softmax_scale: float,
        causal: bool,
        window_left: int,
        window_right: int,
    ) -> Tensor:
        """Returns the out of `forward` for dense inputs, with all other options off.

        For small calls, which take as long as the Python around them.
        """

    def backward(
        self,
        dout: Tensor,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        out: Tensor,
        softmax_lse: Tensor,
        dq: Tensor,
        dk: Tensor,
        dv: Tensor,
        options: Options,
        sequences: Sequences | None = None,
        dsoftmax_lse: Tensor | None = None,
        ds_aux: Tensor | None = None,
    ) -> Tensor:
        """Writes dq, dk, dv and ds_aux (given iff options.s_aux is) and returns softmax_d."""

    def kvcache(
        self,
        q: Tensor,
        k_cache: Tensor,
        v_cache: Tensor,
        k: Tensor | None,
        v: Tensor | None,
        options: Options,
        rotary_cos: Tensor | None = None,
        rotary_sin: Tensor | None = None,
        rotary_interleaved: bool = True,
        cache_seqlens: Tensor | None = None,
        cache_batch_idx: Tensor | None = None,
        cache_leftpad: Tensor | None = None,
        block_table: Tensor | None = None,
        num_splits: int = 0,
        out: Tensor | None = None,
    ) -> tuple[Tensor, Tensor]:
        """Appends k and v to the caches in place, then returns (out, softmax_lse)."""

    def rotary(
        self,
        x: Tensor,
        cos: Tensor,
        sin: Tensor,
        *,
        out: Tensor | None = None,
        seqlen_offsets: int | Tensor = 0,
        cu_seqlens: Tensor | None = None,
        max_seqlen: int | None = None,
        interleaved: bool = False,
        conjugate: bool = False,
    ) -> Tensor:
        """Returns x rotated, in `out` when it is given; `out` may be x itself."""
