"""The backward pass: from tensors to the kernels of kernels/backward*.py.

Everything is bitwise reproducible, whether that is asked for or not. Memory beyond the gradients:
two float32 a query row.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from flash_attn.backends.flaggems import runtime, tiles
from flash_attn.backends.flaggems.kernels.backward_dkdv import backward_dkdv
from flash_attn.backends.flaggems.kernels.backward_dq import backward_dq
from flash_attn.backends.flaggems.kernels.backward_prepare import (
    ROW_ALIGNMENT,
    prepare,
    sink_gradient,
)
from flash_attn.backends.flaggems.launch import (
    LOG2E,
    check_lengths,
    descriptor,
    dropout_numbers,
    is_describable,
    launch,
    operand_unit,
    pieces,
    softcap_kind,
    strides,
    window,
)
from flash_attn.backends.interface import Options, Sequences

# Bytes of the operands that programs running at the same time read again and again: half of an
# H200's second-level cache. Smaller caches lose little, as neighbours in a group share most.
_CACHE_BYTES = 24 << 20

# Scores are added to a log-sum-exp in units of the scale, which must not vanish. At this one all
# scores are 0, as they are at a smaller one.
_MIN_SCALE = 2.0**-60

# Descriptors are made at every launch, which short calls do not win back.
_LEAST_DESCRIBED_ROWS = 512

# Programs that zero the gradients of rows of no sequence, of which there are usually none.
_GAP_PROGRAMS = 16


def _bytes(x: Tensor) -> int:
    return x.numel() * x.element_size()


def _row_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, head and row of a (b, h, sq) or (h, tq) tensor."""
    if x is None:
        return 0, 0, 0
    return x.stride() if x.dim() == 3 else (0, *x.stride())


class _Shapes(NamedTuple):
    """The numbers of a call; lengths are those of the longest sequence."""

    batch: int
    num_heads: int
    num_heads_k: int
    head_dim: int
    seqlen_q: int
    seqlen_k: int
    total_q: int
    total_k: int
    workspace_rows: int

    @property
    def group_size(self) -> int:
        return self.num_heads // max(self.num_heads_k, 1)


def _shapes(q: Tensor, k: Tensor, sequences: Sequences | None) -> _Shapes:
    num_heads, head_dim = q.shape[-2:]
    if sequences is None:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        total_q, total_k = batch * seqlen_q, batch * seqlen_k
        blocks = batch * -(-seqlen_q // ROW_ALIGNMENT.value)
    else:
        batch = sequences.cu_seqlens_q.shape[0] - 1
        seqlen_q, seqlen_k = sequences.max_seqlen_q, sequences.max_seqlen_k
        total_q, total_k = q.shape[0], k.shape[0]
        blocks = total_q // ROW_ALIGNMENT.value + batch + 1
    check_lengths(seqlen_q, seqlen_k)
    return _Shapes(
        *(batch, num_heads, k.shape[-2], head_dim, seqlen_q, seqlen_k, total_q, total_k),
        blocks * ROW_ALIGNMENT.value,
    )


def _prepare(shapes, tensors, sequences, dsoftmax_lse, lse_factor):
    """Launches `prepare`, which writes softmax_d and zeros, and returns the workspace."""
    dout, out, softmax_lse, softmax_d, dq, dk, dv = tensors
    varlen = sequences is not None
    workspace = torch.empty(
        (shapes.num_heads, 2, shapes.workspace_rows), dtype=torch.float32, device=out.device
    )
    unit = operand_unit(out, dout)
    width = 1 << (shapes.head_dim - 1).bit_length()
    block = min(ROW_ALIGNMENT.value, max(4096 // width, 16))
    num_tiles = -(-shapes.seqlen_q // ROW_ALIGNMENT.value) * (ROW_ALIGNMENT.value // block)
    row_programs = shapes.batch * shapes.num_heads * num_tiles
    gap_programs = _GAP_PROGRAMS if varlen else 0
    launch(
        prepare,
        row_programs + gap_programs,
        out.device,
        (
            *(out, dout, softmax_lse, out if dsoftmax_lse is None else dsoftmax_lse),
            *(softmax_d, workspace, dq, dk, dv),
            *((sequences.cu_seqlens_q, sequences.cu_seqlens_k) if varlen else (out, out)),
            *(*strides(out, unit), *strides(dout, unit)),
            *(*_row_strides(softmax_lse), *_row_strides(dsoftmax_lse)),
            *(*_row_strides(softmax_d)[:2], shapes.workspace_rows),
            *(*strides(dq)[1:], *strides(dk)[1:], *strides(dv)[1:]),
            *(shapes.total_q, shapes.total_k, shapes.batch, shapes.num_heads, shapes.num_heads_k),
            *(shapes.seqlen_q, num_tiles, row_programs, gap_programs, lse_factor),
        ),
        {
            "IS_VARLEN": varlen,
            "HAS_DLSE": dsoftmax_lse is not None,
            "UNIT": unit,
            "HEAD_DIM": shapes.head_dim,
            "D_PADDED": width,
            "BLOCK": block,
        },
        tiles.ROWS,
    )
    return workspace


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
    sequences: Sequences | None,
    dsoftmax_lse: Tensor | None,
    ds_aux: Tensor | None,
    softmax_d: Tensor | None = None,
) -> Tensor:
    """Attention backward; see `Backend.backward`. softmax_d is written and returned."""
    shapes = _shapes(q, k, sequences)
    if softmax_d is None:
        softmax_d = torch.empty(softmax_lse.shape, dtype=torch.float32, device=q.device)
    softcap, slopes, dropout_p = options.softcap, options.alibi_slopes, options.dropout_p
    if softcap > 0:
        lse_factor, score_scale = LOG2E, options.softmax_scale * LOG2E * 2.0 / softcap
    else:
        scale = options.softmax_scale if abs(options.softmax_scale) > _MIN_SCALE else _MIN_SCALE
        lse_factor, score_scale = 1.0 / scale, scale * LOG2E
    workspace = _prepare(
        shapes, (dout, out, softmax_lse, softmax_d, dq, dk, dv), sequences, dsoftmax_lse, lse_factor
    )

    window_left, window_right = window(options, shapes.seqlen_q, shapes.seqlen_k)
    cu_seqlens_q, cu_seqlens_k, seqused_k = (None, None, None)
    if sequences is not None:
        cu_seqlens_q, cu_seqlens_k, _, _, seqused_k = sequences[:5]
    unit = operand_unit(q, k, v, dout, dq, dk, dv)
    d0, d1 = pieces(shapes.head_dim, unit)
    capability = runtime.current().capability(q.device)
    constants = {
        "IS_VARLEN": sequences is not None,
        "HAS_SEQUSED": seqused_k is not None,
        "HAS_LEFT": window_left >= 0,
        "HAS_RIGHT": window_right >= 0,
        "HAS_SOFTCAP": softcap_kind(softcap),
        "HAS_ALIBI": slopes is not None,
        "HAS_DROPOUT": dropout_p > 0,
        "DESCRIPTORS": (
            tiles.has_descriptors(capability)
            and sequences is None
            and min(shapes.seqlen_q, shapes.seqlen_k) >= _LEAST_DESCRIBED_ROWS
            and d1 == 0
            and all(
                x.data_ptr() % 16 == 0 and is_describable(x.shape, x.stride())
                for x in (q, k, v, dout)
            )
            # Every row sees a key.
            and (window_right < 0 or shapes.seqlen_k - shapes.seqlen_q + window_right >= 0)
        ),
        "UNIT": unit,
        "HEAD_DIM": shapes.head_dim,
        "D0": d0,
        "D1": d1,
    }
    optional = (cu_seqlens_q, cu_seqlens_k, seqused_k, slopes, options.rng_state)
    slopes_strides = (0, 0)
    if slopes is not None:
        slopes_strides = (slopes.stride(0) if slopes.dim() == 2 else 0, slopes.stride(-1))

    def operands_of(passing, block):
        """The operands of a kernel, of which two pass through its programs in blocks of rows."""
        operands = (q, k, v, dout)
        if not constants["DESCRIPTORS"]:
            return operands
        return [descriptor(x, block, d0) if any(x is y for y in passing) else x for x in operands]

    def pairs_at_once(passing, pairs):
        return max(1, min(pairs, _CACHE_BYTES * pairs // max(sum(map(_bytes, passing)), 1)))

    def run(kernel, gradients, passing, block, tile, num_tiles, pairs):
        """Launches a kernel in num_tiles programs a pair."""
        launch(
            kernel,
            num_tiles * pairs,
            q.device,
            (
                *(*operands_of(passing, block), workspace, *gradients, *optional),
                *(y for x in (q, k, v, dout, *gradients) for y in strides(x, unit)),
                *(shapes.workspace_rows, *slopes_strides, shapes.total_q, shapes.total_k),
                *(shapes.num_heads_k, shapes.group_size, shapes.seqlen_q, shapes.seqlen_k),
                *(window_left, window_right, num_tiles, pairs, pairs_at_once(passing, pairs)),
                *(score_scale, softcap * LOG2E, options.softmax_scale),
                *dropout_numbers(dropout_p),
            ),
            constants
            | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages},
            tile,
        )

    has_features = softcap > 0 or slopes is not None or dropout_p > 0
    tile = tiles.backward_dkdv(capability, d0 + d1, constants["DESCRIPTORS"], has_features)
    tile = tiles.for_unit(unit, capability, tile)
    num_tiles, num_pairs = -(-shapes.seqlen_k // tile.block_n), shapes.batch * shapes.num_heads_k
    run(backward_dkdv, (dk, dv), (q, dout), tile.block_m, tile, num_tiles, num_pairs)
    tile = tiles.for_unit(unit, capability, tiles.backward_dq(capability, d0 + d1, has_features))
    num_tiles, num_pairs = -(-shapes.seqlen_q // tile.block_m), shapes.batch * shapes.num_heads
    run(backward_dq, (dq,), (k, v), tile.block_n, tile, num_tiles, num_pairs)

    if ds_aux is not None:
        launch(
            sink_gradient,
            shapes.num_heads,
            q.device,
            (
                *(options.s_aux, ds_aux, softmax_lse, softmax_d),
                *(options.s_aux.stride(0), ds_aux.stride(0), *_row_strides(softmax_lse)),
                *(*_row_strides(softmax_d)[:2], shapes.total_q, max(softmax_d.shape[-1], 1)),
            ),
            {"BLOCK": 1024},
            tiles.ROWS,
        )
    return softmax_d
