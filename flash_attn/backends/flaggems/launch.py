"""From tensors to the arguments of a kernel, by the conventions of kernels/common.py."""

from __future__ import annotations

import functools
import operator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import torch
from torch import Tensor

from flash_attn.backends.flaggems import runtime
from flash_attn.backends.flaggems.tiles import Tile

LOG2E = 1.4426950408889634

# Positions are 32-bit numbers in the kernels, and sums of two of them too.
MAX_SEQLEN = 2**30


@functools.cache
def pieces(head_dim: int, unit: int) -> tuple[int, int]:
    """Powers of two D0 and D1 (or 0) that together hold a head with the least waste.

    One piece where elements are moved one by one (`unit_of`), which takes longer than what is
    wasted; and of two of those ptxas 12.8 makes wrong code (tests/triton/uniform_registers.py).
    """
    whole = max(16, 1 << (head_dim - 1).bit_length())
    if unit == 1:
        return whole, 0
    half = whole // 2
    rest = max(16, 1 << (max(head_dim - half, 1) - 1).bit_length())
    return (half, rest) if half >= 16 and half + rest < whole else (whole, 0)


def unit_of(*strides: tuple[int, ...]) -> int:
    """The unit in which the strides of operands are counted, in elements.

    8 where all of them are multiples of it, so that 16 bytes move at once, otherwise 1. The last
    stride of an operand is not looked at: it is 1.
    """
    for of_operand in strides:
        for stride in of_operand[:-1]:
            if stride % 8:
                return 1
    return 8


def leading_strides(strides: tuple[int, ...], unit: int = 1) -> tuple[int, int, int]:
    """Of batch (or page), row and head in `unit`s; a batch stride of 0 for (rows, heads, d)."""
    if len(strides) == 3:
        row, head, _ = strides
        return 0, row // unit, head // unit
    batch, row, head, _ = strides
    return batch // unit, row // unit, head // unit


def operand_unit(*operands: Tensor) -> int:
    """`unit_of` tensors."""
    return unit_of(*(x.stride() for x in operands))


def strides(x: Tensor, unit: int = 1) -> tuple[int, int, int]:
    """`leading_strides` of a tensor."""
    return leading_strides(x.stride(), unit)


def is_describable(shape: tuple[int, ...], strides: tuple[int, ...]) -> bool:
    """Whether a tensor (b, s, h, d) or (s, h, d) can have a descriptor if its memory is aligned to
    16 bytes.
    """
    return all(0 < size < 2**31 for size in shape) and all(
        stride % 8 == 0 and 0 < stride < 2**36
        for size, stride in zip(shape[:-1], strides[:-1], strict=True)
        if size > 1
    )


@functools.cache
def _layout_of_gluon() -> Any:
    from triton.experimental.gluon.language import NVMMASharedLayout

    return NVMMASharedLayout(swizzle_byte_width=128, element_bitwidth=16, rank=4)


def descriptor(x: Tensor, rows: int, columns: int, gluon: bool = False) -> Any:
    """Of tiles of rows of one head of a tensor (b, s, h, d), as (b, h, s, d), b being 1 without it.

    gluon: for a kernel in Gluon, which says how tiles lie in shared memory.
    """
    if gluon:
        from triton.experimental.gluon.nvidia.hopper import TensorDescriptor
    else:
        from triton.tools.tensor_descriptor import TensorDescriptor

    batch, seqlen, num_heads, head_dim = x.shape if x.dim() == 4 else (1, *x.shape)
    # The stride of a dimension of one element is any number, but descriptors take only some.
    strides = [stride if size > 1 else 8 for size, stride in zip(x.shape, x.stride(), strict=True)]
    if x.dim() == 3:
        strides = [8, *strides]
    # Without its own checks, which take as long as all else: is_describable has made them.
    made = object.__new__(TensorDescriptor)
    made.base = x
    made.shape = [batch, num_heads, seqlen, head_dim]
    made.strides = [strides[0], strides[2], strides[1], 1]
    made.block_shape = [1, 1, rows, columns]
    if gluon:
        made.layout = _layout_of_gluon()
    return made


def softcap_kind(softcap: float) -> int:
    """0 without softcap; 1; 2 for a large one, of which the error of a plain tanh near 0 counts."""
    return 0 if softcap <= 0 else 1 if softcap <= 100 else 2


def dropout_numbers(dropout_p: float) -> tuple[int, float]:
    """The threshold below which an entry's number keeps it, and what it is scaled by."""
    if dropout_p == 0:
        return 65536, 1.0
    return int((1.0 - dropout_p) * 65536.0 + 0.5), 1.0 / (1.0 - dropout_p)


def window(options: Any, seqlen_q: int, seqlen_k: int) -> tuple[int, int]:
    """Both sides of the window, -1 where infinite. A side that hides nothing is infinite."""
    left, right = options.window_left, options.window_right
    everything = seqlen_q + seqlen_k
    return (
        -1 if left < 0 or left >= everything else left,
        0 if options.causal else -1 if right < 0 or right >= everything else right,
    )


def check_lengths(*lengths: int) -> None:
    """Raises RuntimeError for sequences longer than positions in the kernels can count."""
    if max(lengths) >= MAX_SEQLEN:
        raise RuntimeError(
            f"The FlagGems backend supports sequences of fewer than {MAX_SEQLEN} rows, but got "
            f"{max(lengths)}"
        )


class _Compiled:
    """A kernel that Triton has compiled for an NVIDIA GPU.

    Attributes:
        run: Triton's launcher of it, which takes a grid first, and is built when it is used.
        constants: values of its constexpr parameters, which that takes behind the others.
        function: for the CUDA driver, or None.
    """

    def __init__(
        self, kernel: Any, compiled: Any, index: int, num_arguments: int, constants: dict[str, Any]
    ):
        from flash_attn.backends.flaggems.driver_launch import function_of

        self.run, self.function = compiled, function_of(compiled, index)
        self.constants = tuple(constants[name] for name in kernel.arg_names[num_arguments:])


# By all that Triton specialises on. Its own search takes longer than the rest of a small call.
_compiled: dict[tuple, _Compiled] = {}


class Launch:
    """A kernel with all that it is given but memory; to be kept where calls recur.

    The tensors of its calls are alike: of the same dtypes and with None at the same places; and of
    the same shapes and strides where the kernel takes descriptors of them.

    Attributes:
        kernel: a function of Triton, whose parameters are tensors, then numbers, then constants.
        programs: in how many it runs.
        numbers: in the kernel's order.
        constants: its constexpr parameters, all of them.
        blocks: what it takes descriptors of, by the places of the tensors, with what `descriptor`
            is to know.
    """

    def __init__(
        self,
        kernel: Any,
        programs: int,
        numbers: tuple,
        constants: dict[str, Any],
        tile: Tile,
        blocks: dict[int, tuple] | None = None,
    ):
        if programs >= 2**31:
            raise RuntimeError(f"The call needs {programs} programs, more than a launch can have")
        self.kernel, self.programs = kernel, programs
        self.numbers, self.constants, self.tile = numbers, constants, tile
        self.blocks = blocks or {}
        # What the CUDA driver launches, by the device and by how memory is aligned.
        self._ready: dict[tuple, Any] = {}

    def __call__(self, device: torch.device, *tensors: Tensor | None) -> None:
        """Runs it on the current stream of the device."""
        if self.programs == 0:
            return
        where = runtime.current()
        with where.guard(device):
            if not where.is_nvidia:
                self._run_by_triton(where, self._arguments(tensors))
                return
            addresses = [x.data_ptr() for x in tensors if x is not None]
            alignment = functools.reduce(operator.or_, addresses) % 16
            if alignment:
                alignment = tuple(x % 16 for x in addresses)
            key = device.index, alignment
            ready = self._ready.get(key)
            if ready is None or not ready(device.index, addresses):
                self._find_and_run(where, key, tensors, addresses)

    def _arguments(self, tensors: tuple) -> list:
        """The kernel's arguments before the constants."""
        arguments = [*tensors, *self.numbers]
        for place, block in self.blocks.items():
            arguments[place] = descriptor(tensors[place], *block)
        return arguments

    def _key(self, index: int, tensors: tuple) -> tuple:
        """Of what is compiled for a device of NVIDIA."""
        kinds = (None if x is None else (x.dtype, x.data_ptr() % 16 == 0) for x in tensors)
        known = *self.tile[2:], *self.constants.values(), *self.blocks.items()
        return id(self.kernel), index, known, *kinds

    def has_run(self, device: torch.device, tensors: tuple) -> bool:
        """Whether it, or a call that shares its compiled kernel, has run on an NVIDIA GPU."""
        return bool(self._ready) or self._key(device.index, tensors) in _compiled

    def _keywords(self) -> dict[str, Any]:
        options = {"num_warps": self.tile.num_warps, "num_stages": self.tile.num_stages}
        return self.constants | options

    def _run_by_triton(self, where: runtime.Runtime, arguments: list) -> None:
        where.entry(self.kernel)[self.programs, 1, 1](*arguments, **self._keywords())

    def _compiled_by_triton(self, where: runtime.Runtime, arguments: list) -> Any:
        """Has Triton search for the compiled kernel, or compile it."""
        entry = where.entry(self.kernel)
        return entry.warmup(*arguments, grid=(self.programs, 1, 1), **self._keywords())

    def compile(self, device: torch.device, tensors: tuple) -> None:
        """Compiles it, for Triton to find."""
        where = runtime.current()
        with where.guard(device):
            self._compiled_by_triton(where, self._arguments(tensors))

    def _find_and_run(
        self, where: runtime.Runtime, key: tuple, tensors: tuple, addresses: list[int]
    ) -> None:
        """On NVIDIA GPUs: what is compiled is known to us, and then kept in `_ready`."""
        arguments = self._arguments(tensors)
        index, _ = key
        full_key = self._key(index, tensors)
        compiled = _compiled.get(full_key)
        if compiled is None:
            made = self._compiled_by_triton(where, arguments)
            if made is None:  # nothing is compiled, as in the interpreter
                self._run_by_triton(where, arguments)
                return
            compiled = _Compiled(self.kernel, made, index, len(arguments), self.constants)
            _compiled[full_key] = compiled
        if compiled.function is not None:
            from flash_attn.backends.flaggems.driver_launch import DriverLaunch

            described = {
                place - tensors[:place].count(None): arguments[place] for place in self.blocks
            }
            ready = DriverLaunch(compiled.function, self.programs, self.numbers, described)
            if ready(index, addresses):
                self._ready[key] = ready
                return
        # Triton's launcher takes an address as it is, and asks whose memory a tensor's is.
        given = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
        compiled.run[self.programs, 1, 1](*given, *compiled.constants)


def compile_together(device: torch.device, *calls: tuple[Launch, tuple]) -> None:
    """Has kernels that are new compiled side by side, on NVIDIA GPUs, where that takes a second or
    two each. calls: launches and their tensors.
    """
    if not runtime.current().is_nvidia:
        return
    new = [call for call in calls if call[0].programs > 0 and not call[0].has_run(device, call[1])]
    if len(new) > 1:
        with ThreadPoolExecutor(len(new)) as threads:
            for future in [threads.submit(call[0].compile, device, call[1]) for call in new]:
                future.result()


@functools.lru_cache(maxsize=1024)
def _launch_of(
    kernel: Any, programs: int, numbers: tuple, constants: tuple, tile: Tile, dtypes: tuple
) -> Launch:
    """A launch by all that its calls have in common."""
    return Launch(kernel, programs, numbers, dict(constants), tile)


def launch(
    kernel: Any,
    programs: int,
    device: torch.device,
    arguments: tuple,
    constants: dict[str, Any],
    tile: Tile,
) -> None:
    """Calls the `Launch` of a kernel whose arguments are tensors and None, then numbers."""
    count = sum(x is None or isinstance(x, Tensor) for x in arguments)
    tensors, numbers = arguments[:count], arguments[count:]
    dtypes = tuple(x if x is None else x.dtype for x in tensors)
    _launch_of(kernel, programs, numbers, (*constants.items(),), tile, dtypes)(device, *tensors)
