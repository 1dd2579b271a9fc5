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


def setup():
    import torch

    torch.set_default_device("cuda")
    torch.set_num_threads(1)
    importlib.import_module("fuzz").BROKEN = 0.1


def run(item):
    """One call; the number of results that were compared.

    The FlagGems backend has kernels for long sequences, which see every second call.
    """
    kind, seed = item
    # Where that backend is not asked for there may be no Triton, which its plans import.
    if os.environ.get("FLASH_ATTENTION_USE_FLAGGEMS", "").upper() == "TRUE":
        from flash_attn.backends.flaggems import plan, plan_backward

        plan.LEAST_DESCRIBED_KEYS = plan_backward.LEAST_DESCRIBED_ROWS = (1, 512)[seed % 2]
        plan.plan_forward.cache_clear()
        plan_backward.plan_backward.cache_clear()
    module, _, function = KINDS[kind].partition(":")
    return getattr(importlib.import_module(module), function)(seed, 1)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--configurations", type=int, default=10_000)
    parser.add_argument("--kind", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--head-dim", nargs="+", help="default: all; each takes compiling")
    parser.add_argument("--seed", type=int, default=0, help="of the first call of a kind")
    parser.add_argument("--workers", type=int, default=pool.default_workers(16))
    parser.add_argument("--limit", type=float, default=120, help="seconds of a call")
    parser.add_argument("--seconds", type=float, help="begin nothing new after so long")
    options = parser.parse_args()
    if options.head_dim:
        os.environ["FLASH_ATTN_TEST_HEAD_DIMS"] = ",".join(options.head_dim)

    pool.stop_on_signals()
    total = sum(SHARES[kind] for kind in options.kind)
    # A tenth is changed to be invalid, and a few others have no result that could be compared.
    calls = 1.35 * options.configurations
    counts = {kind: round(calls * SHARES[kind] / total) for kind in options.kind}
    items = [(kind, options.seed + i) for kind, count in counts.items() for i in range(count)]
    # All kinds from the beginning, in proportion.
    items.sort(key=lambda item: (item[1] - options.seed) / counts[item[0]])
    began = time.monotonic()
    until = began + options.seconds if options.seconds else None
    compared, failures = collections.Counter(), collections.defaultdict(list)
    function, prepare = "random_configurations:run", "random_configurations:setup"
    outcomes = pool.run(items, function, prepare, options.workers, options.limit, until)
    for outcome in pool.watched(
        outcomes, len(items), lambda: f", {sum(compared.values())} results compared"
    ):
        kind, seed = outcome.item
        if outcome.error is None:
            compared[kind] += outcome.result
        else:
            failures[kind, outcome.reason[:120]].append(seed)
    seconds = time.monotonic() - began
    shown = ", ".join(f"{kind} {count}" for kind, count in compared.items())
    failed = sum(map(len, failures.values()))
    print(
        f"{sum(compared.values())} results compared in {seconds:.0f} s ({shown}), "
        f"{failed} calls failed"
    )
    for (kind, reason), seeds in sorted(failures.items(), key=lambda pair: -len(pair[1]))[:30]:
        print(f"- {len(seeds)} x {kind}: {reason} (seeds {', '.join(map(str, seeds[:6]))})")
    return 1 if failures or sum(compared.values()) < min(options.configurations, 1) else 0


if __name__ == "__main__":
    sys.exit(main())
