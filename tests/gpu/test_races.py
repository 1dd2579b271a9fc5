"""A thousand repetitions: what must be bitwise the same is, whatever else runs on the GPU."""

import calls
import pytest
import torch
from calls import EVERY

import flash_attn

REPETITIONS = 1000


def repeated(make, noise):
    call = make()
    expected = call()
    other = torch.randn(2048, 2048).to(torch.bfloat16)
    side = torch.cuda.Stream()
    different = torch.zeros(len(expected), dtype=torch.int64)
    for i in range(REPETITIONS):
        if noise and i % 4 == 0:  # blocks are scheduled in another order beside other work
            with torch.cuda.stream(side):
                other @ other
        for j, (x, y) in enumerate(zip(call(), expected, strict=True)):
            different[j] += (x.view(torch.uint8) != y.view(torch.uint8)).any()
    return different.tolist()


@pytest.mark.parametrize("noise", (False, True), ids=("alone", "beside other work"))
@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
def test_repetitions_are_bitwise_equal(make, noise):
    assert not any(repeated(make, noise))


def test_the_deterministic_dq_of_many_blocks():
    q, k, v = calls.leaves((1, 2000, 2, 128), (1, 2000, 1, 128), (1, 2000, 1, 128))

    def dq():
        out = flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True)
        return torch.autograd.grad(out, q, torch.ones_like(out))[0]

    expected = dq()
    different = sum((dq() != expected).any() for _ in range(200))
    assert int(different) == 0


@pytest.mark.parametrize("make", EVERY.values(), ids=EVERY.keys())
def test_memory_that_was_nan_before(make):
    """Every element of every result is written: the allocator hands out memory full of NaN."""
    call = make()
    expected = [x.clone() for x in call()]
    torch.cuda.synchronize()
    for _ in range(3):
        poison = [torch.full((size,), torch.nan) for size in (1 << 26, *[1 << 18] * 8, *[100] * 64)]
        del poison
        results = call()
        for x, y in zip(results, expected, strict=True):
            assert torch.equal(x.isnan(), y.isnan())
