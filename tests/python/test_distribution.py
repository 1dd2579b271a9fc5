"""The distribution: a version that the clients take, and what the import needs."""

import importlib.metadata
import os
import subprocess
import sys

import pytest
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import flash_attn

pytestmark = pytest.mark.cpu

VERSIONS = {
    "transformers": ">=2.3.3",
    "diffusers": ">=2.6.3",
    "TransformerEngine": ">=2.1.1,<2.8.4",
    "Megatron-LM": ">=2.7.3",
    "axolotl": "==2.8.3",
}


@pytest.mark.parametrize("client", VERSIONS)
def test_version_is_one_that_the_client_takes(client):
    assert flash_attn.__version__ in SpecifierSet(VERSIONS[client])
    assert Version("2.1.1") <= Version(flash_attn.__version__) < Version("2.8.4")
    assert not flash_attn.__version__ < "2.6.3"  # yunchang compares strings


def test_distribution():
    distributions = importlib.metadata.packages_distributions()
    if "flash_attn" not in distributions:
        pytest.skip("flash_attn is not installed: the source tree is on the path")
    assert "flash-attn" in distributions["flash_attn"]
    assert "flash-attn" in distributions["flash_attn_2_cuda"]
    for name in ("flash_attn", "flash-attn"):
        assert importlib.metadata.version(name) == flash_attn.__version__


def test_every_module_imports_without_optional_packages():
    """Only the Triton backend needs Triton, no module einops or FlagGems, none prints."""
    code = """
import pkgutil, sys
for name in ("triton", "einops", "flag_gems", "transformers"):
    sys.modules[name] = None
import flash_attn, flash_attn_2_cuda
for module in pkgutil.walk_packages(flash_attn.__path__, "flash_attn."):
    name = module.name
    if not name.endswith("__main__") and not name.startswith("flash_attn.backends.flaggems"):
        __import__(name)
import torch
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")
