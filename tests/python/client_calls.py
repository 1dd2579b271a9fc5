"""What the tests of clients' calls share: shapes, inputs, comparisons."""

import reference
import torch
from checks import DTYPE, assert_close

BATCH, HEADS, HEADS_K, HEAD_DIM = 2, 4, 2, 32


def qkv(sq=19, sk=None, heads_k=HEADS_K, dtype=DTYPE, batch=BATCH):
    sk = sq if sk is None else sk
    q = torch.randn(batch, sq, HEADS, HEAD_DIM)
    k, v = (torch.randn(batch, sk, heads_k, HEAD_DIM) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


def check_out(out, q, k, v, **options):
    expected, _ = reference.attention(q, k, v, **options)
    naive, _ = reference.attention(q, k, v, **options, dtype=q.dtype)
    assert_close(out, expected, naive, "out")


def reference_gradients(q, k, v, dout, **options):
    _, _, gradients = reference.with_gradients(reference.attention, (q, k, v), dout, **options)
    return [gradient.to(q.dtype) for gradient in gradients]
