"""Every test starts from the same seed and runs on few threads; `checks.py` has the comparisons.

pytest tests/python                  on the CPU
pytest tests/python --device cuda    the same tests with tensors on the GPU, float32 left out;
                                     with -n on all visible GPUs in turn
pytest ... --backend flaggems        the same by the FlagGems backend
"""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the reference, checks.py and others

from devices import take_turns

# One thread for each worker of pytest-xdist, two otherwise. Results do not depend on the number;
# test_determinism.py varies it.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(NUM_THREADS)


def pytest_addoption(parser):
    parser.addoption("--device", default="cpu", help="where tensors are made: cpu or cuda")
    parser.addoption("--backend", default="native", help="what serves the GPU: native or flaggems")


def pytest_configure(config):
    config.addinivalue_line("markers", "cpu: a test of the CPU backend, or of no device at all")
    config.addinivalue_line("markers", "native: a test of what only the native backends do")
    device = config.getoption("--device")
    if device != "cpu":
        if device == "cuda":
            take_turns()
        torch.set_default_device(device)


def pytest_collection_modifyitems(config, items):
    if config.getoption("--device") == "cpu":
        return
    is_native = config.getoption("--backend") == "native"
    kept, left_out = [], []
    for item in items:
        is_for_others = not is_native and item.get_closest_marker("native") is not None
        (left_out if is_for_others or _is_for_the_cpu(item) else kept).append(item)
    config.hook.pytest_deselected(items=left_out)
    items[:] = kept


def _is_for_the_cpu(item):
    """Native kernels of GPUs know 16-bit numbers only."""
    parameters = item.callspec.params.values() if hasattr(item, "callspec") else ()
    return item.get_closest_marker("cpu") is not None or any(
        getattr(value, "dtype", value) in (torch.float32, torch.float64) for value in parameters
    )


@pytest.fixture(autouse=True, scope="session")
def _backend(request):
    if request.config.getoption("--device") == "cpu":
        yield
        return
    from flash_attn import set_backend

    set_backend(request.config.getoption("--backend"))
    yield
    set_backend(None)


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != NUM_THREADS:
        torch.set_num_threads(NUM_THREADS)
