"""What `check_gpu.py` times: each function takes one case and returns one row, in its own process.
And what the scripts `tune_*.py` share, which time variants of a kernel.

All sides of a case are timed in alternation (A B C A B C ...) and only times of one round are
compared. The peers are the flash and the cuDNN backend of scaled_dot_product_attention.
"""

import concurrent.futures
import itertools
import math
import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

import flash_attn
from flash_attn.cli import timing
from flash_attn.cli.cases import Case, Features, Inputs, gradients

DEVICE = torch.device("cuda")
WARMING_SECONDS = 0.4
PEERS = {"flash": SDPBackend.FLASH_ATTENTION, "cudnn": SDPBackend.CUDNN_ATTENTION}


# The backend that is checked; `check_gpu.py --backend` sets it for its processes.
BACKEND = os.environ.get("FLASH_ATTN_CHECKED_BACKEND", "native")


def setup():
    torch.set_num_threads(1)
    flash_attn.set_backend(BACKEND)


def run(item):
    """The row of a piece of work: its number, the name of one of the functions below, its case."""
    _, function, work = item
    return globals()[function](work)


def alternate(sides, rounds, sample_seconds, timer=timing.timed):
    """Seconds of a call by side and round; a side that fails is left out, with its reason."""
    calls, failures = {}, {}
    for name, side in sides.items():
        try:
            calls[name] = timing.calls_for(side, DEVICE, timer, sample_seconds)
        except Exception as error:
            if name == "ours":
                raise
            failures[name] = str(error).partition("\n")[0]
    # A GPU that was idle, as while a kernel was compiled, takes a while to reach its clock.
    until = time.monotonic() + WARMING_SECONDS
    while time.monotonic() < until:
        for name, count in calls.items():
            timer(sides[name], count, DEVICE)
    samples = {name: [] for name in calls}
    for _ in range(rounds):
        for name, count in calls.items():
            samples[name].append(timer(sides[name], count, DEVICE))
    return samples, failures


def compared(case, unit, work, samples, failures):
    """A row: the figure of every side, and how many times faster than each peer ours is."""
    values = {name: work / statistics.median(seconds) for name, seconds in samples.items()}
    ratios = {
        name: statistics.median(
            peer / ours for ours, peer in zip(samples["ours"], seconds, strict=True)
        )
        for name, seconds in samples.items()
        if name != "ours"
    }
    return {
        "kind": case.kind,
        "case": str(case),
        "dtype": case.dtype,
        "unit": unit,
        **values,
        "ratios": ratios,
        "failures": failures,
        "seconds": samples,
    }


def with_backend(backend, function):
    def call():
        with sdpa_kernel(backend):
            return function()

    return call


def triton_peers(inputs):
    """What other Triton code does: FlagGems' own forward and FlexAttention."""
    import flag_gems
    import torch._inductor.config
    from torch.nn.attention.flex_attention import create_block_mask, flex_attention

    case = inputs.case
    peers = {}
    if case.kind == "forward":
        lengths = (case.seqlen, case.seqlen)

        def own():
            return flag_gems.flash_attention_forward(
                *(*inputs.tensors, None, None, *lengths, 0.0, case.features.causal, False),
                scale=case.head_dim**-0.5,
                disable_splitkv=True,
            )[0]

        peers["flag_gems"] = own
    mask = None
    if case.features.causal:
        mask = create_block_mask(
            *(lambda b, h, i, j: i >= j, None, None, case.seqlen, case.seqlen), device="cuda"
        )
    # Its compiling processes, one a core, would still be starting while the calls are timed.
    torch._inductor.config.compile_threads = 1
    torch.compiler.reset()  # which counts compilations, and ends them after eight
    flex = torch.compile(flex_attention, dynamic=False)
    peers["flex"] = lambda: flex(*inputs.peer_tensors, block_mask=mask)
    return peers


def grid(work):
    """A cell of the grid of forward or backward, in TFLOP/s."""
    case, rounds, sample_seconds = work
    backward = case.kind == "backward"
    inputs = Inputs(case, DEVICE, requires_grad=backward)
    sides = {"ours": inputs.forward}
    sides |= {name: with_backend(backend, inputs.peer_forward) for name, backend in PEERS.items()}
    if BACKEND == "flaggems":
        sides |= triton_peers(inputs)
    if backward:
        tensors = {"ours": inputs.tensors}
        made = {}
        for name, side in sides.items():
            try:
                made[name] = gradients(side, tensors.get(name, inputs.peer_tensors))
            except Exception:
                if name == "ours":
                    raise
        sides = made
    with torch.set_grad_enabled(backward):
        samples, failures = alternate(sides, rounds, sample_seconds)
    return compared(case, "TFLOP/s", case.flops() / 1e12, samples, failures)


def cost(work):
    """A feature beside our own plain kernel, both in TFLOP/s of visible entries."""
    case, rounds, sample_seconds = work
    backward = case.kind == "backward"
    plain = Case(
        case.kind,
        case.batch,
        case.heads,
        case.seqlen,
        case.head_dim,
        case.dtype,
        Features(causal=case.features.causal),
    )
    made = [Inputs(each, DEVICE, requires_grad=backward) for each in (case, plain)]
    sides = {"ours": made[0].forward, "plain": made[1].forward}
    if backward:
        sides = {
            name: gradients(side, inputs.tensors)
            for (name, side), inputs in zip(sides.items(), made, strict=True)
        }
    with torch.set_grad_enabled(backward):
        samples, failures = alternate(sides, rounds, sample_seconds)
    row = compared(case, "TFLOP/s", case.flops() / 1e12, samples, failures)
    share = case.flops() / plain.flops()
    row["plain"] /= share
    row["ratios"]["plain"] *= share
    return row


def graphed(function, calls=10):
    """A replay of so many calls, so that the host's time does not count; and that number."""
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        function()  # compiled and allocated before the capture
        stream.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream):
            for _ in range(calls):
                function()
    return graph.replay, calls


def decode(work):
    """One query row against a cache, in GB/s of keys and values read.

    The caches are several where one would stay in the L2. `page_size` of the work: 0 is contiguous.
    """
    case, page_size, rounds, sample_seconds = work
    dtype = getattr(torch, case.dtype)
    copies = max(1, -(-(400 << 20) // case.cache_bytes()))
    shape = (case.batch, case.seqlen, case.heads_k, case.head_dim)
    q = torch.randn(case.batch, 1, case.heads, case.head_dim, dtype=dtype, device=DEVICE)
    caches = [torch.randn(2, *shape, dtype=dtype, device=DEVICE) for _ in range(copies)]
    lengths = torch.full((case.batch,), case.seqlen, dtype=torch.int32, device=DEVICE)
    options = {"cache_seqlens": lengths}

    def ours_on(caches, options):
        def call():
            for k, v in caches:
                flash_attn.flash_attn_with_kvcache(q, k, v, **options)

        return call

    sides = {"ours": ours_on([tuple(cache) for cache in caches], options)}
    if page_size:
        pages = case.batch * case.seqlen // page_size
        table = torch.randperm(pages, device=DEVICE).view(case.batch, -1).to(torch.int32)
        paged = [tuple(x.view(pages, page_size, *shape[2:]) for x in cache) for cache in caches]
        sides["contiguous"] = sides["ours"]
        sides["ours"] = ours_on(paged, options | {"block_table": table})
    else:
        q_peer = q.transpose(1, 2)
        peers = [tuple(x.transpose(1, 2).contiguous() for x in cache) for cache in caches]

        def peer(backend):
            def call():
                with sdpa_kernel(backend):
                    for k, v in peers:
                        F.scaled_dot_product_attention(
                            q_peer, k, v, enable_gqa=case.features.gqa > 1
                        )

            return call

        sides |= {name: peer(backend) for name, backend in PEERS.items()}
    replays, failures = {}, {}
    with torch.no_grad():
        for name, side in sides.items():
            try:
                replays[name], _ = graphed(side, 1)
            except RuntimeError as error:
                if name == "ours":
                    raise
                failures[name] = str(error).partition("\n")[0]
        samples, more = alternate(replays, rounds, sample_seconds)
    row = compared(case, "GB/s", copies * case.cache_bytes() / 1e9, samples, failures | more)
    row["case"] += f" pages of {page_size}" if page_size else ""
    return row


def host(work):
    """Microseconds of the host for one call on a tiny shape, until it returns."""
    what, rounds, _ = work
    shape = (1, 16, 2, 64)
    grad = what != "forward"
    ours = [
        torch.randn(shape, dtype=torch.bfloat16, device=DEVICE, requires_grad=grad)
        for _ in range(3)
    ]
    peer = [x.detach().transpose(1, 2).contiguous().requires_grad_(grad) for x in ours]

    def ours_forward():
        return flash_attn.flash_attn_func(*ours)

    def peer_forward():
        return F.scaled_dot_product_attention(*peer)

    sides = {"ours": ours_forward, "flash": peer_forward}
    if what == "forward and backward":
        dout = torch.randn(shape, dtype=torch.bfloat16, device=DEVICE)
        dout_peer = dout.transpose(1, 2).contiguous()
        sides = {
            "ours": lambda: torch.autograd.grad(ours_forward(), ours, dout),
            "flash": lambda: torch.autograd.grad(peer_forward(), peer, dout_peer),
        }
    # The choice of the backend is made once: entering the context would count for the peer.
    with torch.set_grad_enabled(grad), sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        samples = {name: [] for name in sides}
        for side in sides.values():
            timing.timed_on_host(side, 300, DEVICE)
        for _ in range(max(rounds, 9)):
            for name, side in sides.items():
                samples[name].append(timing.timed_on_host(side, 200, DEVICE))
    row = compared(Case("host", *shape, "bfloat16"), "us", 1.0, samples, {})
    for name, seconds in samples.items():
        row[name] = statistics.median(seconds) * 1e6
    row["case"] = what
    return row


_FIRST_CALL = """
import os, time, torch
# What torch itself does once, at the first backward pass that is given a gradient: import sympy.
one = torch.ones(1, device="cuda", requires_grad=True)
torch.autograd.grad(one * 1, one, torch.ones_like(one))
if os.environ.get("FLASH_ATTENTION_USE_FLAGGEMS") == "TRUE":
    import flag_gems  # which takes seconds, once in a process
import flash_attn
q, k, v = torch.randn(3, 2, 512, 8, 128, dtype=torch.bfloat16, device="cuda").unbind(0)
q, k, v = (x.requires_grad_() for x in (q, k, v))
dout = torch.randn_like(q)
torch.cuda.synchronize()
start = time.perf_counter()
out = flash_attn.flash_attn_func(q, k, v, causal=True)
torch.cuda.synchronize()
forward = time.perf_counter()
torch.autograd.grad(out, (q, k, v), dout)
torch.cuda.synchronize()
print(forward - start, time.perf_counter() - forward)
"""


def first_call(work):
    """Milliseconds of the first call of a process: cold, and with the kernel on the disk."""
    rows = {}
    with tempfile.TemporaryDirectory() as cache:
        environment = os.environ | {"FLASH_ATTN_PLUS_CACHE_DIR": cache, "TRITON_CACHE_DIR": cache}
        for state in ("cold", "from the disk"):
            output = subprocess.run(
                [sys.executable, "-c", _FIRST_CALL],
                env=environment,
                capture_output=True,
                text=True,
                check=True,
            )
            forward, backward = map(float, output.stdout.split())
            rows[state] = {"forward": 1e3 * forward, "backward": 1e3 * backward}
    return {"kind": "first call", "case": "(2,8,512,128) causal", "unit": "ms", **rows}


def training_step(work):
    """A transformer block of a model of a billion parameters: seconds of a step, and the losses."""
    seqlen, rounds, steps = work
    hidden, head_dim = 2048, 128

    class Block(torch.nn.Module):
        def __init__(self, attention):
            super().__init__()
            self.attention = attention
            self.norms = torch.nn.ModuleList(torch.nn.RMSNorm(hidden) for _ in range(2))
            self.qkv = torch.nn.Linear(hidden, 3 * hidden, bias=False)
            self.proj = torch.nn.Linear(hidden, hidden, bias=False)
            self.up = torch.nn.Linear(hidden, 4 * hidden, bias=False)
            self.down = torch.nn.Linear(4 * hidden, hidden, bias=False)

        def forward(self, x):
            qkv = self.qkv(self.norms[0](x)).unflatten(-1, (3, hidden // head_dim, head_dim))
            x = x + self.proj(self.attention(*qkv.unbind(2)).flatten(-2))
            return x + self.down(F.silu(self.up(self.norms[1](x))))

    def ours(q, k, v):
        return flash_attn.flash_attn_func(q, k, v, causal=True)

    def peer(q, k, v):
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            out = F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=True
            )
        return out.transpose(1, 2)

    torch.manual_seed(0)
    x, target = torch.randn(2, 2, seqlen, hidden, dtype=torch.bfloat16, device=DEVICE)
    losses, step = {"ours": [], "flash": []}, {}
    state = None
    for name, attention in (("ours", ours), ("flash", peer)):
        block = Block(attention).to(DEVICE, torch.bfloat16)
        state = state or {key: value.clone() for key, value in block.state_dict().items()}
        block.load_state_dict(state)
        optimizer = torch.optim.AdamW(block.parameters(), lr=3e-4, fused=True)

        def run(block=block, optimizer=optimizer, losses=losses[name]):
            optimizer.zero_grad(set_to_none=True)
            loss = F.mse_loss(block(x).float(), target.float())
            loss.backward()
            optimizer.step()
            losses.append(loss.detach())

        step[name] = run
        for _ in range(steps):
            run()
    curves = {name: torch.stack(values).tolist() for name, values in losses.items()}
    samples = {name: [] for name in step}
    for _ in range(rounds):
        for name, run in step.items():
            samples[name].append(timing.timed(run, 4, DEVICE))
    row = compared(
        Case("training step", 2, hidden // head_dim, seqlen, head_dim, "bfloat16"),
        "ms",
        1.0,
        samples,
        {},
    )
    for name, seconds in samples.items():
        row[name] = statistics.median(seconds) * 1e3
    row["losses"] = curves
    row["largest difference of the losses"] = max(
        abs(a - b) for a, b in zip(*curves.values(), strict=True)
    )
    return row


# -------------------------------------------------------------------------------------------------
# Variants of a kernel, which a variable of the environment chooses


def variant(variable, value, function):
    """The function, called with this value in the environment."""

    def call():
        os.environ[variable] = value
        return function()

    return call


def _reason(check, item):
    setup()
    try:
        return check(item)
    except Exception as error:  # of whatever kind: Triton has its own
        return str(error).partition("\n")[0][:200]


def usable(check, items):
    """The items that compile and are right, as a set; prints why the others are not.

    `check` returns what is wrong with an item, or None. It is called in several processes; what it
    compiles lies in the disk cache then.
    """
    items = sorted(set(items))
    spawn = multiprocessing.get_context("spawn")
    workers = min(16, os.cpu_count() or 1)
    with concurrent.futures.ProcessPoolExecutor(workers, mp_context=spawn) as pool:
        reasons = list(pool.map(_reason, itertools.repeat(check), items))
    for item, reason in zip(items, reasons, strict=True):
        if reason is not None:
            print(*item, "cannot be used:", reason, flush=True)
    return {item for item, reason in zip(items, reasons, strict=True) if reason is None}


def print_variants(case, unit, work, samples, failures, peers):
    """A line for each side: its figure, and how many times faster than the round's best peer."""
    timed = [samples[name] for name in peers if name in samples]
    best = [min(seconds) for seconds in zip(*timed, strict=True)]
    for name, seconds in samples.items():
        rate = work / statistics.median(seconds)
        ratio = statistics.median(map(float.__truediv__, best, seconds)) if best else math.nan
        print(f"{case!s:26} {name or 'planner':24} {rate:5.0f} {unit}  x {ratio:.3f}", flush=True)
    for name, reason in failures.items():
        print(f"{case!s:26} {name or 'planner':24} failed: {reason[:100]}", flush=True)
