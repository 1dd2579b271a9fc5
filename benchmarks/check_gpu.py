"""Checks an NVIDIA GPU: are the results right, and how fast are they?

Each check and each timing runs in a process of its own with a time limit, so that one kernel that
fails or hangs costs nothing but its own row. What is found is printed as it comes, and summed up at
the end, also after SIGINT or SIGTERM. Parts:

  correctness  every feature x head dimension x dtype, forward and backward, against float64
  forward      TFLOP/s on the grid of hidden size 2048 and 16,384 tokens, beside torch's flash and
               cuDNN backends
  backward     the same
  features     what a feature costs beside the plain kernel, per visible entry
  decode       GB/s of one query row against a cache, contiguous and paged
  host         microseconds of the host for a tiny call
  first        milliseconds of the first call, cold and from the disk cache
  training     a transformer block's training step beside torch's flash backend, and its losses

  python benchmarks/check_gpu.py
  python benchmarks/check_gpu.py --part correctness --head-dim 64 128 --seconds 60
  python benchmarks/check_gpu.py --part forward decode host --output results/h200
  python benchmarks/check_gpu.py --backend flaggems --part forward backward --seqlen 1024 4096 16384
"""

import argparse
import collections
import datetime
import json
import math
import os
import pathlib
import shlex
import statistics
import sys
import time

ROOT = pathlib.Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT / "tests" / "gpu"), str(ROOT / "benchmarks")]

import features  # noqa: E402
import pool  # noqa: E402
import torch  # noqa: E402

from flash_attn.cli import machine, plot  # noqa: E402
from flash_attn.cli.cases import Case, Features  # noqa: E402

SEQLENS = (512, 1024, 2048, 4096, 8192, 16384)
# (batch, heads, key heads, head dimension, keys)
DECODE = (
    (1, 32, 8, 128, 8192),
    (1, 32, 8, 128, 65536),
    (16, 32, 8, 128, 8192),
    (64, 32, 8, 128, 8192),
    (1, 32, 32, 128, 65536),
    (16, 64, 8, 128, 32768),
)
COSTS = (
    *("softcap=30", "alibi", "window=1024", "gqa=4", "varlen", "sinks", "dropout=0.1"),
    *("causal+softcap=30", "causal+alibi", "causal+window=1024", "causal+gqa=4"),
    *("causal+varlen", "causal+dropout=0.1", "deterministic", "causal+deterministic"),
)


def parse():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--part", nargs="+", choices=PARTS, default=list(PARTS))
    parser.add_argument("--backend", choices=["native", "flaggems"], default="native")
    parser.add_argument("--head-dim", nargs="+", type=int, help="default: all of a part's own")
    parser.add_argument("--dtype", nargs="+", choices=["bf16", "fp16"], help="default: both; bf16")
    parser.add_argument("--pass", dest="passes", nargs="+", choices=["forward", "backward"])
    parser.add_argument("--only", nargs="+", default=(), help="features that contain these words")
    parser.add_argument("--seqlen", nargs="+", type=int, default=SEQLENS)
    parser.add_argument("--seconds", type=float, help="stop beginning new work after so long")
    parser.add_argument("--limit", type=float, default=120, help="seconds of one check or timing")
    parser.add_argument("--workers", type=int, default=pool.default_workers(12))
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-seconds", type=float, default=0.01)
    parser.add_argument(
        "--output", type=pathlib.Path, metavar="PREFIX", help="PREFIX.md, .json and .png"
    )
    return parser.parse_args()


def say(text=""):
    print(text, flush=True)
    LINES.append(text)


LINES = []


def correctness(options, until):
    """Failures by feature and head dimension."""
    checks = features.checks(
        options.head_dim or features.HEAD_DIMS,
        options.dtype or tuple(features.DTYPES),
        options.passes or ("forward", "backward"),
        options.only,
    )
    passed, failures = collections.Counter(), []
    outcomes = pool.run(
        checks, "features:run", "features:setup", options.workers, options.limit, until
    )
    for outcome in pool.watched(outcomes, len(checks)):
        if outcome.error is None:
            passed[outcome.item.feature] += 1
        else:
            failures.append(outcome)
    say(f"{sum(passed.values())} of {len(checks)} checks passed, {len(failures)} failed")
    left_out = len(checks) - sum(passed.values()) - len(failures)
    if left_out:
        say(f"{left_out} were not begun in time")
    by_reason = collections.defaultdict(list)
    for outcome in failures:
        by_reason[outcome.reason[:150]].append(outcome.item)
    rows = sorted(by_reason.items(), key=lambda pair: -len(pair[1]))
    for reason, items in rows[:40]:
        say(f"- {len(items)} x {reason}")
        kinds = collections.Counter(
            (item.feature, "backward" if item.backward else "forward") for item in items
        )
        dims = sorted({item.head_dim for item in items})
        shown = ", ".join(f"{feature} {which}" for feature, which in list(kinds)[:8])
        say(f"    d = {dims}: {shown}{' ...' if len(kinds) > 8 else ''}")
    return [
        {"check": str(outcome.item), "reason": outcome.reason, "error": outcome.error}
        for outcome in failures
    ] + [{"passed": dict(passed)}]


def timed(work, function, options, until):
    """The rows of a part, in the order of the work; failures are said and kept."""
    rows = {}
    items = [(index, function, each) for index, each in enumerate(work)]
    for outcome in pool.run(items, "gpu_timing:run", "gpu_timing:setup", 1, options.limit, until):
        index, _, item = outcome.item
        row = outcome.result or {"case": str(item), "error": outcome.reason, "text": outcome.error}
        rows[index] = row
        if outcome.error:
            say(f"FAILED {item}: {outcome.reason}")
        elif "ours" in row:
            sides = ", ".join(f"{x:.2f} x {side}" for side, x in row["ratios"].items())
            print(
                f"{row['kind']} {row['case']}: {row['ours']:.1f} {row['unit']} {sides}", flush=True
            )
    return [rows[index] for index in sorted(rows)]


def table(rows, sides, label="case"):
    """A Markdown table: our figure, each peer's, and the ratios."""
    rows = [row for row in rows if "error" not in row]
    if not rows:
        return
    unit = rows[0]["unit"]
    ratios = [side for side in sides if any(side in row.get("ratios", ()) for row in rows)]
    heads = [label, f"ours ({unit})", *sides, *(f"x {side}" for side in ratios)]
    say(f"| {' | '.join(heads)} |")
    say("|" + " --- |" * len(heads))
    for row in rows:
        cells = [row["case"], f"{row['ours']:.1f}"]
        cells += [f"{row[side]:.1f}" if side in row else "-" for side in sides]
        cells += [
            f"**{row['ratios'][side]:.2f}**" if side in row["ratios"] else "-" for side in ratios
        ]
        say(f"| {' | '.join(cells)} |")
    for side in ratios:
        values = [row["ratios"][side] for row in rows if side in row["ratios"]]
        mean = math.exp(statistics.fmean(map(math.log, values)))
        say(f"x {side}: geometric mean {mean:.3f}, smallest {min(values):.3f}")


def dtypes_of(options):
    names = {"bf16": "bfloat16", "fp16": "float16"}
    return [names[name] for name in options.dtype or ("bf16",)]


def grid(kind):
    def part(options, until):
        work = [
            (
                Case(kind, 16384 // s, 2048 // d, s, d, dtype, Features(causal=causal)),
                options.rounds,
                options.sample_seconds,
            )
            for dtype in dtypes_of(options)
            for d in options.head_dim or (64, 128, 256)
            for causal in (False, True)
            for s in options.seqlen
        ]
        rows = timed(work, "grid", options, until)
        peers = ("flash", "cudnn", *(("flag_gems", "flex") if options.backend != "native" else ()))
        table(rows, peers, "(batch, heads, length, d)")
        return rows

    return part


def costs(options, until):
    rows = []
    for kind in options.passes or ("forward", "backward"):
        work = [
            (
                Case(kind, 4, 2048 // d, 4096, d, dtypes_of(options)[0], Features.parse(text)),
                options.rounds,
                options.sample_seconds,
            )
            for d in options.head_dim or (64, 128)
            for text in COSTS
            if (not options.only or any(word in text for word in options.only))
            and (kind == "backward" or "deterministic" not in text)
        ]
        some = timed(work, "cost", options, until)
        say(f"\n{kind}")
        table(some, ("plain",))
        rows += some
    return rows


def decode(options, until):
    work = [
        (
            Case("decode", b, h, s, d, dtypes_of(options)[0], Features(gqa=h // hk)),
            page_size,
            options.rounds,
            options.sample_seconds,
        )
        for page_size in (0, 16, 256)
        for b, h, hk, d, s in DECODE
    ]
    rows = timed(work, "decode", options, until)
    table([row for row in rows if "pages" not in row["case"]], ("flash", "cudnn"))
    say()
    table([row for row in rows if "pages" in row["case"]], ("contiguous",))
    return rows


def host(options, until):
    work = [
        (what, options.rounds, options.sample_seconds)
        for what in ("forward", "forward that records", "forward and backward")
    ]
    rows = timed(work, "host", options, until)
    table(rows, ("flash",))
    return rows


def first(options, until):
    rows = timed([None], "first_call", options, until)
    for row in rows:
        for state in ("cold", "from the disk"):
            if state in row:
                times = ", ".join(f"{name} {ms:.0f} ms" for name, ms in row[state].items())
                say(f"{state}: {times}")
    return rows


def training(options, until):
    rows = timed([(8192, options.rounds, 20)], "training_step", options, until)
    table(rows, ("flash",))
    for row in rows:
        if "losses" in row:
            say(
                f"losses: {row['losses']['ours'][0]:.4f} to {row['losses']['ours'][-1]:.4f}, "
                f"largest difference {row['largest difference of the losses']:.2e}"
            )
    return rows


PARTS = {
    "correctness": correctness,
    "forward": grid("forward"),
    "backward": grid("backward"),
    "features": costs,
    "decode": decode,
    "host": host,
    "first": first,
    "training": training,
}


def main():
    options = parse()
    os.environ["FLASH_ATTN_CHECKED_BACKEND"] = options.backend
    # For what has no time to choose: a process that times its first call.
    os.environ["FLASH_ATTENTION_USE_FLAGGEMS"] = str(options.backend == "flaggems").upper()
    pool.stop_on_signals()
    began = time.monotonic()
    until = began + options.seconds if options.seconds else None
    versions = {name: version for name, version in machine.versions().items() if version}
    facts = {
        "command": shlex.join(["python", *sys.argv]),
        "date": datetime.date.today().isoformat(),
        "device": torch.cuda.get_device_name(),
        "versions": versions,
        "driver": getattr(torch.cuda, "driver_version", None),
    }
    say(f"# {facts['device']}")
    say(f"- `{facts['command']}`, {facts['date']}, {options.rounds} alternating rounds")
    say("- " + ", ".join(f"{name} {version}" for name, version in versions.items()))
    results = {}
    for name in options.part:
        say(f"\n## {name}\n")
        start = time.monotonic()
        results[name] = PARTS[name](options, until)
        say(f"({'stopped after ' * pool.stopped()}{time.monotonic() - start:.0f} s)")
        if options.output is not None:
            options.output.parent.mkdir(parents=True, exist_ok=True)
            options.output.with_suffix(".md").write_text("\n".join(LINES) + "\n")
            text = json.dumps(facts | results, indent=1, default=str)
            options.output.with_suffix(".json").write_text(text + "\n")
            rows = [
                row | {"ratio": row["ratios"]["flash"]}
                for part in results.values()
                for row in part
                if "flash" in row.get("ratios", ())
            ]
            plot.save(rows, facts, "torch's flash backend", options.output.with_suffix(".png"))
    return 1 if any("error" in row for rows in results.values() for row in rows) else 0


if __name__ == "__main__":
    sys.exit(main())
