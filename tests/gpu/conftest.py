"""Tests of what only a GPU shows: streams, graphs, races, the cache of compiled kernels, clients.

    pytest tests/gpu    on a machine with an NVIDIA GPU from Ampere on; elsewhere all are skipped

The scripts beside them take options: `random_configurations.py`, `sanitize.py` and
`flash_attention_2.py`. Tensors are made on the GPU unless said otherwise.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest
import torch

HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

from devices import take_turns  # noqa: E402

# The reference computes on the CPU, which the workers of pytest-xdist share.
torch.set_num_threads(1 if "PYTEST_XDIST_WORKER" in os.environ else 2)

HAS_GPU = torch.cuda.is_available() and torch.cuda.get_device_capability() >= (8, 0)


def pytest_configure():
    if HAS_GPU:
        take_turns()
        torch.set_default_device("cuda")


def pytest_collection_modifyitems(items):
    if not HAS_GPU:
        for item in items:
            item.add_marker(pytest.mark.skip(reason="needs an NVIDIA GPU from Ampere on"))


def pytest_ignore_collect(collection_path):
    if collection_path.name == "test_transformers.py":
        return importlib.util.find_spec("transformers") is None or None


@pytest.fixture(autouse=True)
def _native_and_seeded():
    from flash_attn import use_backend

    torch.manual_seed(0)
    with use_backend("native"):
        yield
