"""What `import flash_attn` does, prints and needs, and what a damaged installation says."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

import flash_attn
from flash_attn import _core

pytestmark = pytest.mark.cpu

ROOT = Path(flash_attn.__file__).parent.parent


def python(code, **environment):
    paths = [str(ROOT), os.environ.get("PYTHONPATH", "")]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(paths)} | environment
    return subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True
    )


def test_import_prints_nothing_and_loads_nothing_heavy():
    result = python(
        "import torch, sys\n"
        "before = set(sys.modules)\n"
        "import flash_attn\n"
        "new = {name.split('.')[0] for name in set(sys.modules) - before}\n"
        "heavy = {'triton', 'einops', 'flag_gems', 'transformers', 'urllib3', 'requests'}\n"
        "assert not new & heavy, new & heavy\n"
        "assert not {m for m in set(sys.modules) - before if m.startswith('torch._dynamo')}\n"
        "assert not {m for m in set(sys.modules) - before if m.startswith('flash_attn.modules')}\n"
    )
    assert result.returncode == 0, result.stderr
    assert result.stdout == "" and result.stderr == ""


@pytest.mark.parametrize("first", ("flash_attn", "torch.utils.flop_counter"))
def test_operations_are_counted_whichever_module_comes_first(first):
    result = python(
        f"import {first}\n"
        "import sys, torch, flash_attn\n"
        "from torch.utils.flop_counter import FlopCounterMode\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "with FlopCounterMode(display=False) as counter:\n"
        "    flash_attn.flash_attn_func(q, q, q)\n"
        "assert counter.get_total_flops() == 4 * 2 * 4 * 4 * 8\n"
        "assert not any('deferred' in type(x).__module__ for x in sys.meta_path)\n"
    )
    assert result.returncode == 0, result.stderr


def test_first_backward_loads_nothing():
    """But torch itself loads sympy when it is given the gradient of the result."""
    result = python(
        "import torch, sys, flash_attn\n"
        "q, k, v = (torch.randn(1, 4, 2, 8, requires_grad=True) for _ in range(3))\n"
        "qkv = torch.randn(1, 4, 3, 2, 8, requires_grad=True)\n"
        "before = set(sys.modules)\n"
        "flash_attn.flash_attn_func(q, k, v, s_aux=torch.zeros(2)).sum().backward()\n"
        "flash_attn.flash_attn_qkvpacked_func(qkv, 0.5, causal=True).sum().backward()\n"
        "assert set(sys.modules) == before, set(sys.modules) - before\n"
    )
    assert result.returncode == 0, result.stderr


def test_import_works_without_einops_and_triton():
    result = python(
        "import sys\n"
        "for name in ('einops', 'triton', 'flag_gems'):\n"
        "    sys.modules[name] = None\n"
        "import torch, flash_attn\n"
        "q = torch.randn(1, 4, 2, 8)\n"
        "flash_attn.flash_attn_func(q, q, q)\n"
    )
    assert result.returncode == 0, result.stderr


def test_import_opens_no_connection():
    result = python(
        "import torch, socket\n"
        "def refuse(*args, **kwargs):\n"
        "    raise AssertionError('a socket')\n"
        "socket.socket = socket.create_connection = refuse\n"
        "import flash_attn\n"
    )
    assert result.returncode == 0, result.stderr


def test_import_does_not_initialise_a_gpu():
    result = python(
        "import torch, flash_attn\nassert not torch.cuda.is_initialized()\n",
        CUDA_VISIBLE_DEVICES="",
    )
    assert result.returncode == 0, result.stderr


def test_ops_are_registered_by_the_import():
    result = python(
        "import flash_attn, torch\n"
        "for name in ('_flash_attn_forward', '_flash_attn_varlen_backward', 'with_kvcache'):\n"
        "    assert hasattr(torch.ops.flash_attn, name)\n"
        "flash_attn.flash_attn_interface._flash_attn_forward\n"
    )
    assert result.returncode == 0, result.stderr


def test_version():
    assert flash_attn.__version__.startswith("2.8.3+plus.")
    # What clients ask for, compared as they compare it.
    from packaging.version import Version

    assert Version("2.1.1") <= Version(flash_attn.__version__) < Version("2.8.4")
    assert _core.version() in flash_attn.__version__


def test_another_package_may_add_to_the_path(tmp_path):
    """FlashAttention-4 installs flash_attn/cute beside this package."""
    beside = tmp_path / "flash_attn" / "cute"
    beside.mkdir(parents=True)
    (tmp_path / "flash_attn" / "__init__.py").write_text("")
    (beside / "__init__.py").write_text("answer = 42\n")
    result = python(
        f"import sys\nsys.path.append({str(tmp_path)!r})\n"
        "import flash_attn\n"
        "from flash_attn.cute import answer\n"
        "assert answer == 42 and flash_attn.__version__\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "damage", ["missing", "empty", "text", "truncated", "truncated-dependency", "directory"]
)
def test_damaged_core_library(tmp_path, damage):
    library = tmp_path / "_core.so"
    if damage == "empty":
        library.write_bytes(b"")
    elif damage == "text":
        library.write_text("not a library\n" * 100)
    elif damage == "truncated":
        library.write_bytes(_core._library_path().read_bytes()[:1000])
    elif damage == "truncated-dependency":
        library.write_bytes(_core._library_path().read_bytes())
        whole = _core._library_path().with_name("libflash_attn_plus.so").read_bytes()
        library.with_name("libflash_attn_plus.so").write_bytes(whole[: len(whole) // 2])
    elif damage == "directory":
        library.mkdir()
    result = python(
        "try:\n    import flash_attn\nexcept ImportError as error:\n    print(error)\n",
        FLASH_ATTN_PLUS_CORE=str(library),
    )
    assert result.returncode == 0, result.stderr
    assert "flash_attn: the core library" in result.stdout
    assert str(library) in result.stdout
    assert "Reinstall the package: pip install" in result.stdout


def test_constraint_error_is_both():
    assert issubclass(flash_attn.ConstraintError, AssertionError)
    assert issubclass(flash_attn.ConstraintError, RuntimeError)
