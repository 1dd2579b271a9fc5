"""Facts of the machine and of what is installed, without a name that would identify it."""

import importlib.metadata
import os
import pathlib
import platform
import time

import torch

import flash_attn


def cpu_model():
    """Name of the processor, as the system gives it."""
    try:
        for line in pathlib.Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "Model")):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def version_of(distribution):
    """Version of an installed distribution, or None."""
    try:
        return importlib.metadata.version(distribution)
    except importlib.metadata.PackageNotFoundError:
        return None


def versions():
    """Versions that matter for a result or a bug report; None for what is not installed."""
    return {
        "flash-attn": flash_attn.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda (torch)": torch.version.cuda,
        "apache-tvm-ffi": version_of("apache-tvm-ffi"),
        "triton": version_of("triton"),
        "flag-gems": version_of("flag-gems"),
    }


def devices():
    """Every device that tensors can be on: the CPU, then accelerators, as (torch.device, name)."""
    found = [(torch.device("cpu"), cpu_model())]
    kind = accelerator()
    if kind is None:
        return found
    module = torch.get_device_module(kind)
    for index in range(module.device_count()):
        name = module.get_device_name(index) if hasattr(module, "get_device_name") else kind.type
        if kind.type == "cuda":
            name += " (compute capability {}.{})".format(*module.get_device_capability(index))
        found.append((torch.device(kind.type, index), name))
    return found


def accelerator():
    """The type of this machine's accelerator as a torch.device, or None."""
    available = hasattr(torch, "accelerator") and torch.accelerator.is_available()
    return torch.accelerator.current_accelerator() if available else None


def cores():
    """Cores that this process may run on."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()


def cpu_seconds_of_others():
    """CPU time that all other programs have used since the system started; None where unknown."""
    try:
        with open("/proc/stat") as file:
            user, nice, system, _, _, *interrupts = map(int, file.readline().split()[1:9])
    except OSError:
        return None
    busy = (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")
    return busy - time.process_time()


def cache_directory():
    """Where compiled GPU kernels are kept."""
    if chosen := os.environ.get("FLASH_ATTN_PLUS_CACHE_DIR"):
        return pathlib.Path(chosen)
    base = os.environ.get("XDG_CACHE_HOME") or pathlib.Path.home() / ".cache"
    return pathlib.Path(base) / "flash-attn-plus"


def cpu_isa():
    """The instruction set that the CPU kernels use."""
    from flash_attn import _core

    return _core.cpu_isa()
