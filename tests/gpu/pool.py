"""Work in several processes on one GPU, each piece with a time limit.

A kernel that never ends, or a wild access that breaks the context of its process, costs that piece
of work and a new process; everything else goes on.
"""

import collections
import importlib
import multiprocessing
import multiprocessing.connection
import time
import traceback
from typing import NamedTuple


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


def _work(connection, setup, function):
    """The worker: answers (result, error, whether its context is still usable)."""
    try:
        if setup is not None:
            _resolve(setup)()
        function = _resolve(function)
        connection.send((None, None, True))
    except BaseException:
        connection.send((None, traceback.format_exc(), False))
        return
    while True:
        item = connection.recv()
        if item is None:
            return
        try:
            connection.send((function(item), None, True))
        except BaseException as error:
            lines = str(error).strip().splitlines() or [""]
            text = f"{type(error).__name__}: {lines[0]}\n{traceback.format_exc()}"
            # After most failures of a kernel nothing works in its process any more.
            usable = "CUDA" not in text and not isinstance(error, KeyboardInterrupt)
            connection.send((None, text, usable))
            if not usable:
                return


class _Worker:
    def __init__(self, context, setup, function, seconds):
        self.connection, other = context.Pipe()
        self.process = context.Process(target=_work, args=(other, setup, function), daemon=True)
        self.process.start()
        other.close()
        self.item, self.starting, self.deadline = None, True, time.monotonic() + 120 + seconds

    def give(self, item, seconds):
        self.connection.send(item)
        self.item, self.deadline = item, time.monotonic() + seconds

    def end(self):
        self.process.kill()
        self.process.join()
        self.connection.close()


def run(items, function, setup=None, workers=4, seconds=40, until=None):
    """Yields an `Outcome` for each item, in the order in which they are done.

    Arguments:
        items: anything that can be pickled.
        function, setup: "module:name"; `setup` runs once in each process, `function` on each item.
        workers: number of processes.
        seconds: time limit of one item.
        until: a time of `time.monotonic` after which no item is begun; the others are left out.
    """
    context = multiprocessing.get_context("spawn")
    waiting = collections.deque(items)
    pool = [
        _Worker(context, setup, function, seconds) for _ in range(min(workers, len(waiting) or 1))
    ]
    try:
        while pool:
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
                        result, usable = None, False
                        error = f"the process ended with status {worker.process.exitcode}"
                    if worker.starting and not usable:
                        raise RuntimeError(f"a worker could not start:\n{error}")
                    if not worker.starting:
                        outcome = Outcome(worker.item, result, error)
                    worker.item, worker.starting = None, False
                elif time.monotonic() > worker.deadline:
                    outcome = Outcome(worker.item, None, f"no result within {seconds} s")
                    usable = False
                if outcome is not None:
                    yield outcome
                if not usable:
                    worker.end()
                    pool.remove(worker)
                    if waiting:
                        pool.append(_Worker(context, setup, function, seconds))
                elif worker.item is None and not worker.starting:
                    if waiting:
                        worker.give(waiting.popleft(), seconds)
                    else:
                        worker.end()
                        pool.remove(worker)
    finally:
        for worker in pool:
            worker.end()
