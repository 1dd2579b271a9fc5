"""Peak memory of a forward and backward pass, beyond what inputs and outputs need."""

import ctypes
import dataclasses
import gc
import pathlib

import torch

from flash_attn.cli import cases, timing


class _CpuPeak:
    """Peak resident memory of this process, by the counter that Linux lets a process reset."""

    def __enter__(self):
        # What is free but not given back would hide as much of the peak.
        gc.collect()
        if hasattr(libc := ctypes.CDLL(None), "malloc_trim"):
            libc.malloc_trim(0)
        try:
            pathlib.Path("/proc/self/clear_refs").write_text("5")
        except OSError as error:
            raise RuntimeError("peak memory of the CPU can be measured on Linux only") from error
        self.before = self._read("VmRSS")
        return self

    def __exit__(self, *exception):
        self.bytes = self._read("VmHWM") - self.before

    @staticmethod
    def _read(name):
        for line in pathlib.Path("/proc/self/status").read_text().splitlines():
            if line.startswith(name):
                return int(line.split()[1]) * 1024
        raise RuntimeError(f"the system does not report {name}")


class _AcceleratorPeak:
    """Peak of the tensors that torch allocated on an accelerator."""

    def __init__(self, device):
        self.device, self.module = device, torch.get_device_module(device)

    def __enter__(self):
        timing.synchronize(self.device)
        self.module.reset_peak_memory_stats(self.device)
        self.before = self.module.memory_allocated(self.device)
        return self

    def __exit__(self, *exception):
        timing.synchronize(self.device)
        self.bytes = self.module.max_memory_allocated(self.device) - self.before


def measure(case, device):
    """Megabytes that forward and backward allocate beyond out, dout and the three gradients."""
    # What a first call keeps for good (libraries, compiled code, thread stacks) is not its work's.
    warm = cases.Inputs(dataclasses.replace(case, seqlen=128), device, requires_grad=True)
    cases.gradients(warm.forward, warm.tensors)()
    cases.gradients(warm.peer_forward, warm.peer_tensors)()
    inputs = cases.Inputs(case, device, requires_grad=True)

    def extra(forward, tensors):
        with _CpuPeak() if device.type == "cpu" else _AcceleratorPeak(device) as peak:
            out = forward()
            gradients = torch.autograd.grad(out, tensors, torch.randn_like(out))
        results = [out, out, *gradients]  # out, dout
        return (peak.bytes - sum(t.numel() * t.itemsize for t in results)) / 1e6

    return {
        "unit": "MB",
        "ours": extra(inputs.forward, inputs.tensors),
        "peer": extra(inputs.peer_forward, inputs.peer_tensors),
        "note": "forward and backward, beyond out, dout and gradients",
    }
