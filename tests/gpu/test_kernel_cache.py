"""Compiled kernels on the disk: cold, shared by processes, damaged, and no place for them."""

import contextlib
import os
import subprocess
import sys

import pytest

SCRIPT = """
import sys, time, torch, flash_attn
torch.manual_seed(0)
q, k, v = torch.randn(3, 1, 100, 2, 64, device="cuda").to(torch.float16).unbind(0)
q.requires_grad_()
out = flash_attn.flash_attn_func(q, k, v, causal=True, deterministic=True)
dq, = torch.autograd.grad(out, q, torch.ones_like(out))
print(out.double().sum().item().hex(), dq.double().sum().item().hex())
"""


def start(cache, **environment):
    return subprocess.Popen(
        [sys.executable, "-c", SCRIPT],
        env=os.environ
        | {
            "FLASH_ATTENTION_USE_FLAGGEMS": "FALSE",
            "FLASH_ATTN_PLUS_CACHE_DIR": str(cache),
            "OMP_NUM_THREADS": "1",
        }
        | environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


def finish(process):
    output, error = process.communicate(timeout=120)
    assert process.returncode == 0, error[-2000:]
    assert len(output.split()) == 2
    return output


def run(cache, **environment):
    return finish(start(cache, **environment))


def kernels(cache):
    return {file.name: file.read_bytes() for file in cache.iterdir()}


def write(cache, files):
    for name, data in files.items():
        (cache / name).write_bytes(data)


@pytest.fixture(scope="session")
def filled(tmp_path_factory):
    """The files of a cache, and what the calls print."""
    directory = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        directory = directory.parent  # the workers share what the first one has made
    done = directory / "filled"
    if not done.exists():
        mine = tmp_path_factory.mktemp("filling")
        (mine / "kernels").mkdir()
        (mine / "printed").write_text(run(mine / "kernels"))
        with contextlib.suppress(OSError):  # another one was faster
            mine.rename(done)
    return kernels(done / "kernels"), (done / "printed").read_text()


def test_a_second_process_compiles_nothing(tmp_path, filled):
    files, expected = filled
    write(tmp_path, files)
    before = {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()}
    assert before
    assert run(tmp_path) == expected
    assert {file: file.stat().st_mtime_ns for file in tmp_path.iterdir()} == before


def test_sixteen_processes_on_a_cold_cache(tmp_path, filled):
    files, expected = filled
    processes = [start(tmp_path) for _ in range(16)]
    assert {finish(process) for process in processes} == {expected}
    assert set(kernels(tmp_path)) == set(files), "a half-written file is left"


DAMAGES = {
    "empty": lambda data: b"",
    "truncated": lambda data: data[: len(data) // 2],
    "longer": lambda data: data + b"x",
    "a bit flipped": lambda data: data[:-100] + bytes([data[-100] ^ 1]) + data[-99:],
    "a bit flipped in the head": lambda data: bytes([data[0] ^ 1]) + data[1:],
    "something else": lambda data: b"\x00" * len(data),
}


@pytest.mark.parametrize("damage", DAMAGES.values(), ids=DAMAGES.keys())
def test_damaged_files_are_compiled_again(tmp_path, filled, damage):
    files, expected = filled
    damaged = {name: damage(data) for name, data in files.items()}
    write(tmp_path, damaged)
    assert run(tmp_path) == expected
    replaced = kernels(tmp_path)
    assert set(replaced) == set(files)
    assert all(replaced[name] != data for name, data in damaged.items())


def test_directories_in_the_place_of_files(tmp_path, filled):
    files, expected = filled
    for name in files:
        (tmp_path / name).mkdir()
    assert run(tmp_path) == expected


def test_a_directory_that_cannot_be_made(tmp_path, filled):
    (tmp_path / "file").touch()
    assert run(tmp_path / "file" / "cache") == filled[1]


def test_nothing_names_a_directory(filled):
    assert run("", XDG_CACHE_HOME="", HOME="/dev/null") == filled[1]


def test_a_read_only_cache_serves(tmp_path, filled):
    files, expected = filled
    write(tmp_path, files)
    tmp_path.chmod(0o500)
    try:
        assert run(tmp_path) == expected
    finally:
        tmp_path.chmod(0o700)


def test_a_full_disk(filled):
    """Writes to /dev/full fail as on a full disk; the directory's files cannot even be made."""
    assert run("/dev/full") == filled[1]
