"""What the two kernels of the backward pass have in common: how their programs are numbered, and
how tiles come, go, and become probabilities.
"""

import triton
import triton.language as tl

from flash_attn.backends.flaggems.kernels.common import tanh_of

NUMBERS = [
    *("q_batch_stride", "q_row_stride", "q_head_stride"),
    *("k_batch_stride", "k_row_stride", "k_head_stride"),
    *("v_batch_stride", "v_row_stride", "v_head_stride"),
    *("dout_batch_stride", "dout_row_stride", "dout_head_stride"),
    *("workspace_rows", "slopes_batch_stride", "slopes_head_stride", "total_q", "total_k"),
    *("num_heads_k", "group_size", "seqlen_q", "seqlen_k", "window_left", "window_right"),
    *("num_tiles", "num_pairs", "pairs_at_once"),
    *("score_scale", "softcap", "softmax_scale", "dropout_threshold", "dropout_scale"),
]


@triton.jit
def program_order(num_tiles, num_pairs, pairs_at_once):
    """Tile and pair (of batch and head, int64) of this program.

    pairs_at_once pairs, which share the cache, are worked on together, tile by tile.
    """
    program = tl.program_id(0).to(tl.int64)
    group = program // (pairs_at_once.to(tl.int64) * num_tiles)
    first = group * pairs_at_once
    pairs = tl.minimum(num_pairs - first, pairs_at_once.to(tl.int64))
    rest = program - first * num_tiles
    return (rest // pairs).to(tl.int32), first + rest % pairs


@triton.jit
def tile_offsets(row_stride, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Where the elements of a tile of rows are, from its first; row_stride in elements."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    return row[:, None] * row_stride + column[None, :]


@triton.jit
def load_tile(
    pointer,
    offsets,
    begin,
    end,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALID_COLUMNS: tl.constexpr,
    HAS_BEGIN: tl.constexpr,
    HAS_END: tl.constexpr,
):
    """A tile of rows, 0 in rows before `begin` and from `end` on, and in invalid columns."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    if HAS_BEGIN:
        mask = (row[:, None] >= begin) & (row[:, None] < end)
    elif HAS_END:
        mask = row[:, None] < end
    if VALID_COLUMNS < COLUMNS:
        if HAS_END:
            mask = mask & (column[None, :] < VALID_COLUMNS)
        else:
            mask = column[None, :] < VALID_COLUMNS
        x = tl.load(pointer + offsets, mask=mask, other=0.0)
    elif HAS_END:
        x = tl.load(pointer + offsets, mask=mask, other=0.0)
    else:
        x = tl.load(pointer + offsets)
    return x


@triton.jit
def exponents(
    score,
    distance,
    softcap,
    slope,
    HAS_SOFTCAP: tl.constexpr,
    HAS_ALIBI: tl.constexpr,
):
    """Scores in units of log2, and what softcap's derivative is made of: tanh(s / softcap).

    score: times score_scale already. HAS_SOFTCAP: `softcap_kind` of launch.py.
    """
    capped = score
    if HAS_SOFTCAP:
        capped = tanh_of(score, HAS_SOFTCAP == 2)
        score = softcap * capped
    if HAS_ALIBI:
        score = score - slope * tl.abs(distance)
    return score, capped


@triton.jit
def store_tile(
    pointer,
    row_stride,
    x,
    end,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    VALID_COLUMNS: tl.constexpr,
):
    """Rows [0, end) of a tile; row_stride in elements, int64."""
    row = tl.arange(0, ROWS)
    column = tl.arange(0, COLUMNS)
    mask = (row[:, None] < end) & (column[None, :] < VALID_COLUMNS)
    tl.store(pointer + row[:, None] * row_stride + column[None, :], x, mask=mask)
