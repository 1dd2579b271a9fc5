"""Loads the C++ core. Its functions take the fields of the structs of `attention.h`."""

import os
import sys
from pathlib import Path

import tvm_ffi

_REINSTALL = (
    "Reinstall the package: pip install --force-reinstall --no-deps flash-attn (or, from its "
    "sources, pip install .)."
)


class ConstraintError(AssertionError, RuntimeError):
    """A documented constraint on the head dimension or the numbers of heads is broken."""


def _library_path() -> Path:
    """`FLASH_ATTN_PLUS_CORE` names another build of the core, for its developers."""
    if chosen := os.environ.get("FLASH_ATTN_PLUS_CORE"):
        return Path(chosen).absolute()
    import flash_attn  # an editable install spreads the package over two directories

    candidates = [Path(directory, "lib", "_core.so") for directory in flash_attn.__path__]
    for candidate in candidates:
        if candidate.exists():
            return candidate
    looked_for = ", ".join(map(str, candidates))
    raise ImportError(
        f"flash_attn: the core library is missing; looked for {looked_for}. {_REINSTALL}"
    )


def _check_is_whole(path: Path) -> None:
    """The section headers end an ELF file; loading a file that ends before them would crash."""
    with path.open("rb") as file:
        header = file.read(64)
    if header[:5] != b"\x7fELF\x02":  # not a 64-bit ELF file: the loader will say so
        return
    offset, size, count = (
        int.from_bytes(header[begin:end], sys.byteorder)
        for begin, end in ((40, 48), (58, 60), (60, 62))
    )
    if path.stat().st_size < offset + size * count:
        raise OSError(f"{path} is truncated")


def _load():
    path = _library_path()
    try:
        for library in (path, path.with_name("libflash_attn_plus.so")):
            if library.exists():
                _check_is_whole(library)
        return tvm_ffi.load_module(str(path))
    except Exception as error:
        raise ImportError(
            f"flash_attn: the core library {path} cannot be loaded: {error}. {_REINSTALL}"
        ) from error


def _function(name: str):
    try:
        function = getattr(_module, name)
    except AttributeError as error:
        raise ImportError(
            f"flash_attn: the core library has no function {name!r}: it belongs to another version "
            f"of the package. {_REINSTALL}"
        ) from error
    function.release_gil = True
    return function


tvm_ffi.register_error("ConstraintError", ConstraintError)
_module = _load()

forward = _function("forward")
backward = _function("backward")
kvcache = _function("kvcache")
rotary = _function("rotary")
forward_supports = _function("forward_supports")
backward_supports = _function("backward_supports")
cpu_isa = _function("cpu_isa")
cpu_isas = _function("cpu_isas")
version = _function("version")
cuda_kernels = _function("cuda_kernels")
cuda_runtime = _function("cuda_runtime")
cuda_explain = _function("cuda_explain")
cuda_compile = _function("cuda_compile")
set_nvrtc_directories = _function("set_nvrtc_directories")
