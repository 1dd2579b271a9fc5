"""Compiles what the FlagGems backend launches for an NVIDIA GPU, without one.

Calls of every kind are made on CPU tensors, with a runtime that compiles kernels for the wanted
architecture where the real one would launch them. Prints a line of JSON for each kernel: its name,
the flags that are on, its tile, registers, bytes of stack (spilled registers are there) and of
shared memory, what ptxas remarks on asynchronous products that it has wait, instructions that read
what was never written (uniform_registers.py), whether its parameters are those that
driver_launch.py packs, and seconds.
Not under TRITON_INTERPRET.

  python tests/triton/compile_kernels.py --arch 90 --jobs 2
"""

import argparse
import contextlib
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1])]

import torch  # noqa: E402
import triton  # noqa: E402
from triton.backends.compiler import GPUTarget  # noqa: E402
from uniform_registers import unset  # noqa: E402

from flash_attn.backends import Options, Sequences, flaggems  # noqa: E402
from flash_attn.backends.flaggems import runtime  # noqa: E402
from flash_attn.backends.flaggems.driver_launch import layout_of, num_parameters  # noqa: E402

BF16 = torch.bfloat16


def sizes(ptx):
    """Bytes of each parameter of a kernel, from its declaration."""
    declaration = ptx[ptx.index(".entry") : ptx.index("{", ptx.index(".entry"))]
    parameter = r"\.param (?:\.align \d+ )?\.[bfsu](\d+)(?: \.ptr .*)? \w+?(?:\[(\d+)\])?[,\n]"
    return [int(bits) // 8 * int(count or 1) for bits, count in re.findall(parameter, declaration)]


class Driver:
    """What Triton asks of a driver before it compiles."""

    def __init__(self, arch):
        self.target = GPUTarget("cuda", arch, 32)

    def get_current_target(self):
        return self.target


TOOLS = Path(triton.backends.__file__).parent / "nvidia" / "bin"


def remarks(ptx):
    """Codes of what ptxas remarks on wgmma: products serialised, waits that it has injected."""
    if "wgmma" not in ptx:
        return []
    with tempfile.NamedTemporaryFile("w", suffix=".ptx") as file:
        file.write(ptx)
        file.flush()
        command = (TOOLS / "ptxas", "-v", "--gpu-name=sm_90a", file.name, "-o", os.devnull)
        said = subprocess.run(command, capture_output=True, text=True, check=True).stderr
    return sorted(set(re.findall(r"\((C75\d\d)\)", said)))


class Launch:
    """A kernel with the arguments of a launch, specialised as Triton does it."""

    def __init__(self, kernel, arguments, keywords, target):
        self.kernel, self.target = kernel, target
        _, _, _, backend, binder = kernel.create_binder()
        bound, specialisation, options = binder(*arguments, **keywords, debug=False)
        options, self.signature, self.constants, self.attributes = kernel._pack_args(
            backend, keywords, bound, specialisation, options
        )
        self.options = {name: keywords[name] for name in ("num_warps", "num_stages")}
        self.flags = {name: x for name, x in keywords.items() if x and name not in self.options}
        # Launches of one key share a compiled kernel.
        self.key = kernel.__name__, str(specialisation), str(self.options)

    def _is_as_laid_out(self, ptx):
        """Whether parameters are what driver_launch.py takes them for."""
        expected = [size for _, size in layout_of(self.signature.values()).places]
        return expected == sizes(ptx) and len(expected) == num_parameters(ptx)

    def report(self):
        """Compiles it, and says what it needs."""
        start = time.monotonic()
        source = self.kernel.ASTSource(self.kernel, self.signature, self.constants, self.attributes)
        compiled = triton.compile(source, target=self.target, options=self.options)
        seconds = time.monotonic() - start
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            text, sass = (
                subprocess.run(
                    [*command, file.name], capture_output=True, text=True, check=True
                ).stdout
                for command in ((TOOLS / "cuobjdump", "-res-usage"), (TOOLS / "nvdisasm", "-c"))
            )
        registers, stack = map(int, re.search(r"REG:(\d+) STACK:(\d+)", text).groups())
        return {
            "kernel": self.kernel.__name__,
            "flags": self.flags,
            **self.options,
            "registers": registers,
            "stack": stack,
            "shared": compiled.metadata.shared,
            "remarks": remarks(compiled.asm["ptx"]),
            "unset": unset(sass),
            "as_laid_out": self._is_as_laid_out(compiled.asm["ptx"]),
            "seconds": round(seconds, 2),
        }


class CompilingRuntime:
    """A `runtime.Runtime` that keeps what it is to launch."""

    vendor, is_nvidia, device_type = "nvidia", True, "cpu"

    def __init__(self, arch):
        self.arch, self.launches = arch, {}
        driver = Driver(arch)
        self.target = driver.target
        triton.runtime.driver.set_active(driver)

    def entry(self, kernel):
        def launch(*arguments, **keywords):
            made = Launch(kernel, arguments, keywords, self.target)
            self.launches.setdefault(made.key, made)

        class Entry:
            def __getitem__(self, grid):
                return launch

            def warmup(self, *arguments, grid, **keywords):
                launch(*arguments, **keywords)

        return Entry()

    def guard(self, device):
        return contextlib.nullcontext()

    def num_units(self, device):
        return 132

    def capability(self, device):
        return self.arch


def _qkv(head_dim, sq=512, sk=512, heads=4, heads_k=2, dtype=BF16):
    shapes = ((2, sq, heads, head_dim), (2, sk, heads_k, head_dim), (2, sk, heads_k, head_dim))
    return [torch.zeros(shape, dtype=dtype) for shape in shapes]


def _attention(head_dim, with_gradient=True, dtype=BF16, **options):
    q, k, v = _qkv(head_dim, dtype=dtype)
    options = Options(head_dim**-0.5, **options)
    out, lse, _ = flaggems.forward(q, k, v, options, return_s_dmask=options.dropout_p > 0)
    if with_gradient:
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        ds_aux = None if options.s_aux is None else torch.empty(4)
        flaggems.backward(out, q, k, v, out, lse, *gradients, options, None, None, ds_aux)


def _varlen(head_dim, with_gradient=True, **options):
    q, k, v = (x.flatten(0, 1) for x in _qkv(head_dim))
    cu = torch.tensor([0, 512, 1024]).int()
    sequences, options = Sequences(cu, cu, 512, 512), Options(head_dim**-0.5, **options)
    out, lse, _ = flaggems.forward(q, k, v, options, sequences)
    if with_gradient:
        gradients = [torch.empty_like(x) for x in (q, k, v)]
        flaggems.backward(out, q, k, v, out, lse, *gradients, options, sequences)


def _cache(head_dim, paged=False, sq=1, **options):
    q = torch.zeros(2, sq, 8, head_dim, dtype=BF16)
    shape = (64, 16) if paged else (2, 4096)
    caches = torch.zeros(2, *shape, 2, head_dim, dtype=BF16)
    table = torch.arange(64).view(2, 32).int() if paged else None
    lengths = torch.tensor([100, 200]).int()
    k, v = torch.zeros(2, 2, 1, 2, head_dim, dtype=BF16)
    tables = torch.zeros(2, 4096, 16, dtype=BF16)
    options = Options(head_dim**-0.5, True, **options)
    for appended in ((None, None, options), (k, v, options, *tables, False)):
        place = {"cache_seqlens": lengths, "block_table": table}
        flaggems.kvcache(q, *caches, *appended, **place)


def _rotary():
    x, tables = torch.zeros(2, 64, 4, 128, dtype=BF16), torch.zeros(2, 64, 32)
    for interleaved in (False, True):
        flaggems.rotary(x, *tables, interleaved=interleaved)


def calls():
    """A call of every kind, as functions of nothing."""
    yield lambda: _attention(64)
    yield lambda: _attention(128, causal=True, s_aux=torch.zeros(4))
    yield lambda: _attention(96, causal=True, softcap=30.0, alibi_slopes=torch.zeros(4))
    yield lambda: _attention(128, dropout_p=0.1, rng_state=torch.tensor([1, 2]))
    yield lambda: _attention(33, causal=True)
    yield lambda: _attention(256, window_left=64, window_right=0)
    yield lambda: _varlen(128, causal=True)
    yield lambda: _cache(128)
    yield lambda: _cache(64, paged=True)
    yield _rotary


def more_calls():
    """Other head dimensions, and features by themselves."""
    for head_dim in (64, 128, 256):
        yield lambda d=head_dim: _attention(d)
        yield lambda d=head_dim: _attention(d, causal=True)
        yield lambda d=head_dim: _cache(d)
    yield lambda: _attention(128, causal=True, dtype=torch.float16)
    for head_dim in (7, 40, 192):
        yield lambda d=head_dim: _attention(d, causal=True)
    for options in (
        {"window_left": 64, "window_right": 0},
        {"causal": True, "softcap": 30.0},
        {"causal": True, "alibi_slopes": torch.zeros(4)},
        {"causal": True, "dropout_p": 0.1, "rng_state": torch.tensor([1, 2])},
    ):
        yield lambda options=options: _attention(128, **options)
    yield lambda: _cache(128, paged=True)
    yield lambda: _cache(128, paged=True, sq=200)


def count_specialisations():
    """How many kernels 50 shapes of each kind of call need, by the kind."""
    generator = torch.Generator().manual_seed(0)

    def numbers(*limits):
        return [int(torch.randint(1, limit, (), generator=generator)) for limit in limits]

    def dense():
        batch, sq, sk, heads_k = numbers(5, 700, 700, 5)
        q = torch.zeros(batch, sq + 64, 4 * heads_k, 64, dtype=BF16)
        k, v = torch.zeros(2, batch, sk, heads_k, 64, dtype=BF16).unbind()
        options = Options(0.125, True)
        out, lse, _ = flaggems.forward(q, k, v, options)
        flaggems.backward(out, q, k, v, out, lse, *map(torch.empty_like, (q, k, v)), options)

    def varlen():
        lengths = numbers(*[400] * (1 + numbers(6)[0]))
        cu = torch.tensor([0, *lengths]).cumsum(0).int()
        q, k, v = torch.zeros(3, sum(lengths) + numbers(9)[0], 4, 64, dtype=BF16).unbind()
        sequences = Sequences(cu, cu, max(max(lengths), 65), max(lengths))
        options = Options(0.125)
        out, lse, _ = flaggems.forward(q, k, v, options, sequences)
        gradients = map(torch.empty_like, (q, k, v))
        flaggems.backward(out, q, k, v, out, lse, *gradients, options, sequences)

    def decode():
        batch, pages, heads_k = numbers(9, 99, 5)
        q = torch.zeros(batch, 1, 4 * heads_k, 64, dtype=BF16)
        k, v = torch.zeros(2, batch, 16 * pages + 8192, heads_k, 64, dtype=BF16).unbind()
        lengths = torch.ones(batch).int()
        flaggems.kvcache(
            q, k, v, q[:, :, :heads_k], q[:, :, :heads_k], Options(0.125), None, None, True, lengths
        )

    counts = {}
    for call in (dense, varlen, decode):
        where = runtime._runtime = CompilingRuntime(90)
        for _ in range(50):
            call()
        kernels = [launch.kernel.__name__ for launch in where.launches.values()]
        counts[call.__name__] = {name: kernels.count(name) for name in sorted(set(kernels))}
    return counts


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--arch", type=int, default=90)
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--all", action="store_true", help="more head dimensions and features")
    parser.add_argument("--only", nargs="+", default=[""], help="kernels with these in the name")
    parser.add_argument("--count", action="store_true", help="kernels for 50 shapes, by kind")
    options = parser.parse_args()
    if options.count:
        print(json.dumps(count_specialisations()))
        return
    where = runtime._runtime = CompilingRuntime(options.arch)
    for call in (*calls(), *(more_calls() if options.all else ())):
        call()
    _LAUNCHES.extend(
        launch
        for launch in where.launches.values()
        if any(word in launch.kernel.__name__ for word in options.only)
    )
    # Processes that fork have what there is to compile.
    with multiprocessing.get_context("fork").Pool(options.jobs) as pool:
        for report in pool.imap_unordered(_report, range(len(_LAUNCHES))):
            print(json.dumps(report), flush=True)


_LAUNCHES = []


def _report(index):
    launch = _LAUNCHES[index]
    try:
        return launch.report()
    except Exception as error:
        named = {"kernel": launch.kernel.__name__, "flags": launch.flags, **launch.options}
        return named | {"error": f"{type(error).__name__}: {error}"[-2000:]}


if __name__ == "__main__":
    main()
