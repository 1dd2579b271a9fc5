"""Which tiles of the CUDA forward kernel are fastest on this GPU?

Each variant is checked against float64 on a small shape, then timed in alternation with torch's
flash backend, in TFLOP/s of visible entries; a row ends with how many times faster than that it is.
Hidden size 2048, 16,384 tokens in all.

  python benchmarks/tune_forward.py --head-dim 128 --seqlen 512 4096

Tiles are tile_m,tile_n,num_warps,stages,min_blocks,q_in_registers; "" is what the planner takes.
"""

import argparse
import math
import os
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import gpu_timing

from flash_attn import flash_attn_func

VARIABLE = "FLASH_ATTN_PLUS_FORWARD_TILES"
VARIANTS = {
    64: ("128,64,4,1,2,1", "128,64,4,1,2,0", "128,64,4,1,3,0", "128,32,4,2,3,0"),
    96: ("128,64,4,2,2,0", "128,64,4,1,2,0"),
    128: ("128,64,4,2,2,0", "128,64,4,1,2,0", "128,32,4,2,2,0"),
    192: ("64,64,4,1,2,0", "128,64,8,1,1,0"),
    256: ("64,64,4,1,2,0", "128,64,8,1,1,0"),
}


def flash(q, k, v, causal):
    with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
        out = F.scaled_dot_product_attention(
            *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
        )
    return out.transpose(1, 2)


def check(item):
    tiles, head_dim, causal = item
    os.environ[VARIABLE] = tiles
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 2, 333, 2, head_dim, device="cuda", dtype=torch.bfloat16)
    out = flash_attn_func(q, k, v, causal=causal).double()
    scores = torch.einsum("bihd,bjhd->bhij", q.double(), k.double()) / math.sqrt(head_dim)
    if causal:
        scores += torch.full_like(scores[0, 0], -math.inf).triu(1)
    exact = torch.einsum("bhij,bjhd->bihd", scores.softmax(-1), v.double())
    errors = [(x - exact).abs().max().item() for x in (out, flash(q, k, v, causal))]
    return None if errors[0] <= 3 * errors[1] else f"error {errors[0]}, the peer's {errors[1]}"


def compare(head_dim, seqlen, causal, variants, rounds, sample_seconds):
    batch, heads = 16384 // seqlen, max(1, 2048 // head_dim)
    shape = (batch, seqlen, heads, head_dim)
    q, k, v = torch.randn(3, *shape, device="cuda", dtype=torch.bfloat16)
    sides = {"flash": lambda: flash(q, k, v, causal)}
    for tiles in variants:
        sides[tiles] = gpu_timing.variant(
            VARIABLE, tiles, lambda: flash_attn_func(q, k, v, causal=causal)
        )
    with torch.no_grad():
        samples, failures = gpu_timing.alternate(sides, rounds, sample_seconds)
    flops = 4 * batch * heads * seqlen**2 * head_dim * (0.5 if causal else 1)
    case = f"d={head_dim} s={seqlen}{' causal' if causal else ''}"
    gpu_timing.print_variants(case, "TFLOP/s", flops / 1e12, samples, failures, ["flash"])


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--tiles", nargs="+", help="instead of the built-in list")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-seconds", type=float, default=0.01)
    args = parser.parse_args()
    os.environ[VARIABLE] = ""
    gpu_timing.setup()
    work = [
        (tiles, head_dim, causal)
        for head_dim in args.head_dim
        for tiles in args.tiles or ["", *VARIANTS[head_dim]]
        for causal in (False, True)
    ]
    usable = gpu_timing.usable(check, work)
    for head_dim in args.head_dim:
        for seqlen in args.seqlen:
            for causal in (False, True):
                variants = [item[0] for item in work if item[1:] == (head_dim, causal)]
                variants = [x for x in variants if (x, head_dim, causal) in usable]
                compare(head_dim, seqlen, causal, variants, args.rounds, args.sample_seconds)


if __name__ == "__main__":
    main()
