"""Which backend serves a call.

Tensors on the CPU are always served by the native backend, the C++ core. For tensors on an
accelerator the environment variable FLASH_ATTENTION_USE_FLAGGEMS decides (TRUE: FlagGems, FALSE:
the native kernels; read once, when `flash_attn` is imported), and `set_backend` and `use_backend`
override it. This version has no accelerator backend yet: calls on an accelerator are refused.
"""

from __future__ import annotations

import contextlib
import contextvars
import os
from collections.abc import Iterator
from types import ModuleType
from typing import NamedTuple

import torch

from flash_attn.backends import native
from flash_attn.backends.interface import Backend, Options, Sequences

__all__ = [
    "Backend",
    "Choice",
    "Options",
    "Sequences",
    "backend_for",
    "explain",
    "set_backend",
    "use_backend",
]

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


def explain(device: torch.device | str) -> Choice:
    """Says which backend would serve tensors on `device`, and why. Never raises for a refusal."""
    device = torch.device(device)
    if device.type == "cpu":
        return Choice("native", "tensors on the CPU are always served by the native backend")
    wanted, source = requested()
    asks = {
        "flaggems": "asks for the FlagGems backend",
        "native": "asks for the native CUDA backend",
        None: "asks for FlagGems where it is installed, else for the native CUDA backend",
    }[wanted]
    return Choice(
        None,
        f"{source}: {asks}, but this version has no GPU backend yet; it serves tensors on the CPU",
    )


def _refusal(device: torch.device) -> Exception:
    # Without the native kernels there is nothing but a missing package to report.
    error = RuntimeError if requested()[0] == "native" else ImportError
    return error(f"flash_attn cannot serve tensors on {device}. {explain(device).reason}.")


def backend_for(tensor: torch.Tensor) -> ModuleType:
    """The backend that serves calls on `tensor`.

    Raises:
        ImportError: the device needs a backend that is not there.
        RuntimeError: the native backend was asked for and cannot serve the device.
    """
    if tensor.is_cpu:
        return native
    raise _refusal(tensor.device)
