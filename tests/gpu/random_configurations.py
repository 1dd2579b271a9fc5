"""Random configurations in bulk, against the float64 reference on the GPU.

The calls are those of the fuzz tests of the Python suite: dense, variable length, paged, cached,
any strides, every feature, forward and backward, on tensors that lie among sentinels and in memory
full of NaN. A few are invalid and must be refused without a trace. The numbers of dropout are
recomputed by the reference, so a mask that differs in one bit fails.

  python tests/gpu/random_configurations.py --configurations 10000
  python tests/gpu/random_configurations.py --kind backward --head-dim 64 128 --seed 7
"""

import argparse
import collections
import importlib
import os
import sys
import time
from pathlib import Path

HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

import pool  # noqa: E402

KINDS = {
    "forward": "test_fuzz_attention:check_forward_calls",
    "backward": "test_fuzz_attention:check_backward_calls",
    "cache": "test_fuzz_cache:check_cache_calls",
    "rotary": "test_fuzz_rotary:check_rotary_calls",
}
SHARES = {"forward": 4, "backward": 3, "cache": 2, "rotary": 1}
CALLS = 20  # of one piece of work


def setup():
    import torch

    torch.set_default_device("cuda")
    torch.set_num_threads(1)
    importlib.import_module("fuzz").BROKEN = 0.1


def run(item):
    """The number of results that were compared."""
    kind, seed = item
    module, _, function = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), function)(seed, CALLS)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configurations", type=int, default=10_000)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--head-dim", nargs="+", help="default: all; each takes compiling")
    parser.add_argument("--seed", type=int, default=0, help="of the first piece of work")
    parser.add_argument("--workers", type=int, default=min(16, os.cpu_count() or 4))
    parser.add_argument("--limit", type=float, default=120, help="seconds of a piece of work")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long")
    options = parser.parse_args()
    if options.head_dim:
        os.environ["FLASH_ATTN_TEST_HEAD_DIMS"] = ",".join(options.head_dim)

    total = sum(SHARES[kind] for kind in options.kind)
    # A tenth is changed to be invalid, and a few others have no result that could be compared.
    pieces = 1.35 * options.configurations / CALLS
    counts = {kind: round(pieces * SHARES[kind] / total) for kind in options.kind}
    items = [(kind, options.seed + i) for kind, count in counts.items() for i in range(count)]
    items.sort(key=lambda item: item[1])  # all kinds from the beginning
    began = time.monotonic()
    until = began + options.seconds if options.seconds else None
    compared, failures = collections.Counter(), collections.defaultdict(list)
    function, prepare = "random_configurations:run", "random_configurations:setup"
    for outcome in pool.run(items, function, prepare, options.workers, options.limit, until):
        kind, seed = outcome.item
        if outcome.error is None:
            compared[kind] += outcome.result
        else:
            failures[kind, outcome.reason[:120]].append((seed, outcome.error))
    seconds = time.monotonic() - began
    shown = ", ".join(f"{kind} {count}" for kind, count in compared.items())
    print(f"{sum(compared.values())} results compared in {seconds:.0f} s: {shown}")
    for (kind, reason), found in sorted(failures.items(), key=lambda pair: -len(pair[1]))[:30]:
        seeds = ", ".join(str(seed) for seed, _ in found[:6])
        print(f"- {kind}, {len(found)} pieces of {CALLS}: {reason} (seeds {seeds})")
    for (kind, _), found in list(failures.items())[:3]:
        print(f"\n{kind}, seed {found[0][0]}\n{found[0][1][-1800:]}")
    return 1 if failures or sum(compared.values()) < min(options.configurations, 1) else 0


if __name__ == "__main__":
    sys.exit(main())
