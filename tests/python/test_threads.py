"""Several Python threads at once, and processes that fork."""

import os
import signal
import subprocess
import sys
import threading

import pytest
import torch
from checks import BF16, FP32, Case, dtype_id

import flash_attn

pytestmark = pytest.mark.cpu


def work(seed, dtype=FP32):
    """A forward and a backward that need threads; returns all results."""
    generator = torch.Generator().manual_seed(seed)
    tensors = [
        torch.randn(2, 200 + 10 * seed, 4, 64, generator=generator).to(dtype).requires_grad_()
        for _ in range(3)
    ]
    out = flash_attn.flash_attn_func(*tensors, causal=True)
    return [out.detach(), *torch.autograd.grad(out, tensors, out.detach())]


@pytest.mark.parametrize("dtype", (FP32, BF16), ids=dtype_id)
def test_several_python_threads(dtype):
    """Different calls at the same time give what they give one after the other."""
    torch.set_num_threads(2)
    expected = [work(seed, dtype) for seed in range(6)]
    actual = [[] for _ in range(6)]
    errors = []
    start = threading.Barrier(6)

    def run(seed):
        try:
            start.wait()
            for _ in range(4):
                actual[seed].append(work(seed, dtype))
        except Exception as error:
            errors.append(error)

    threads = [threading.Thread(target=run, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not errors
    for seed in range(6):
        assert len(actual[seed]) == 4
        for results in actual[seed]:
            assert all(torch.equal(a, b) for a, b in zip(results, expected[seed], strict=True))


def test_errors_in_several_threads():
    """Each thread gets the message of its own call."""
    messages = {}

    def run(name, call):
        for _ in range(50):
            try:
                call()
            except RuntimeError as error:
                messages.setdefault(name, set()).add(str(error))

    q, k, v = Case().inputs()
    calls = {
        "dropout": lambda: flash_attn.flash_attn_func(q, k, v, 1.5),
        "heads": lambda: flash_attn.flash_attn_func(q, k[:, :, :3], v[:, :, :3]),
        "batch": lambda: flash_attn.flash_attn_func(q, k[:1], v[:1]),
    }
    threads = [threading.Thread(target=run, args=item) for item in calls.items()]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert {name: len(texts) for name, texts in messages.items()} == dict.fromkeys(calls, 1)
    for name, word in (("dropout", "dropout_p"), ("heads", "heads"), ("batch", "shape")):
        assert word in next(iter(messages[name]))


# In a forked child torch's own parallel operations (torch.equal is one) hang, since its OpenMP does
# not survive a fork: results are compared as bytes.
FORK = """
import os, sys, torch, flash_attn
torch.set_num_threads({threads})
torch.manual_seed(0)
x = torch.randn(2, 300, 4, 64)

def attention():
    return flash_attn.flash_attn_func(x, x, x, causal=True).numpy().tobytes()

before = attention()
pids = []
for _ in range(3):
    pid = os.fork()
    if pid == 0:
        torch.set_num_threads({child_threads})
        ok = all(attention() == before for _ in range(5))
        if {nested} and os.fork() == 0:
            os._exit(attention() != before)
        elif {nested}:
            ok = ok and os.waitstatus_to_exitcode(os.wait()[1]) == 0
        os._exit(not ok)
    pids.append(pid)
after = attention()
codes = [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]
assert codes == [0, 0, 0], codes
assert after == before
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
@pytest.mark.parametrize(
    "threads,child_threads,nested", ((2, 2, True), (1, 2, False), (3, 1, False))
)
def test_use_fork_and_use(threads, child_threads, nested):
    """The child makes threads of its own; the parent's go on."""
    code = FORK.format(threads=threads, child_threads=child_threads, nested=nested)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code], capture_output=True, text=True, timeout=120
    )
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr


FORK_WHILE_BUSY = """
import os, threading, torch, flash_attn
torch.set_num_threads(2)
x = torch.randn(2, 300, 4, 64)
expected = flash_attn.flash_attn_func(x, x, x).numpy().tobytes()
stop = threading.Event()

def busy():
    while not stop.is_set():
        flash_attn.flash_attn_func(x, x, x)

thread = threading.Thread(target=busy)
thread.start()
try:
    for _ in range(10):
        pid = os.fork()
        if pid == 0:
            os._exit(flash_attn.flash_attn_func(x, x, x).numpy().tobytes() != expected)
        assert os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) == 0
finally:
    stop.set()
    thread.join()
print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_fork_while_another_thread_is_in_a_call():
    result = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", FORK_WHILE_BUSY],
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr


LOADER = """
import torch, flash_attn
from torch.utils.data import DataLoader, Dataset

class Attention(Dataset):
    def __len__(self):
        return 6

    def __getitem__(self, i):
        x = torch.full((1, 40, 2, 32), float(i))
        return flash_attn.flash_attn_func(x, x, x)[0]

if __name__ == "__main__":
    x = torch.ones(1, 40, 2, 32)
    flash_attn.flash_attn_func(x, x, x)
    for context in ("fork", "spawn"):
        loader = DataLoader(Attention(), num_workers=2, multiprocessing_context=context)
        for i, out in enumerate(loader):
            assert (out - i).abs().max() < 1e-5
    print("done")
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")
def test_workers_of_a_data_loader(tmp_path):
    script = tmp_path / "loader.py"
    script.write_text(LOADER)
    result = subprocess.run(
        [sys.executable, "-W", "ignore", str(script)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([p for p in sys.path if p])},
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert result.returncode == 0 and result.stdout == "done\n", result.stderr


def test_process_ends_while_threads_wait():
    """The pool's threads do not keep the process from ending, nor crash it."""
    code = (
        "import torch, flash_attn; torch.set_num_threads(4); x = torch.randn(2, 300, 4, 64);"
        "flash_attn.flash_attn_func(x, x, x); print('done')"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=300)
    assert result.returncode == 0 and result.stdout == b"done\n" and not result.stderr


def test_interrupted_by_a_signal():
    """Signals that arrive during a call wait for it: the result is right."""
    calls = []
    previous = signal.signal(signal.SIGALRM, lambda *_: calls.append(1))
    try:
        expected = work(3)
        signal.setitimer(signal.ITIMER_REAL, 0.002, 0.002)
        for _ in range(10):
            assert all(torch.equal(a, b) for a, b in zip(work(3), expected, strict=True))
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, previous)
    assert calls
