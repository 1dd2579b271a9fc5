"""Which backend serves a call.

Tensors on the CPU are always served by the native backend, the C++ core. For tensors on an
accelerator the environment variable FLASH_ATTENTION_USE_FLAGGEMS decides (TRUE: FlagGems, FALSE:
the native CUDA kernels; read once, when `flash_attn` is imported), and `set_backend` and
`use_backend` override it. Without a wish FlagGems serves where it is installed, and the native CUDA
kernels otherwise. What is asked for and not there is an error: nothing falls back silently.
"""

from __future__ import annotations

import contextlib
import contextvars
import functools
import importlib
import importlib.util
import logging
import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from flash_attn.backends import cuda, native
from flash_attn.backends.interface import Backend, Options, Sequences

__all__ = [
    "Backend",
    "Choice",
    "Options",
    "Sequences",
    "backend_for",
    "explain",
    "serves",
    "set_backend",
    "use_backend",
]

_log = logging.getLogger("flash_attn")

ENVIRONMENT_VARIABLE = "FLASH_ATTENTION_USE_FLAGGEMS"
BACKENDS = ("native", "flaggems")


def _from_environment() -> str | None:
    value = os.environ.get(ENVIRONMENT_VARIABLE, "")
    try:
        return {"": None, "TRUE": "flaggems", "FALSE": "native"}[value.upper()]
    except KeyError:
        raise ValueError(
            f"{ENVIRONMENT_VARIABLE} must be TRUE or FALSE (or empty, which is not set), "
            f"but it is {value!r}"
        ) from None


_environment = _from_environment()
_process: str | None = None
_block: contextvars.ContextVar[str | None] = contextvars.ContextVar(
    "flash_attn_backend", default=None
)


def _check(name: str | None) -> str | None:
    if name is not None and name not in BACKENDS:
        raise ValueError(f"The backend must be 'native', 'flaggems' or None, but it is {name!r}")
    return name


def set_backend(name: str | None) -> None:
    """Chooses the backend of accelerator tensors for the whole process.

    Arguments:
        name: "native", "flaggems", or None to follow FLASH_ATTENTION_USE_FLAGGEMS again.

    Raises:
        ValueError: for any other name.
    """
    global _process
    _process = _check(name)


@contextlib.contextmanager
def use_backend(name: str | None) -> Iterator[None]:
    """Chooses the backend of accelerator tensors within a block, for this thread or task alone.

    Gradients of the calls within follow, wherever and whenever they are computed.

    Arguments:
        name: "native", "flaggems", or None to follow `set_backend` and the environment.

    Raises:
        ValueError: for any other name.
    """
    token = _block.set(_check(name))
    try:
        yield
    finally:
        _block.reset(token)


def chosen_in_block() -> str | None:
    """What `use_backend` says here."""
    return _block.get()


def requested() -> tuple[str | None, str]:
    """The backend asked for on accelerators (None: no wish), and what asked for it."""
    block = _block.get()
    if block is not None:
        return block, f"flash_attn.use_backend({block!r})"
    if _process is not None:
        return _process, f"flash_attn.set_backend({_process!r})"
    if _environment is not None:
        value = "TRUE" if _environment == "flaggems" else "FALSE"
        return _environment, f"{ENVIRONMENT_VARIABLE}={value}"
    return None, f"{ENVIRONMENT_VARIABLE} not set"


class Choice(NamedTuple):
    """What would serve tensors on a device.

    Attributes:
        backend: name of the backend, or None when the call would be refused.
        reason: why, in a sentence.
    """

    backend: str | None
    reason: str


INSTALL = "Install it with pip install 'flash-attn[flaggems]' and the Triton of your accelerator"
USE_NATIVE = f"set {ENVIRONMENT_VARIABLE}=FALSE to use the native kernels"


def _is_installed(module: str) -> bool:
    return importlib.util.find_spec(module) is not None


def what_asks() -> str:
    """What asks for the backend of accelerators, as the subject of a sentence."""
    wanted, source = requested()
    if wanted is None:
        installed = "installed" if _is_installed("flag_gems") else "not installed"
        source += f", and FlagGems is {installed}, which"
    return source


def explain(device: torch.device | str) -> Choice:
    """Says which backend would serve tensors on `device`, and why. Never raises for a refusal."""
    device = torch.device(device)
    if device.type == "cpu":
        return Choice("native", "tensors on the CPU are always served by the native backend")
    wanted, _ = requested()
    installed = _is_installed("flag_gems")
    source = what_asks()
    if wanted == "flaggems" or (wanted is None and installed):
        if not installed:
            failure = "importing flag_gems failed: No module named 'flag_gems'"
            return Choice(
                None, f"{source} needs FlagGems, but {failure}. {INSTALL}, or {USE_NATIVE}"
            )
        return Choice("flaggems", f"{source} asks for the FlagGems backend")
    refusal = cuda.refusal(device)
    if refusal is None:
        return Choice("native", f"{source} asks for the native CUDA backend")
    reason = f"{source} asks for the native CUDA backend, but {refusal}"
    if wanted is None:
        reason += f". FlagGems serves other accelerators. {INSTALL}"
    return Choice(None, reason)


@functools.cache
def _accelerator_backend(device: torch.device, wanted: str | None) -> ModuleType:
    """The backend chosen for a device; a refusal is raised, and looked into again the next time."""
    backend, reason = explain(device)
    if backend is None:
        error = RuntimeError if wanted == "native" else ImportError
        raise error(f"flash_attn: {reason}.")
    if wanted is None:
        _log.info("tensors on %s are served by the %s backend: %s", device, backend, reason)
    if backend == "native":
        cuda.prepare()
        return native
    return importlib.import_module("flash_attn.backends.flaggems")


@functools.cache
def _is_served(device: torch.device, wanted: str | None) -> bool:
    return explain(device).backend is not None


def serves(tensor: torch.Tensor) -> bool:
    """Whether a backend serves calls on `tensor`."""
    return tensor.is_cpu or _is_served(tensor.device, _block.get() or _process or _environment)


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The backend that serves calls on `tensor`.

    Raises:
        ImportError: the device needs a backend that is not there.
        RuntimeError: the native backend was asked for and cannot serve the device.
    """
    if tensor.is_cpu:
        return native
    return _accelerator_backend(tensor.device, _block.get() or _process or _environment)
