"""Time this package beside torch's scaled_dot_product_attention.

Rounds alternate between the two sides (A B A B ...) and only times of one round are compared: a row
shows the median of the ratios, above 1 where this package is faster. Without options the standard
table is run; any of --shape, --features and --kind selects other cases: all their combinations.

  kinds     forward, backward, decode (one query row against a cache), host (time of a tiny call
            until it returns), memory (peak beyond inputs and outputs), copy (what memory can move)
  features  joined by +: causal, window=256, softcap=30, alibi, dropout=0.1, gqa=4, sinks, varlen,
            deterministic

  python -m flash_attn bench
  python -m flash_attn bench --shape 1,8,4096,128 --features plain causal causal+window=512
  python -m flash_attn bench --kind forward --features softcap=30 alibi --against plain
"""

import argparse
import dataclasses
import datetime
import itertools
import json
import math
import pathlib
import shlex
import statistics
import sys
import time

import torch

from flash_attn.cli import cases, machine, memory, plot, timing
from flash_attn.cli.cases import Case, Features

KINDS = ("memory", "forward", "backward", "decode", "host", "copy")

# (batch, heads, length, head dimension) and features of the standard tables.
_CPU_SHAPES = [
    ((1, 8, 1024, 64), Features()),
    ((1, 8, 1024, 64), Features(causal=True)),
    ((1, 8, 4096, 128), Features()),
    ((1, 8, 4096, 128), Features(causal=True)),
    ((8, 8, 256, 64), Features(causal=True)),
]
_CPU_DECODE = [((1, 32, 8192, 128), Features())]
# Hidden size 2048, 16,384 tokens in all.
_GPU_SHAPES = [
    ((16384 // seqlen, 2048 // head_dim, seqlen, head_dim), Features(causal=causal))
    for head_dim in (64, 128, 256)
    for causal in (False, True)
    for seqlen in (512, 1024, 2048, 4096, 8192, 16384)
]
_GPU_DECODE = [
    ((1, 32, 8192, 128), Features(gqa=4)),
    ((1, 32, 65536, 128), Features(gqa=4)),
    ((16, 32, 8192, 128), Features(gqa=4)),
    ((64, 32, 8192, 128), Features(gqa=4)),
    ((1, 32, 65536, 128), Features()),
    ((16, 64, 32768, 128), Features(gqa=8)),
]
_HOST = [((1, 1, 1, 64), Features())]
_MEMORY = [((1, 1, 16384, 64), Features()), ((1, 1, 65536, 64), Features())]


def add_arguments(parser):
    def parsed(parse):
        def convert(text):
            try:
                return parse(text)
            except ValueError as error:
                raise argparse.ArgumentTypeError(str(error)) from None

        return convert

    default_device = machine.accelerator() or torch.device("cpu")
    parser.add_argument("--device", type=torch.device, default=default_device)
    parser.add_argument("--dtype", nargs="+", choices=list(cases.DTYPES), help="default: all")
    parser.add_argument("--kind", nargs="+", choices=KINDS, help="default: all but memory")
    parser.add_argument("--shape", nargs="+", type=parsed(cases.shape_of), metavar="B,H,S,D")
    parser.add_argument("--features", nargs="+", type=parsed(Features.parse), metavar="F+F")
    parser.add_argument(
        "--against",
        choices=["sdpa", "plain"],
        default="sdpa",
        help="plain: our own kernel without the features, per visible operation",
    )
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-seconds", type=float, help="length of one sample")
    parser.add_argument(
        "--retries",
        type=int,
        default=0,
        help="measure a case again, up to so many times, while other programs keep the CPU busy; "
        "the run that they disturbed least is kept",
    )
    parser.add_argument("--threads", type=int, help="CPU threads of both sides")
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="PREFIX", help="write PREFIX.md, .json and .png"
    )


def selected_cases(arguments):
    """The standard table, or the combinations of what was asked for."""
    on_cpu = arguments.device.type == "cpu"
    dtypes = arguments.dtype or [name for name in cases.DTYPES if on_cpu or name != "float32"]
    kinds = arguments.kind or [kind for kind in KINDS if kind != "memory"]
    attention = _CPU_SHAPES if on_cpu else _GPU_SHAPES
    standard = {
        "memory": _MEMORY,
        "forward": attention,
        "backward": attention,
        "decode": _CPU_DECODE if on_cpu else _GPU_DECODE,
        "host": _HOST,
    }
    for dtype, kind in itertools.product(dtypes, sorted(kinds, key=KINDS.index)):
        if kind == "copy":
            continue
        table = standard[kind]
        if arguments.shape or arguments.features:
            shapes = arguments.shape or list(dict.fromkeys(shape for shape, _ in table))
            table = itertools.product(shapes, arguments.features or [Features()])
        for shape, features in table:
            yield Case(kind, *shape, dtype, features)


def measure(case, arguments):
    """One row of the table, as a dictionary of plain values."""
    device, rounds = arguments.device, arguments.rounds
    sample_seconds = arguments.sample_seconds
    if sample_seconds is None:
        sample_seconds = 0.2 if device.type == "cpu" else 0.02
    row = {"kind": case.kind, "case": str(case), "dtype": case.dtype, **dataclasses.asdict(case)}
    row["features"] = str(case.features)
    if case.kind == "memory":
        return row | memory.measure(case, device)
    inputs = cases.Inputs(case, device, requires_grad=case.kind == "backward")
    against_plain = arguments.against == "plain"
    plain = inputs.plain()
    timer = timing.timed_on_host if case.kind == "host" else timing.timed
    if case.kind == "backward":
        ours = cases.gradients(inputs.forward, inputs.tensors)
        if against_plain:
            peer = cases.gradients(plain.forward, plain.tensors)
        else:
            peer = cases.gradients(inputs.peer_forward, inputs.peer_tensors)
    elif case.kind == "decode":
        ours, peer = inputs.decode, plain.decode if against_plain else inputs.peer_forward
    else:
        ours, peer = inputs.forward, plain.forward if against_plain else inputs.peer_forward
    with torch.set_grad_enabled(case.kind == "backward"):
        result = timing.compare(ours, peer, device, rounds, sample_seconds, timer)

    plain_case = dataclasses.replace(case, features=Features(causal=case.features.causal))
    peer_case = plain_case if against_plain else case
    if case.kind == "host":
        unit = "us"
        ours_value, peer_value = result.ours_seconds * 1e6, result.peer_seconds * 1e6
        scale = 1.0
    else:
        unit = "GB/s" if case.kind == "decode" else "GFLOP/s"
        work = Case.cache_bytes if case.kind == "decode" else Case.flops
        ours_value = work(case) / result.ours_seconds / 1e9
        peer_value = work(peer_case) / result.peer_seconds / 1e9
        scale = work(case) / work(peer_case)
    ratios = [scale * ratio for ratio in result.ratios]
    notes = []
    if not against_plain and case.features.missing_in_peer():
        notes.append(f"peer without {', '.join(case.features.missing_in_peer())}")
    if not against_plain and "attn_mask" in inputs.peer_keywords:
        notes.append("peer with a mask tensor")
    return row | {
        "unit": unit,
        "ours": ours_value,
        "peer": peer_value,
        "ratio": statistics.median(ratios),
        "ratio_min": min(ratios),
        "ratio_max": max(ratios),
        "ours_seconds": result.ours,
        "peer_seconds": result.peer,
        "note": "; ".join(notes),
    }


def measure_undisturbed(case, arguments):
    """`measure`, with the share of the CPUs that other programs used meanwhile."""
    rows = []
    for _ in range(1 + arguments.retries):
        start, others = time.perf_counter(), machine.cpu_seconds_of_others()
        row = measure(case, arguments)
        if others is None:
            return row
        seconds = machine.cores() * (time.perf_counter() - start)
        row["others"] = max(0.0, machine.cpu_seconds_of_others() - others) / seconds
        rows.append(row)
        if row["others"] < 0.05:
            break
    return min(rows, key=lambda row: row["others"])


def copy_bandwidth(device, rounds):
    """GB/s of a large copy, reads and writes counted."""
    source = torch.ones(1 << 27, device=device)
    target = torch.empty_like(source)
    timing.timed(lambda: target.copy_(source), 1, device)
    seconds = [timing.timed(lambda: target.copy_(source), 1, device) for _ in range(max(5, rounds))]
    return 2 * source.numel() * source.itemsize / statistics.median(seconds) / 1e9


def table_line(row):
    """One line of the Markdown table."""
    if "error" in row:
        return f"| {row['kind']} | {row['dtype']} | {row['case']} | - | - | - | {row['error']} |"
    digits = 2 if row["unit"] in ("us", "MB") else 1
    ours, peer = (f"{row[side]:.{digits}f} {row['unit']}" for side in ("ours", "peer"))
    ratio = spread = ""
    if "ratio" in row:
        ratio = f"**{row['ratio']:.2f}**"
        spread = f"{row['ratio_min']:.2f} to {row['ratio_max']:.2f}"
    busy = row.get("others", 0.0)
    disturbed = f"others used {busy:.0%} of the CPUs" if busy > 0.05 else ""
    remarks = "; ".join(filter(None, (spread, row["note"], disturbed)))
    cells = (row["kind"], row["dtype"], row["case"], ours, peer, ratio, remarks)
    return f"| {' | '.join(cells)} |"


def summary_lines(rows):
    """Geometric mean and smallest ratio by kind and dtype."""
    timed = [row for row in rows if "ratio" in row]
    if not timed:
        return []
    lines = [
        "| kind | dtype | cases | geometric mean | smallest |",
        "| --- | --- | --- | --- | --- |",
    ]
    groups = {}
    for row in timed:
        groups.setdefault((row["kind"], row["dtype"]), []).append(row["ratio"])
    for (kind, dtype), ratios in groups.items():
        mean = math.exp(statistics.fmean(map(math.log, ratios)))
        lines.append(f"| {kind} | {dtype} | {len(ratios)} | {mean:.2f} | {min(ratios):.2f} |")
    return lines


def run(arguments):
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    device = arguments.device
    facts = {
        "command": shlex.join(["python", "-m", "flash_attn", *sys.argv[1:]]),
        "date": datetime.date.today().isoformat(),
        "device": {d.type: name for d, name in machine.devices()}.get(device.type, str(device)),
        "threads": torch.get_num_threads(),
        "instruction set": machine.cpu_isa(),
        "versions": {name: version for name, version in machine.versions().items() if version},
    }
    peer = "plain kernel" if arguments.against == "plain" else "SDPA"
    shown = ", ".join(f"{name} {version}" for name, version in facts["versions"].items())
    lines = [
        f"- device: {facts['device']}, CPU threads: {facts['threads']}, {facts['instruction set']}",
        f"- versions: {shown}",
        f"- command: `{facts['command']}`, {facts['date']}, {arguments.rounds} alternating rounds",
        "",
        f"| kind | dtype | (batch, heads, length, d) | flash_attn | {peer} | ratio | min to max |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    print("\n".join(lines), flush=True)

    rows = []
    for case in selected_cases(arguments):
        try:
            row = measure_undisturbed(case, arguments)
        except (RuntimeError, ImportError) as error:
            reason = str(error).partition("\n")[0]
            row = {"kind": case.kind, "case": str(case), "dtype": case.dtype, "error": reason}
        rows.append(row)
        lines.append(table_line(row))
        print(lines[-1], flush=True)

    ending = ["", *summary_lines(rows)]
    if arguments.kind is None or "copy" in arguments.kind:
        bandwidth = facts["copy_gb_per_second"] = copy_bandwidth(device, arguments.rounds)
        ending += ["", f"A copy moves {bandwidth:.1f} GB/s, reads and writes counted."]
    print("\n".join(ending), flush=True)

    if arguments.output is not None:
        prefix = arguments.output
        prefix.parent.mkdir(parents=True, exist_ok=True)
        title = ["# flash_attn beside " + peer, ""]
        prefix.with_suffix(".md").write_text("\n".join(title + lines + ending) + "\n")
        prefix.with_suffix(".json").write_text(json.dumps(facts | {"rows": rows}, indent=1) + "\n")
        plotted = plot.save(rows, facts, peer, prefix.with_suffix(".png"))
        print(f"\nWritten: {prefix}.md, {prefix}.json" + (f", {prefix}.png" if plotted else ""))
        if not plotted:
            print("No plot: matplotlib is not installed.")
    return 0
