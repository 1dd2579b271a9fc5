"""The environment of a process: variables and a core library that it cannot use."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.cpu


def run_python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        timeout=500,
    )


def test_unknown_backend_in_the_environment():
    result = run_python("import flash_attn", FLASH_ATTENTION_USE_FLAGGEMS="maybe")
    assert result.returncode != 0
    last = result.stderr.strip().splitlines()[-1]
    assert last.startswith("ValueError") and "FLASH_ATTENTION_USE_FLAGGEMS" in last
    assert "TRUE" in last and "FALSE" in last and "maybe" in last


@pytest.mark.parametrize("value", ("true", ""))
def test_known_backends_in_the_environment(value):
    """On the CPU the native backend serves whatever was asked for accelerators."""
    code = (
        "import torch, flash_attn; x = torch.ones(1, 2, 1, 8);"
        "print(float(flash_attn.flash_attn_func(x, x, x).sum()))"
    )
    result = run_python(code, FLASH_ATTENTION_USE_FLAGGEMS=value)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "16.0"


CALL = "import torch, flash_attn; x = torch.ones(1, 2, 1, 8); flash_attn.flash_attn_func(x, x, x)"


def test_unknown_instruction_set():
    result = run_python(CALL, FLASH_ATTN_PLUS_CPU_ISA="quantum")
    assert result.returncode != 0
    assert "FLASH_ATTN_PLUS_CPU_ISA" in result.stderr and "quantum" in result.stderr


def test_missing_core_library(tmp_path):
    path = tmp_path / "nowhere.so"
    result = run_python(CALL, FLASH_ATTN_PLUS_CORE=str(path))
    assert result.returncode != 0
    assert "ImportError" in result.stderr and str(path) in result.stderr


def test_corrupt_core_library(tmp_path):
    path = tmp_path / "_core.so"
    path.write_bytes(b"not a library")
    result = run_python(CALL, FLASH_ATTN_PLUS_CORE=str(path))
    assert result.returncode != 0
    assert "ImportError" in result.stderr and str(path) in result.stderr
