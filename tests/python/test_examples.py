"""The programs and the code that the documentation shows run as they are."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.cpu

ROOT = Path(__file__).parents[2]


def run(*command):
    result = subprocess.run(
        [sys.executable, *map(str, command)], capture_output=True, text=True, timeout=300
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result.stdout


@pytest.mark.parametrize("readme", ["README.md", "README_zh.md"])
def test_example_of_the_readme(readme, tmp_path):
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / readme).read_text("utf-8"), re.DOTALL)
    program = tmp_path / "example.py"
    program.write_text(code, "utf-8")
    assert "torch.Size([2, 1024, 8, 64])" in run(program)


def test_arrays_of_numpy():
    text = run(ROOT / "examples" / "array_libraries.py", "--numpy")
    assert text.count("numpy") == 4 and "every other key, causal=True" in text


def test_language_model_trains_as_with_torchs_attention_and_writes():
    model = ROOT / "examples" / "language_model.py"
    text = run(model, "--compare", "--steps", "3", "--batch", "1", "--target", "9")
    assert text.count("3/3") == 2
    assert "Written through flash_attn_with_kvcache" in text
    assert "    def __init__(self, " in text
