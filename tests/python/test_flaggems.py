"""The adapter to FlagGems: how it is loaded, what it says when it cannot be, and what goes where.

FlagGems needs an accelerator; a module that has what the adapter asks it for stands in. The kernels
are tested in tests/triton.
"""

import subprocess
import sys
import threading
import time
from types import ModuleType, SimpleNamespace

import pytest
import torch

from flash_attn import ConstraintError, use_backend
from flash_attn.__main__ import main
from flash_attn.backends import Options, Sequences, flaggems, native
from flash_attn.backends.flaggems import own_operator, policy, runtime
from flash_attn.backends.interface import Backend

pytestmark = pytest.mark.cpu


@pytest.fixture(autouse=True)
def _nothing_loaded(monkeypatch):
    monkeypatch.setattr(runtime, "_runtime", None)
    for name in list(sys.modules):
        if name.partition(".")[0] == "flag_gems":
            monkeypatch.delitem(sys.modules, name)


def operator(module):
    """A flash_attention_forward that lies in `module`, and keeps its arguments."""

    def flash_attention_forward(*arguments, **keywords):
        flash_attention_forward.calls.append((arguments, keywords))
        return torch.full_like(arguments[0], 7.0), None, None, None, None

    flash_attention_forward.__module__ = module
    flash_attention_forward.calls = []
    return flash_attention_forward


def install(monkeypatch, vendor="nvidia", device="cpu", own="flag_gems.ops.attention", **changes):
    """Puts a FlagGems into sys.modules, and returns it."""
    package = ModuleType("flag_gems")
    package.__version__ = "5.0.2"
    package.vendor_name, package.device = vendor, device
    package.flash_attention_forward = operator(own)
    package.__dict__.update(changes)
    devices = SimpleNamespace(
        current_device=lambda: None,
        get_device_properties=lambda device: SimpleNamespace(multi_processor_count=20),
        get_device_capability=lambda device: (9, 0),
    )
    monkeypatch.setitem(sys.modules, "flag_gems", package)
    for name, content in {
        "flag_gems.runtime": {"torch_device_fn": devices},
        "flag_gems.utils": {"libentry": lambda: lambda kernel: ("libentry", kernel)},
    }.items():
        module = ModuleType(name)
        module.__dict__.update(content)
        monkeypatch.setitem(sys.modules, name, module)
    return package


def broken_import(monkeypatch, error):
    class Finder:
        @staticmethod
        def find_spec(name, path=None, target=None):
            if name == "flag_gems":
                raise error

    monkeypatch.setattr(sys, "meta_path", [Finder, *sys.meta_path])


# -------------------------------------------------------------------------------------------------
# Loading


def test_the_backend_has_the_functions_of_one_and_loads_nothing():
    for name in ("forward", "plain_forward", "backward", "kvcache", "rotary"):
        assert callable(getattr(flaggems, name)) and callable(getattr(Backend, name))
    program = (
        "import sys, flash_attn.backends.flaggems, flash_attn.backends.flaggems.policy;"
        "print([name for name in ('triton', 'flag_gems') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert result.stdout.strip() == "[]", result.stderr


def test_a_missing_flaggems(monkeypatch):
    error = ModuleNotFoundError("No module named 'flag_gems'")
    broken_import(monkeypatch, error)
    with use_backend("flaggems"), pytest.raises(ImportError) as raised:
        runtime.current()
    assert str(raised.value) == (
        "flash_attn: flash_attn.use_backend('flaggems') needs FlagGems, but importing flag_gems "
        "failed: No module named 'flag_gems'. Install it with pip install 'flash-attn[flaggems]' "
        "and the Triton of your accelerator, or set FLASH_ATTENTION_USE_FLAGGEMS=FALSE to use the "
        "native kernels."
    )
    assert raised.value.__cause__ is error


def test_a_flaggems_that_does_not_start(monkeypatch):
    """Without an accelerator, with another Triton, interpreted: what FlagGems says is chained."""
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    monkeypatch.setenv("GEMS_VENDOR", "nobody")
    error = RuntimeError("0 active drivers ([]). There should only be one.")
    broken_import(monkeypatch, error)
    for _ in range(2):  # it is tried again
        with pytest.raises(RuntimeError) as raised:
            runtime.current()
        assert raised.value.__cause__ is error
        for text in ("importing flag_gems failed", "0 active drivers", "Triton is "):
            assert text in str(raised.value)
        assert "TRITON_INTERPRET=1" in str(raised.value) and "GEMS_VENDOR=nobody" in str(
            raised.value
        )


def test_a_flaggems_without_the_runtime_that_is_needed(monkeypatch):
    package = install(monkeypatch)
    del package.vendor_name
    with pytest.raises(RuntimeError, match=r"using the runtime of flag_gems 5\.0\.2 failed"):
        runtime.current()


def test_it_is_loaded_once(monkeypatch):
    install(monkeypatch)
    made = []
    plain = runtime.Runtime

    def counted(package):
        made.append(package)
        time.sleep(0.05)
        return plain(package)

    monkeypatch.setattr(runtime, "Runtime", counted)
    threads = [threading.Thread(target=runtime.current) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 1


def test_what_the_runtime_says_of_devices(monkeypatch):
    install(monkeypatch)
    where, device = runtime.current(), torch.device("cpu")
    assert where.num_units(device) == 20 and where.capability(device) == 90
    assert where.entry("kernel") == "kernel"
    assert "FlagGems 5.0.2" in where.describe() and "vendor nvidia" in where.describe()

    monkeypatch.setattr(runtime, "_runtime", None)
    install(monkeypatch, vendor="metax")
    where = runtime.current()
    assert where.capability(device) == 0
    assert where.entry("kernel") == ("libentry", "kernel")
    assert where.entry("kernel") is where.entry("kernel")


def test_tensors_on_another_kind_of_device(monkeypatch):
    install(monkeypatch, device="xpu")
    q = torch.zeros(1, 2, 2, 8)
    with pytest.raises(RuntimeError, match=r"devices of type xpu \(nvidia\) here, but .* on cpu"):
        flaggems.forward(q, q, q, Options(1.0))


# -------------------------------------------------------------------------------------------------
# Bad input: the words of the other backends


def test_bad_input_is_refused_in_the_words_of_the_native_backend(monkeypatch):
    install(monkeypatch)
    q, k = torch.zeros(1, 4, 4, 8), torch.zeros(1, 4, 3, 8)
    plain, cu = Options(1.0), torch.tensor([0, 4])
    wrong = [
        (ConstraintError, "forward", (q, k, k, plain)),
        (RuntimeError, "forward", (q, q.half(), q, plain)),
        (RuntimeError, "forward", (q[0], q, q, plain)),
        (RuntimeError, "forward", (q, q, q, Options(1.0, softcap=-1.0))),
        (RuntimeError, "forward", (q, q, q, Options(1.0, alibi_slopes=torch.zeros(3)))),
        (RuntimeError, "forward", (q[0], q[0], q[0], plain, Sequences(cu, cu, 4, 4))),
        (RuntimeError, "backward", (q, q, q, q, q, torch.zeros(1, 4, 3), q, q, q, plain)),
        (RuntimeError, "kvcache", (q, q, q, q, None, plain)),
        (RuntimeError, "kvcache", (q, q, q, q, q, plain)),
        (RuntimeError, "rotary", (q, torch.zeros(4, 8), torch.zeros(4, 8))),
        (RuntimeError, "rotary", (q, torch.zeros(3, 2), torch.zeros(3, 2))),
    ]
    for error, function, arguments in wrong:
        texts = []
        for backend in (native, flaggems):
            with pytest.raises(error) as raised:
                getattr(backend, function)(*arguments)
            texts.append(str(raised.value))
        assert texts[0] == texts[1]


# -------------------------------------------------------------------------------------------------
# What goes where

GOOD = policy.Request(
    vendor="metax",
    overridden=True,
    dense=True,
    inference=True,
    has_dropout=False,
    has_score_features=False,
    softmax_scale=0.125,
    causal=True,
    window_left=-1,
    window_right=0,
    seqlen_q=256,
    seqlen_k=300,
    head_dim=64,
    same_strides=True,
)
BREAKS = [
    {"vendor": "nvidia"},
    {"overridden": False},
    {"dense": False},
    {"inference": False},
    {"has_dropout": True},
    {"has_score_features": True},
    {"softmax_scale": 0.0},
    {"window_left": 8},
    {"seqlen_q": 200},
    {"seqlen_q": 384},
    {"same_strides": False},
    {"head_dim": 80},
]


def test_every_rule_keeps_what_breaks_it_from_the_operator():
    assert policy.broken_rule(GOOD) is None
    assert len(BREAKS) == len(policy.RULES)
    for rule, change in zip(policy.RULES, BREAKS, strict=True):
        assert policy.broken_rule(GOOD._replace(**change)) is rule, change


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False, "window_right": -1, "seqlen_q": 200},
        {"causal": False, "window_left": 5, "window_right": 3},
        {"seqlen_q": 77},
        {"causal": False, "window_right": -1, "seqlen_q": 500, "seqlen_k": 1},
    ],
)
def test_requests_that_go_to_the_operator(change):
    assert policy.broken_rule(GOOD._replace(**change)) is None


@pytest.mark.parametrize(
    "change",
    [
        {"causal": False, "window_left": 5, "window_right": -1},
        {"causal": False, "window_left": -1, "window_right": 5},
        {"causal": False, "window_right": -1, "seqlen_k": 0},
    ],
)
def test_requests_that_do_not(change):
    assert policy.broken_rule(GOOD._replace(**change)) is not None


def test_a_vendors_operator_serves_what_it_can(monkeypatch):
    package = install(monkeypatch, vendor="metax", own="_metax.ops.attention")
    q, k, v = (torch.randn(1, 128, 2, 64) for _ in range(3))
    out = flaggems.plain_forward(q, k, v, 0.5, True, -1, -1)
    assert torch.all(out == 7.0)
    ((arguments, keywords),) = package.flash_attention_forward.calls
    assert arguments[0] is q and arguments[8] is True
    assert keywords["scale"] == 0.5 and keywords["disable_splitkv"] is True
    assert keywords["window_size_left"] is None and keywords["window_size_right"] is None
    options = Options(0.5, False, 9, 4)
    flaggems.forward(q, k, v, options, return_lse=False)
    keywords = package.flash_attention_forward.calls[-1][1]
    assert (keywords["window_size_left"], keywords["window_size_right"]) == (9, 4)


@pytest.mark.parametrize("vendor, own", [("nvidia", "_nvidia.ops"), ("metax", "flag_gems.ops")])
def test_other_requests_are_ours(monkeypatch, vendor, own):
    install(monkeypatch, vendor=vendor, own=own)
    q = torch.randn(1, 128, 2, 64)
    assert not own_operator.serves(runtime.current(), q, q, q, Options(0.5), True, True)


def test_doctor_prints_the_table(capsys, monkeypatch):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    for rule in policy.RULES:
        assert rule.needs in text and rule.because in text
