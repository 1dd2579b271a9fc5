"""Compiles the CUDA kernels that the planners can choose, for every architecture, and compares what
they use with the limits beside their Specs. Needs NVRTC (nvidia-cuda-nvrtc) and no GPU.

The planners name the kernels: more than a thousand for each architecture, more than a check can
compile. So first come those that together hold every pair of values that two fields of a Spec (the
architecture is one more) have in any kernel at all, then the others, in an order that does not
change, until the time is up. What was compiled stays in the cache: the next run goes on from there.
"""

import argparse
import collections
import hashlib
import heapq
import itertools
import os
import sys
import time

from flash_attn.cli import machine
from flash_attn.cli.compile import compile_kernels, kernels_of

ARCHITECTURES = (80, 86, 87, 89, 90, 100, 103, 110, 120, 121)


def pairs(kernel):
    """The pairs of values that a kernel holds."""
    values = [("arch", kernel.arch), *sorted(kernel.fields().items())]
    return [(kernel.kind(), *pair) for pair in itertools.combinations(values, 2)]


def shuffled(kernels):
    """In an order that depends on nothing but the kernels."""
    return sorted(kernels, key=lambda k: hashlib.sha256(repr(k).encode()).digest())


def covering(kernels):
    """Few kernels that hold every pair of values: greedily, the one with most new ones first."""
    held = {kernel: set(pairs(kernel)) for kernel in kernels}
    queue = [(-len(new), index, kernel) for index, (kernel, new) in enumerate(held.items())]
    heapq.heapify(queue)
    missing = set().union(*held.values())
    chosen = []
    while missing:
        _, index, kernel = heapq.heappop(queue)
        gain = len(held[kernel] & missing)
        if queue and gain < -queue[0][0]:  # others may have more by now
            heapq.heappush(queue, (-gain, index, kernel))
            continue
        chosen.append(kernel)
        missing -= held[kernel]
    return chosen


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n\n")[0])
    parser.add_argument("--arch", nargs="+", type=int, default=ARCHITECTURES)
    parser.add_argument("--jobs", type=int, default=machine.cores())
    parser.add_argument("--minutes", type=float, default=10, help="time of a run")
    parser.add_argument("--most", type=float, default=14, help="minutes for the first set, at most")
    parser.add_argument(
        "--kind", nargs="+", help="only these kinds: forward, backward, decode, ..."
    )
    parser.add_argument("--cache", default="build/kernels", help="the cache directory")
    arguments = parser.parse_args()
    os.environ["FLASH_ATTN_PLUS_CACHE_DIR"] = arguments.cache

    kernels = shuffled(kernel for arch in arguments.arch for kernel in kernels_of(arch))
    if arguments.kind:
        kernels = [kernel for kernel in kernels if kernel.kind() in arguments.kind]
    first = covering(kernels)
    chosen = set(first)
    rest = [kernel for kernel in kernels if kernel not in chosen]
    print(f"{len(kernels)} kernels, {len(first)} of which hold every pair of values", flush=True)

    start, problems, seen = time.monotonic(), [], 0
    use = collections.defaultdict(lambda: [0, 0, 0.0, 0, 0])

    def results():
        yield from compile_kernels(first, arguments.jobs, 60 * arguments.most)
        left = start + 60 * arguments.minutes - time.monotonic()
        yield from compile_kernels(rest, arguments.jobs, left)

    for kernel, report, error in results():
        seen += 1
        chosen.discard(kernel)
        if error or report["excess"]:
            problem = f"sm_{kernel.arch} {kernel.spec}: {error or report['excess']}"
            problems.append(problem)
            print(problem, flush=True)
            continue
        total = use[kernel.kind()]
        total[0] += 1
        total[1] += report["from"] == "disk"
        total[2] += float(report["seconds"])
        total[3] = max(total[3], int(report["registers"]))
        total[4] = max(total[4], int(report["spill_bytes"]))

    print(f"{'kind':20}{'good':>6}{'cached':>8}{'seconds':>9}{'registers':>11}{'spills':>8}")
    for kind, (count, cached, seconds, registers, spills) in sorted(use.items()):
        print(f"{kind:20}{count:6}{cached:8}{seconds:9.0f}{registers:11}{spills:8}")
    print(f"{seen} of {len(kernels)} kernels, {len(problems)} with problems")
    if chosen:
        print(f"the time was up before {len(chosen)} that hold pairs of values")
    return 1 if problems or chosen else 0


if __name__ == "__main__":
    sys.exit(main())
