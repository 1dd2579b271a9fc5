"""What a backward call launches: a pure function of its shapes, strides and options.

As plan.py does for the forward call, it leaves out memory, so that equal calls share one plan.
"""

from __future__ import annotations

import functools
import math
from typing import Any, NamedTuple

import torch

from flash_attn.backends.flaggems import tiles
from flash_attn.backends.flaggems.kernels.backward_dkdv import backward_dkdv
from flash_attn.backends.flaggems.kernels.backward_dq import backward_dq
from flash_attn.backends.flaggems.kernels.backward_prepare import (
    ROW_ALIGNMENT,
    prepare,
    sink_gradient,
)
from flash_attn.backends.flaggems.launch import (
    LOG2E,
    Launch,
    check_lengths,
    dropout_numbers,
    is_describable,
    leading_strides,
    pieces,
    softcap_kind,
    unit_of,
    window,
)

# Bytes of the operands that programs running at the same time read again and again: half of an
# H200's second-level cache. Smaller caches lose little, as neighbours in a group share most.
_CACHE_BYTES = 24 << 20

# Scores are added to a log-sum-exp in units of the scale, which must not vanish. At this one all
# scores are 0, as they are at a smaller one.
_MIN_SCALE = 2.0**-60

# Descriptors are made at every launch, which short calls do not win back.
LEAST_DESCRIBED_ROWS = 512

# Programs that zero the gradients of rows of no sequence, of which there are usually none.
_GAP_PROGRAMS = 16


class BackwardCall(NamedTuple):
    """A backward call without its memory.

    Attributes:
        capability: of the device, see `Runtime`.
        dtype: of q, k, v, out and their gradients.
        q_shape, k_shape: of the tensors.
        q_strides ... dv_strides: of the tensors, in elements.
        lse_strides, dlse_strides, d_strides: of softmax_lse, its gradient (None without) and
            softmax_d.
        aligned: whether the memory of q, k, v and dout begins at multiples of 16 bytes.
        batch: number of sequences.
        seqlen_q, seqlen_k: rows of each sequence, of the longest where lengths vary.
        softmax_scale, causal, window_left, window_right, softcap, dropout_p: as in `Options`.
        slopes_strides: None without them.
        sink_strides: of s_aux and its gradient, None where that is not asked for.
        varlen, has_seqused: which other tensors are given.
    """

    capability: int
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    out_strides: tuple[int, ...]
    dout_strides: tuple[int, ...]
    dq_strides: tuple[int, ...]
    dk_strides: tuple[int, ...]
    dv_strides: tuple[int, ...]
    lse_strides: tuple[int, ...]
    dlse_strides: tuple[int, ...] | None
    d_strides: tuple[int, ...]
    aligned: bool
    batch: int
    seqlen_q: int
    seqlen_k: int
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    slopes_strides: tuple[int, ...] | None
    sink_strides: tuple[int, int] | None
    varlen: bool
    has_seqused: bool


class BackwardPlan(NamedTuple):
    """What to launch for a call.

    Attributes:
        workspace_shape: of float32, which `prepare` writes and the next two read.
        prepare, dkdv, dq: kernels, in this order.
        sink: the kernel of the gradient of s_aux, or None.
    """

    workspace_shape: tuple[int, int, int]
    prepare: Launch
    dkdv: Launch
    dq: Launch
    sink: Launch | None


def _row_strides(strides: tuple[int, ...] | None) -> tuple[int, ...]:
    """Of batch, head and row of a (b, h, sq) or (h, tq) tensor."""
    if strides is None:
        return 0, 0, 0
    return strides if len(strides) == 3 else (0, *strides)


def _plan_prepare(call: BackwardCall, workspace_rows: int, lse_factor: float) -> Launch:
    num_heads, head_dim = call.q_shape[-2:]
    unit = unit_of(call.out_strides, call.dout_strides)
    width = 1 << (head_dim - 1).bit_length()
    block = min(ROW_ALIGNMENT.value, max(4096 // width, 16))
    num_tiles = -(-call.seqlen_q // ROW_ALIGNMENT.value) * (ROW_ALIGNMENT.value // block)
    row_programs = call.batch * num_heads * num_tiles
    gap_programs = _GAP_PROGRAMS if call.varlen else 0
    gradients = call.dq_strides, call.dk_strides, call.dv_strides
    return Launch(
        prepare,
        row_programs + gap_programs,
        (
            *(*leading_strides(call.out_strides, unit), *leading_strides(call.dout_strides, unit)),
            *(*_row_strides(call.lse_strides), *_row_strides(call.dlse_strides)),
            *(*_row_strides(call.d_strides)[:2], workspace_rows),
            *(x for strides in gradients for x in leading_strides(strides)[1:]),
            *(*_totals(call), call.batch, num_heads, call.k_shape[-2]),
            *(call.seqlen_q, num_tiles, row_programs, gap_programs, lse_factor),
        ),
        {
            "IS_VARLEN": call.varlen,
            "HAS_DLSE": call.dlse_strides is not None,
            "UNIT": unit,
            "HEAD_DIM": head_dim,
            "D_PADDED": width,
            "BLOCK": block,
        },
        tiles.ROWS,
    )


def _totals(call: BackwardCall) -> tuple[int, int]:
    """Rows of all sequences together: of queries and of keys."""
    if call.varlen:
        return call.q_shape[0], call.k_shape[0]
    return call.batch * call.seqlen_q, call.batch * call.seqlen_k


def _plan_sink(call: BackwardCall) -> Launch:
    num_heads = call.q_shape[-2]
    total_q, _ = _totals(call)
    rows_of_batch = total_q if call.varlen else call.seqlen_q
    return Launch(
        sink_gradient,
        num_heads,
        (
            *(*call.sink_strides, *_row_strides(call.lse_strides)),
            *(*_row_strides(call.d_strides)[:2], total_q, max(rows_of_batch, 1)),
        ),
        {"BLOCK": 1024},
        tiles.ROWS,
    )


def _has_described_operands(call: BackwardCall) -> bool:
    """Whether tensor descriptors can be made of q, k, v and dout, and are worth it."""
    return (
        tiles.has_descriptors(call.capability)
        and min(call.seqlen_q, call.seqlen_k) >= LEAST_DESCRIBED_ROWS
        and call.aligned
        and is_describable(call.q_shape, call.q_strides)
        and is_describable(call.q_shape, call.dout_strides)
        and is_describable(call.k_shape, call.k_strides)
        and is_describable(call.k_shape, call.v_strides)
    )


@functools.lru_cache(maxsize=4096)
def plan_backward(call: BackwardCall) -> BackwardPlan:
    """The plan of a call.

    Raises:
        RuntimeError: a sequence is longer than the kernels can count.
    """
    check_lengths(call.seqlen_q, call.seqlen_k)
    (num_heads, head_dim), num_heads_k = call.q_shape[-2:], call.k_shape[-2]
    total_q, total_k = _totals(call)
    if call.varlen:
        blocks = total_q // ROW_ALIGNMENT.value + call.batch + 1
    else:
        blocks = call.batch * -(-call.seqlen_q // ROW_ALIGNMENT.value)
    workspace_rows = blocks * ROW_ALIGNMENT.value
    softcap = call.softcap
    if softcap > 0:
        lse_factor, score_scale = LOG2E, call.softmax_scale * LOG2E * 2.0 / softcap
    else:
        scale = call.softmax_scale if abs(call.softmax_scale) > _MIN_SCALE else _MIN_SCALE
        lse_factor, score_scale = 1.0 / scale, scale * LOG2E

    window_left, window_right = window(call, call.seqlen_q, call.seqlen_k)
    operands = call.q_strides, call.k_strides, call.v_strides, call.dout_strides
    unit = unit_of(*operands, call.dq_strides, call.dk_strides, call.dv_strides)
    d0, d1 = pieces(head_dim, unit)
    described = _has_described_operands(call)
    every_row_sees_a_key = window_right < 0 or call.seqlen_k - call.seqlen_q + window_right >= 0
    head_of_hopper = tiles.head_of_hopper(call.capability, head_dim, unit)
    hopper = described and head_of_hopper > 0
    if hopper:
        d0, d1 = head_of_hopper, 0
    else:
        described = described and d1 == 0 and not call.varlen and every_row_sees_a_key
    constants = {
        "IS_VARLEN": call.varlen,
        "HAS_SEQUSED": call.has_seqused,
        "HAS_LEFT": window_left >= 0,
        "HAS_RIGHT": window_right >= 0,
        "HAS_SOFTCAP": softcap_kind(softcap),
        "HAS_ALIBI": call.slopes_strides is not None,
        "HAS_DROPOUT": call.dropout_p > 0,
        "HEAD_DIM": head_dim,
        "D0": d0,
    }
    if hopper:
        constants["CLEARS"] = call.varlen or not every_row_sees_a_key
    else:
        constants |= {"DESCRIPTORS": described, "UNIT": unit, "D1": d1}
    slopes_strides = call.slopes_strides or (0,)
    slopes_batch_stride = slopes_strides[0] if len(slopes_strides) == 2 else 0

    def plan_of(
        kernel: Any,
        gradients: tuple[tuple[int, ...], ...],
        passing: tuple[int, int],
        passing_shape: tuple[int, ...],
        block: int,
        tile: tiles.Tile,
        num_tiles: int,
        pairs: int,
    ) -> Launch:
        """A kernel in num_tiles programs a pair.

        Arguments:
            gradients: strides of what it writes.
            passing: which two of q, k, v and dout pass through its programs, in blocks of rows.
            passing_shape: of these.
        """
        passing_bytes = 2 * math.prod(passing_shape) * call.dtype.itemsize
        pairs_at_once = max(1, min(pairs, _CACHE_BYTES * pairs // max(passing_bytes, 1)))
        return Launch(
            kernel,
            num_tiles * pairs,
            (
                *(x for y in (*operands, *gradients) for x in leading_strides(y, unit)),
                *(workspace_rows, slopes_batch_stride, slopes_strides[-1], total_q, total_k),
                *(num_heads_k, num_heads // max(num_heads_k, 1), call.seqlen_q, call.seqlen_k),
                *(window_left, window_right, num_tiles, pairs, pairs_at_once),
                *(score_scale, softcap * LOG2E, call.softmax_scale),
                *dropout_numbers(call.dropout_p),
            ),
            constants
            | {"BLOCK_M": tile.block_m, "BLOCK_N": tile.block_n, "STAGES": tile.num_stages},
            tile,
            dict.fromkeys(passing, (block, d0, hopper)) if described else None,
        )

    has_features = softcap > 0 or call.slopes_strides is not None or call.dropout_p > 0
    kernel_of_dkdv: Any = backward_dkdv
    kernel_of_dq: Any = backward_dq
    if hopper:
        from flash_attn.backends.flaggems.kernels import backward_dkdv_hopper, backward_dq_hopper

        kernel_of_dkdv = backward_dkdv_hopper.backward_dkdv_hopper
        kernel_of_dq = backward_dq_hopper.backward_dq_hopper
        tile_of_dkdv, tile_of_dq = tiles.backward_hopper(d0)
    else:
        tile_of_dkdv = tiles.backward_dkdv(call.capability, d0 + d1, described, has_features)
        tile_of_dkdv = tiles.for_unit(unit, call.capability, tile_of_dkdv)
        tile_of_dq = tiles.backward_dq(call.capability, d0 + d1, has_features)
        tile_of_dq = tiles.for_unit(unit, call.capability, tile_of_dq)
    dkdv = plan_of(
        kernel_of_dkdv,
        (call.dk_strides, call.dv_strides),
        (0, 3),
        call.q_shape,
        tile_of_dkdv.block_m,
        tile_of_dkdv,
        -(-call.seqlen_k // tile_of_dkdv.block_n),
        call.batch * num_heads_k,
    )
    dq = plan_of(
        kernel_of_dq,
        (call.dq_strides,),
        (1, 2),
        call.k_shape,
        tile_of_dq.block_n,
        tile_of_dq,
        -(-call.seqlen_q // tile_of_dq.block_m),
        call.batch * num_heads,
    )
    return BackwardPlan(
        (num_heads, 2, workspace_rows),
        _plan_prepare(call, workspace_rows, lse_factor),
        dkdv,
        dq,
        None if call.sink_strides is None else _plan_sink(call),
    )
