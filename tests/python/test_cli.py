"""The commands of `python -m flash_attn`, and the harness of the benchmark without its clock."""

import itertools
import json

import pytest
import torch

from flash_attn.__main__ import main
from flash_attn.cli import cases, machine, plot, timing
from flash_attn.cli.cases import Case, Features, Inputs

pytestmark = pytest.mark.cpu

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def one_thread():
    """Small cases gain nothing from more, and lose much where tests run beside each other."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


def test_doctor_says_what_serves_the_cpu(capsys):
    assert main(["doctor"]) == 0
    text = capsys.readouterr().out
    assert "native" in text
    assert "works: largest error" in text
    assert machine.cpu_isa() in text


def test_doctor_reports_a_failure_and_still_succeeds(capsys, monkeypatch):
    def broken(*args, **kwargs):
        raise RuntimeError("broken on purpose")

    monkeypatch.setattr("flash_attn.flash_attn_func", broken)
    assert main(["doctor"]) == 0
    assert "FAILED: RuntimeError: broken on purpose" in capsys.readouterr().out


def test_doctor_names_the_state_of_the_cache(capsys, monkeypatch, tmp_path):
    monkeypatch.setenv("FLASH_ATTN_PLUS_CACHE_DIR", str(tmp_path / "none"))
    main(["doctor"])
    assert "not there yet" in capsys.readouterr().out
    (tmp_path / "kernel").write_bytes(b"0" * 2_000_000)
    monkeypatch.setenv("FLASH_ATTN_PLUS_CACHE_DIR", str(tmp_path))
    main(["doctor"])
    assert "1 files, 2.0 MB" in capsys.readouterr().out
    monkeypatch.delenv("FLASH_ATTN_PLUS_CACHE_DIR")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert machine.cache_directory() == tmp_path / "flash-attn-plus"


def test_bench_writes_table_samples_and_picture(capsys, tmp_path):
    prefix = tmp_path / "results" / "small"
    options = ["--device", "cpu", "--dtype", "float32", "--shape", "1,2,24,16", "--rounds", "5"]
    options += ["--sample-seconds", "0", "--kind", "forward", "backward", "decode", "host"]
    options += ["--features", "plain", "causal+window=8", "alibi+gqa=2", "softcap=5", "varlen"]
    assert main(["bench", *options, "--output", str(prefix)]) == 0
    table = prefix.with_suffix(".md").read_text()
    assert table.count("| forward | float32 | (1,2,24,16)") == 5
    assert "peer without softcap" in table
    assert "peer with a mask tensor" in table
    assert "| - |" not in table  # no case failed
    results = json.loads(prefix.with_suffix(".json").read_text())
    assert len(results["rows"]) == 4 * 5
    assert all(len(row["ours_seconds"]) == 5 for row in results["rows"])
    assert results["versions"]["torch"] == torch.__version__
    pytest.importorskip("matplotlib")
    assert prefix.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_bench_against_the_plain_kernel(capsys):
    options = ["--device", "cpu", "--dtype", "bfloat16", "--shape", "1,2,24,16", "--threads", "1"]
    options += ["--sample-seconds", "0", "--kind", "forward", "backward", "decode"]
    main(["bench", *options, "--features", "causal+dropout=0.5", "--against", "plain"])
    text = capsys.readouterr().out
    assert "plain kernel" in text
    assert "CPU threads: 1" in text


def test_bench_measures_memory(capsys):
    main(
        [
            "bench",
            "--device",
            "cpu",
            "--dtype",
            "float32",
            "--kind",
            "memory",
            "--shape",
            "1,1,256,32",
        ]
    )
    assert "MB" in capsys.readouterr().out


def test_bench_goes_on_after_a_refused_case(capsys):
    options = [
        "--device",
        "cpu",
        "--dtype",
        "float32",
        "--sample-seconds",
        "0",
        "--kind",
        "forward",
    ]
    main(["bench", *options, "--shape", "1,1,8,512", "1,1,8,16"])
    text = capsys.readouterr().out
    assert "only supports head dimension at most 256" in text
    assert "(1,1,8,16)" in text


@pytest.mark.parametrize(
    "option", [["--features", "colour"], ["--features", "window"], ["--shape", "1,2,3"]]
)
def test_bench_refuses_what_it_does_not_know(option, capsys):
    with pytest.raises(SystemExit):
        main(["bench", *option])
    assert "unknown feature" in capsys.readouterr().err or option[0] == "--shape"


def test_without_matplotlib_there_is_no_picture(monkeypatch, tmp_path):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert not plot.save([{"ratio": 1.0}], {}, "SDPA", tmp_path / "none.png")


@pytest.mark.parametrize(
    "features",
    ["", "causal", "window=5", "causal+window=3", "varlen+causal", "varlen+window=2"],
)
def test_visible_pairs_are_those_of_the_mask(features):
    case = Case("forward", 3, 1, 17, 8, "float32", Features.parse(features))
    f, total = case.features, 0
    for length in case.lengths():
        distance = torch.arange(length)[None, :] - torch.arange(length)[:, None]
        left = f.window if f.window >= 0 else length
        visible = (distance >= -left) & (distance <= (0 if f.causal else left))
        total += int(visible.sum())
    assert case.visible_pairs() == total


@pytest.mark.parametrize(
    "features", ["", "causal", "window=5", "causal+window=3", "alibi", "alibi+causal", "gqa=2"]
)
def test_both_sides_of_a_case_compute_the_same(features):
    case = Case("forward", 2, 4, 19, 16, "float32", Features.parse(features))
    inputs = Inputs(case, CPU)
    peer = inputs.peer_forward().transpose(1, 2)
    torch.testing.assert_close(inputs.forward(), peer, atol=1e-5, rtol=1e-5)


def test_features_are_read_back_as_written():
    text = "causal+window=256+gqa=4+deterministic"
    assert str(Features.parse(text)) == text
    assert str(Features.parse("plain")) == ""


def test_rounds_alternate_and_ratios_pair_times_of_one_round():
    order = []
    clock = iter([1.0, 1.0, 2.0, 6.0, 1.0, 4.0, 5.0, 5.0])  # two warm-ups, then three rounds

    def timer(function, calls, device):
        function()
        return next(clock)

    result = timing.compare(
        lambda: order.append("A"), lambda: order.append("B"), CPU, 3, 0.5, timer
    )
    assert "".join(order) == "AABB" + "ABABAB"  # each to warm up, and to say how long it takes
    assert result.ratios == [3.0, 4.0, 1.0]
    assert result.ratio == 3.0


def test_a_short_call_is_repeated_until_a_sample_is_long_enough():
    calls = timing.calls_for(lambda: None, CPU, lambda function, calls, device: 0.001, 0.1)
    assert 0.1 <= calls * 0.001 < 0.2


def test_a_first_call_that_compiles_does_not_count():
    costs = itertools.chain([3.0], itertools.repeat(0.001))
    clock = [0.0]

    def call():
        clock[0] += next(costs)

    def timer(function, calls, device):
        start = clock[0]
        for _ in range(calls):
            function()
        return (clock[0] - start) / calls

    calls = timing.calls_for(call, CPU, timer, 0.1)
    assert 0.1 <= calls * 0.001 < 0.2


def test_gradients_run_the_backward_pass_alone():
    case = Case("backward", 1, 2, 9, 8, "float32", Features.parse("causal"))
    inputs = Inputs(case, CPU, requires_grad=True)
    first, second = (cases.gradients(inputs.forward, inputs.tensors) for _ in range(2))
    assert [g.shape for g in first()] == [g.shape for g in second()]
