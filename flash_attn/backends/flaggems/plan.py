"""What a forward call launches: a pure function of its shapes, strides and options.

Nothing here looks at memory, so that equal calls share one plan, which is found again by hashing
the call.
"""

from __future__ import annotations

import functools
from typing import Any, NamedTuple

import torch

from flash_attn.backends.flaggems import tiles
from flash_attn.backends.flaggems.kernels.combine import combine_parts
from flash_attn.backends.flaggems.kernels.forward import attention_forward
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

MAX_SPLITS = 128
# Rows that one tile of the kernel for few rows has at most.
MOST_FEW_ROWS = 64
# What the kernel of Hopper takes, in its order.
_NUMBERS_OF_HOPPER = (
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("out_batch_stride", "out_row_stride", "out_head_stride"),
    *("lse_batch_stride", "lse_head_stride"),
    *("slopes_batch_stride", "slopes_head_stride", "s_aux_stride"),
    *("batch", "num_heads", "group_size", "seqlen_q", "seqlen_k", "seqlen_new"),
    *("total_q", "total_k", "cache_rows", "num_tiles", "window_left", "window_right"),
    *("scale", "softcap", "dropout_threshold", "dropout_scale"),
)
# What the kernel that writes S_dmask does not take of the forward kernel's.
_NOT_OF_S_DMASK = (
    *("DESCRIPTORS", "PACKED", "SPLIT", "HAS_SINK", "HAS_DROPOUT", "TRANSFORMED"),
    *("BLOCK_M", "BLOCK_N"),
)
_CONSTANTS_OF_HOPPER = (
    *("VARLEN_Q", "VARLEN_K", "HAS_SEQUSED", "HAS_LEFTPAD", "HAS_BATCH_IDX"),
    *("HAS_LEFT", "HAS_RIGHT", "HAS_SOFTCAP", "HAS_ALIBI", "HAS_SINK", "HAS_DROPOUT"),
    *("TRANSFORMED", "HEAD_DIM", "D0", "BLOCK_M", "BLOCK_N"),
)

# Descriptors are made at every launch, which short calls do not win back.
LEAST_DESCRIBED_KEYS = 512


class Call(NamedTuple):
    """A forward call without its memory.

    Attributes:
        capability, num_units: of the device, see `Runtime`.
        dtype: of q, k, v and out.
        q_shape, k_shape: of the tensors.
        q_strides, k_strides, v_strides, out_strides, lse_strides: of the tensors, in elements.
        aligned: whether the memory of q, k, v and out begins at multiples of 16 bytes.
        batch: number of sequences.
        seqlen_q, seqlen_k: rows of each sequence, of the longest where lengths vary.
        seqlen_new: keys beyond those that seqused counts.
        num_splits: parts of the keys; 0 leaves it to the plan.
        softmax_scale, causal, window_left, window_right, softcap, dropout_p: as in `Options`.
        slopes_strides, s_aux_stride, table_stride: None where there is no such tensor.
        varlen_q, varlen_k, has_seqused, has_leftpad, has_batch_idx: which other tensors are given.
    """

    capability: int
    num_units: int
    dtype: torch.dtype
    q_shape: tuple[int, ...]
    k_shape: tuple[int, ...]
    q_strides: tuple[int, ...]
    k_strides: tuple[int, ...]
    v_strides: tuple[int, ...]
    out_strides: tuple[int, ...]
    lse_strides: tuple[int, ...]
    aligned: bool
    batch: int
    seqlen_q: int
    seqlen_k: int
    seqlen_new: int
    num_splits: int
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    softcap: float
    dropout_p: float
    slopes_strides: tuple[int, ...] | None
    s_aux_stride: int | None
    table_stride: int | None
    varlen_q: bool
    varlen_k: bool
    has_seqused: bool
    has_leftpad: bool
    has_batch_idx: bool

    @property
    def is_dense(self) -> bool:
        """Whether sequences have all rows of their tensors, in order."""
        varlen = self.varlen_q or self.varlen_k
        return not (varlen or self.has_seqused or self.has_leftpad or self.has_batch_idx)


class Plan(NamedTuple):
    """What to launch for a call.

    Attributes:
        attend: the forward kernel.
        hopper: whether that is the one of kernels/forward_hopper.py.
        num_splits: parts of the keys.
        rows: query rows.
        combine: the kernel that combines the parts where there are several, otherwise None.
        s_dmask_numbers: of the kernel that writes S_dmask, before and behind its strides.
        s_dmask_constants: of that kernel, but for its tile.
    """

    attend: Launch
    hopper: bool
    num_splits: int
    rows: int
    combine: Launch | None
    s_dmask_numbers: tuple[tuple, tuple]
    s_dmask_constants: dict[str, Any]


def plan_splits(num_items: int, num_keys: int, num_units: int, block_n: int) -> int:
    """The number of parts into which keys are split, as src/attention/split.cpp chooses it.

    The time of the longest unit, in keys, is waves * (keys of a part + cost); the fewest parts that
    reach the least of it.

    Arguments:
        num_items: programs that there are without splitting.
        num_units: how many of them the device runs at once.
    """
    cost = 128
    most = max(1, min(-(-num_keys // block_n), num_units, MAX_SPLITS))
    best, best_time = 1, None
    for splits in range(1, most + 1):
        waves = -(-num_items * splits // num_units)
        keys = -(-num_keys // (splits * block_n)) * block_n
        time = waves * (keys + (cost if splits > 1 else 0))
        if best_time is None or time < best_time:
            best, best_time = splits, time
    return best


def _has_described_keys(call: Call) -> bool:
    """Whether tensor descriptors can be made of keys and values, and are worth it."""
    return (
        tiles.has_descriptors(call.capability)
        and call.aligned
        and call.seqlen_k >= LEAST_DESCRIBED_KEYS
        and call.table_stride is None
        and is_describable(call.k_shape, call.k_strides)
        and is_describable(call.k_shape, call.v_strides)
    )


def _strides(name: str, strides: tuple[int, ...], unit: int) -> dict[str, int]:
    """`leading_strides` by the names of the kernels' arguments."""
    names = (f"{name}_{dimension}_stride" for dimension in ("batch", "row", "head"))
    return dict(zip(names, leading_strides(strides, unit), strict=True))


@functools.lru_cache(maxsize=4096)
def plan_forward(call: Call) -> Plan:
    """The plan of a call that has sequences and query rows.

    Raises:
        RuntimeError: a sequence is longer than the kernels can count.
    """
    check_lengths(call.seqlen_q, call.seqlen_k)
    num_heads, head_dim = call.q_shape[-2:]
    group_size = num_heads // call.k_shape[-2]
    has_dropout = call.dropout_p > 0
    paged = call.table_stride is not None
    left, right = window(call, call.seqlen_q, call.seqlen_k)
    unit = unit_of(call.q_strides, call.k_strides, call.v_strides, call.out_strides)
    d0, d1 = pieces(head_dim, unit)

    # Rows of a key head's query heads side by side, where they fit in one tile.
    rows = call.seqlen_q * group_size
    few = rows <= MOST_FEW_ROWS and not has_dropout
    packed = few and group_size > 1
    if few:
        tile = tiles.few_rows(call.capability, d0 + d1, rows)
    else:
        rows = call.seqlen_q
        tile = tiles.forward(call.capability, d0 + d1, has_dropout)
        tile = tiles.for_unit(unit, call.capability, tile)
    has_slopes, has_sink = call.slopes_strides is not None, call.s_aux_stride is not None
    softcap, scale = call.softcap, call.softmax_scale
    described = not few and _has_described_keys(call)
    head_of_hopper = tiles.head_of_hopper(call.capability, head_dim, unit)
    hopper = described and head_of_hopper > 0
    if hopper:
        d0, d1 = head_of_hopper, 0
        tile = tiles.forward_hopper(d0)
    else:
        described = described and d1 == 0 and call.is_dense
    heads = call.k_shape[-2] if packed else num_heads
    num_tiles = -(-rows // tile.block_m)
    splits = 1
    if few and call.num_splits > 0:
        splits = min(call.num_splits, MAX_SPLITS)
    elif few:
        visible = call.seqlen_k
        if left >= 0 and right >= 0:
            visible = min(visible, call.seqlen_q + left + right)
        # Two programs share a multiprocessor; but where keys have to be split for each to have one,
        # one reads as fast, and there are fewer parts to put together.
        items = call.batch * heads * num_tiles
        units = call.num_units if 2 * items <= call.num_units else 2 * call.num_units
        splits = plan_splits(items, visible, units, tile.block_n)

    lse_strides = (0, *call.lse_strides) if call.varlen_q else call.lse_strides
    slopes_strides = call.slopes_strides or (0,)
    total_q = call.q_shape[0] if call.varlen_q else 0
    threshold, dropout_scale = dropout_numbers(call.dropout_p)
    numbers = {
        **_strides("q", call.q_strides, unit),
        **_strides("k", call.k_strides, unit),
        **_strides("v", call.v_strides, unit),
        **_strides("out", call.out_strides, unit),
        "lse_batch_stride": lse_strides[0],
        "lse_head_stride": lse_strides[1],
        "table_stride": call.table_stride or 0,
        "slopes_batch_stride": slopes_strides[0] if len(slopes_strides) == 2 else 0,
        "slopes_head_stride": slopes_strides[-1],
        "s_aux_stride": call.s_aux_stride or 0,
        "batch": call.batch,
        "num_heads": num_heads,
        "group_size": group_size,
        "seqlen_q": call.seqlen_q,
        "seqlen_k": call.seqlen_k,
        "seqlen_new": call.seqlen_new,
        "total_q": total_q,
        "total_k": call.k_shape[0] if call.varlen_k else 0,
        "page_size": call.k_shape[1] if paged else 1,
        "num_pages": call.k_shape[0] if paged else 1,
        "cache_rows": call.k_shape[0],
        "num_tiles": num_tiles,
        "num_splits": splits,
        "window_left": max(left, 0),
        "window_right": max(right, 0),
        "scale": 2 * LOG2E * scale / softcap if softcap > 0 else scale * LOG2E,
        "softcap": softcap * LOG2E,
        "dropout_threshold": threshold,
        "dropout_scale": dropout_scale,
    }
    constants = {
        "UNIT": unit,
        "VARLEN_Q": call.varlen_q,
        "VARLEN_K": call.varlen_k,
        "HAS_SEQUSED": call.has_seqused,
        "HAS_LEFTPAD": call.has_leftpad,
        "HAS_BATCH_IDX": call.has_batch_idx,
        "PAGED": paged,
        "DESCRIPTORS": described,
        "PACKED": packed,
        "SPLIT": splits > 1,
        "HAS_LEFT": left >= 0,
        "HAS_RIGHT": right >= 0,
        "HAS_SOFTCAP": softcap_kind(softcap),
        "HAS_ALIBI": has_slopes,
        "HAS_SINK": has_sink,
        "HAS_DROPOUT": has_dropout,
        # Scaling in the exponent saves a multiplication, and has scores beyond 2^23 differ from
        # their maximum by its rounding. Few rows do without the saving.
        "TRANSFORMED": few or softcap > 0 or has_slopes or not scale > 0,
        "HEAD_DIM": head_dim,
        "D0": d0,
        "D1": d1,
        "BLOCK_M": tile.block_m,
        "BLOCK_N": tile.block_n,
    }
    in_order = tuple(numbers.values())
    s_dmask_constants = {name: x for name, x in constants.items() if name not in _NOT_OF_S_DMASK}
    kernel: Any = attention_forward
    if hopper:
        from flash_attn.backends.flaggems.kernels.forward_hopper import attention_forward_hopper

        kernel = attention_forward_hopper
        numbers = {name: numbers[name] for name in _NUMBERS_OF_HOPPER}
        constants = {name: constants[name] for name in _CONSTANTS_OF_HOPPER}
        constants["STAGES"] = tile.num_stages
    blocks = dict.fromkeys((1, 2), (tile.block_n, d0, hopper)) if described else None
    programs = call.batch * heads * splits * num_tiles
    attend = Launch(kernel, programs, (*numbers.values(),), constants, tile, blocks)
    rows *= call.batch * heads
    combine = None
    if splits > 1:
        combine_numbers = (
            *leading_strides(call.out_strides),
            *lse_strides[:2],
            call.s_aux_stride or 0,
            *(call.batch, num_heads, group_size, call.seqlen_q, total_q, splits),
        )
        combine_constants = {
            "VARLEN_Q": call.varlen_q,
            "PACKED": packed,
            "HAS_SINK": has_sink,
            "HEAD_DIM": head_dim,
            "BLOCK_D": d0 if d1 == 0 else 2 * d0,
            "MAX_SPLITS": MAX_SPLITS,
        }
        combine = Launch(combine_parts, rows, combine_numbers, combine_constants, tiles.COMBINE)
    return Plan(
        attend,
        hopper,
        splits,
        rows,
        combine,
        (in_order[:6], in_order[14:]),  # without the strides of v, out and lse
        s_dmask_constants,
    )
