"""The backward pass: from tensors to the kernels of kernels/backward*.py.

Everything is bitwise reproducible, whether that is asked for or not. Memory beyond the gradients:
two float32 a query row.
"""

from __future__ import annotations

import torch
from torch import Tensor

from flash_attn.backends.flaggems import runtime, tiles
from flash_attn.backends.flaggems.kernels.backward import backward_dkdv, backward_dq
from flash_attn.backends.flaggems.kernels.backward_prepare import (
    ROW_ALIGNMENT,
    prepare,
    sink_gradient,
)
from flash_attn.backends.flaggems.launch import (
    LOG2E,
    check_lengths,
    dropout_numbers,
    launch,
    operand_unit,
    pieces,
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

# Programs that zero the gradients of rows of no sequence, of which there are usually none.
_GAP_PROGRAMS = 16


def _row_strides(x: Tensor | None) -> tuple[int, int, int]:
    """Of batch, head and row of a (b, h, sq) or (h, tq) tensor."""
    if x is None:
        return 0, 0, 0
    return x.stride() if x.dim() == 3 else (0, *x.stride())


def _power_of_two(x: int) -> int:
    return 1 << max(x - 1, 0).bit_length()


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
    device = q.device
    num_heads, head_dim = q.shape[-2:]
    num_heads_k = k.shape[-2]
    group_size = num_heads // max(num_heads_k, 1)
    if sequences is None:
        batch, seqlen_q, seqlen_k = q.shape[0], q.shape[1], k.shape[1]
        total_q, total_k = batch * seqlen_q, batch * seqlen_k
        blocks = batch * -(-seqlen_q // ROW_ALIGNMENT.value)
        softmax_d = torch.empty((batch, num_heads, seqlen_q), dtype=torch.float32, device=device)
        cu_seqlens_q = cu_seqlens_k = seqused_k = None
    else:
        cu_seqlens_q, cu_seqlens_k, seqlen_q, seqlen_k, seqused_k = sequences[:5]
        batch = cu_seqlens_q.shape[0] - 1
        total_q, total_k = q.shape[0], k.shape[0]
        blocks = total_q // ROW_ALIGNMENT.value + batch + 1
        softmax_d = torch.empty((num_heads, total_q), dtype=torch.float32, device=device)
    check_lengths(seqlen_q, seqlen_k)
    rows = blocks * ROW_ALIGNMENT.value
    workspace = torch.empty((num_heads, 2, rows), dtype=torch.float32, device=device)

    scale, softcap = options.softmax_scale, options.softcap
    if softcap > 0:
        lse_factor, score_scale = LOG2E, scale / softcap
    else:
        if abs(scale) < _MIN_SCALE:
            scale = _MIN_SCALE
        lse_factor, score_scale = 1.0 / scale, scale * LOG2E

    def given(x: Tensor | None) -> Tensor:
        return q if x is None else x

    lse_strides, softmax_d_strides = _row_strides(softmax_lse), _row_strides(softmax_d)
    unit = operand_unit(out, dout)
    width = _power_of_two(head_dim)
    block = min(ROW_ALIGNMENT.value, max(8192 // width, 32))
    num_tiles = -(-seqlen_q // ROW_ALIGNMENT.value) * (ROW_ALIGNMENT.value // block)
    row_programs = batch * num_heads * num_tiles
    gap_programs = _GAP_PROGRAMS if sequences is not None else 0
    launch(
        prepare,
        row_programs + gap_programs,
        device,
        (
            *(out, dout, softmax_lse, given(dsoftmax_lse), softmax_d, workspace, dq, dk, dv),
            *(given(cu_seqlens_q), given(cu_seqlens_k)),
            *(*strides(out, unit), *strides(dout, unit)),
            *(*lse_strides, *_row_strides(dsoftmax_lse), *softmax_d_strides[:2], rows),
            *(*strides(dq)[1:], *strides(dk)[1:], *strides(dv)[1:]),
            *(total_q, total_k, batch, num_heads, num_heads_k, seqlen_q),
            *(num_tiles, row_programs, gap_programs, lse_factor),
        ),
        {
            "IS_VARLEN": sequences is not None,
            "HAS_DLSE": dsoftmax_lse is not None,
            "UNIT": unit,
            "HEAD_DIM": head_dim,
            "D_PADDED": width,
            "BLOCK": block,
        },
        tiles.Tile(block, 0, 4, 1),
    )

    window_left, window_right = window(options, seqlen_q, seqlen_k)
    threshold, dropout_scale = dropout_numbers(options.dropout_p)
    slopes = options.alibi_slopes
    unit = operand_unit(q, k, v, dout, dq, dk, dv)
    d0, d1 = pieces(head_dim)
    tensors = (q, k, v, dout, workspace)
    more_tensors = (
        *(given(cu_seqlens_q), given(cu_seqlens_k), given(seqused_k)),
        *(given(slopes), given(options.rng_state)),
    )
    operand_strides = sum((strides(x, unit) for x in (q, k, v, dout)), ())
    numbers = (
        *(rows, 0 if slopes is None or slopes.dim() == 1 else slopes.stride(0)),
        *(0 if slopes is None else slopes.stride(-1), total_q, total_k),
        *(num_heads_k, group_size, seqlen_q, seqlen_k, window_left, window_right),
    )
    scales = (score_scale, softcap * LOG2E, threshold, dropout_scale, options.softmax_scale)
    constants = {
        "IS_VARLEN": sequences is not None,
        "HAS_SEQUSED": seqused_k is not None,
        "HAS_LEFT": window_left >= 0,
        "HAS_RIGHT": window_right >= 0,
        "HAS_SOFTCAP": softcap > 0,
        "HAS_ALIBI": slopes is not None,
        "HAS_DROPOUT": options.dropout_p > 0,
        "UNIT": unit,
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
    }
    capability = runtime.current().capability(device)
    transformed = softcap > 0 or slopes is not None or options.dropout_p > 0

    def run(kernel, gradients, tile, length, block, pairs, bytes_of_pair):
        num_tiles = -(-length // block)
        at_once = max(1, min(pairs, _CACHE_BYTES // max(bytes_of_pair, 1)))
        launch(
            kernel,
            num_tiles * pairs,
            device,
            (
                *(*tensors, *gradients, *more_tensors, *operand_strides),
                *sum((strides(x, unit) for x in gradients), ()),
                *(*numbers, num_tiles, pairs, at_once, *scales),
            ),
            constants | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n},
            tile,
        )

    row_bytes = 2 * head_dim * q.element_size()
    tile = tiles.backward_dkdv(capability, d0 + d1, transformed)
    run(
        *(backward_dkdv, (dk, dv), tile, seqlen_k, tile.block_n),
        *(batch * num_heads_k, group_size * seqlen_q * row_bytes),
    )
    tile = tiles.backward_dq(capability, d0 + d1, transformed)
    run(
        *(backward_dq, (dq,), tile, seqlen_q, tile.block_m),
        *(batch * num_heads, seqlen_k * row_bytes),
    )

    if ds_aux is not None:
        launch(
            sink_gradient,
            num_heads,
            device,
            (
                *(options.s_aux, ds_aux, softmax_lse, softmax_d),
                *(options.s_aux.stride(0), ds_aux.stride(0), *lse_strides),
                *(*softmax_d_strides[:2], total_q, max(softmax_d.shape[-1], 1)),
            ),
            {"BLOCK": 1024},
            tiles.Tile(1024, 0, 8, 1),
        )
    return softmax_d
