"""Work in several processes on all GPUs that are visible, each piece with a time limit.

A kernel that never ends, or a wild access that breaks the context of its process, costs that piece
of work and a new process; everything else goes on. A script that is told to stop still says what it
has found.
"""

import collections
import faulthandler
import importlib
import multiprocessing
import multiprocessing.connection
import os
import signal
import threading
import time
import traceback
from typing import NamedTuple

import torch

_stop = threading.Event()


def stop_on_signals():
    """SIGINT and SIGTERM no longer end the process, but `run`, and what asks `stopped()`."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: _stop.set())


def stopped():
    return _stop.is_set()


def default_workers(of_a_device):
    """A number of processes: so many for every GPU, but no more than there are CPU cores."""
    return min(of_a_device * max(1, torch.cuda.device_count()), os.cpu_count() or 4)


def device_environment(index):
    """For a process of its own: the variable that lets it see one GPU, in turn."""
    listed = os.environ.get("CUDA_VISIBLE_DEVICES")
    devices = listed.split(",") if listed else range(torch.cuda.device_count())
    return {"CUDA_VISIBLE_DEVICES": str(devices[index % len(devices)])} if devices else {}


class Outcome(NamedTuple):
    """What became of one piece of work: its result, or why there is none."""

    item: object
    result: object = None
    error: str | None = None  # the last line of the reason first, then all of it

    @property
    def reason(self):
        return None if self.error is None else self.error.splitlines()[0]


def _resolve(path):
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def _work(connection, index, setup, function):
    """The worker: answers (result, error, whether its context is still usable)."""
    for number in (signal.SIGINT, signal.SIGTERM):  # sent to the whole group; the parent decides
        signal.signal(number, signal.SIG_IGN)
    faulthandler.register(signal.SIGUSR1)
    try:
        if torch.cuda.device_count() > 1:
            torch.cuda.set_device(index % torch.cuda.device_count())
        if setup is not None:
            _resolve(setup)()
        function = _resolve(function)
        connection.send((None, None, True))
    except BaseException:
        connection.send((None, traceback.format_exc(), False))
        return
    while True:
        try:
            item = connection.recv()
        except EOFError:  # the parent is gone
            return
        try:
            connection.send((function(item), None, True))
        except Exception as error:
            lines = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__}: {lines[0]}\n{traceback.format_exc()}"
            # After most failures of a kernel nothing works in its process any more.
            usable = "CUDA" not in text
            connection.send((None, text, usable))
            if not usable:
                return


class _Worker:
    def __init__(self, context, index, setup, function, seconds):
        self.index = index
        self.connection, other = context.Pipe()
        self.process = context.Process(
            target=_work, args=(other, index, setup, function), daemon=True
        )
        self.process.start()
        other.close()
        self.item, self.starting, self.deadline = None, True, time.monotonic() + 120 + seconds

    def give(self, item, seconds):
        self.connection.send(item)
        self.item, self.deadline = item, time.monotonic() + seconds

    def say_where(self):
        """Has the process print where it is."""
        os.kill(self.process.pid, signal.SIGUSR1)
        time.sleep(0.2)

    def end(self):
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(items, function, setup=None, workers=4, seconds=40, until=None):
    """Yields an `Outcome` for each item, in the order in which they are done.

    Arguments:
        items: anything that can be pickled.
        function, setup: "module:name"; `setup` runs once in each process, `function` on each item.
            Processes are spread over the visible GPUs: there the current one is theirs.
        workers: number of processes.
        seconds: time limit of one item, compiling its kernels included.
        until: a time of `time.monotonic` after which no item is begun; the others are left out.
    """
    context = multiprocessing.get_context("spawn")
    waiting = collections.deque(items)
    pool = [
        _Worker(context, index, setup, function, seconds)
        for index in range(0 if stopped() else min(workers, len(waiting) or 1))
    ]
    began = time.monotonic()
    try:
        while pool and not stopped():
            now = time.monotonic()
            if until is not None and now > until:
                waiting.clear()
            ready = multiprocessing.connection.wait([w.connection for w in pool], timeout=0.2)
            for worker in list(pool):
                outcome, usable = None, True
                if worker.connection in ready:
                    try:
                        result, error, usable = worker.connection.recv()
                    except (EOFError, OSError):
                        worker.process.join(10)
                        result, usable = None, False
                        error = f"the process ended with status {worker.process.exitcode}"
                    if worker.starting and not usable:
                        raise RuntimeError(f"a worker could not start:\n{error}")
                    if worker.starting and not any(w.starting for w in pool if w is not worker):
                        print(f"({len(pool)} processes, {now - began:.0f} s)", flush=True)
                    if not worker.starting:
                        outcome = Outcome(worker.item, result, error)
                    worker.item, worker.starting = None, False
                elif time.monotonic() > worker.deadline:
                    worker.say_where()
                    outcome = Outcome(worker.item, None, f"no result within {seconds:.0f} s")
                    usable = False
                if outcome is not None:
                    yield outcome
                if not usable:
                    worker.end()
                    pool.remove(worker)
                    if waiting:
                        pool.append(_Worker(context, worker.index, setup, function, seconds))
                elif worker.item is None and not worker.starting:
                    if waiting:
                        worker.give(waiting.popleft(), seconds)
                    else:
                        worker.end()
                        pool.remove(worker)
    finally:
        for worker in pool:
            worker.process.kill()  # without waiting: what was found is to be said first


def watched(outcomes, total, status=lambda: "", every=10):
    """Passes outcomes on; prints each failure as it comes, and now and then how far it is.

    Arguments:
        total: the number of outcomes there will be.
        status: gives what else to say of the state.
        every: seconds between two lines about the state.
    """
    began = printed = time.monotonic()
    done, failed, reasons = 0, 0, set()
    for outcome in outcomes:
        done += 1
        if outcome.error is not None:
            failed += 1
            print(f"FAILED {outcome.item}: {outcome.reason[:200]}", flush=True)
            if outcome.reason not in reasons and len(reasons) < 3:
                print(outcome.error.partition("\n")[2][-1500:], flush=True)
            reasons.add(outcome.reason)
        yield outcome
        if (now := time.monotonic()) - printed > every:
            printed = now
            print(
                f"({done} of {total}, {failed} failed, {now - began:.0f} s{status()})", flush=True
            )
    if stopped():
        print(f"stopped after {done} of {total}", flush=True)
