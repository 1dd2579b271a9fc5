"""Which tiles of the CUDA backward kernel are fastest on this GPU?

Each variant is checked against float64 on a small shape, then timed in alternation with torch's
flash backend (both without their forward passes and without autograd), in TFLOP/s of visible
entries; a row ends with how many times faster than that it is. Hidden size 2048, 16,384 tokens in
all.

  python benchmarks/tune_backward.py
  python benchmarks/tune_backward.py --head-dim 128 --tiles 64,64,4,2,1,2 64,128,8,2,2,1
  python benchmarks/tune_backward.py --head-dim 64 --tiles "" --deterministic

Tiles are tile_m,tile_n,num_warps,q_stages,do_stages,min_blocks; "" is what the planner takes.
"""

import argparse
import functools
import math
import os
import pathlib
import sys

import torch

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import gpu_timing

from flash_attn.flash_attn_interface import _flash_attn_backward

VARIABLE = "FLASH_ATTN_PLUS_BACKWARD_TILES"
VARIANTS = {
    64: ("64,64,4,2,1,3", "64,128,8,2,2,1", "128,128,8,2,2,1", "128,64,4,1,1,2"),
    96: ("64,64,4,2,2,2", "64,128,8,2,2,1"),
    128: ("64,128,8,2,2,1", "64,64,4,2,1,2", "64,128,8,2,1,1"),
    192: ("64,64,8,2,2,1", "64,64,8,2,1,1"),
    256: ("64,64,8,2,1,1", "64,64,8,2,2,1"),
}


class Problem:
    """One shape, with what the forward pass left for the backward pass."""

    def __init__(self, batch, heads, seqlen, head_dim, causal, dtype):
        shape = (batch, seqlen, heads, head_dim)
        self.causal, self.scale = causal, head_dim**-0.5
        self.q, self.k, self.v, self.dout = torch.randn(4, *shape, dtype=dtype, device="cuda")
        self.gradients = [torch.empty_like(self.q) for _ in range(3)]
        self.peer = [x.transpose(1, 2) for x in (self.q, self.k, self.v)]
        out, lse, *rest = torch.ops.aten._scaled_dot_product_flash_attention(
            *self.peer, 0.0, causal, False, scale=self.scale
        )
        self.out, self.lse, self.rest = out.transpose(1, 2), lse, rest
        self.flops = 10 * batch * heads * seqlen**2 * head_dim / (2 if causal else 1)

    def ours(self, deterministic=False):
        _flash_attn_backward(
            *(self.dout, self.q, self.k, self.v, self.out, self.lse, *self.gradients),
            *(0.0, self.scale, self.causal, -1, -1, 0.0, None, deterministic, None),
        )
        return self.gradients

    def flash(self):
        cu_q, cu_k, max_q, max_k, seed, offset, *_ = self.rest
        return torch.ops.aten._scaled_dot_product_flash_attention_backward(
            *(self.dout.transpose(1, 2), *self.peer, self.out.transpose(1, 2), self.lse),
            *(cu_q, cu_k, max_q, max_k, 0.0, self.causal, seed, offset),
            scale=self.scale,
        )

    def float64(self):
        tensors = [x.double().requires_grad_() for x in self.peer]
        scores = self.scale * tensors[0] @ tensors[1].mT
        if self.causal:
            hidden = torch.ones_like(scores[0, 0], dtype=torch.bool).triu(1)
            scores = scores.masked_fill(hidden, -math.inf)
        out = scores.softmax(-1) @ tensors[2]
        return torch.autograd.grad(out, tensors, self.dout.transpose(1, 2).double())


def check(item):
    tiles, head_dim, dtype, deterministic = item
    os.environ[VARIABLE] = tiles
    worst = 0.0  # largest error of a gradient, in units of the peer's
    for causal in (False, True):
        torch.manual_seed(0)
        problem = Problem(2, 3, 333, head_dim, causal, getattr(torch, dtype))
        exact, peer = problem.float64(), problem.flash()
        for x in problem.gradients:
            x.fill_(math.nan)
        for a, b, c in zip(problem.ours(deterministic), peer, exact, strict=True):
            error = (a.transpose(1, 2) - c).abs().max() / (b - c).abs().max()
            worst = max(worst, math.inf if error.isnan() else error.item())
    return None if worst <= 3 else f"{worst:.1f} times the peer's error"


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[1024, 4096])
    parser.add_argument("--tiles", nargs="+", help="instead of the built-in list")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-seconds", type=float, default=0.01)
    parser.add_argument("--dtype", default="bfloat16", choices=("bfloat16", "float16"))
    parser.add_argument("--deterministic", action="store_true")
    args = parser.parse_args()
    os.environ[VARIABLE] = ""
    gpu_timing.setup()
    kind = (args.dtype, args.deterministic)
    work = [
        (tiles, head_dim, *kind)
        for head_dim in args.head_dim
        for tiles in args.tiles or ["", *VARIANTS[head_dim]]
    ]
    usable = gpu_timing.usable(check, work)
    for head_dim in args.head_dim:
        variants = [item[0] for item in work if item[1] == head_dim and item in usable]
        for seqlen in args.seqlen:
            for causal in (False, True):
                shape = (16384 // seqlen, 2048 // head_dim, seqlen, head_dim)
                problem = Problem(*shape, causal, getattr(torch, args.dtype))
                ours = functools.partial(problem.ours, args.deterministic)
                sides = {"flash": problem.flash}
                sides |= {x: gpu_timing.variant(VARIABLE, x, ours) for x in variants}
                samples, failures = gpu_timing.alternate(sides, args.rounds, args.sample_seconds)
                case = f"d={head_dim} s={seqlen}{' causal' if causal else ''}"
                flops = problem.flops / 1e12
                gpu_timing.print_variants(case, "TFLOP/s", flops, samples, failures, ["flash"])


if __name__ == "__main__":
    main()
