"""Bad input of the backward pass: its texts, and that nothing has been written by then."""

import re

import pytest
import torch

from flash_attn.flash_attn_interface import (
    _flash_attn_backward,
    _flash_attn_forward,
    _flash_attn_varlen_backward,
)

pytestmark = pytest.mark.cpu  # one validation serves all devices, but reads lengths on the CPU only


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def backward_arguments(**changes):
    q, k, v = torch.ones(2, 5, 4, 16), torch.ones(2, 7, 2, 16), torch.ones(2, 7, 2, 16)
    out, lse, _, _ = _flash_attn_forward(q, k, v, 0.0, 0.25, False, -1, -1, 0.0, None, False)
    arguments = {
        "dout": torch.ones_like(q),
        "q": q,
        "k": k,
        "v": v,
        "out": out,
        "softmax_lse": lse,
        "dq": torch.empty_like(q),
        "dk": torch.empty_like(k),
        "dv": torch.empty_like(v),
        "dropout_p": 0.0,
        "softmax_scale": 0.25,
        "causal": False,
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "deterministic": False,
        "rng_state": None,
    }
    return {**arguments, **changes}


BACKWARD_ERRORS = {
    "rng_state": ({"dropout_p": 0.1}, "rng_state must be given when dropout_p > 0"),
    "rng_state_dtype": (
        {"dropout_p": 0.1, "rng_state": int32(1, 2)},
        "rng_state must have dtype int64",
    ),
    "rng_state_shape": (
        {"dropout_p": 0.1, "rng_state": torch.zeros(3, dtype=torch.int64)},
        "rng_state must have shape",
    ),
    "dout_dtype": (
        {"dout": torch.ones(2, 5, 4, 16, dtype=torch.float16)},
        "query and dout must have the same",
    ),
    "dout_shape": ({"dout": torch.ones(2, 6, 4, 16)}, "dout must have shape"),
    "out_shape": ({"out": torch.ones(2, 6, 4, 16)}, "out must have shape"),
    "lse_shape": ({"softmax_lse": torch.ones(2, 4, 6)}, "softmax_lse must have shape"),
    "lse_dtype": (
        {"softmax_lse": torch.ones(2, 4, 5, dtype=torch.float16)},
        "softmax_lse must have dtype",
    ),
    "dq_shape": ({"dq": torch.ones(2, 5, 4, 8)}, "dq must have shape"),
    "dk_dtype": (
        {"dk": torch.ones(2, 7, 2, 16, dtype=torch.bfloat16)},
        "dk must have the same dtype as q",
    ),
    "dv_heads": ({"dv": torch.ones(2, 7, 4, 16)}, "dv must have shape"),
    "dq_expanded": ({"dq": torch.ones(1, 5, 4, 16).expand(2, -1, -1, -1)}, "dq is written to"),
}


@pytest.mark.parametrize("name", BACKWARD_ERRORS)
def test_backward_error(name):
    changes, text = BACKWARD_ERRORS[name]
    with pytest.raises(RuntimeError, match=re.escape(text)):
        _flash_attn_backward(**backward_arguments(**changes))


def test_varlen_backward_error():
    q, k = torch.ones(12, 4, 16), torch.ones(20, 2, 16)
    with pytest.raises(RuntimeError, match="max_seqlen_k is 10"):
        _flash_attn_varlen_backward(
            *(torch.ones_like(q), q, k, k, torch.ones_like(q), torch.ones(4, 12)),
            *(torch.empty_like(q), torch.empty_like(k), torch.empty_like(k)),
            *(int32(0, 5, 12), int32(0, 9, 20), 7, 10),
            *(0.0, 0.25, False, -1, -1, 0.0, None, False),
        )


def test_backward_writes_nothing_before_an_error():
    for changes, _ in BACKWARD_ERRORS.values():
        arguments = backward_arguments(
            dq=torch.full((2, 5, 4, 16), 123.0), dk=torch.full((2, 7, 2, 16), 123.0)
        )
        arguments["dv"] = torch.full((2, 7, 2, 16), 123.0)
        watched = [arguments[name] for name in ("dq", "dk", "dv") if name not in changes]
        with pytest.raises(RuntimeError):
            _flash_attn_backward(**{**arguments, **changes})
        assert all((x == 123.0).all() for x in watched)
