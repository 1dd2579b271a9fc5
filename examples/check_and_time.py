"""One attention at a real size on the best device: checked against float64, timed beside torch.

Causal attention, forward and backward, of 8 heads over 2048 tokens at head dimension 64. The check
computes two heads once more in float64 by the formula itself. The times are medians of alternating
rounds against torch's scaled_dot_product_attention on the same device.
"""

import argparse

import torch
import torch.nn.functional as F

from flash_attn import flash_attn_func
from flash_attn.cli import machine, timing

SEQLEN, HEADS, HEAD_DIM = 2048, 8, 64


def exact(q, k, v, dout):
    """Output and gradients of one head, (s, d) each, by the formula in float64."""
    q, k, v = (t.double().requires_grad_() for t in (q, k, v))
    hidden = torch.ones(SEQLEN, SEQLEN, dtype=torch.bool).triu(1)
    scores = (q @ k.T * HEAD_DIM**-0.5).masked_fill(hidden, -torch.inf)
    out = scores.softmax(dim=-1) @ v
    return [out.detach(), *torch.autograd.grad(out, (q, k, v), dout.double())]


def largest_errors(inputs, dout, results):
    """Relative error of out, dq, dk and dv, the larger of the first and the last head."""
    errors = [0.0] * len(results)
    for head in (0, HEADS - 1):
        expected = exact(*(t.detach()[0, :, head].cpu() for t in (*inputs, dout)))
        for i, (result, want) in enumerate(zip(results, expected, strict=True)):
            error = (result[0, :, head].cpu().double() - want).norm() / want.norm()
            errors[i] = max(errors[i], error.item())
    return errors


def backward(out, inputs, dout):
    """A function that runs the backward pass alone."""
    return lambda: torch.autograd.grad(out, inputs, dout, retain_graph=True)


def check_and_time(dtype, device):
    """Errors of (out, dq, dk, dv), and the timings of forward and backward."""
    torch.manual_seed(0)
    shape = (1, SEQLEN, HEADS, HEAD_DIM)
    inputs = [torch.randn(shape, device=device, dtype=dtype).requires_grad_() for _ in "qkv"]
    dout = torch.randn(shape, device=device, dtype=dtype)
    peer_inputs = [t.detach().transpose(1, 2).contiguous().requires_grad_() for t in inputs]

    def ours():
        return flash_attn_func(*inputs, causal=True)

    def peer():
        return F.scaled_dot_product_attention(*peer_inputs, is_causal=True)

    out, peer_out = ours(), peer()
    ours_backward = backward(out, inputs, dout)
    peer_backward = backward(peer_out, peer_inputs, dout.transpose(1, 2).contiguous())
    errors = largest_errors(inputs, dout, [out.detach(), *ours_backward()])
    with torch.no_grad():
        forward_times = timing.compare(ours, peer, device)
    return errors, forward_times, timing.compare(ours_backward, peer_backward, device)


def main():
    best = machine.accelerator() or torch.device("cpu")
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", type=torch.device, default=best)
    device = parser.parse_args().device

    name = {d.type: name for d, name in machine.devices()}[device.type]
    print(f"{name}: causal attention, {HEADS} heads, {SEQLEN} tokens, head dimension {HEAD_DIM}\n")
    print("          relative error against float64        milliseconds (torch's)")
    print("          out      dq       dk       dv         forward            backward")
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        if dtype == torch.float32 and device.type != "cpu":
            continue
        errors, *timings = check_and_time(dtype, device)
        shown = "  ".join(f"{error:.1e}" for error in errors)
        times = "   ".join(
            f"{1e3 * t.ours_seconds:7.2f} ({1e3 * t.peer_seconds:.2f})".ljust(16) for t in timings
        )
        print(f"{str(dtype)[6:]:9} {shown}  {times}", flush=True)
        # Rounding the results to 16 bits is half a unit at most; float32 adds up 2048 products.
        units = 16 if dtype == torch.float32 else 1
        if not max(errors) < units * torch.finfo(dtype).eps:
            raise SystemExit(f"FAILED: the error in {dtype} is too large")
    print("\nEvery result agrees with float64.")


if __name__ == "__main__":
    main()
