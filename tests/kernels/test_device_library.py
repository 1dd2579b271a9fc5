"""The test kernels of tests/gpu compile, each for the first and the last family that differ."""

import sys
from pathlib import Path

import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "gpu"))

import device_kernels
from device_code import compile_kernels


@pytest.mark.parametrize("arch", [80, 90])
@pytest.mark.parametrize("file", device_kernels.FILES)
def test_every_kernel_compiles(file, arch):
    for constants in device_kernels.FILES[file]:
        assert compile_kernels(file, arch, **constants)
