"""What the native backend needs of an NVIDIA GPU, and of torch to find it."""

from __future__ import annotations

import importlib.util
from pathlib import Path

import torch

from flash_attn import _core

MIN_CAPABILITY = (8, 0)


def refusal(device: torch.device) -> str | None:
    """Why the native kernels cannot serve a device that is no CPU; None when they can."""
    if device.type != "cuda" or torch.version.hip is not None:
        kind = "AMD" if device.type == "cuda" else device.type
        return f"it serves NVIDIA GPUs, and {device} is of type {kind}"
    try:
        capability = torch.cuda.get_device_capability(device)
    except Exception as error:  # no driver, no such device, a torch without CUDA
        return f"torch cannot use {device}: {error}"
    if capability < MIN_CAPABILITY:
        return "it needs compute capability {}.{} (Ampere) or newer, ".format(
            *MIN_CAPABILITY
        ) + "and {} has {}.{}".format(device, *capability)
    return None


def nvrtc_directories() -> list[Path]:
    """Where torch's packages keep NVRTC, that of torch's own CUDA version first."""
    roots = []
    if (spec := importlib.util.find_spec("nvidia")) is not None:
        roots += spec.submodule_search_locations or []
    found = {file.parent: file for root in roots for file in Path(root).glob("*/lib/libnvrtc.so.*")}
    version = (torch.version.cuda or "").partition(".")[0]
    ordered = sorted(found, key=lambda lib: (found[lib].name != f"libnvrtc.so.{version}", str(lib)))
    return [*ordered, Path(torch.__file__).parent / "lib"]


def prepare() -> None:
    """Tells the core where to look for the compiler of its kernels."""
    _core.set_nvrtc_directories(":".join(map(str, nvrtc_directories())))
