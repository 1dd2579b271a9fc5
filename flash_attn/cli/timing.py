"""Timing two functions against each other, on any device."""

import dataclasses
import statistics
import time

import torch


def synchronize(device):
    """Waits for all work of the device; nothing to do on a CPU."""
    if device.type != "cpu":
        torch.get_device_module(device).synchronize(device)


def timed(function, calls, device):
    """Seconds of one of so many calls; on an accelerator between two events of its stream."""
    if device.type == "cpu":
        start = time.perf_counter()
        for _ in range(calls):
            function()
        return (time.perf_counter() - start) / calls
    module = torch.get_device_module(device)
    begin, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
    begin.record()
    for _ in range(calls):
        function()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / calls


def timed_on_host(function, calls, device):
    """Seconds until a call returns, whether or not the device has finished."""
    synchronize(device)
    start = time.perf_counter()
    for _ in range(calls):
        function()
    seconds = (time.perf_counter() - start) / calls
    synchronize(device)
    return seconds


def calls_for(function, device, timer, sample_seconds):
    """Warms up, and says how many calls one sample needs to last so many seconds."""
    function()  # which may compile, and says nothing of the others
    synchronize(device)
    calls, seconds = 1, timer(function, 1, device)
    while seconds * calls < sample_seconds and calls < 1_000_000:
        calls = min(10 * calls, max(calls + 1, round(1.1 * sample_seconds / max(seconds, 1e-9))))
        seconds = timer(function, calls, device)
    return calls


@dataclasses.dataclass
class Comparison:
    """Seconds of one call on either side, one entry a round."""

    ours: list[float]
    peer: list[float]

    @property
    def ratios(self):
        """How many times faster than the peer, by round: only times of one round are compared."""
        return [peer / ours for ours, peer in zip(self.ours, self.peer, strict=True)]

    @property
    def ratio(self):
        return statistics.median(self.ratios)

    @property
    def ours_seconds(self):
        return statistics.median(self.ours)

    @property
    def peer_seconds(self):
        return statistics.median(self.peer)


def compare(ours, peer, device, rounds=5, sample_seconds=0.1, timer=timed):
    """Times both in alternation (A B A B ...), after warming both up."""
    sides = (ours, peer)
    calls = [calls_for(side, device, timer, sample_seconds) for side in sides]
    samples = ([], [])
    for _ in range(rounds):
        for side, count, seconds in zip(sides, calls, samples, strict=True):
            seconds.append(timer(side, count, device))
    return Comparison(*samples)
