"""Every kernel that the backend launches compiles for NVIDIA GPUs, and fits them."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from compile_kernels import remarks
from uniform_registers import unset

SCRIPT = Path(__file__).with_name("compile_kernels.py")
# Bytes of shared memory that a program may use, by architecture.
SHARED = {80: 163 << 10, 86: 99 << 10, 90: 227 << 10}
# Bytes of registers that a kernel may spill: what is written once, outside the inner loop.
MAX_STACK = 1024


def may_wait(report):
    """Whether ptxas may have products of a kernel wait for each other: dP for S in Hopper's dK and
    dV (docs/flaggems.md), and all where elements are moved one by one.
    """
    return report["kernel"] == "backward_dkdv_hopper" or report["flags"].get("UNIT") == 1


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
        assert not report["remarks"] or may_wait(report), report
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


# A product whose accumulator is touched before it was waited for.
PTX = """
.version 8.4
.target sm_90a
.address_size 64
.visible .entry f(.param .u64 out, .param .u64 descriptor)
{
	.reg .f32 %f<4>;
	.reg .b64 %rd<3>;
	ld.param.u64 %rd1, [out];
	ld.param.u64 %rd2, [descriptor];
	mov.f32 %f0, 0f00000000;
	mov.f32 %f1, 0f00000000;
	mov.f32 %f2, 0f00000000;
	mov.f32 %f3, 0f00000000;
	wgmma.fence.sync.aligned;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd2, %rd2, 1,1,1,0,0;
	add.f32 %f0, %f0, %f0;
	wgmma.mma_async.sync.aligned.m64n8k16.f32.bf16.bf16 {%f0, %f1, %f2, %f3}, %rd2, %rd2, 1,1,1,0,0;
	wgmma.commit_group.sync.aligned;
	wgmma.wait_group.sync.aligned 0;
	st.global.f32 [%rd1], %f0;
	ret;
}
"""


def test_a_product_that_waits_is_found():
    assert "C7517" in remarks(PTX)
    assert remarks(PTX.replace("	add.f32 %f0, %f0, %f0;\n", "")) == []


def test_shapes_do_not_specialise():
    """Fifty shapes of a kind: one kernel, and of dense calls one more, for Hopper's descriptors."""
    (counts,) = run("--count")
    assert set(counts) == {"dense", "varlen", "decode"}
    for kind, kernels in counts.items():
        for name, count in kernels.items():
            assert count <= (2 if kind == "dense" else 1), (kind, name, count)
