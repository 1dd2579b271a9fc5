"""Launches of what Triton has compiled by the CUDA driver itself, on NVIDIA GPUs.

Triton's launcher asks the driver whose memory every pointer is, reads every argument anew and calls
its hooks, of which there usually are none: 27 us of a small call; and a C compiler has to build it
first, which takes 0.4 s a kernel. Here a kernel's parameters are packed into memory of the
thread, where the driver finds them: numbers once, addresses at every launch. What they are follows
from the kernel's signature, and the driver is asked whether it agrees; a kernel of which it does
not, or which needs more than a plain launch, is left to Triton.
"""

from __future__ import annotations

import ctypes
import functools
import struct
import threading
from collections.abc import Iterable
from typing import Any, NamedTuple

import torch

try:
    from triton import knobs
except ImportError:  # before Triton 3.4
    knobs = None

# Codes of `struct` by Triton's types; pointers and descriptors are told by their names.
_CODES = {"i32": "i", "i64": "q", "fp32": "f"}
_ADDRESS = "Q"
_TENSOR_MAP = "128s"  # CUtensorMap

# A thread's memory: CUlaunchConfig (grid, block and shared memory, stream, no attributes) and, at a
# multiple of 64, the parameters.
_HEADER = "=28s4xQ24x"
_PARAMETERS = 64
_MOST_BYTES = 4096

# What kernels may need that is not done here, as Triton's metadata says it.
_NEEDS = (
    *("global_scratch_size", "profile_scratch_size"),
    *("launch_cooperative_grid", "launch_pdl"),
)


class Layout(NamedTuple):
    """Where a kernel's parameters lie in the memory of a thread, from which the driver takes each.

    Attributes:
        places: offset and size in bytes of each.
        tensors: format of those of tensors and descriptors, which come first: a field each, though
            a descriptor is several parameters.
        numbers: format of the others, up to the end.
    """

    places: list[tuple[int, int]]
    tensors: str
    numbers: str


def _codes(kind: str) -> list[str]:
    """Of the parameters that an argument of a type becomes."""
    if kind == "constexpr":
        return []
    if kind.startswith("*"):
        return [_ADDRESS]
    if kind.startswith("tensordesc"):  # its shape and strides follow
        rank = kind[kind.index("[") : kind.index("]")].count(",") + 1
        return [_TENSOR_MAP, *"i" * rank, *"q" * rank]
    return [_CODES[kind]]


def _place(codes: Iterable[str], end: int) -> tuple[list[tuple[int, int]], str]:
    """Offsets and sizes of parameters behind `end`, and a format with the padding.

    Each lies at a multiple of its size, tensor maps of 64.
    """
    places, fields = [], ""
    for code in codes:
        size = struct.calcsize(f"={code}")
        padding = -end % min(size, 64)
        places.append((end + padding, size))
        fields += f"{padding}x{code}"
        end += padding + size
    return places, fields


def layout_of(signature: Iterable[str]) -> Layout:
    """The layout of a kernel with arguments of these types of Triton, tensors first.

    Raises:
        KeyError: the layout of a type is not known.
    """
    places, tensors, numbers, end = [], "", "", 0
    for kind in signature:
        placed, fields = _place(_codes(kind), end)
        if not placed:
            continue
        begin, before, end = placed[0][0], end, sum(placed[-1])
        if kind.startswith("tensordesc"):
            tensors += f"{begin - before}x{end - begin}s"
        elif kind.startswith("*"):
            tensors += fields
        else:
            numbers += fields
        places += placed
    # Addresses of scratch memory, which stay 0.
    scratch, _ = _place((_ADDRESS, _ADDRESS), end)
    numbers += f"{sum(scratch[-1]) - end}x"
    return Layout(places + scratch, tensors, numbers)


@functools.cache
def _driver() -> ctypes.CDLL:
    driver = ctypes.CDLL("libcuda.so.1")
    pointer, number = ctypes.c_void_p, ctypes.c_int
    driver.cuTensorMapEncodeTiled.argtypes = [
        *(pointer, number, number, pointer, pointer, pointer, pointer, pointer),
        *(number, number, number, number),
    ]
    return driver


def _check(status: int, what: str) -> None:
    if status:
        name, text = ctypes.c_char_p(b"an error"), ctypes.c_char_p(b"not known to it")
        _driver().cuGetErrorName(status, ctypes.byref(name))
        _driver().cuGetErrorString(status, ctypes.byref(text))
        raise RuntimeError(
            f"flash_attn: {what} failed with {name.value.decode()} ({status}): "
            f"{text.value.decode()}"
        )


def _aligned(size: int) -> ctypes.Array:
    """Memory that begins at a multiple of 64."""
    room = ctypes.create_string_buffer(size + 63)
    return (ctypes.c_char * size).from_buffer(room, -ctypes.addressof(room) % 64)


class _Pointers(dict):
    """By function: to its parameters in the memory of a thread, where they begin at an address."""

    def __init__(self, begin: int):
        self._begin = begin

    def __missing__(self, function: Function) -> ctypes.Array:
        addresses = [self._begin + offset for offset, _ in function.places]
        made = self[function] = (ctypes.c_void_p * len(addresses))(*addresses)
        return made


class _Thread(threading.local):
    """What each thread has for its launches: memory, and a current context."""

    def __init__(self):
        driver, context = _driver(), ctypes.c_void_p()
        _check(driver.cuCtxGetCurrent(ctypes.byref(context)), "cuCtxGetCurrent")
        if not context:  # the thread has chosen no device, which is to torch the first
            status = driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), 0)
            _check(status, "cuDevicePrimaryCtxRetain")
            _check(driver.cuCtxSetCurrent(context), "cuCtxSetCurrent")
        self.memory = _aligned(_PARAMETERS + _MOST_BYTES)
        self.tensor_map = _aligned(128)
        self.pointers = _Pointers(ctypes.addressof(self.memory) + _PARAMETERS)


@functools.cache
def _threads() -> _Thread:
    return _Thread()


class Descriptor:
    """What a kernel gets of a tensor in the form of a descriptor, wherever its memory is.

    Arguments:
        described: Triton's TensorDescriptor.
        metadata: what the compiled kernel says of the descriptor.
    """

    def __init__(self, described: Any, metadata: dict[str, Any]):
        from triton.backends.nvidia.driver import TMA_DTYPE_DEVICE_TO_HOST

        rank, element = len(described.shape), metadata["elem_size"]
        # The driver counts dimensions from the last one, whose stride it knows.
        self._fixed = (
            (ctypes.c_uint64 * rank)(*described.shape[::-1]),
            (ctypes.c_uint64 * rank)(*(element * x for x in described.strides[-2::-1])),
            (ctypes.c_uint32 * rank)(*metadata["block_size"][::-1]),
            (ctypes.c_uint32 * rank)(*[1] * rank),
            0,  # CU_TENSOR_MAP_INTERLEAVE_NONE
            metadata["swizzle"],
            2,  # CU_TENSOR_MAP_L2_PROMOTION_L2_128B
            0,  # CU_TENSOR_MAP_FLOAT_OOB_FILL_NONE
        )
        self._kind = TMA_DTYPE_DEVICE_TO_HOST[metadata["elem_type"]], rank
        _, fields = _place([*"i" * rank, *"q" * rank], 0)
        self._sizes = struct.pack(f"={fields}", *described.shape, *described.strides)
        # Memory is often where it was: a tensor map takes longer to make than to find.
        self.parameters = functools.lru_cache(maxsize=128)(self._parameters)

    def _parameters(self, address: int) -> bytes:
        where = _threads().tensor_map
        status = _driver().cuTensorMapEncodeTiled(where, *self._kind, address, *self._fixed)
        _check(status, "cuTensorMapEncodeTiled")
        return where.raw + self._sizes


class Function:
    """A compiled kernel that the driver can launch.

    Attributes:
        handle: CUfunction.
        places: of its parameters, see `Layout`.
        descriptors: Triton's metadata of them.
        numbers: packs the numbers.
        fields: packs what is in the memory of a thread.
    """

    def __init__(self, compiled: Any, handle: int, layout: Layout):
        self.name, self.handle = compiled.name, ctypes.c_void_p(handle)
        self.descriptors = getattr(compiled.metadata, "tensordesc_meta", None)
        self.shared = compiled.metadata.shared
        self.num_threads = 32 * compiled.metadata.num_warps
        self.numbers = struct.Struct(f"={layout.numbers}")
        self.fields = struct.Struct(f"{_HEADER}{layout.tensors}{self.numbers.size}s")
        self.places = layout.places


def _is_hooked(*names: str) -> bool:
    """Whether something wants to be called by Triton, a profiler say."""
    hooks = (getattr(knobs.runtime, name, None) for name in names)
    return any(getattr(hook, "calls", hook) for hook in hooks)


def function_of(compiled: Any, device_index: int) -> Function | None:
    """Of a kernel that Triton has compiled, loaded on a device, the current one; None where it is
    left to Triton.
    """
    metadata = compiled.metadata
    if (
        knobs is None
        or _is_hooked("kernel_load_start_hook", "kernel_load_end_hook")
        or metadata.num_ctas != 1
        or any(getattr(metadata, name, 0) for name in _NEEDS)
    ):
        return None
    try:
        layout = layout_of(compiled.src.signature.values())
    except KeyError:
        return None
    from triton.runtime.driver import driver

    try:
        _, handle, *_ = driver.active.utils.load_binary(
            compiled.name, compiled.kernel, metadata.shared, device_index
        )
    except RuntimeError:  # Triton says what it lacks
        return None
    sizes = [size for _, size in layout.places]
    return Function(compiled, handle, layout) if sizes == _sizes(compiled, handle) else None


def num_parameters(ptx: str) -> int:
    """Of the kernel in a module of one."""
    return ptx.partition(".entry")[2].partition(")")[0].count(".param")


def _sizes(compiled: Any, handle: int) -> list[int]:
    """Of the parameters in bytes, as the driver has them, which says so since CUDA 12.4; none where
    it does not.
    """
    ask = getattr(_driver(), "cuFuncGetParamInfo", None)
    if ask is None:
        return []
    sizes, offset, size = [], ctypes.c_size_t(), ctypes.c_size_t()
    for index in range(num_parameters(compiled.asm["ptx"])):
        if ask(
            *(ctypes.c_void_p(handle), ctypes.c_size_t(index)),
            *(ctypes.byref(offset), ctypes.byref(size)),
        ):
            return []
        sizes.append(size.value)
    return sizes


class DriverLaunch:
    """A launch that lacks only the addresses of its tensors.

    Arguments:
        described: Triton's descriptors, by the places of their tensors among the addresses.
    """

    def __init__(
        self, function: Function, programs: int, numbers: tuple, described: dict[int, Any]
    ):
        self._function, self._handle = function, function.handle
        self._pack_into = function.fields.pack_into
        grid, block = (programs, 1, 1), (function.num_threads, 1, 1)
        self._config = struct.pack("=7I", *grid, *block, function.shared)
        # Rounded here, as numbers that are infinite then are an error to struct.
        rounded = (ctypes.c_float(x).value if isinstance(x, float) else x for x in numbers)
        self._numbers = function.numbers.pack(*rounded)
        self._described = [
            (place, Descriptor(described[place], metadata).parameters)
            for place, metadata in zip(described, function.descriptors or (), strict=True)
        ]
        self._launch, self._thread = _driver().cuLaunchKernelEx, _threads()
        self._stream_of = torch._C._cuda_getCurrentRawStream

    def __call__(self, device_index: int, addresses: list[int]) -> bool:
        """Launches the kernel on the device, which is the current one; changes `addresses`.

        Returns:
            False, and does nothing, where something wants to be called at every launch.
        """
        runtime = knobs.runtime
        # As _is_hooked, in fewer steps.
        for hook in (runtime.launch_enter_hook, runtime.launch_exit_hook):
            if getattr(hook, "calls", hook):
                return False
        for place, parameters in self._described:
            addresses[place] = parameters(addresses[place])
        thread, stream = self._thread, self._stream_of(device_index)
        memory = thread.memory
        self._pack_into(memory, 0, self._config, stream, *addresses, self._numbers)
        # Without argtypes, which nearly double the time of the call: pointers, and None for NULL.
        status = self._launch(memory, self._handle, thread.pointers[self._function], None)
        if status:
            _check(status, f"the launch of {self._function.name}")
        return True
