"""compute-sanitizer over every kernel on small shapes: memcheck, racecheck, initcheck, synccheck.

Every tool runs over groups of calls, each group in a process with a time limit, after a run without
a tool that compiles the group's kernels; a summary says what was found. The calls' results are not
compared here: other tests do that.

  python tests/gpu/sanitize.py
  python tests/gpu/sanitize.py --tool racecheck --head-dim 128 --group backward decode
  python tests/gpu/sanitize.py --backend flaggems --head-dim 64 128 256
"""

import argparse
import collections
import concurrent.futures
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time

import pool

TOOLS = ("memcheck", "racecheck", "initcheck", "synccheck")
GROUPS = ("forward", "backward", "deterministic", "varlen", "decode", "append", "rotary")
HEAD_DIMS = (64, 128, 256, 96, 40, 72, 33)  # with tiles of their own, padded, element by element


def options():
    """Features, so combined that every one that changes a kernel is on somewhere."""
    import torch

    slopes, sinks = torch.rand(4), torch.randn(4)
    return [
        {},
        {"causal": True},
        {"causal": True, "window_size": (30, -1), "softcap": 3.0},
        {"alibi_slopes": slopes, "dropout_p": 0.2},
        {"s_aux": sinks, "softcap": 2.0, "dropout_p": 0.1, "causal": True},
    ]


def inputs(*shapes, grad=False):
    """Made on the CPU: a copy initialises memory in every tool's eyes."""
    import torch

    made = (torch.randn(shape, device="cpu").to(torch.bfloat16) for shape in shapes)
    return [x.cuda().requires_grad_(grad) for x in made]


def attention(head_dim, backward, **more):
    import torch

    import flash_attn

    for sq, sk in ((70, 150), (130, 70), (1, 200)):
        for each in options():
            q, k, v = inputs(
                *[(1, n, h, head_dim) for n, h in ((sq, 4), (sk, 2), (sk, 2))], grad=backward
            )
            (dout,) = inputs((1, sq, 4, head_dim))
            out = flash_attn.flash_attn_func(q, k, v, **each, **more)
            if backward:
                torch.autograd.grad(out, (q, k, v), dout)


def varlen(head_dim):
    import torch

    import flash_attn

    for each in options():
        q, k, v = inputs(*[(203, h, head_dim) for h in (4, 2, 2)], grad=True)
        (dout,) = inputs((203, 4, head_dim))
        cu = torch.tensor((0, 70, 70, 200), dtype=torch.int32, device="cpu").cuda()
        out = flash_attn.flash_attn_varlen_func(q, k, v, cu, cu, 130, 130, **each)
        torch.autograd.grad(out, (q, k, v), dout)


def cached(head_dim, append):
    import torch

    import flash_attn

    def int32(*values):
        return torch.tensor(values, dtype=torch.int32, device="cpu").cuda()

    q, k, v = inputs(*[(2, 2, h, head_dim) for h in (8, 2, 2)])
    tables = inputs((304, 8), (304, 8)) if head_dim >= 16 else ()
    for paged in (False, True):
        caches = inputs(*[(40, 16, 2, head_dim) if paged else (2, 300, 2, head_dim)] * 2)
        more = {"cache_seqlens": int32(250, 3)}
        if paged:
            table = torch.randperm(40, device="cpu")[:38].view(2, 19).to(torch.int32)
            more["block_table"] = table.cuda()
        for each in ({}, {"window_size": (40, 0)}, {"softcap": 2.0}, {"num_splits": 3}):
            new = (k, v) if append else ()
            if append and each == {}:
                new = (k, v, *tables)
            flash_attn.flash_attn_with_kvcache(q, *caches, *new, **more, causal=True, **each)


def rotary(head_dim):
    import torch

    from flash_attn.layers.rotary import apply_rotary_emb

    x, cos, sin = inputs((2, 50, 3, head_dim), (80, head_dim // 4), (80, head_dim // 4))
    offsets = torch.tensor((3, 20), device="cpu").cuda()
    for interleaved in (False, True):
        apply_rotary_emb(x, cos, sin, interleaved=interleaved, seqlen_offsets=offsets)
        apply_rotary_emb(x, cos, sin, interleaved=interleaved, inplace=True)


def run_group(group, head_dim, backend):
    import torch

    import flash_attn

    torch.set_default_device("cuda")
    flash_attn.set_backend(backend)
    if backend == "flaggems":  # the kernels of Hopper for short sequences, too
        from flash_attn.backends.flaggems import plan, plan_backward

        plan.LEAST_DESCRIBED_KEYS = plan_backward.LEAST_DESCRIBED_ROWS = 1
    {
        "forward": lambda: attention(head_dim, False),
        "backward": lambda: attention(head_dim, True),
        "deterministic": lambda: attention(head_dim, True, deterministic=True),
        "varlen": lambda: varlen(head_dim),
        "decode": lambda: cached(head_dim, False),
        "append": lambda: cached(head_dim, True),
        "rotary": lambda: rotary(head_dim),
    }[group]()
    torch.cuda.synchronize()
    time.sleep(0.5)  # for torch's autograd thread, which must not meet the end of Python
    print("finished")


def sanitizer(tool):
    command = ["compute-sanitizer", "--tool", tool, "--error-exitcode", "9", "--print-limit", "20"]
    help_text = subprocess.run(
        ["compute-sanitizer", "--help"], capture_output=True, text=True
    ).stdout
    if tool != "initcheck" and "--kernel-regex" in help_text:  # which must see others write
        command += ["--kernel-regex", "kns=attention|backward|prepare|rotary|append"]
    return command


def run_child(command, group, head_dim, backend, number, seconds):
    """What was found, or None; and its text."""
    # Without torch's cache of freed memory every buffer has its own bounds.
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    command = [*command, sys.executable, __file__, "--child", group, "--head-dim", str(head_dim)]
    command += ["--backend", backend]
    until = time.monotonic() + seconds
    with tempfile.TemporaryFile("w+", errors="replace") as log:
        process = subprocess.Popen(
            command,
            env=environment | pool.device_environment(number),
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
        while process.poll() is None and time.monotonic() < until and not pool.stopped():
            time.sleep(0.1)
        if unfinished := process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        log.seek(0)
        text = log.read()
    if unfinished:
        return "stopped" if pool.stopped() else f"not finished within {seconds:.0f} s", text
    if process.returncode == 0 and "finished" in text:
        return None, text
    summary = re.findall(r"(?:ERROR|RACECHECK) SUMMARY: .*", text)
    return (summary[-1] if summary else f"status {process.returncode}"), text


def report(what, found, text, shown):
    print(f"{what}: {found}", flush=True)
    lines = text.splitlines()
    marked = [x for x in lines if x.startswith("=========") or "Error" in x]
    if shown:
        print("    " + "\n    ".join((marked or lines[-14:])[:14]), flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--tool", nargs="+", choices=TOOLS, default=list(TOOLS))
    parser.add_argument("--group", nargs="+", choices=GROUPS, default=list(GROUPS))
    parser.add_argument("--head-dim", nargs="+", type=int, default=list(HEAD_DIMS))
    parser.add_argument("--backend", choices=("native", "flaggems"), default="native")
    parser.add_argument("--limit", type=float, default=240, help="seconds of a run")
    parser.add_argument(
        "--seconds", type=float, default=1e9, help="begin nothing new after so long"
    )
    parser.add_argument("--workers", type=int, default=pool.default_workers(14))
    parser.add_argument("--child", choices=GROUPS, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        run_group(options.child, *options.head_dim, options.backend)
        return 0
    if shutil.which("compute-sanitizer") is None:
        print("compute-sanitizer is not on the path: it comes with the CUDA toolkit")
        return 2
    pool.stop_on_signals()
    began = printed = time.monotonic()
    groups = [(group, head_dim) for head_dim in options.head_dim for group in options.group]
    work = [("no tool", *each) for each in groups]
    work += [(tool, *each) for each in groups for tool in options.tool]
    commands = {"no tool": []} | {tool: sanitizer(tool) for tool in options.tool}
    # Compiling counts for the run without a tool, which others of its group wait for.
    compiled = {each: threading.Event() for each in groups}

    def one(number):
        tool, *each = work[number]
        each = tuple(each)
        try:
            if tool != "no tool":
                while not compiled[each].wait(0.5) and not pool.stopped():
                    pass
            if pool.stopped() or time.monotonic() - began > options.seconds:
                return "not begun", ""
            limit = options.limit if commands[tool] else max(options.limit, 600)
            return run_child(commands[tool], *each, options.backend, number, limit)
        finally:
            if tool == "no tool":
                compiled[each].set()

    clean, failures, not_begun = collections.Counter(), 0, 0
    executor = concurrent.futures.ThreadPoolExecutor(options.workers)
    futures = {executor.submit(one, number): work[number] for number in range(len(work))}
    for future in concurrent.futures.as_completed(futures):
        tool, group, head_dim = futures[future]
        found, text = future.result()
        if found is None:
            clean[tool] += 1
        elif found == "not begun":
            not_begun += 1
        else:
            failures += 1
            report(f"{tool}, {group}, d={head_dim}", found, text, failures <= 5)
        if time.monotonic() - printed > 10:
            printed = time.monotonic()
            print(f"({clean.total()} of {len(work)} clean, {failures} not)", flush=True)
    executor.shutdown()
    shown = ", ".join(f"{tool} {clean[tool]}" for tool in commands)
    print(
        f"{clean.total()} of {len(work)} runs clean ({shown}), {failures} not, "
        f"{not_begun} not begun, {time.monotonic() - began:.0f} s"
    )
    return 1 if failures or not_begun else 0


if __name__ == "__main__":
    sys.exit(main())
