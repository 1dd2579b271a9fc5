"""Tests of the Triton kernels without a GPU.

    pytest tests/triton

Triton's interpreter runs every kernel on CPU tensors, which this directory hands to the FlagGems
backend: `flash_attn` as a whole is under test, but FlagGems, which the interpreter has no place
for. Interpreted products of bfloat16 are wrong (Triton 3.6), so the tests use float16 and float32.
`test_compilation.py` compiles the kernels for NVIDIA GPUs, which needs none.
"""

import contextlib
import os
import sys
from pathlib import Path

os.environ["TRITON_INTERPRET"] = "1"
HERE = Path(__file__).parent
sys.path[:0] = [str(HERE), str(HERE.parent / "python")]

import numpy  # noqa: E402
import pytest  # noqa: E402
import torch  # noqa: E402
import triton.runtime.interpreter  # noqa: E402

from flash_attn import backends  # noqa: E402
from flash_attn.backends import flaggems  # noqa: E402
from flash_attn.backends.flaggems import plan, plan_backward, runtime, tiles  # noqa: E402

torch.set_num_threads(1)
numpy.seterr(all="ignore")  # -inf and NaN are numbers like others here


class InterpretedRuntime:
    """What `runtime.Runtime` is with FlagGems."""

    vendor = "nvidia"  # whose requests all go to our kernels
    is_nvidia = True
    device_type = "cpu"

    def entry(self, kernel):
        return kernel

    def guard(self, device):
        return contextlib.nullcontext()

    def num_units(self, device):
        return 8

    def capability(self, device):
        return 0


def _with_scalar_bounds(patch):
    """Bounds of loops are arrays of one number in the interpreter; NumPy 2.4 takes none for int."""

    def patched(tensor, scope):
        patch(tensor, scope)
        scope.set_attr(tensor, "__index__", lambda self: int(self.handle.data.item()))

    return patched


@pytest.fixture(autouse=True, scope="session")
def _interpreted_backend():
    interpreter = triton.runtime.interpreter
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(
            interpreter, "_patch_lang_tensor", _with_scalar_bounds(interpreter._patch_lang_tensor)
        )
        patch.setattr(runtime, "_runtime", InterpretedRuntime())
        patch.setattr(backends, "native", flaggems)
        yield


@pytest.fixture(autouse=True)
def _seed_and_small_tiles(monkeypatch):
    """Tiles of which small shapes have several; plans of other tiles are forgotten."""
    torch.manual_seed(0)
    plan.plan_forward.cache_clear()
    plan_backward.plan_backward.cache_clear()
    few_rows = tiles.few_rows
    monkeypatch.setattr(tiles, "forward", lambda *_: tiles.Tile(32, 32, 4, 1))
    monkeypatch.setattr(tiles, "few_rows", lambda *x: few_rows(*x)._replace(block_n=32))
