"""Peak memory: outputs and a workspace that does not grow with sq x sk.

Measured in a process of its own by the kernel's own peak (VmHWM), which is reset after the inputs
have been made. The score matrix of one head would take 64k x 64k x 4 bytes = 16 GiB.
"""

import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

MEASURE = """
import sys, torch, flash_attn
from pathlib import Path

def peak():
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024

def measured(call):
    call(64, 64)  # threads, scratch and code are there
    sizes = []
    for sq, sk in {sizes}:
        tensors, run = call(sq, sk, prepare=True)
        Path("/proc/self/clear_refs").write_text("5")
        base = peak()
        run()
        sizes.append(peak() - base)
    return sizes

def call(sq, sk, prepare=False):
    dtype = getattr(torch, "{dtype}")
    q = torch.randn(1, sq, 1, 64).to(dtype).requires_grad_({backward})
    k, v = (torch.randn(1, sk, 1, 64).to(dtype).requires_grad_({backward}) for _ in range(2))
    dout = torch.randn(1, sq, 1, 64).to(dtype)

    def run():
        out = flash_attn.flash_attn_func(q, k, v, **{options})
        if {backward}:
            torch.autograd.grad(out, (q, k, v), dout)

    if not prepare:
        run()
    return (q, k, v), run

torch.set_num_threads(2)
print(*measured(call))
"""


def peaks(sizes, dtype, backward, options):
    code = MEASURE.format(sizes=sizes, dtype=dtype, backward=backward, options=options)
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=500
    )
    assert result.returncode == 0, result.stderr
    return [int(word) for word in result.stdout.split()]


needs_peak = pytest.mark.skipif(
    not Path("/proc/self/clear_refs").exists(), reason="the system does not report peaks"
)

MEBIBYTE = 1 << 20


@needs_peak
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_forward_over_64k_keys(dtype):
    """A few queries over 64k keys, and as many queries as keys inside a window."""
    sizes = [(64, 65536), (1024, 65536)]
    small, large = peaks(sizes, dtype, False, {})
    # k and v take 16 MiB each in float32; the score matrix of 1024 rows would take 256 MiB.
    assert small < 80 * MEBIBYTE and large < 80 * MEBIBYTE
    (square,) = peaks([(65536, 65536)], dtype, False, {"window_size": (255, 0)})
    assert square < 112 * MEBIBYTE


@needs_peak
@pytest.mark.parametrize("dtype", ("float32", "bfloat16"))
def test_backward_over_64k_keys(dtype):
    """Gradients take as much as the inputs; beyond them at most float32 copies of that size."""
    (few,) = peaks([(1024, 65536)], dtype, True, {})
    # dk and dv take 16 MiB each in float32; the score matrix would take 256 MiB.
    assert few < 160 * MEBIBYTE
    (square,) = peaks([(65536, 65536)], dtype, True, {"window_size": (255, 0)})
    # out, dq, dk, dv of 16 MiB each in float32
    assert square < 224 * MEBIBYTE


@needs_peak
def test_growth_is_linear():
    """Twice the length: about twice the memory, not four times."""
    sizes = [(n, n) for n in (8192, 16384, 32768)]
    options = {"window_size": (511, 0)}
    for backward in (False, True):
        small, middle, large = peaks(sizes, "float32", backward, options)
        assert middle < 2.5 * small + 8 * MEBIBYTE and large < 2.5 * middle + 8 * MEBIBYTE
