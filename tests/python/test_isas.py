"""Every instruction set that this machine can run: a compact table of cases each, by itself.

The instruction set is chosen once per process, so each runs this file's cases in one of its own.
"""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from checks import DTYPES, Case, check_backward, check_forward, pairwise

from flash_attn import _core

pytestmark = pytest.mark.cpu

ISAS = _core.cpu_isas().split(",")
KNOWN = {"portable", "avx2", "avx512", "avx512_bf16", "amx_bf16"}

FEATURES = {
    "dtype": DTYPES,
    "lengths": ((70, 70), (40, 200), (130, 40), (1, 150), (200, 257)),
    "heads": ((4, 4), (6, 2), (8, 1)),
    "head_dim": (64, 128, 40, 33, 256, 1),
    "causal": (False, True),
    "window_size": ((-1, -1), (24, 0), (17, 31)),
    "softcap": (0.0, 1.5),
    "alibi": ("", "bh"),
    "sinks": (False, True),
    "dropout_p": (0.0, 0.17),
    "layout": ("dense", "sliced"),
    "lse_gradient": (False, True),
}


def cases():
    for row in pairwise(seed=5, **FEATURES):
        (sq, sk), (heads, heads_k) = row.pop("lengths"), row.pop("heads")
        yield Case(sq=sq, sk=sk, heads=heads, heads_k=heads_k, **row)


def run_cases():
    """In the child: everything that fails, with its id."""
    import test_kvcache
    import test_varlen

    torch.set_num_threads(2)
    work = [(check_backward, case) for case in cases()]
    work += [
        (check_forward, Case(dtype=dtype, sq=sq, sk=3000, heads_k=heads_k))
        for dtype in DTYPES
        for sq, heads_k in ((1, 1), (2, 4), (90, 2))
    ]
    work += [
        (test_kvcache.check, test_kvcache.CacheCase(dtype=dtype, new=new, page_size=page, rotary=r))
        for dtype in DTYPES
        for new, page, r in ((None, 0, ""), (1, 16, "halves"), (5, 0, "interleaved"))
    ]
    work += [
        (
            test_varlen.check_backward,
            test_varlen.VarlenCase(dtype=dtype, batch="zeros", causal=True),
        )
        for dtype in DTYPES
    ]
    failures = []
    for check, case in work:
        torch.manual_seed(0)
        try:
            check(case)
        except Exception as error:  # all of them are reported together
            failures.append(f"{case}: {type(error).__name__}: {error}")
    print(f"{_core.cpu_isa()}: {len(work)} cases, {len(failures)} failures")
    print("\n".join(failures))
    return len(failures)


def test_the_list():
    """From the best to the portable one, which every machine has."""
    assert set(ISAS) <= KNOWN and ISAS[-1] == "portable" and len(set(ISAS)) == len(ISAS)
    assert _core.cpu_isa() in ISAS


@pytest.mark.parametrize("isa", ISAS)
def test_instruction_set(isa):
    result = subprocess.run(
        [sys.executable, str(Path(__file__))],
        env={
            **os.environ,
            "FLASH_ATTN_PLUS_CPU_ISA": isa,
            "PYTHONPATH": os.pathsep.join(path or os.getcwd() for path in sys.path),
        },
        capture_output=True,
        text=True,
        timeout=500,
    )
    assert result.returncode == 0, result.stdout + result.stderr
    assert result.stdout.startswith(f"{isa}: ")


@pytest.mark.parametrize("isa", sorted(KNOWN - set(ISAS)))
def test_instruction_set_that_this_machine_lacks(isa):
    """Is refused with its name, not run into an illegal instruction."""
    code = (
        "import torch, flash_attn; x = torch.ones(1, 2, 1, 8); flash_attn.flash_attn_func(x, x, x)"
    )
    result = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "FLASH_ATTN_PLUS_CPU_ISA": isa},
        capture_output=True,
        text=True,
    )
    assert result.returncode == 1 and isa in result.stderr


if __name__ == "__main__":
    sys.exit(min(run_cases(), 1))
