"""Which GPU a process of tests uses."""

import os

import torch


def take_turns():
    """Makes the visible GPUs current in turn, one for each worker of pytest-xdist."""
    worker = os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw")
    torch.cuda.set_device(int(worker) % torch.cuda.device_count())
