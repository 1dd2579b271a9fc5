"""Compiles the test kernels of `kernels/` and launches them.

They include the headers of the product's kernels, which NVRTC is given as text as the product gives
them to it, and are compiled with the same options.
"""

import ctypes
import ctypes.util
import functools
import os
from pathlib import Path

import torch

from flash_attn.backends.cuda import nvrtc_directories

HERE = Path(__file__).resolve().parent
SOURCES = HERE.parents[1] / "src"
OPTIONS = ("-std=c++20", "-default-device")


def _texts():
    patterns = ("attention/*.h", "cuda/spec.h", "cuda/spec/*.h", "cuda/kernels/*.cuh")
    texts = {
        str(file.relative_to(SOURCES)): file.read_bytes()
        for pattern in patterns
        for file in SOURCES.glob(pattern)
    }
    return texts | {file.name: file.read_bytes() for file in SOURCES.glob("cuda/kernels/std/*")}


@functools.cache
def _nvrtc():
    """The library; its builtins first, which it would look for elsewhere."""
    places = [
        os.environ.get("FLASH_ATTN_PLUS_NVRTC"),
        *nvrtc_directories(),
        "/usr/local/cuda/lib64",
    ]
    for place in filter(None, places):
        directory = Path(place) if Path(place).is_dir() else Path(place).parent
        for library in sorted(directory.glob("libnvrtc.so*")):
            for builtins in directory.glob("libnvrtc-builtins.so*"):
                ctypes.CDLL(str(builtins), mode=ctypes.RTLD_GLOBAL)
            return ctypes.CDLL(str(library))
    if (found := ctypes.util.find_library("nvrtc")) is not None:
        return ctypes.CDLL(found)
    raise RuntimeError(f"no libnvrtc.so in {', '.join(map(str, filter(None, places)))}")


def _array(strings):
    return (ctypes.c_char_p * len(strings))(*strings)


def compile_kernels(file, arch, **constants):
    """The machine code of kernels/<file>.cu.

    Arguments:
        arch: a compute capability, 80 for 8.0.
        constants: what the file says that it needs, as C++: {"kM": "2"}. Their types are deduced,
            and "DType::kFloat16" is a name of the product's.
    """
    text = "".join(f"constexpr auto {name} = {value};\n" for name, value in constants.items())
    text = f"""#include "cuda/spec.h"
namespace flash_attn_plus::cuda {{
{text}}}
#line 1 "{file}.cu"
{(HERE / "kernels" / f"{file}.cu").read_text()}"""
    headers = _texts()
    nvrtc, program = _nvrtc(), ctypes.c_void_p()
    names, texts = _array([name.encode() for name in headers]), _array(list(headers.values()))
    source = text.encode(), b"kernel.cu"
    nvrtc.nvrtcCreateProgram(ctypes.byref(program), *source, len(headers), texts, names)
    options = [option.encode() for option in (f"--gpu-architecture=sm_{arch}", *OPTIONS)]
    failed = nvrtc.nvrtcCompileProgram(program, len(options), _array(options))

    def read(what):
        size = ctypes.c_size_t()
        getattr(nvrtc, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
        data = ctypes.create_string_buffer(size.value)
        getattr(nvrtc, f"nvrtcGet{what}")(program, data)
        return data.raw

    try:
        if failed:
            raise RuntimeError(f"{file} {constants}: {read('ProgramLog').decode()}")
        return read("CUBIN")
    finally:
        nvrtc.nvrtcDestroyProgram(ctypes.byref(program))


@functools.cache
def _driver():
    return ctypes.CDLL("libcuda.so.1")


def _check(status, what):
    if status:
        name = ctypes.c_char_p()
        _driver().cuGetErrorName(status, ctypes.byref(name))
        raise RuntimeError(f"CUDA: {what} failed: {(name.value or b'?').decode()}")


@functools.cache
def _module(device, file, constants):
    module = ctypes.c_void_p()
    arch = 10 * torch.cuda.get_device_capability(device)[0]
    arch += torch.cuda.get_device_capability(device)[1]
    image = compile_kernels(file, arch, **dict(constants))
    _check(_driver().cuModuleLoadData(ctypes.byref(module), image), f"loading {file}")
    return module


def _argument(x):
    if x is None or isinstance(x, torch.Tensor):
        return ctypes.c_void_p(None if x is None else x.data_ptr())
    return ctypes.c_double(x) if isinstance(x, float) else ctypes.c_int64(x)


def launch(file, kernel, blocks, threads, *arguments, **constants):
    """Launches a kernel of kernels/<file>.cu on the current device and stream.

    Arguments:
        blocks, threads: of the grid and of a block.
        arguments: tensors (pointers there), None (a null pointer), int (int64_t), float (double).
        constants: of `compile_kernels`.
    """
    device = torch.cuda.current_device()
    stream = torch.cuda.current_stream().cuda_stream  # makes the device's context current, too
    assert all(x.is_cuda for x in arguments if isinstance(x, torch.Tensor))
    module = _module(device, file, tuple(constants.items()))
    function = ctypes.c_void_p()
    found = _driver().cuModuleGetFunction(ctypes.byref(function), module, kernel.encode())
    _check(found, f"looking up {kernel}")
    values = [_argument(x) for x in arguments]
    pointers = (ctypes.c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
    grid = blocks, 1, 1, threads, 1, 1, 0
    launched = _driver().cuLaunchKernel(function, *grid, ctypes.c_void_p(stream), pointers, None)
    _check(launched, f"launching {kernel}")
