"""The accelerator under the Triton kernels: what FlagGems knows of it.

FlagGems is imported by the first call that needs it, once, under a lock. It is asked for the name
of its vendor, the type of its devices, torch's module for them, and its launcher of kernels;
attention of its own is asked for by policy.py.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import os
import threading
from typing import Any

import torch

from flash_attn import backends

_NOTHING = contextlib.nullcontext()


class Runtime:
    """A vendor's accelerators.

    Attributes:
        vendor: FlagGems' name of the vendor.
        is_nvidia: whether that is NVIDIA.
        device_type: type of its devices in torch.
        flag_gems: the package, for its operators.
    """

    def __init__(self, flag_gems: Any):
        self.flag_gems = flag_gems
        self.vendor: str = flag_gems.vendor_name
        self.is_nvidia = self.vendor == "nvidia"
        self.device_type: str = flag_gems.device
        self._devices = importlib.import_module("flag_gems.runtime").torch_device_fn
        self._current_device = self._devices.current_device
        if self._devices is torch.cuda and hasattr(torch._C, "_cuda_getDevice"):
            # Without a look whether CUDA is initialised, which it is where there are tensors.
            self._current_device = torch._C._cuda_getDevice
        self._entries: dict[Any, Any] = {}

    def describe(self) -> str:
        """What was found, in a line."""
        version = getattr(self.flag_gems, "__version__", "of unknown version")
        return (
            f"FlagGems {version}, Triton {_triton_version()}, vendor {self.vendor}, devices of "
            f"type {self.device_type}"
        )

    def entry(self, kernel: Any) -> Any:
        """What launches a kernel.

        FlagGems' libentry() spares vendors' Triton versions the search for a compiled kernel. On
        NVIDIA Triton's own, in C since 3.4, takes less time.
        """
        if self.is_nvidia:
            return kernel
        try:
            return self._entries[kernel]
        except KeyError:
            libentry = importlib.import_module("flag_gems.utils").libentry
            return self._entries.setdefault(kernel, libentry()(kernel))

    def guard(self, device: torch.device) -> contextlib.AbstractContextManager:
        """Makes the device current where it is not: kernels are launched on the current one."""
        if self._current_device() == device.index:
            return _NOTHING
        return self._devices.device(device)

    @functools.cache  # noqa: B019
    def num_units(self, device: torch.device) -> int:
        """How many programs the device runs at once, at one for each multiprocessor."""
        try:
            return self._devices.get_device_properties(device).multi_processor_count
        except (AttributeError, RuntimeError):
            return 32

    @functools.cache  # noqa: B019
    def capability(self, device: torch.device) -> int:
        """10 * major + minor of an NVIDIA GPU, 0 of any other accelerator."""
        if not self.is_nvidia:
            return 0
        major, minor = self._devices.get_device_capability(device)
        return 10 * major + minor


_lock = threading.Lock()
_runtime: Runtime | None = None


def _triton_version() -> str:
    try:
        return importlib.import_module("triton").__version__
    except Exception as error:
        return f"not usable ({error})"


def _load() -> Runtime:
    try:
        flag_gems = importlib.import_module("flag_gems")
    except ImportError as error:
        raise ImportError(
            f"flash_attn: {backends.what_asks()} needs FlagGems, but importing flag_gems failed: "
            f"{error}. {backends.INSTALL}, or {backends.USE_NATIVE}."
        ) from error
    except Exception as error:
        raise _failure("importing flag_gems", error) from error
    try:
        return Runtime(flag_gems)
    except Exception as error:
        version = getattr(flag_gems, "__version__", "of unknown version")
        raise _failure(f"using the runtime of flag_gems {version}", error) from error


def _failure(what: str, error: Exception) -> RuntimeError:
    return RuntimeError(
        f"flash_attn: the FlagGems backend cannot start: {what} failed: "
        f"{type(error).__name__}: {error}. Triton is {_triton_version()}, "
        f"TRITON_INTERPRET={os.environ.get('TRITON_INTERPRET', 'not set')}, "
        f"GEMS_VENDOR={os.environ.get('GEMS_VENDOR', 'not set')}. FlagGems needs an accelerator "
        "that torch sees, its vendor's Triton (at most 3.6 on NVIDIA GPUs), and no interpreter."
    )


def current() -> Runtime:
    """The runtime; FlagGems is imported when there is none yet.

    Raises:
        ImportError: FlagGems, or something that it needs, is not installed.
        RuntimeError: it is, and does not start.
    """
    global _runtime
    if _runtime is None:
        with _lock:
            if _runtime is None:
                _runtime = _load()
    return _runtime
