"""`python -m flash_attn compile` and `explain`: the CUDA kernels without a GPU."""

import os
import subprocess
import sys

import pytest

from flash_attn import __main__ as cli
from flash_attn.backends.cuda import nvrtc_directories
from flash_attn.cli import compile as compile_cli
from flash_attn.cli.compile import Kernel

pytestmark = pytest.mark.cpu

needs_nvrtc = pytest.mark.skipif(
    not any(directory.glob("libnvrtc.so*") for directory in nvrtc_directories()),
    reason="NVRTC is not installed",
)


def run(capsys, *arguments):
    status = cli.main([str(argument) for argument in arguments])
    return status, capsys.readouterr().out


def test_a_kernel_knows_its_kind_and_fields():
    kernel = Kernel(90, "BackwardConvertSpec{.dtype = DType::kFloat16, .head_dim = 64}")
    assert kernel.kind() == "backward_convert"
    assert kernel.fields() == {"dtype": "DType::kFloat16", "head_dim": "64"}


def test_filters_let_through_what_a_program_needs():
    kernels = compile_cli.kernels_of(90)
    assert len(set(kernels)) == len(kernels)
    selected = compile_cli.select(kernels, ["forward", "s_dmask"], ["bf16"], [33, 128])
    assert {kernel.kind() for kernel in selected} == {"forward", "s_dmask"}
    assert {kernel.fields()["dtype"] for kernel in selected} == {"DType::kBFloat16"}
    # 33 is served by the tile of 48.
    assert {kernel.fields().get("head_dim") for kernel in selected} == {None, "48", "128"}


@pytest.mark.parametrize("text", ["sm_90", "9.0", "90"])
def test_architectures_have_several_spellings(text):
    assert compile_cli.architecture(text) == 90


def test_list_compiles_nothing(capsys, tmp_path):
    status, out = run(capsys, "compile", "--arch", "sm_80", "sm_90", "--kernel", "append", "--list")
    lines = out.splitlines()
    assert status == 0
    assert {line.split()[0] for line in lines} == {"sm_80", "sm_90"}
    assert all("AppendSpec{" in line for line in lines)


@needs_nvrtc
def test_compile_fills_a_directory_once(capsys, tmp_path, monkeypatch):
    monkeypatch.setenv("FLASH_ATTN_PLUS_CACHE_DIR", "")  # --output sets it
    call = ("compile", "--arch", "sm_90", "--kernel", "append", "--dtype", "bf16")
    options = ("--match", "rotates = false", "--jobs", 1, "--output", tmp_path)
    status, out = run(capsys, *call, *options)
    assert status == 0 and ": compiled" in out and ": disk" not in out
    files = sorted(tmp_path.iterdir())
    assert files and all(file.name.startswith("append_to_cache-sm_90-") for file in files)
    status, out = run(capsys, *call, *options)
    assert status == 0 and ": disk" in out and ": compiled" not in out
    assert sorted(tmp_path.iterdir()) == files


def test_explain_prints_the_launches(capsys):
    status, out = run(capsys, "explain", "--arch", "sm_86", "--head-dim", 64, "--causal")
    assert status == 0
    assert "sm_86: 84 multiprocessors, 99 kB" in out
    assert "ForwardSpec{" in out and "blocks of" in out
    status, out = run(capsys, "explain", "backward", "--deterministic", "--dropout", 0.1)
    assert status == 0 and "BackwardSpec{" in out and "deterministic = true" in out
    status, out = run(
        capsys, "explain", "kvcache", "--seqlen-q", 1, "--seqlen-k", 9000, "--new-keys", 1
    )
    assert status == 0 and "AppendSpec{" in out and "DecodeSpec{" in out


def test_explain_gives_the_reason_of_a_refusal(capsys):
    status, out = run(capsys, "explain", "--head-dim", 300)
    assert status == 1 and "head dimension at most 256" in out
    status, out = run(capsys, "explain", "--arch", "sm_75")
    assert status == 1 and "must be one of sm_80" in out


@pytest.mark.parametrize(
    "variable, call",
    [
        ("FLASH_ATTN_PLUS_FORWARD_TILES", ["forward", "--seqlen-q", "512"]),
        ("FLASH_ATTN_PLUS_BACKWARD_TILES", ["backward"]),
        ("FLASH_ATTN_PLUS_DECODE_TILES", ["kvcache", "--seqlen-q", "1", "--seqlen-k", "9000"]),
    ],
)
def test_tiles_of_the_environment_that_make_no_sense_are_refused(variable, call):
    for value, refused in (("64,64", True), ("", False)):
        done = subprocess.run(
            [sys.executable, "-m", "flash_attn", "explain", *call],
            env=os.environ | {variable: value},
            capture_output=True,
            text=True,
        )
        assert done.returncode == refused, done.stderr
        assert (f"{variable} must be" in done.stdout + done.stderr) == refused
