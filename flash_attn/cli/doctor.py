"""Say what is installed, what this machine can run, and which backend would serve each device.

Changes nothing, computes one small attention on each device that a backend serves, and always exits
with status 0: what is wrong is in the text.
"""

import importlib.util
import os

import torch

import flash_attn
from flash_attn import backends
from flash_attn.backends import cuda
from flash_attn.cli import machine

_VARIABLES = (
    "FLASH_ATTENTION_USE_FLAGGEMS",
    "FLASH_ATTENTION_DETERMINISTIC",
    "FLASH_ATTN_PLUS_CPU_ISA",
    "FLASH_ATTN_PLUS_CORE",
    "FLASH_ATTN_PLUS_CACHE_DIR",
    "FLASH_ATTN_PLUS_LOG",
    "FLASH_ATTN_PLUS_NVRTC",
)


def add_arguments(parser):
    """The command has no options."""


def section(title, lines):
    print(f"\n{title}")
    width = max(len(name) for name, _ in lines)
    for name, value in lines:
        print(f"  {name:{width}}  {value}")


def attempt(function):
    """The result of a function, or what it raised, as text."""
    try:
        return function()
    except Exception as error:
        return f"FAILED: {type(error).__name__}: {error}"


def core_lines():
    from flash_attn import _core

    return [
        ("version", attempt(_core.version)),
        ("instruction set", attempt(_core.cpu_isa)),
        ("runnable, best first", attempt(_core.cpu_isas)),
        ("threads", f"{torch.get_num_threads()} (as torch), {machine.cores()} cores to run on"),
    ]


def gpu_lines(cache):
    """What the native GPU kernels need: driver, compiler, and where compiled kernels are kept."""
    from flash_attn import _core

    cuda.prepare()
    report = attempt(_core.cuda_runtime)  # lines of "name: value"
    lines = [tuple(line.split(": ", 1)) for line in report.splitlines() if ": " in line]
    return [*lines, ("compiled kernels", f"{cache}: {attempt(lambda: cache_state(cache))}")]


def flaggems_lines():
    """The state of FlagGems, and what its own operator of attention would serve."""
    from flash_attn.backends.flaggems import policy, runtime

    if importlib.util.find_spec("flag_gems") is None:
        state = "not installed"
    else:
        state = attempt(lambda: runtime.current().describe())
    table = [(f"own operator, rule {i}", rule) for i, rule in enumerate(policy.describe(), 1)]
    return [("state", state), *table]


def self_test(device):
    """The largest error of a small causal attention against float64, as text."""
    generator = torch.Generator().manual_seed(0)
    dtype = torch.float32 if device.type == "cpu" else torch.float16
    q, k, v = torch.randn(3, 1, 33, 2, 32, generator=generator).to(device, dtype)
    out = flash_attn.flash_attn_func(q, k, v, causal=True).cpu().double()
    q, k, v = (t.cpu().double().transpose(1, 2) for t in (q, k, v))
    expected = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True)
    error = (out - expected.transpose(1, 2)).abs().max().item()
    return f"{'works' if error < 1e-2 else 'FAILED'}: largest error {error:.1e} against float64"


def cache_state(directory):
    """How many compiled kernels the directory holds, or why it cannot be used."""
    if not directory.is_dir():
        return "not there yet"
    files = [file for file in directory.iterdir() if file.is_file()]
    size = sum(file.stat().st_size for file in files)
    writable = "" if os.access(directory, os.W_OK) else ", NOT WRITABLE"
    return f"{len(files)} files, {size / 1e6:.1f} MB{writable}"


def run(arguments):
    print(f"FlashAttention-Plus {flash_attn.__version__}")
    section("Versions", [(n, v or "not installed") for n, v in machine.versions().items()])
    section("CPU core", core_lines())
    cache = machine.cache_directory()
    section("GPU kernels", gpu_lines(cache))
    section("FlagGems", flaggems_lines())
    section("Environment", [(name, os.environ.get(name, "not set")) for name in _VARIABLES])
    for device, name in machine.devices():
        choice = backends.explain(device)
        lines = [
            ("name", name),
            ("backend", choice.backend or "NONE: calls are refused"),
            ("why", choice.reason),
        ]
        if choice.backend is not None:
            lines.append(("test", attempt(lambda device=device: self_test(device))))
        section(f"Device {device}", lines)
    return 0
