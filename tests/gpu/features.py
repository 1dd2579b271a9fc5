"""Every feature on small shapes, forward and backward, against the float64 reference.

A feature is a row of `FEATURES`: the fields of a case of the Python suite, whose checks are used.
The sizes leave partial tiles on every side and give every kernel more than one tile.
"""

import functools
import importlib
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1] / "python"))

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}
HEAD_DIMS = (32, 40, 64, 80, 96, 128, 160, 192, 224, 256)

# Of checks.Case.
_DENSE = {
    "plain": {},
    "causal": {"causal": True},
    "causal, few queries": {"sq": 70, "sk": 300, "causal": True},
    "causal, few keys": {"sq": 300, "sk": 70, "causal": True},
    "one query": {"sq": 1, "sk": 515},
    "one key": {"sq": 130, "sk": 1},
    "no keys": {"sq": 5, "sk": 0},
    "window": {"window_size": (37, 20)},
    "causal window": {"causal": True, "window_size": (37, -1)},
    "window on one side": {"window_size": (-1, 50)},
    "softcap": {"softcap": 2.0},
    "alibi": {"alibi": "bh"},
    "alibi causal": {"alibi": "h", "causal": True},
    "sinks": {"sinks": True},
    "sinks causal": {"sinks": True, "causal": True, "sq": 300, "sk": 70},
    "dropout": {"dropout_p": 0.2},
    "dropout causal": {"dropout_p": 0.2, "causal": True},
    "gqa": {"heads": 6, "heads_k": 2},
    "mqa causal": {"heads": 5, "heads_k": 1, "causal": True},
    "gqa, few queries": {"heads": 8, "heads_k": 2, "sq": 3, "sk": 400, "causal": True},
    "scale": {"softmax_scale": 0.03},
    "transposed": {"layout": "transposed", "causal": True},
    "sliced": {"layout": "sliced"},
    "expanded": {"layout": "expanded"},
    "interleaved": {"layout": "interleaved"},
    "gradient of lse": {"lse_gradient": True, "causal": True},
    "everything": {
        "causal": True,
        "window_size": (90, -1),
        "softcap": 3.0,
        "alibi": "bh",
        "sinks": True,
        "dropout_p": 0.15,
        "heads": 6,
        "heads_k": 2,
        "lse_gradient": True,
    },
}

# Of test_varlen.VarlenCase.
_VARLEN = {
    "varlen": {},
    "varlen causal": {"causal": True, "heads": (6, 2)},
    "varlen empty sequences": {"batch": "zeros", "causal": True},
    "varlen one query each": {"batch": "decode", "heads": (8, 2)},
    "varlen everything": {
        "causal": True,
        "window_size": (40, -1),
        "softcap": 2.0,
        "alibi": "bh",
        "sinks": True,
        "dropout_p": 0.2,
        "heads": (6, 2),
        "lse_gradient": True,
    },
}

# Of test_kvcache.CacheCase; forward only.
_CACHE = {
    "cache": {"heads": (8, 2)},
    "cache, one length": {"int_lengths": True},
    "cache, 4 splits": {"num_splits": 4, "heads": (4, 4)},
    "cache, rows of q": {"sq": 20, "heads": (4, 2)},
    "cache, append": {"new": 1},
    "cache, append with rotary": {"new": 3, "sq": 3, "rotary": "halves"},
    "cache, append interleaved": {"new": 3, "sq": 3, "rotary": "interleaved", "causal": False},
    "cache, pages of 16": {"page_size": 16, "new": 1},
    "cache, pages of 256": {"page_size": 256, "heads": (8, 1)},
    "cache, pages of 7": {"page_size": 7, "new": 2, "sq": 2, "leftpad": True},
    "cache, batch index": {"batch_idx": True, "new": 1, "leftpad": True},
    "cache, window": {"window_size": (30, 0), "softcap": 2.0, "alibi": True, "sinks": True},
}

FEATURES = {**_DENSE, **_VARLEN, **_CACHE}


@dataclass(frozen=True)
class Check:
    feature: str
    head_dim: int
    dtype: str
    backward: bool
    deterministic: bool = False

    def __str__(self):
        words = [self.feature, f"d={self.head_dim}", self.dtype]
        words.append("backward" if self.backward else "forward")
        return ", ".join(words + ["deterministic"] * self.deterministic)


def checks(head_dims=HEAD_DIMS, dtypes=tuple(DTYPES), passes=("forward", "backward"), only=()):
    """Every check of these kinds; `only`: of features whose name contains one of the words."""
    rows = []
    for feature in FEATURES:
        if only and not any(word in feature for word in only):
            continue
        for head_dim in head_dims:
            for dtype in dtypes:
                if "forward" in passes:
                    rows.append(Check(feature, head_dim, dtype, False))
                if "backward" in passes and feature not in _CACHE:
                    rows.append(Check(feature, head_dim, dtype, True))
                    if feature in ("plain", "causal", "gqa", "varlen everything"):
                        rows.append(Check(feature, head_dim, dtype, True, deterministic=True))
    return rows


def setup():
    """In each process: tensors are made on the GPU unless said otherwise."""
    backend = os.environ.get("FLASH_ATTN_CHECKED_BACKEND", "native")
    importlib.import_module("flash_attn").set_backend(backend)  # before a check's time runs
    torch.set_default_device("cuda")
    torch.set_num_threads(1)


def run(check):
    """One check; raises AssertionError with what differs."""
    import checks as dense
    import test_kvcache
    import test_varlen

    import flash_attn

    torch.manual_seed(0)
    fields = dict(FEATURES[check.feature], head_dim=check.head_dim, dtype=DTYPES[check.dtype])
    if check.feature in _DENSE:
        case = dense.Case(**{"sq": 131, "sk": 203, **fields})
        function = functools.partial(flash_attn.flash_attn_func, deterministic=check.deterministic)
        (dense.check_backward if check.backward else dense.check_forward)(case, function)
    elif check.feature in _VARLEN:
        case = test_varlen.VarlenCase(**fields)
        (test_varlen.check_backward if check.backward else test_varlen.check_forward)(case)
    else:
        test_kvcache.check(test_kvcache.CacheCase(**fields))
    torch.cuda.synchronize()
