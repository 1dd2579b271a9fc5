"""What the tests of the modules share: sizes, inputs, a comparison."""

import reference
import torch
from checks import DTYPE, assert_close

DIM, HEADS, HEAD_DIM = 128, 4, 32


def check_attention(out, q, k, v, **options):
    expected, _ = reference.attention(q, k, v, **options)
    naive, _ = reference.attention(q, k, v, **options, dtype=q.dtype)
    assert_close(out, expected, naive, "out")


def qkv(batch=2, seqlen=23, heads=HEADS, dtype=DTYPE):
    return torch.randn(batch, seqlen, 3, heads, HEAD_DIM).to(dtype)


def generate(module, x, steps, params):
    """Passes x in pieces of the given lengths."""
    outputs, position = [], 0
    for step in steps:
        outputs.append(module(x[:, position : position + step], inference_params=params))
        position += step
        params.seqlen_offset = position
    return torch.cat(outputs, dim=1)
