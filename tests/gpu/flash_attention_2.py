"""FlashAttention-2's own test file, run against this package.

The file (tests/test_flash_attn.py of its repository, release 2.8.3) is not part of this one: give
its path. It has some hundreds of thousands of cases, of which a random sample is run, divided among
processes over all visible GPUs. Failures are counted by test and reason; `docs/numerics.md`
explains those that stay.

  python tests/gpu/flash_attention_2.py PATH/test_flash_attn.py --cases 20000
"""

import argparse
import collections
import json
import math
import os
import random
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pool

# Loaded into pytest by name. It keeps a sample of each test's cases before they become items, which
# would take minutes, and writes down what became of each.
PLUGIN = """
import json, os, random
import pytest, torch

SAMPLE = json.loads(os.environ["FA2_SAMPLE"])  # cases to keep by test; none: only count them
PIECE, PIECES = map(int, os.environ["FA2_PIECE"].split("/"))

def write(row):
    with open(os.environ["FA2_RESULTS"], "a") as file:
        file.write(json.dumps(row) + "\\n")

@pytest.hookimpl(wrapper=True)
def pytest_generate_tests(metafunc):
    yield
    name, calls = metafunc.function.__name__, metafunc._calls
    if not SAMPLE:
        write([name, len(calls)])
        del calls[1:]
        return
    chosen = random.Random(os.environ["FA2_SEED"] + name).sample(calls, SAMPLE.get(name, 0))
    calls[:] = chosen[PIECE::PIECES]

def pytest_collection_modifyitems(items):
    items[:] = [item for item in items if hasattr(item, "callspec")]  # those with cases left

def pytest_runtest_teardown():
    torch.cuda.empty_cache()  # which other processes need

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        text = str(report.longrepr or "").strip().splitlines()
        errors = [line[1:].strip() for line in text if line.startswith("E ")]
        write([report.nodeid, report.outcome, (errors or text[-1:] or [""])[0][:300]])
"""


class Piece:
    """A process of pytest, and the rows that it has written so far."""

    def __init__(self, path, options, number, directory, sample):
        self.results = Path(directory, f"{number}.jsonl")
        self.log = Path(directory, f"{number}.log")
        self.rows, self.position, self.heard = [], 0, time.monotonic()
        environment = os.environ | {
            "FA2_SEED": str(options.seed),
            "FA2_SAMPLE": json.dumps(sample),
            "FA2_PIECE": f"{number}/{options.workers}",
            "FA2_RESULTS": str(self.results),
            "PYTHONPATH": os.pathsep.join([directory, os.environ.get("PYTHONPATH", "")]),
        }
        command = [sys.executable, "-m", "pytest", "-q"]
        command += ["--maxfail=1"] if options.first else []
        command += ["-p", "fa2_sample", "-p", "no:cacheprovider", "--rootdir", directory]
        command += ["--tb=short"] if sample else ["--collect-only"]
        with self.log.open("w") as log:
            self.process = subprocess.Popen(
                [*command, str(path)],
                env=environment | pool.device_environment(number),
                cwd=directory,
                stdout=log,
                stderr=subprocess.STDOUT,
                start_new_session=True,
            )

    def new_rows(self):
        """Those written since the last call, whole lines only."""
        if not self.results.exists():
            return []
        with self.results.open("rb") as file:
            file.seek(self.position)
            lines = file.read().rpartition(b"\n")[0].splitlines(keepends=True)
        if lines:
            self.position += sum(map(len, lines)) + (not lines[-1].endswith(b"\n"))
            self.heard = time.monotonic()
        rows = [json.loads(line) for line in lines]
        self.rows += rows
        return rows

    def last_line(self):
        lines = self.log.read_text(errors="replace").strip().splitlines()
        return lines[-1][:200] if lines else ""


def run_pieces(path, options, numbers, sample, began):
    """Yields (piece, its new rows), until all have ended, and what ended a piece early.

    A piece without a result for `options.limit` seconds is stuck; all end after `options.seconds`.
    """
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "fa2_sample.py").write_text(PLUGIN)
        running = [Piece(path, options, number, directory, sample) for number in numbers]
        try:
            while running:
                time.sleep(0.2)
                for piece in list(running):
                    ended = piece.process.poll() is not None
                    yield piece, piece.new_rows(), None
                    reason = None
                    if ended and piece.process.returncode not in (0, 1, 5):  # 5: no cases
                        reason = f"status {piece.process.returncode}: {piece.last_line()}"
                    elif not ended and time.monotonic() - piece.heard > options.limit:
                        reason = f"no result within {options.limit:.0f} s: {piece.last_line()}"
                    elif not ended and pool.stopped():
                        reason = "stopped"
                    elif not ended and time.monotonic() - began > options.seconds:
                        reason = f"stopped after {options.seconds:.0f} s"
                    if ended or reason:
                        running.remove(piece)
                        end(piece)
                        yield piece, piece.new_rows(), reason
        finally:
            for piece in running:
                end(piece)


def end(piece):
    if piece.process.poll() is None:
        os.killpg(piece.process.pid, signal.SIGKILL)
        piece.process.wait()


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="FlashAttention-2's tests/test_flash_attn.py")
    parser.add_argument("--cases", type=int, default=20_000, help="size of the random sample")
    parser.add_argument("--only", default="", help="of the tests whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=pool.default_workers(9))
    parser.add_argument("--limit", type=float, default=180, help="seconds without any result")
    parser.add_argument(
        "--seconds", type=float, default=math.inf, help="end everything after so long"
    )
    parser.add_argument("--first", action="store_true", help="stop each process at a failure")
    parser.add_argument("--output", type=Path, help="write every result there, as JSON lines")
    options = parser.parse_args()
    path = options.path.resolve(strict=True)
    pool.stop_on_signals()

    began = printed = time.monotonic()
    counts, why = {}, None
    for piece, rows, reason in run_pieces(path, options, [0], {}, began):
        counts |= {name: count for name, count in rows if options.only in name}
        why = reason or piece.last_line()
    total = sum(counts.values())
    if not total:
        print(f"no cases were found: {why}")
        return 1
    share = min(1.0, options.cases / total)
    sample = {name: min(count, round(share * count) + 1) for name, count in counts.items()}
    wanted = sum(sample.values())
    print(f"{total} cases in {len(counts)} tests, {wanted} of them run", flush=True)

    results, early = [], []
    counts = collections.Counter()

    def state():
        shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
        return f"{len(results)} of {wanted} cases in {time.monotonic() - began:.0f} s: {shown}"

    for _, rows, reason in run_pieces(path, options, range(options.workers), sample, began):
        for row in rows:
            nodeid, outcome, text = row
            results.append(row)
            counts[outcome] += 1
            if outcome == "failed":
                print(f"FAILED {nodeid.rpartition('::')[2]}: {text[:160]}", flush=True)
        if reason:
            early.append(reason)
            print(f"a process ended early: {reason}", flush=True)
        if time.monotonic() - printed > 10:
            printed = time.monotonic()
            print(f"({state()})", flush=True)
    print(state(), flush=True)
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in results))

    groups = collections.defaultdict(list)
    for nodeid, outcome, reason in results:
        if outcome == "failed":
            test = nodeid.rpartition("::")[2].partition("[")[0]
            groups[test, re.sub(r"[-+]?\d+(\.\d+)?(e-?\d+)?", "N", reason)[:110]].append(nodeid)
    for (test, reason), nodeids in sorted(groups.items(), key=lambda pair: -len(pair[1]))[:40]:
        print(f"- {len(nodeids)} x {test}: {reason}")
        print("    " + random.Random(0).choice(nodeids).rpartition("::")[2])
    return 1 if counts["failed"] or early or not results else 0


if __name__ == "__main__":
    sys.exit(main())
