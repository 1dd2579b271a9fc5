"""Attention on the arrays of NumPy (CPU) and CuPy (NVIDIA GPU) through the C ABI, without torch.

Any library whose arrays have an address, a shape and strides can call the core in this way:
`include/flash_attn_plus/attention.h` is all there is to know.

  python examples/array_libraries.py             on a GPU where CuPy finds one, else on the CPU
  python examples/array_libraries.py --numpy     on the CPU
"""

import argparse
import ctypes
import importlib.util
import os
from pathlib import Path

import numpy

CPU, CUDA = 1, 2  # of DLPack


class Device(ctypes.Structure):
    _fields_ = [("type", ctypes.c_int32), ("id", ctypes.c_int32)]


class DType(ctypes.Structure):
    _fields_ = [("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)]


class Tensor(ctypes.Structure):
    """fap_tensor"""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device", Device),
        ("ndim", ctypes.c_int32),
        ("dtype", DType),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]

    @classmethod
    def view(cls, array):
        """A view of an array, which has to outlive it."""
        integers = ctypes.c_int64 * array.ndim
        if isinstance(array, numpy.ndarray):
            data, device = array.ctypes.data, Device(CPU, 0)
        else:
            data, device = array.data.ptr, Device(CUDA, array.device.id)
        return cls(
            data,
            device,
            array.ndim,
            DType(2 if array.dtype.kind == "f" else 0, 8 * array.itemsize, 1),
            integers(*array.shape),
            integers(*(stride // array.itemsize for stride in array.strides)),
        )


TENSOR = ctypes.POINTER(Tensor)


class ForwardArgs(ctypes.Structure):
    """fap_forward_args: what is not set is zero, and zero is off."""

    _fields_ = [
        ("size", ctypes.c_size_t),
        *((name, TENSOR) for name in ("q", "k", "v", "out", "softmax_lse")),
        ("softmax_scale", ctypes.c_double),
        ("window_left", ctypes.c_int64),
        ("window_right", ctypes.c_int64),
        ("causal", ctypes.c_int32),
        ("num_threads", ctypes.c_int32),
        ("stream", ctypes.c_void_p),
        ("workspace", ctypes.c_void_p),
        ("workspace_size", ctypes.c_size_t),
        ("softcap", ctypes.c_double),
        *((name, TENSOR) for name in ("alibi_slopes", "s_aux")),
        ("dropout_p", ctypes.c_double),
        *((name, TENSOR) for name in ("rng_state", "s_dmask", "cu_seqlens_q", "cu_seqlens_k")),
        ("max_seqlen_q", ctypes.c_int64),
        ("max_seqlen_k", ctypes.c_int64),
        *((name, TENSOR) for name in ("seqused_k", "leftpad_k", "block_table")),
        ("num_splits", ctypes.c_int32),
    ]


NEEDS_WORKSPACE = 3


def load_core():
    """The core library of the installed package, which is not imported: that would import torch."""
    if chosen := os.environ.get("FLASH_ATTN_PLUS_CORE"):
        path = Path(chosen).with_name("libflash_attn_plus.so")
    else:
        (package, *_) = importlib.util.find_spec("flash_attn").submodule_search_locations
        path = Path(package, "lib", "libflash_attn_plus.so")
    core = ctypes.CDLL(str(path))
    core.fap_last_error.restype = ctypes.c_char_p
    core.fap_workspace_needed.restype = ctypes.c_size_t
    return core


def attention(core, xp, q, k, v, causal=False):
    """Softmax attention of q (b, sq, h, d) over k and v (b, sk, hk, d), all float16.

    Returns out, as q, and the log-sum-exp (b, h, sq), float32. Arrays are of the library `xp`.
    """
    batch, seqlen_q, heads, head_dim = q.shape
    out, lse = xp.empty_like(q), xp.empty((batch, heads, seqlen_q), xp.float32)
    arguments = ForwardArgs(ctypes.sizeof(ForwardArgs))
    for name, array in {"q": q, "k": k, "v": v, "out": out, "softmax_lse": lse}.items():
        setattr(arguments, name, ctypes.pointer(Tensor.view(array)))
    arguments.softmax_scale = head_dim**-0.5
    arguments.window_left = arguments.window_right = -1
    arguments.causal = causal
    if xp is not numpy:
        arguments.stream = xp.cuda.get_current_stream().ptr
    status = core.fap_forward(ctypes.byref(arguments))
    if status == NEEDS_WORKSPACE:  # on a GPU, where the caller owns all memory
        workspace = xp.empty(core.fap_workspace_needed(), xp.uint8)
        arguments.workspace, arguments.workspace_size = workspace.data.ptr, workspace.size
        status = core.fap_forward(ctypes.byref(arguments))
    if status:
        raise RuntimeError(core.fap_last_error().decode())
    return out, lse


def expected_attention(xp, q, k, v, causal):
    """The same in float32, with all scores in memory."""
    group = q.shape[2] // k.shape[2]
    q, k, v = (x.astype(xp.float32).transpose(0, 2, 1, 3) for x in (q, k, v))
    k, v = xp.repeat(k, group, axis=1), xp.repeat(v, group, axis=1)
    scores = q @ k.transpose(0, 1, 3, 2) * q.shape[-1] ** -0.5
    if causal:
        rows, columns = scores.shape[-2:]
        visible = xp.arange(columns) <= xp.arange(rows)[:, None] + columns - rows
        scores = xp.where(visible, scores, -xp.inf)
    p = xp.exp(scores - scores.max(-1, keepdims=True))
    return (p / p.sum(-1, keepdims=True) @ v).transpose(0, 2, 1, 3)


def array_library():
    """CuPy where it finds a GPU, else NumPy."""
    try:
        import cupy

        cupy.cuda.runtime.getDeviceCount()
        return cupy
    except Exception:  # not installed, no driver, no GPU
        return numpy


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--numpy", action="store_true", help="even where there is a GPU")
    xp = numpy if parser.parse_args().numpy else array_library()
    core = load_core()
    random = numpy.random.default_rng(0)
    shapes = ((2, 100, 8, 64), (2, 300, 2, 64), (2, 300, 2, 64))
    q, k, v = (xp.asarray(random.standard_normal(shape).astype("float16")) for shape in shapes)
    # Views work as they are: every other row of the keys, without a copy.
    for name, keys, values in (("all keys", k, v), ("every other key", k[:, ::2], v[:, ::2])):
        for causal in (False, True):
            out, _ = attention(core, xp, q, keys, values, causal)
            error = abs(out - expected_attention(xp, q, keys, values, causal)).max()
            print(f"{xp.__name__}, {name}, causal={causal}: largest error {float(error):.1e}")
            assert error < 5e-3


if __name__ == "__main__":
    main()
