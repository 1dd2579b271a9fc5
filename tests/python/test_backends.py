"""The choice of a backend: environment variable, process, block, and what is said when it fails."""

import os
import subprocess
import sys
import threading
from types import SimpleNamespace

import pytest
import torch

import flash_attn
from flash_attn import backends
from flash_attn.backends import backend_for, cuda, explain, native, set_backend, use_backend
from flash_attn.backends.interface import Backend

pytestmark = pytest.mark.cpu

GPU = torch.device("cuda", 1)


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.setattr(backends, "_environment", None)
    machine(monkeypatch)
    yield
    set_backend(None)


def machine(monkeypatch, capability=(9, 0), modules=()):
    """Pretends that there are GPUs of this compute capability, and that these modules can load."""
    backends._accelerator_backend.cache_clear()
    backends._is_served.cache_clear()

    def get_device_capability(device):
        if capability is None:
            raise RuntimeError("Found no NVIDIA driver on your system")
        return capability

    monkeypatch.setattr(torch.version, "hip", None)
    monkeypatch.setattr(torch.cuda, "get_device_capability", get_device_capability)
    monkeypatch.setattr(backends, "_is_installed", lambda module: module in modules)


def on(device):
    """A tensor as far as the choice is concerned: there may be no such device here."""
    return SimpleNamespace(is_cpu=False, device=torch.device(device))


def refused_with(error, device=GPU):
    with pytest.raises(error) as raised:
        backend_for(on(device))
    assert raised.type is error
    choice = explain(device)
    assert choice.backend is None and not backends.serves(on(device))
    assert str(raised.value) == f"flash_attn: {choice.reason}."
    return str(raised.value)


@pytest.mark.parametrize("choice", [None, "native", "flaggems"])
def test_the_cpu_is_always_native(choice):
    with use_backend(choice):
        assert backend_for(torch.empty(0)) is native
        assert explain("cpu").backend == "native"
        q = torch.randn(1, 3, 2, 8)
        assert flash_attn.flash_attn_func(q, q, q).shape == q.shape


def test_native_has_the_functions_of_a_backend():
    for name in ("forward", "backward", "kvcache", "rotary"):
        assert callable(getattr(Backend, name)) and callable(getattr(native, name))


FLAGGEMS = ("flag_gems",)
INSTALL = "Install it with pip install 'flash-attn[flaggems]' and the Triton of your accelerator"
USE_NATIVE = "set FLASH_ATTENTION_USE_FLAGGEMS=FALSE to use the native kernels"


@pytest.mark.parametrize(
    "environment, installed", [("native", ()), ("native", FLAGGEMS), (None, ())]
)
def test_native_serves_nvidia_gpus(monkeypatch, environment, installed):
    machine(monkeypatch, (8, 0), installed)
    monkeypatch.setattr(backends, "_environment", environment)
    assert backend_for(on(GPU)) is native and backends.serves(on(GPU))
    assert explain(GPU).backend == "native"
    assert "native CUDA backend" in explain(GPU).reason


def test_flaggems_serves_where_it_is_installed(monkeypatch):
    adapter = SimpleNamespace()
    monkeypatch.setitem(sys.modules, "flash_attn.backends.flaggems", adapter)
    machine(monkeypatch, modules=FLAGGEMS)
    for environment in (None, "flaggems"):
        monkeypatch.setattr(backends, "_environment", environment)
        for device in (GPU, "xpu:0"):
            assert backend_for(on(device)) is adapter
            assert explain(device).backend == "flaggems"


def test_the_choice_without_a_wish_is_logged_once(monkeypatch, caplog):
    caplog.set_level("INFO", "flash_attn")
    for _ in range(3):
        backend_for(on(GPU))
    (record,) = caplog.records
    assert "tensors on cuda:1 are served by the native backend" in record.getMessage()
    assert "FLASH_ATTENTION_USE_FLAGGEMS not set, and FlagGems is not installed" in caplog.text


def test_flaggems_asked_for_and_not_installed(monkeypatch):
    monkeypatch.setattr(backends, "_environment", "flaggems")
    assert refused_with(ImportError) == (
        "flash_attn: FLASH_ATTENTION_USE_FLAGGEMS=TRUE needs FlagGems, but importing flag_gems "
        f"failed: No module named 'flag_gems'. {INSTALL}, or {USE_NATIVE}."
    )


@pytest.mark.parametrize(
    "capability, device, says",
    [
        ((7, 5), GPU, "it needs compute capability 8.0 (Ampere) or newer, and cuda:1 has 7.5"),
        (None, GPU, "torch cannot use cuda:1: Found no NVIDIA driver on your system"),
        ((9, 0), "xpu:2", "it serves NVIDIA GPUs, and xpu:2 is of type xpu"),
        ((9, 0), "mps", "it serves NVIDIA GPUs, and mps is of type mps"),
    ],
)
def test_native_refuses_other_devices(monkeypatch, capability, device, says):
    machine(monkeypatch, capability)
    with use_backend("native"):
        assert says in refused_with(RuntimeError, device)
    text = refused_with(ImportError, device)
    assert says in text and INSTALL in text


def test_native_refuses_amd_gpus(monkeypatch):
    monkeypatch.setattr(torch.version, "hip", "7.0")
    with use_backend("native"):
        assert "cuda:1 is of type AMD" in refused_with(RuntimeError)


def test_a_refusal_ends_with_its_cause(monkeypatch):
    machine(monkeypatch, None)
    refused_with(ImportError)
    machine(monkeypatch)
    assert backend_for(on(GPU)) is native


@pytest.mark.parametrize("environment", ["flaggems", "native", None])
def test_process_choice_wins_over_the_environment(monkeypatch, environment):
    monkeypatch.setattr(backends, "_environment", environment)
    set_backend("native")
    assert backend_for(on(GPU)) is native
    set_backend("flaggems")
    assert "set_backend('flaggems') needs FlagGems" in refused_with(ImportError)


def test_block_wins_over_process_and_ends():
    set_backend("flaggems")
    with use_backend("native"):
        assert backend_for(on(GPU)) is native
        with use_backend("flaggems"):
            assert "use_backend('flaggems')" in refused_with(ImportError)
        assert backend_for(on(GPU)) is native
        with use_backend(None):
            assert "set_backend('flaggems')" in refused_with(ImportError)
    refused_with(ImportError)
    set_backend(None)
    assert backend_for(on(GPU)) is native


@pytest.mark.parametrize("seen_by", ("autograd", "op"))
def test_gradients_follow_the_block_of_their_call(monkeypatch, seen_by):
    """Autograd computes those of a GPU in a thread of its own, where no block is."""
    seen, backward = [], native.backward

    def recorded(*arguments):
        seen.append(backends.requested()[0])
        return backward(*arguments)

    monkeypatch.setattr(native, "backward", recorded)
    q = torch.randn(1, 3, 2, 8, requires_grad=True)
    with use_backend("native"):
        if seen_by == "autograd":
            out = flash_attn.flash_attn_func(q, q, q)
        else:
            out = torch.ops.flash_attn._flash_attn_forward(
                *(q, q, q, 0.0, 1.0, False, -1, -1, 0.0, None, False)
            )[0]
    thread = threading.Thread(target=lambda: out.sum().backward())
    thread.start()
    thread.join()
    assert seen == ["native"]


def test_block_ends_with_an_exception():
    with pytest.raises(ZeroDivisionError), use_backend("native"):
        raise ZeroDivisionError
    assert backends.requested()[0] is None


def test_block_belongs_to_its_thread():
    seen = []
    with use_backend("native"):
        thread = threading.Thread(target=lambda: seen.append(backends.requested()[0]))
        thread.start()
        thread.join()
    assert seen == [None]


def test_process_choice_holds_in_every_thread():
    seen = []
    set_backend("native")
    thread = threading.Thread(target=lambda: seen.append(backends.requested()[0]))
    thread.start()
    thread.join()
    assert seen == ["native"]


@pytest.mark.parametrize("name", ["cuda", "", "Native", 1])
def test_unknown_backends(name):
    with pytest.raises(ValueError, match="'native', 'flaggems' or None"):
        set_backend(name)
    with pytest.raises(ValueError, match="'native', 'flaggems' or None"), use_backend(name):
        pass


@pytest.mark.parametrize(
    "value, expected",
    [
        (None, None),
        ("", None),
        ("TRUE", "flaggems"),
        ("true", "flaggems"),
        ("True", "flaggems"),
        ("FALSE", "native"),
        ("false", "native"),
    ],
)
def test_environment_variable(monkeypatch, value, expected):
    monkeypatch.delenv(backends.ENVIRONMENT_VARIABLE, raising=False)
    if value is not None:
        monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, value)
    assert backends._from_environment() == expected


@pytest.mark.parametrize("value", ["1", "yes", "native", "TRUE ", "FALS"])
def test_other_values_of_the_environment_variable(monkeypatch, value):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, value)
    with pytest.raises(ValueError, match="must be TRUE or FALSE") as raised:
        backends._from_environment()
    assert repr(value) in str(raised.value)


def test_a_wrong_environment_variable_fails_the_import():
    result = subprocess.run(
        [sys.executable, "-c", "import flash_attn"],
        env=os.environ | {backends.ENVIRONMENT_VARIABLE: "maybe"},
        capture_output=True,
        text=True,
    )
    assert result.returncode != 0
    assert "ValueError: FLASH_ATTENTION_USE_FLAGGEMS must be TRUE or FALSE" in result.stderr


def test_the_variable_is_read_at_import(monkeypatch):
    monkeypatch.setenv(backends.ENVIRONMENT_VARIABLE, "FALSE")
    assert backends.requested()[0] is None


@pytest.mark.parametrize("mode", ["eager", "op"])
def test_mixed_devices_are_an_error(mode):
    q, k = torch.randn(1, 3, 2, 8), torch.randn(1, 3, 2, 8, device="meta")
    if mode == "op":
        q, k = k, q
    with pytest.raises(RuntimeError, match="must be on the same device as"):
        flash_attn.flash_attn_func(q, k, k).sum().item()


def test_nvrtc_directories_begin_with_those_of_torch_s_cuda(monkeypatch, tmp_path):
    for layout, name in (("cu13", "libnvrtc.so.13"), ("cuda_nvrtc", "libnvrtc.so.12")):
        (tmp_path / layout / "lib").mkdir(parents=True)
        (tmp_path / layout / "lib" / name).touch()
    spec = SimpleNamespace(submodule_search_locations=[str(tmp_path)])
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: spec)
    for version, first in (("12.8", "cuda_nvrtc"), ("13.0", "cu13")):
        monkeypatch.setattr(torch.version, "cuda", version)
        directories = cuda.nvrtc_directories()
        assert directories[0] == tmp_path / first / "lib" and len(directories) == 3
    monkeypatch.setattr(cuda.importlib.util, "find_spec", lambda name: None)
    assert len(cuda.nvrtc_directories()) == 1
