"""Compares the FlagGems backend on this machine's accelerator with the CPU backend, on the same
numbers: every feature, forward and backward, dropout masks included.

For bringing up a new accelerator; docs/flaggems.md says how.

  python examples/check_flaggems.py
  python examples/check_flaggems.py --only causal --head-dim 64 128
  python examples/check_flaggems.py --time
"""

import argparse
import sys
import time

import torch

import flash_attn

FEATURES = {
    "plain": {},
    "causal": {"causal": True},
    "window": {"window_size": (50, 20)},
    "softcap": {"softcap": 5.0, "causal": True},
    "alibi": {"alibi_slopes": torch.tensor([0.1, 0.2, 0.3, 0.4]), "causal": True},
    "sinks": {"s_aux": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    "dropout": {"dropout_p": 0.2, "causal": True},
}


def on(device, options):
    return {k: x.to(device) if isinstance(x, torch.Tensor) else x for k, x in options.items()}


def results(tensors, options, lengths, state):
    """Output, log-sum-exp and gradients, on the device of the tensors."""
    q, k, v = (x.detach().requires_grad_() for x in tensors)
    dropout_p = options.get("dropout_p", 0.0)
    common = (dropout_p, q.shape[-1] ** -0.5, options.get("causal", False))
    common += (*options.get("window_size", (-1, -1)), options.get("softcap", 0.0))
    common += (options.get("alibi_slopes"), False)
    keywords = {"s_aux": options.get("s_aux")}
    if dropout_p:
        keywords["rng_state"] = state.to(q.device)
    if lengths is None:
        call = torch.ops.flash_attn._flash_attn_forward
        out, lse, *_ = call(q, k, v, *common, **keywords)
    else:
        cu = torch.tensor([0, *lengths]).cumsum(0).to(q.device, torch.int32)
        call = torch.ops.flash_attn._flash_attn_varlen_forward
        out, lse, *_ = call(q, k, v, cu, cu, max(lengths), max(lengths), *common, **keywords)
    gradients = torch.autograd.grad(out, (q, k, v), torch.ones_like(out))
    return [x.detach().float().cpu() for x in (out, lse, *gradients)]


def check(device, feature, head_dim, dtype, lengths):
    """The largest error of each result, relative to its largest value."""
    torch.manual_seed(0)
    shape = (2, 200) if lengths is None else (sum(lengths),)
    tensors = [torch.randn(*shape, heads, head_dim).to(dtype) for heads in (4, 2, 2)]
    state = torch.tensor([1234, 5678])
    expected = results([x.float() for x in tensors], FEATURES[feature], lengths, state)
    tensors = [x.to(device) for x in tensors]
    actual = results(tensors, on(device, FEATURES[feature]), lengths, state)
    errors = {}
    for name, x, y in zip(("out", "lse", "dq", "dk", "dv"), actual, expected, strict=True):
        errors[name] = float((x - y).abs().max() / y.abs().max().clamp(min=1e-3))
    return errors


def check_cache(device, dtype):
    """Decode: new keys appended and rotated, pages, a length for each sequence."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(3, 1, heads, 64).to(dtype) for heads in (8, 2, 2))
    caches = torch.randn(2, 30, 16, 2, 64).to(dtype)
    table = torch.randperm(30).view(3, 10).int()
    lengths, angles = torch.tensor([5, 150, 77]).int(), torch.rand(160, 16)
    tables = angles.cos().to(dtype), angles.sin().to(dtype)
    made = []
    for where in ("cpu", device):
        moved = [x.to(where) for x in (q, *caches.clone(), k, v, *tables, lengths)]
        out = flash_attn.flash_attn_with_kvcache(*moved, block_table=table.to(where), causal=True)
        made.append([x.float().cpu() for x in (out, *moved[1:3])])
    return {
        name: float((x - y).abs().max())
        for name, x, y in zip(("out", "k_cache", "v_cache"), *made[::-1], strict=True)
    }


def timing(device, head_dims):
    """TFLOP/s of forward and backward."""
    module = torch.get_device_module(device)
    for head_dim in head_dims:
        for seqlen in (1024, 4096, 16384):
            shape = (16384 // seqlen, seqlen, 2048 // head_dim, head_dim)
            tensors = [
                torch.randn(shape, device=device, dtype=torch.float16, requires_grad=True)
                for _ in range(3)
            ]
            out = flash_attn.flash_attn_func(*tensors, causal=True)
            dout = torch.randn_like(out)
            calls = {
                "forward": lambda t=tensors: flash_attn.flash_attn_func(*t, causal=True),
                "backward": lambda o=out, t=tensors, d=dout: torch.autograd.grad(
                    o, t, d, retain_graph=True
                ),
            }
            flops = 2 * shape[0] * seqlen * seqlen * 2048
            for name, call in calls.items():
                call()
                module.synchronize()
                start = time.perf_counter()
                for _ in range(10):
                    call()
                module.synchronize()
                seconds = (time.perf_counter() - start) / 10
                work = flops * (2.5 if name == "backward" else 1.0)
                print(f"{shape} causal {name}: {work / seconds / 1e12:.1f} TFLOP/s", flush=True)


def main():
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--head-dim", nargs="+", type=int, default=[64, 128])
    parser.add_argument("--only", nargs="+", choices=FEATURES, default=list(FEATURES))
    parser.add_argument("--device", help="default: torch's current accelerator")
    parser.add_argument("--time", action="store_true", help="TFLOP/s instead of errors")
    options = parser.parse_args()
    device = options.device or torch.accelerator.current_accelerator()
    flash_attn.set_backend("flaggems")
    if options.time:
        timing(device, options.head_dim)
        return 0
    failures = 0

    def report(what, run):
        nonlocal failures
        try:
            errors = run()
        except Exception as error:
            failures += 1
            print(f"FAILED {what}: {type(error).__name__}: {str(error)[:300]}", flush=True)
            return
        wrong = not all(x < 0.03 for x in errors.values())
        failures += wrong
        shown = ", ".join(f"{name} {x:.1e}" for name, x in errors.items())
        print(f"{'WRONG ' if wrong else 'right '} {what}: {shown}", flush=True)

    for dtype in (torch.float16, torch.bfloat16):
        for head_dim in options.head_dim:
            for feature in options.only:
                for lengths in (None, (100, 1, 200)):
                    kind = "dense" if lengths is None else "varlen"
                    report(
                        f"{feature} {kind} d={head_dim} {dtype}",
                        lambda f=feature, d=head_dim, t=dtype, n=lengths: check(device, f, d, t, n),
                    )
        report(f"paged cache {dtype}", lambda t=dtype: check_cache(device, t))
    print("everything is right" if not failures else f"{failures} failed")
    return 1 if failures else 0


if __name__ == "__main__":
    sys.exit(main())
