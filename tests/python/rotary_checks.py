"""Rotary tables, and the comparison of a rotation with the reference."""

from itertools import pairwise

import reference
import torch
from checks import FP32, assert_close

POSITIONS = 96


def tables(rotary_dim, dtype=FP32, positions=POSITIONS):
    angle = torch.rand(positions, rotary_dim // 2) * 2 * torch.pi
    return angle.cos().to(dtype), angle.sin().to(dtype)


def expected_rotation(x, cos, sin, *, offsets=0, cu_seqlens=None, dtype=torch.float64, **options):
    """The reference's rotation of every sequence; rows of no sequence stay as they are."""
    out = x.to(dtype, copy=True)
    if cu_seqlens is None:
        sequences = [(batch, slice(None), x.shape[1]) for batch in range(x.shape[0])]
    else:
        bounds = cu_seqlens.tolist()
        sequences = [(slice(begin, end), ..., end - begin) for begin, end in pairwise(bounds)]
    for number, (index, rest, length) in enumerate(sequences):
        offset = offsets if isinstance(offsets, int) else int(offsets[number])
        out[index, rest] = reference.apply_rotary(
            x[index, rest],
            cos,
            sin,
            positions=torch.arange(length) + offset,
            dtype=dtype,
            **options,
        )
    return out


def check_rotation(actual, x, cos, sin, **options):
    expected = expected_rotation(x, cos, sin, **options)
    naive = expected_rotation(x, cos, sin, dtype=x.dtype, **options)
    assert actual.dtype == x.dtype
    assert_close(actual, expected, naive, "rotated")


OFFSETS = {
    "none": 0,
    "int": 17,
    "int32": torch.tensor([3, 0, 29], dtype=torch.int32),
    "int64": torch.tensor([3, 0, 29]),
}
