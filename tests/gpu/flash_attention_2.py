"""FlashAttention-2's own test file, run against this package.

The file (tests/test_flash_attn.py of its repository, release 2.8.3) is not part of this one: give
its path. It has some hundreds of thousands of cases, of which a random sample is run, divided among
processes, each piece with a time limit. Failures are counted by test and reason; `docs/numerics.md`
explains those that stay.

  python tests/gpu/flash_attention_2.py PATH/test_flash_attn.py --cases 20000
"""

import argparse
import collections
import concurrent.futures
import json
import os
import random
import re
import subprocess
import sys
import tempfile
import time
from pathlib import Path

# Loaded into pytest by name. It keeps a sample of each test's cases before they become items, which
# would take minutes, and writes down what became of each.
PLUGIN = """
import json, os, random
import pytest

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

def pytest_runtest_logreport(report):
    if report.when == "call" or report.outcome != "passed":
        text = str(report.longrepr or "").strip().splitlines()
        errors = [line[1:].strip() for line in text if line.startswith("E ")]
        write([report.nodeid, report.outcome, (errors or text[-1:] or [""])[0][:300]])
"""


def run_piece(path, options, piece, directory, sample):
    """The rows that the plugin wrote, and what pytest said."""
    results = Path(directory, f"{piece}.jsonl")
    environment = os.environ | {
        "FA2_SEED": str(options.seed),
        "FA2_SAMPLE": json.dumps(sample),
        "FA2_PIECE": f"{piece}/{options.workers}",
        "FA2_RESULTS": str(results),
        "PYTHONPATH": os.pathsep.join([directory, os.environ.get("PYTHONPATH", "")]),
    }
    command = [sys.executable, "-m", "pytest", "-q"]
    command += ["--maxfail=1"] if options.first else []
    command += ["-p", "fa2_sample", "-p", "no:cacheprovider", "--rootdir", directory, "--tb=short"]
    command += [] if sample else ["--collect-only"]
    process = subprocess.Popen(
        [*command, str(path)],
        env=environment,
        cwd=directory,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    try:
        output, _ = process.communicate(timeout=options.seconds)
    except subprocess.TimeoutExpired:
        process.kill()
        output, _ = process.communicate()
        output += f"\nstopped after {options.seconds:.0f} s"
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines], output


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("path", type=Path, help="FlashAttention-2's tests/test_flash_attn.py")
    parser.add_argument("--cases", type=int, default=20_000, help="size of the random sample")
    parser.add_argument("--only", default="", help="of the tests whose name contains this")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=min(14, os.cpu_count() or 4))
    parser.add_argument("--seconds", type=float, default=540, help="limit of a process")
    parser.add_argument("--first", action="store_true", help="stop each process at a failure")
    parser.add_argument("--output", type=Path, help="write every result there, as JSON lines")
    options = parser.parse_args()
    path = options.path.resolve(strict=True)

    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "fa2_sample.py").write_text(PLUGIN)
        rows, output = run_piece(path, options, 0, directory, {})
    counts = {name: count for name, count in rows if options.only in name}
    total = sum(counts.values())
    if not total:
        print(output[-3000:])
        return 1
    share = min(1.0, options.cases / total)
    sample = {name: min(count, round(share * count) + 1) for name, count in counts.items()}
    print(f"{total} cases in {len(counts)} tests, {sum(sample.values())} of them run", flush=True)
    with tempfile.TemporaryDirectory() as directory:
        Path(directory, "fa2_sample.py").write_text(PLUGIN)
        with concurrent.futures.ThreadPoolExecutor(options.workers) as executor:
            pieces = list(
                executor.map(
                    lambda piece: run_piece(path, options, piece, directory, sample),
                    range(options.workers),
                )
            )
    results = [row for rows, _ in pieces for row in rows]
    if options.output:
        options.output.write_text("".join(json.dumps(row) + "\n" for row in results))
    counts = collections.Counter(outcome for _, outcome, _ in results)
    shown = ", ".join(f"{count} {outcome}" for outcome, count in counts.items())
    print(f"{len(results)} cases in {time.monotonic() - began:.0f} s: {shown}")
    if not results:
        print(pieces[0][1][-3000:])
        return 1

    groups = collections.defaultdict(list)
    for nodeid, outcome, reason in results:
        if outcome == "failed":
            test = nodeid.rpartition("::")[2].partition("[")[0]
            groups[test, re.sub(r"[-+]?\d+(\.\d+)?(e-?\d+)?", "N", reason)[:110]].append(nodeid)
    for (test, reason), nodeids in sorted(groups.items(), key=lambda pair: -len(pair[1]))[:40]:
        print(f"- {len(nodeids)} x {test}: {reason}")
        print("    " + random.Random(0).choice(nodeids).rpartition("::")[2])
    for rows, output in pieces:
        if not rows or "stopped after" in output:
            print("a process ended early: " + output.strip().splitlines()[-1][:200])
    return 1 if counts["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
