"""How launches by the CUDA driver lay out a kernel's parameters.

test_compilation.py compares the parameters with what the compiler declares, for every kernel.
"""

import struct

import pytest

from flash_attn.backends.flaggems import driver_launch

DESCRIPTOR = "tensordesc<bf16[1, 1, 128, 64]>"


@pytest.mark.parametrize(
    ("signature", "offsets"),
    [
        ([], [0, 8]),
        (["*bf16", "constexpr", "*fp32"], [0, 8, 16, 24]),
        (["i32", "i64", "fp32"], [0, 8, 16, 24, 32]),
        (["*fp16", "i32", "i32", "i32", "i64"], [0, 8, 12, 16, 24, 32, 40]),
        # A tensor map of 128 bytes, four sizes and four strides.
        (
            ["*bf16", DESCRIPTOR, "*bf16"],
            [0, 64, *range(192, 208, 4), *range(208, 240, 8), 240, 248, 256],
        ),
        (["*fp32", "tensordesc<fp16[1, 32, 64]>"], [0, 64, 192, 196, 200, 208, 216, 224, 232, 240]),
    ],
)
def test_offsets(signature, offsets):
    layout = driver_launch.layout_of(signature)
    assert [offset for offset, _ in layout.places] == offsets
    packed = struct.Struct(f"={layout.tensors}{layout.numbers}")
    assert packed.size == sum(layout.places[-1])


def test_packed_values_lie_at_the_offsets():
    layout = driver_launch.layout_of(["*bf16", DESCRIPTOR, "*fp32", "constexpr", "i32", "i64"])
    assert layout.places[-4:] == [(248, 4), (256, 8), (264, 8), (272, 8)]
    described = bytes(range(176))
    packed = struct.pack(f"={layout.tensors}{layout.numbers}", 11, described, 12, 13, 14)
    expected = struct.pack("=Q56x176sQi4xq16x", 11, described, 12, 13, 14)
    assert packed == expected


def test_an_unknown_type_has_no_layout():
    with pytest.raises(KeyError):
        driver_launch.layout_of(["*bf16", "fp64"])
