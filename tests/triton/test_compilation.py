"""Every kernel that the backend launches compiles for NVIDIA GPUs, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from uniform_registers import unset

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Bytes of shared memory that a program may use, by architecture.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
# Bytes of registers that a kernel may spill: what is written once, outside the inner loop.
MAX_STACK = 1024


def run(*options):
    """The lines that the script prints; the interpreter is for this process alone."""
    environment = {name: x for name, x in os.environ.items() if name != "TRITON_INTERPRET"}
    command = [sys.executable, SCRIPT, *options]
    result = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-2000:]
    return [json.loads(line) for line in result.stdout.splitlines()]


@pytest.mark.parametrize("arch", SHARED)
def test_kernels_compile_and_fit(arch):
    options = ["--arch", str(arch), "--jobs", "1"]
    if arch == 86:  # as 80, with less shared memory
        options += ["--only", "attention_forward", "backward_dkdv"]
    reports = run(*options)
    assert reports
    for report in reports:
        assert "error" not in report, report
        assert report["shared"] <= SHARED[arch], report
        assert report["stack"] <= MAX_STACK, report
        assert not report["unset"], report
        assert report["as_laid_out"], report


# One path to the product writes UR4 and UR5, the other jumps over that.
SASS = """
        /*0000*/                   UMOV UR6, 0x400 ;
        /*0010*/                   UMOV UR7, 0x40000040 ;
        /*0020*/              @!P0 BRA `(.L_x_0) ;
        /*0030*/                   UIADD3 UR4, UP0, UR6, 0x20, URZ ;
        /*0040*/                   UMOV UR5, UR7 ;
.L_x_0:
        /*0050*/                   HGMMA.64x16x16.F32.BF16 R72, gdesc[UR4], R72 ;
        /*0060*/                   EXIT ;
"""


def test_what_reads_an_unset_register_is_found():
    assert unset(SASS) == ["HGMMA.64x16x16.F32.BF16 R72, gdesc[UR4], R72"]
    assert unset(SASS.replace("@!P0 BRA `(.L_x_0)", "NOP")) == []


def test_shapes_do_not_specialise():
    """Fifty shapes of a kind: one kernel, and of dense calls one more, for Hopper's descriptors."""
    (counts,) = run("--count")
    assert set(counts) == {"dense", "varlen", "decode"}
    for kind, kernels in counts.items():
        for name, count in kernels.items():
            assert count <= (2 if kind == "dense" else 1), (kind, name, count)
