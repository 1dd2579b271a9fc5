"""The native backend: the C++ core, on the memory of torch's tensors.

It allocates the outputs and passes everything on; the core checks the arguments, and raises
`RuntimeError` or `ConstraintError` with the texts that users of FlashAttention-2 know.

On a GPU the kernels are launched on the current stream of the tensors' device, which need not be
the current device, and nothing is read there and nothing waited for. All memory comes from torch's
allocator on that stream, so that a call can be captured in a graph.
"""

from __future__ import annotations

import torch
from torch import Tensor, contiguous_format, empty_like, get_num_threads

from flash_attn import _core
from flash_attn.backends.allocation import row_vector
from flash_attn.backends.interface import Options, Sequences

# The handle of a device's current stream, as an integer; in builds of torch that have streams.
_current_stream = getattr(torch._C, "_cuda_getCurrentRawStream", None)

# Where a workspace would be, and its size; and the index of the two among the arguments.
_NO_WORKSPACE = (0, 0)
_WORKSPACE_INDEX, _BACKWARD_WORKSPACE_INDEX = 11, 17


def _stream(q: Tensor) -> int:
    """The current stream of the device of q; the CPU has none."""
    return 0 if q.is_cpu else _current_stream(q.get_device())


def _call_with_workspace(function, arguments: tuple, index: int, num_bytes: int) -> None:
    """Repeats a call of the core that asked for so many bytes, which belong at `index`.

    It asks only on a GPU, and only where this torch lends the core no allocator, or has no memory
    left, which torch's own error says best.
    """
    workspace = torch.empty(num_bytes, dtype=torch.uint8, device=arguments[0].device)
    function(*arguments[:index], workspace.data_ptr(), num_bytes, *arguments[index + 2 :])


def plain_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    softmax_scale: float,
    causal: bool,
    window_left: int,
    window_right: int,
) -> Tensor:
    """Attention forward without options; see `Backend.plain_forward`."""
    out = empty_like(q)
    arguments = (
        q,
        k,
        v,
        out,
        None,
        softmax_scale,
        window_left,
        window_right,
        causal,
        get_num_threads(),
        0 if q.is_cpu else _stream(q),
    )
    if num_bytes := _core.forward(*arguments):
        _call_with_workspace(_core.forward, arguments, _WORKSPACE_INDEX, num_bytes)
    return out


def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    options: Options,
    sequences: Sequences | None = None,
    return_s_dmask: bool = False,
    out: Tensor | None = None,
    return_lse: bool = True,
) -> tuple[Tensor, Tensor | None, Tensor | None]:
    """Attention forward; see `Backend.forward`."""
    softmax_lse = row_vector(q, sequences is not None) if return_lse else None
    if out is None:
        out = empty_like(q)
    (
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
        _,
    ) = options
    s_dmask = None
    if return_s_dmask and dropout_p > 0:
        if sequences is None:
            shape = (q.shape[0], q.shape[2], q.shape[1], k.shape[1])
        else:
            shape = (
                sequences.cu_seqlens_q.shape[0] - 1,
                q.shape[1],
                sequences.max_seqlen_q,
                sequences.max_seqlen_k,
            )
        s_dmask = q.new_empty(shape)
    arguments = (
        q,
        k,
        v,
        out,
        softmax_lse,
        softmax_scale,
        window_left,
        window_right,
        causal,
        get_num_threads(),
        _stream(q),
        *_NO_WORKSPACE,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
        s_dmask,
    )
    if sequences is not None:
        arguments += sequences
    if num_bytes := _core.forward(*arguments):
        _call_with_workspace(_core.forward, arguments, _WORKSPACE_INDEX, num_bytes)
    return out, softmax_lse, s_dmask


def backward(
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
    """Attention backward; see `Backend.backward`."""
    softmax_d = empty_like(softmax_lse, memory_format=contiguous_format)
    (
        softmax_scale,
        causal,
        window_left,
        window_right,
        softcap,
        alibi_slopes,
        s_aux,
        dropout_p,
        rng_state,
        deterministic,
    ) = options
    arguments = (
        dout,
        q,
        k,
        v,
        out,
        softmax_lse,
        dq,
        dk,
        dv,
        softmax_d,
        softmax_scale,
        window_left,
        window_right,
        causal,
        deterministic,
        get_num_threads(),
        _stream(q),
        *_NO_WORKSPACE,
        softcap,
        alibi_slopes,
        s_aux,
        ds_aux,
        dsoftmax_lse,
        dropout_p,
        rng_state,
    )
    if sequences is not None:
        arguments += sequences[:5]  # what a backward pass can have
    if num_bytes := _core.backward(*arguments):
        _call_with_workspace(_core.backward, arguments, _BACKWARD_WORKSPACE_INDEX, num_bytes)
    return softmax_d


def kvcache(
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
    """Attention over a cache, appended to first; see `Backend.kvcache`."""
    softmax_lse = row_vector(q, False)
    if out is None:
        out = empty_like(q)
    arguments = (
        q,
        k_cache,
        v_cache,
        out,
        softmax_lse,
        options.softmax_scale,
        options.window_left,
        options.window_right,
        options.causal,
        get_num_threads(),
        _stream(q),
        *_NO_WORKSPACE,
        cache_seqlens,
        k,
        v,
        cache_batch_idx,
        cache_leftpad,
        block_table,
        rotary_cos,
        rotary_sin,
        rotary_interleaved,
        options.softcap,
        options.alibi_slopes,
        options.s_aux,
        num_splits,
    )
    if num_bytes := _core.kvcache(*arguments):
        _call_with_workspace(_core.kvcache, arguments, _WORKSPACE_INDEX, num_bytes)
    return out, softmax_lse


def rotary(
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
    """Rotary position embedding; see `Backend.rotary`."""
    if out is None:
        out = empty_like(x)
    by_sequence = isinstance(seqlen_offsets, Tensor)
    _core.rotary(
        x,
        out,
        cos,
        sin,
        0 if by_sequence else seqlen_offsets,
        interleaved,
        conjugate,
        get_num_threads(),
        _stream(x),
        seqlen_offsets if by_sequence else None,
        cu_seqlens,
        max_seqlen or 0,
    )
    return out
