"""Which tiles of the CUDA decode kernel are fastest on this GPU?

Each variant is timed in alternation with torch's flash and cuDNN backends.

  python benchmarks/tune_decode.py --cases 0 2 --variants 0,0,0,0,0 4,16,3,2,0 4,16,5,1,16

A variant is streams,step_keys,stages,min_blocks,num_splits, 0 leaving a number to the planner.
Every variant is checked against float64 first. Calls are replayed as CUDA graphs over as many
caches as fill the L2 several times. A row shows GB/s of keys and values read, and the median ratio
to the faster peer.
"""

import argparse
import os
import pathlib
import sys

import torch
import torch.nn.functional as F
from torch.nn.attention import sdpa_kernel

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parents[1]))

import gpu_timing

from flash_attn import flash_attn_with_kvcache

VARIABLE = "FLASH_ATTN_PLUS_DECODE_TILES"
CASES = (  # batch, heads, key heads, head dimension, keys
    (1, 32, 8, 128, 8 << 10),
    (1, 32, 8, 128, 64 << 10),
    (16, 32, 8, 128, 8 << 10),
    (64, 32, 8, 128, 8 << 10),
    (1, 32, 32, 128, 64 << 10),
    (16, 64, 8, 128, 32 << 10),
    (16, 32, 8, 64, 8 << 10),
    (16, 32, 8, 256, 8 << 10),
)
VARIANTS = (
    *("0,0,0,0,0", "4,16,3,2,0", "4,16,6,1,0", "8,16,3,1,0", "2,16,6,2,0", "4,32,3,1,0"),
    *("4,16,2,3,0", "2,16,4,3,0", "2,32,3,2,0", "4,16,5,2,0"),
)
SPLITS = {0: (8, 16, 24, 48, 64), 1: (16, 32, 48, 64), 2: (1, 2, 4), 3: (1, 2), 4: (4, 8, 16)}


def inputs(case):
    batch, heads, heads_k, head_dim, keys = case
    shape = (batch, keys, heads_k, head_dim)
    q = torch.randn(batch, 1, heads, head_dim, device="cuda", dtype=torch.bfloat16)
    return q, *torch.randn(2, *shape, device="cuda", dtype=torch.bfloat16)


def check(item):
    os.environ[VARIABLE], head_dim = item
    torch.manual_seed(0)
    q, k, v = inputs((2, 8, 2, head_dim, 3001))
    out = flash_attn_with_kvcache(q, k, v).double()
    q, k, v = (x.double().transpose(1, 2) for x in (q, k, v))
    k, v = k.repeat_interleave(4, 1), v.repeat_interleave(4, 1)
    expected = torch.softmax(q @ k.mT * head_dim**-0.5, -1) @ v
    error = (out - expected.transpose(1, 2)).abs().max().item()
    return None if error < 1e-3 else f"error {error}"


def compare(case, variants, rounds, seconds, page_size):
    batch, heads, heads_k, head_dim, keys = case
    num_bytes = 4 * batch * keys * heads_k * head_dim
    made = [inputs(case) for _ in range(max(1, -(-(400 << 20) // num_bytes)))]
    transposed = [[x.transpose(1, 2).contiguous() for x in each] for each in made]

    def peer(backend):
        def call():
            with sdpa_kernel(backend):
                for q, k, v in transposed:
                    F.scaled_dot_product_attention(q, k, v, enable_gqa=heads != heads_k)

        return call

    def ours():
        for q, k, v in made:
            flash_attn_with_kvcache(q, k, v)

    def paged():
        for q, k, v in made:
            k, v = (x.view(-1, page_size, heads_k, head_dim) for x in (k, v))
            flash_attn_with_kvcache(q, k, v, block_table=table, cache_seqlens=lengths)

    sides = {name: peer(backend) for name, backend in gpu_timing.PEERS.items()}
    sides |= {x: gpu_timing.variant(VARIABLE, x, ours) for x in variants}
    if page_size:
        pages = batch * keys // page_size
        table = torch.randperm(pages, device="cuda").view(batch, -1).to(torch.int32)
        lengths = torch.full((batch,), keys, dtype=torch.int32, device="cuda")
        sides |= {f"{x} paged": gpu_timing.variant(VARIABLE, x, paged) for x in variants}
    replays, failures = {}, {}
    for name, side in sides.items():
        try:
            replays[name], _ = gpu_timing.graphed(side, 1)
        except RuntimeError as error:
            failures[name] = str(error).partition("\n")[0]
    samples, more = gpu_timing.alternate(replays, rounds, seconds)
    gpu_timing.print_variants(
        *(case, "GB/s", len(made) * num_bytes / 1e9, samples, failures | more, gpu_timing.PEERS)
    )


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--cases", type=int, nargs="+", default=range(6), help="numbers of CASES")
    parser.add_argument("--variants", nargs="+", default=VARIANTS)
    parser.add_argument("--splits", action="store_true", help="other numbers of splits as well")
    parser.add_argument("--page-size", type=int, default=0, help="time pages of this size as well")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--sample-seconds", type=float, default=0.005)
    args = parser.parse_args()
    os.environ[VARIABLE] = ""
    gpu_timing.setup()
    work = {}
    for number in args.cases:
        splits = SPLITS.get(number, ()) if args.splits else ()
        work[number] = [*args.variants, *(f"0,0,0,0,{n}" for n in splits)]
    usable = gpu_timing.usable(
        check, [(x, CASES[number][3]) for number, variants in work.items() for x in variants]
    )
    for number, variants in work.items():
        case = CASES[number]
        right = [x for x in variants if (x, case[3]) in usable]
        with torch.no_grad():
            compare(case, right, args.rounds, args.sample_seconds, args.page_size)


if __name__ == "__main__":
    main()
