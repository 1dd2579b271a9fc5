"""Every test starts from the same seed and runs on few threads; `checks.py` has the comparisons."""

import os
import sys
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parent))  # the reference, checks.py and others

# One thread for each worker of pytest-xdist, two otherwise. Results do not depend on the number;
# test_determinism.py varies it.
NUM_THREADS = 1 if "PYTEST_XDIST_WORKER" in os.environ else 2
torch.set_num_threads(NUM_THREADS)


@pytest.fixture(autouse=True)
def _seed_and_threads():
    torch.manual_seed(0)
    yield
    if torch.get_num_threads() != NUM_THREADS:
        torch.set_num_threads(NUM_THREADS)
