"""Times tile shapes of the sm80 forward kernel beside torch's flash backend, in alternation.

  python benchmarks/tune_forward.py --head-dim 128 --seqlen 512 4096

A shape is tile_m,tile_n,num_warps,stages,min_blocks,q_in_registers,warps_n; --shapes tries others
than the listed ones. The table shows the median ratio to torch's flash backend, and the largest
difference to it.
"""

import argparse
import concurrent.futures
import multiprocessing
import os
import statistics

VARIABLE = "FLASH_ATTN_PLUS_FORWARD_TILES"
SHAPES = {
    64: ("128,64,4,1,2,1,1", "128,64,4,1,2,0,1", "128,64,4,1,3,0,1", "128,32,4,2,3,0,1"),
    96: ("128,64,4,2,2,0,1", "128,64,4,1,2,0,1"),
    128: ("128,64,4,2,2,0,1", "128,64,4,1,2,0,1", "128,32,4,2,2,0,1"),
    192: ("128,64,8,1,1,0,2", "64,64,4,1,2,0,2", "64,64,4,1,2,0,1"),
    256: ("128,64,8,1,1,0,2", "64,64,4,1,2,0,1", "128,64,8,1,1,0,1"),
}


def warm(item):
    """Compiles a shape; returns why it cannot be used, if so."""
    import torch

    from flash_attn import flash_attn_func

    os.environ[VARIABLE], head_dim, causal = item
    q = torch.randn(1, 256, 2, head_dim, device="cuda", dtype=torch.bfloat16)
    try:
        flash_attn_func(q, q, q, causal=causal)
        torch.cuda.synchronize()
    except RuntimeError as error:
        return str(error)[:100]


def milliseconds(function, repeats):
    import torch

    start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    start.record()
    for _ in range(repeats):
        function()
    end.record()
    end.synchronize()
    return start.elapsed_time(end) / repeats


def compare(head_dim, seqlen, causal, shapes, rounds):
    import torch
    import torch.nn.functional as F
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from flash_attn import flash_attn_func

    batch, heads = 16384 // seqlen, max(1, 2048 // head_dim)
    q, k, v = torch.randn(
        3, batch, seqlen, heads, head_dim, device="cuda", dtype=torch.bfloat16
    ).unbind()
    flops = 4 * batch * heads * seqlen**2 * head_dim * (0.5 if causal else 1)
    repeats = max(3, int(5e12 / flops))

    def ours():
        return flash_attn_func(q, k, v, causal=causal)

    def flash():
        with sdpa_kernel(SDPBackend.FLASH_ATTENTION):
            return F.scaled_dot_product_attention(
                *(x.transpose(1, 2) for x in (q, k, v)), is_causal=causal
            )

    expected = flash().transpose(1, 2).float()
    for shape in shapes:
        os.environ[VARIABLE] = shape
        error = (ours().float() - expected).abs().max().item()
        times = [[milliseconds(f, repeats) for f in (ours, flash)] for _ in range(rounds)]
        rate = flops / statistics.median(a for a, _ in times) / 1e9
        ratio = statistics.median(b / a for a, b in times)
        case = f"d={head_dim} s={seqlen}{' causal' if causal else ''}"
        print(f"{case:20} {shape:22} {rate:4.0f} TFLOP/s  x flash {ratio:.3f}  error {error:.0e}")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--head-dim", type=int, nargs="+", default=[64, 128, 256])
    parser.add_argument("--seqlen", type=int, nargs="+", default=[512, 4096])
    parser.add_argument("--shapes", nargs="+")
    parser.add_argument("--rounds", type=int, default=5)
    args = parser.parse_args()
    os.environ[VARIABLE] = ""
    work = [
        (shape, head_dim, causal)
        for head_dim in args.head_dim
        for shape in args.shapes or SHAPES[head_dim]
        for causal in (False, True)
    ]
    spawn = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), mp_context=spawn) as pool:
        reasons = dict(zip(work, pool.map(warm, work), strict=True))
    for item, reason in reasons.items():
        if reason:
            print(*item, "cannot be used:", reason)
    for head_dim in args.head_dim:
        for seqlen in args.seqlen:
            for causal in (False, True):
                shapes = args.shapes or SHAPES[head_dim]
                usable = [shape for shape in shapes if not reasons[shape, head_dim, causal]]
                compare(head_dim, seqlen, causal, usable, args.rounds)


if __name__ == "__main__":
    main()
