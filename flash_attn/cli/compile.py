"""Compile CUDA kernels ahead of their first use, into the cache on disk. Needs no GPU.

For images and machines that may not compile at run time: the cache directory
(FLASH_ATTN_PLUS_CACHE_DIR, see --output) is filled here and can be read-only there. Without filters
every kernel of an architecture is compiled, which takes minutes; most programs
use one dtype and one head dimension.
"""

import concurrent.futures
import multiprocessing
import os
import re
import time
from typing import NamedTuple

from flash_attn import _core
from flash_attn.backends import cuda
from flash_attn.cli import machine

DTYPES = {"fp16": "DType::kFloat16", "bf16": "DType::kBFloat16"}


class Kernel(NamedTuple):
    """A kernel of an architecture: `spec` is "ForwardSpec{.dtype = DType::kFloat16, ...}"."""

    arch: int
    spec: str

    def kind(self) -> str:
        """The name of its Spec: forward, backward, decode, ..."""
        return re.sub(r"(?<!^)(?=[A-Z])", "_", self.spec.partition("Spec{")[0]).lower()

    def fields(self) -> dict[str, str]:
        return dict(re.findall(r"\.(\w+) = ([^,}]+)", self.spec))


class Result(NamedTuple):
    """What became of a kernel: the report of the core, or the text of an error."""

    kernel: Kernel
    report: dict[str, str]
    error: str | None


def kernels_of(arch: int) -> list[Kernel]:
    """Every kernel that a call on this architecture can use.

    Raises:
        RuntimeError: for an unknown architecture.
    """
    return [Kernel(arch, spec) for spec in _core.cuda_kernels(arch).splitlines()]


def _compile(kernel: Kernel) -> Result:
    try:
        report = _core.cuda_compile(kernel.arch, kernel.spec)
    except RuntimeError as error:
        return Result(kernel, {}, str(error))
    return Result(kernel, dict(line.split("=", 1) for line in report.splitlines()), None)


def compile_kernels(kernels, jobs, seconds=float("inf")):
    """Compiles kernels in so many processes, in their order, and yields a Result for each.

    Arguments:
        kernels: what to compile.
        jobs: number of processes.
        seconds: nothing more is begun after so long.
    """
    end = time.monotonic() + seconds
    waiting = iter(kernels)
    with concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), cuda.prepare
    ) as pool:
        running = set()
        while True:
            while len(running) < 2 * jobs and time.monotonic() < end:
                kernel = next(waiting, None)
                if kernel is None:
                    break
                running.add(pool.submit(_compile, kernel))
            if not running:
                return
            done, running = concurrent.futures.wait(
                running, return_when=concurrent.futures.FIRST_COMPLETED
            )
            for future in done:
                yield future.result()


def architecture(text: str) -> int:
    """90 from "sm_90", "9.0" or "90"."""
    digits = text.removeprefix("sm_").replace(".", "")
    if not digits.isdecimal():
        raise ValueError(text)
    return int(digits)


def add_arguments(parser):
    parser.add_argument(
        "--arch", nargs="+", type=architecture, required=True, help="architectures, e.g. sm_90"
    )
    parser.add_argument(
        "--kernel", nargs="+", help="only these kinds: forward, backward, decode, rotary, ..."
    )
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, help="only for these dtypes")
    parser.add_argument("--head-dim", nargs="+", type=int, help="only for these head dimensions")
    parser.add_argument("--match", type=re.compile, help="only those whose Spec this pattern finds")
    parser.add_argument("--output", help="the cache directory, instead of the environment's")
    parser.add_argument("--jobs", type=int, default=machine.cores(), help="processes")
    parser.add_argument("--list", action="store_true", help="print what would be compiled")


def _tile(head_dim: int, tiles: set[int]) -> int:
    """The smallest tile that holds a head dimension."""
    return min((tile for tile in tiles if tile >= head_dim), default=0)


def select(kernels, kinds=None, dtypes=None, head_dims=None, pattern=None):
    """Those that all filters let through; a kernel without a dtype passes that one, and so on."""
    tiles = {int(k.fields()["head_dim"]) for k in kernels if "head_dim" in k.fields()}
    wanted_tiles = {str(_tile(d, tiles)) for d in head_dims or ()}
    wanted_dtypes = {DTYPES[name] for name in dtypes or ()}
    selected = []
    for kernel in kernels:
        fields = kernel.fields()
        if kinds and not any(kernel.kind().startswith(kind) for kind in kinds):
            continue
        if wanted_dtypes and fields.get("dtype", None) not in {None, *wanted_dtypes}:
            continue
        if wanted_tiles and fields.get("head_dim", None) not in {None, *wanted_tiles}:
            continue
        if pattern and not pattern.search(kernel.spec):
            continue
        selected.append(kernel)
    return selected


def run(arguments):
    if arguments.output:
        os.environ["FLASH_ATTN_PLUS_CACHE_DIR"] = arguments.output
    kernels = []
    for arch in arguments.arch:
        kernels += select(
            kernels_of(arch),
            arguments.kernel,
            arguments.dtype,
            arguments.head_dim,
            arguments.match,
        )
    if arguments.list:
        for kernel in kernels:
            print(f"sm_{kernel.arch} {kernel.spec}")
        return 0
    print(f"{len(kernels)} kernels, into {machine.cache_directory()}")
    failures = 0
    for number, (kernel, report, error) in enumerate(compile_kernels(kernels, arguments.jobs), 1):
        if error is None and report["kept"] == "0":
            error = "compiled, but the cache directory cannot be written"
        failures += error is not None
        done = error or f"{report['from']} {float(report['seconds']):.2f} s"
        print(f"[{number}/{len(kernels)}] sm_{kernel.arch} {kernel.spec}: {done}", flush=True)
    if failures:
        print(f"{failures} of {len(kernels)} kernels failed")
    return 1 if failures else 0
