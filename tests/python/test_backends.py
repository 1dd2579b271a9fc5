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
from flash_attn.backends import backend_for, explain, native, set_backend, use_backend
from flash_attn.backends.interface import Backend

GPU = torch.device("cuda", 1)
NO_GPU = "this version has no GPU backend yet"


@pytest.fixture(autouse=True)
def _no_choice(monkeypatch):
    monkeypatch.setattr(backends, "_environment", None)
    yield
    set_backend(None)


def on(device):
    """A tensor as far as the choice is concerned: there may be no such device here."""
    return SimpleNamespace(is_cpu=False, device=torch.device(device))


def refused_with(error, device=GPU):
    with pytest.raises(error, match=NO_GPU) as raised:
        backend_for(on(device))
    assert raised.type is error
    assert str(device) in str(raised.value)
    assert explain(device).backend is None
    assert explain(device).reason in str(raised.value)
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


@pytest.mark.parametrize(
    "environment, choice, error, says",
    [
        (None, None, ImportError, "FLASH_ATTENTION_USE_FLAGGEMS not set"),
        ("flaggems", None, ImportError, "FLASH_ATTENTION_USE_FLAGGEMS=TRUE: asks for the FlagGems"),
        ("native", None, RuntimeError, "FLASH_ATTENTION_USE_FLAGGEMS=FALSE: asks for the native"),
        ("native", "flaggems", ImportError, "set_backend('flaggems')"),
        ("flaggems", "native", RuntimeError, "set_backend('native')"),
    ],
)
def test_accelerators_are_refused_with_the_reason(monkeypatch, environment, choice, error, says):
    monkeypatch.setattr(backends, "_environment", environment)
    set_backend(choice)
    assert says in refused_with(error)


@pytest.mark.parametrize("device", ["cuda", "cuda:3", "xpu", "mps", "npu"])
def test_every_accelerator_is_refused(device):
    try:
        device = torch.device(device)
    except RuntimeError:
        pytest.skip("this torch does not know the device")
    refused_with(ImportError, device)


def test_block_wins_over_process_and_ends():
    set_backend("flaggems")
    with use_backend("native"):
        assert "use_backend('native')" in refused_with(RuntimeError)
        with use_backend("flaggems"):
            refused_with(ImportError)
        refused_with(RuntimeError)
        with use_backend(None):
            assert "set_backend('flaggems')" in refused_with(ImportError)
    refused_with(ImportError)
    set_backend(None)
    assert "not set" in refused_with(ImportError)


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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU to refuse")
def test_a_gpu_tensor_is_refused():
    q = torch.randn(1, 3, 2, 64, dtype=torch.float16, device="cuda")
    with pytest.raises(ImportError, match=NO_GPU):
        flash_attn.flash_attn_func(q, q, q)
