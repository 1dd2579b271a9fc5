"""Which tiles of the Triton kernels are fastest on this GPU?

The table in flash_attn/backends/flaggems/tiles.py comes from here. Each variant is checked against
float64 on a small shape, then timed in alternation with torch's flash and cuDNN backends (backward:
without their forward passes and without autograd), in TFLOP/s of visible entries; a row ends with
how many times faster than the better of them it is. Hidden size 2048, 16,384 tokens in all. A
backward pass is timed whole: of its two large kernels one is varied, the other has its usual tile.

  python benchmarks/tune_triton.py
  python benchmarks/tune_triton.py --kernels dq --head-dim 128 --tiles 128,64,8,3 128,128,8,2

Tiles are block_m,block_n,num_warps,num_stages; of dkdv and dq with ",pointers" behind them (no
tensor descriptors), of all with ",hopper" (the kernels in Gluon, whose num_warps are of a group).
"" is what the tables say.
"""

import argparse
import contextlib
import functools
import math
import os
import pathlib
import sys
from unittest import mock

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))
os.environ["FLASH_ATTN_CHECKED_BACKEND"] = "flaggems"  # of processes that check variants, too

import gpu_timing
from tune_backward import Problem

import flash_attn
from flash_attn.backends.flaggems import attention, gradients, plan, plan_backward, tiles

VARIANTS = {
    "forward": {
        64: (
            *("128,128,8,3", "128,128,4,3", "128,64,4,3", "64,128,4,3", "64,64,4,3", "64,64,4,2"),
            *("128,128,4,2,hopper", "128,64,4,3,hopper", "128,128,4,3,hopper"),
        ),
        128: (
            *("128,128,8,2", "128,128,8,3", "128,64,8,3", "64,128,4,2"),
            *("128,128,4,2,hopper", "128,64,4,3,hopper"),
        ),
        256: (
            *("128,64,8,2", "128,32,8,3", "64,64,4,2"),
            *("128,64,4,2,hopper", "128,32,4,3,hopper"),
        ),
    },
    "dkdv": {
        64: (
            *("128,128,8,2", "64,128,8,3", "64,64,4,2", "64,64,4,3", "128,64,4,2", "128,64,4,3"),
            *("128,64,4,2,pointers", "64,64,4,3,pointers"),
            *("64,128,4,2,hopper", "64,128,4,3,hopper"),
        ),
        128: (
            *("64,128,8,2", "64,128,8,3", "32,128,8,3", "64,64,4,2", "64,64,4,3", "32,64,4,3"),
            *("64,64,4,2,pointers", "32,64,4,3,pointers", "64,128,4,2,hopper", "32,128,4,3,hopper"),
        ),
        256: ("64,64,8,2", "32,64,8,3", "128,64,8,1", "32,64,8,2,pointers", "64,64,4,2,hopper"),
    },
    "dq": {
        64: (
            *("128,128,8,3", "128,64,8,3", "128,64,4,3", "64,64,4,3", "128,64,4,3,pointers"),
            *("128,128,4,2,hopper", "128,64,4,3,hopper"),
        ),
        128: (
            *("128,64,8,3", "128,128,8,2", "64,64,4,2", "64,64,4,3", "128,64,8,3,pointers"),
            *("128,64,4,3,hopper", "128,128,4,2,hopper"),
        ),
        256: (
            *("64,64,8,2", "64,32,4,3", "128,32,8,2", "128,64,8,1", "64,32,8,3"),
            "64,64,4,2,hopper",
        ),
    },
}
FUNCTIONS = {"forward": "forward", "dkdv": "backward_dkdv", "dq": "backward_dq"}


@functools.cache
def planner(function, kernel, variant):
    """A planner with a memory of its own for a variant: it remembers tiles with its plans."""
    return functools.lru_cache(function.__wrapped__)


@contextlib.contextmanager
def chosen(kernel, variant, head_dim):
    """Calls within use the variant of the kernel."""
    if not variant:
        yield
        return
    words = variant.split(",")
    tile = tiles.Tile(*map(int, words[:4]))
    with contextlib.ExitStack() as stack:

        def replace(name, value):
            stack.enter_context(mock.patch.object(tiles, name, lambda *_: value))

        replace("has_gluon", "hopper" in words)
        if "hopper" not in words:
            replace(FUNCTIONS[kernel], tile)
        elif kernel == "forward":
            replace("forward_hopper", tile)
        else:  # the other of the two has its usual tile
            dkdv, dq = tiles.backward_hopper(head_dim)
            replace("backward_hopper", (tile, dq) if kernel == "dkdv" else (dkdv, tile))
        if kernel == "forward":
            plans = attention, "plan_forward", planner(plan.plan_forward, kernel, variant)
        else:
            plans = (
                *(gradients, "plan_backward"),
                planner(plan_backward.plan_backward, kernel, variant),
            )
        stack.enter_context(mock.patch.object(*plans))
        if "pointers" in words:
            replace("has_descriptors", False)
        yield


def variant_of(kernel, variant, head_dim, function):
    def call():
        with chosen(kernel, variant, head_dim):
            return function()

    return call


class Attention(Problem):
    """A problem of the backward kernels, with its forward pass too."""

    def ours_forward(self):
        with torch.no_grad():
            return flash_attn.flash_attn_func(self.q, self.k, self.v, causal=self.causal)

    def peer_forward(self):
        return F.scaled_dot_product_attention(*self.peer, is_causal=self.causal)

    def cudnn(self):
        """The backward pass of cuDNN, by autograd's node of its forward pass."""
        if not hasattr(self, "node"):
            tensors = [x.detach().requires_grad_() for x in self.peer]
            self.node = gpu_timing.with_backend(
                SDPBackend.CUDNN_ATTENTION,
                lambda: F.scaled_dot_product_attention(*tensors, is_causal=self.causal),
            )()
            self.leaves = tensors
        return torch.autograd.grad(
            self.node, self.leaves, self.dout.transpose(1, 2), retain_graph=True
        )

    def sides(self, kernel):
        """What is varied, and its peers by name."""
        if kernel != "forward":
            return self.ours, {"flash": self.flash, "cudnn": self.cudnn}
        return self.ours_forward, {
            name: gpu_timing.with_backend(backend, self.peer_forward)
            for name, backend in gpu_timing.PEERS.items()
        }


def check(item):
    kernel, variant, head_dim, dtype = item
    worst = 0.0  # largest error, in units of the peer's
    for causal in (False, True):
        torch.manual_seed(0)
        problem = Attention(2, 3, 700, head_dim, causal, getattr(torch, dtype))
        with chosen(kernel, variant, head_dim):
            if kernel == "forward":
                ours, peer = [problem.ours_forward()], [problem.peer_forward()]
                exact = [F.scaled_dot_product_attention(*_double(problem), is_causal=causal)]
            else:
                for x in problem.gradients:
                    x.fill_(math.nan)
                ours, peer, exact = problem.ours(), problem.flash(), problem.float64()
        for a, b, c in zip(ours, peer, exact, strict=True):
            error = (a.transpose(1, 2) - c).abs().max() / (b - c).abs().max()
            worst = max(worst, math.inf if error.isnan() else error.item())
    return None if worst <= 3 else f"{worst:.1f} times the peer's error"


def _double(problem):
    return [x.double() for x in problem.peer]


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kernels", nargs="+", default=list(VARIANTS), choices=VARIANTS)
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tiles", nargs="+", help="instead of the built-in list")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-seconds", type=float, default=0.01)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    args = parser.parse_args()
    gpu_timing.setup()
    work = [
        (kernel, variant, head_dim, args.dtype)
        for kernel in args.kernels
        for head_dim in args.head_dim
        for variant in args.tiles or ["", *VARIANTS[kernel][head_dim]]
    ]
    usable = gpu_timing.usable(check, work)
    for kernel in args.kernels:
        for head_dim in args.head_dim:
            variants = [x[1] for x in work if x[0] == kernel and x[2] == head_dim and x in usable]
            for seqlen in args.seqlen:
                for causal in (False, True):
                    shape = (16384 // seqlen, 2048 // head_dim, seqlen, head_dim)
                    problem = Attention(*shape, causal, getattr(torch, args.dtype))
                    ours, sides = problem.sides(kernel)
                    peers = list(sides)
                    sides |= {x: variant_of(kernel, x, head_dim, ours) for x in variants}
                    samples, failures = gpu_timing.alternate(
                        sides, args.rounds, args.sample_seconds
                    )
                    flops = problem.flops / 1e12 * (0.4 if kernel == "forward" else 1)
                    case = f"{kernel} d={head_dim} s={seqlen}{' causal' if causal else ''}"
                    gpu_timing.print_variants(case, "TFLOP/s", flops, samples, failures, peers)


if __name__ == "__main__":
    main()
