"""Names, order, defaults and annotations of everything that programs for FlashAttention-2 call."""

import inspect

import pytest
import torch

import flash_attn
from flash_attn import flash_attn_interface

REQUIRED = inspect.Parameter.empty

TAIL = {
    "dropout_p": 0.0,
    "softmax_scale": None,
    "causal": False,
    "window_size": (-1, -1),
    "softcap": 0.0,
    "alibi_slopes": None,
    "deterministic": False,
    "return_attn_probs": False,
}
OURS = {"s_aux": None}


def required(names):
    return dict.fromkeys(names.split(), REQUIRED)


VARLEN = "cu_seqlens_q cu_seqlens_k max_seqlen_q max_seqlen_k"

PUBLIC = {
    "flash_attn_func": required("q k v") | TAIL | OURS,
    "flash_attn_kvpacked_func": required("q kv") | TAIL | OURS,
    "flash_attn_qkvpacked_func": required("qkv") | TAIL | OURS,
    "flash_attn_varlen_func": (required(f"q k v {VARLEN}") | TAIL | {"block_table": None} | OURS),
    "flash_attn_varlen_kvpacked_func": required(f"q kv {VARLEN}") | TAIL | OURS,
    "flash_attn_varlen_qkvpacked_func": required("qkv cu_seqlens max_seqlen") | TAIL | OURS,
    "flash_attn_with_kvcache": (
        required("q k_cache v_cache")
        | {
            "k": None,
            "v": None,
            "rotary_cos": None,
            "rotary_sin": None,
            "cache_seqlens": None,
            "cache_batch_idx": None,
            "cache_leftpad": None,
            "block_table": None,
            "softmax_scale": None,
            "causal": False,
            "window_size": (-1, -1),
            "softcap": 0.0,
            "rotary_interleaved": True,
            "alibi_slopes": None,
            "num_splits": 0,
            "return_softmax_lse": False,
        }
        | OURS
    ),
}

OPTIONS = "dropout_p softmax_scale causal window_size_left window_size_right softcap alibi_slopes"
GRADIENTS = "dout q k v out softmax_lse dq dk dv"
RNG = {"rng_state": None}

# FlashAttention-2's parameters, then ours.
INTERNAL = {
    "_flash_attn_forward": required(f"q k v {OPTIONS} return_softmax")
    | {"s_aux": None, "rng_state": None},
    "_flash_attn_varlen_forward": required(f"q k v {VARLEN} dropout_p softmax_scale causal")
    | {
        "window_size_left": -1,
        "window_size_right": -1,
        "softcap": 0.0,
        "alibi_slopes": None,
        "return_softmax": False,
        "block_table": None,
        "leftpad_k": None,
        "seqused_k": None,
        "zero_tensors": False,
    }
    | {"num_splits": 0, "s_aux": None, "rng_state": None},
    "_flash_attn_backward": required(f"{GRADIENTS} {OPTIONS} deterministic")
    | RNG
    | {"s_aux": None, "dsoftmax_lse": None, "ds_aux": None},
    "_flash_attn_varlen_backward": required(f"{GRADIENTS} {VARLEN} {OPTIONS} deterministic")
    | RNG
    | {"zero_tensors": False}
    | {"s_aux": None, "dsoftmax_lse": None, "ds_aux": None, "seqused_k": None},
}

FLOATS = {"dropout_p", "softmax_scale", "softcap"}
INTEGERS = {
    "window_size_left",
    "window_size_right",
    "max_seqlen_q",
    "max_seqlen_k",
    "num_splits",
}
FLAGS = {"causal", "return_softmax", "deterministic", "zero_tensors"}
OPTIONAL = {
    "alibi_slopes",
    "block_table",
    "leftpad_k",
    "seqused_k",
    "rng_state",
    "s_aux",
    "dsoftmax_lse",
    "ds_aux",
    "dq",
    "dk",
    "dv",
}


def annotation(name):
    if name in FLOATS:
        return "float"
    if name in INTEGERS:
        return "int"
    if name in FLAGS:
        return "bool"
    return "Tensor | None" if name in OPTIONAL else "Tensor"


@pytest.mark.parametrize("name", PUBLIC)
def test_public_function(name):
    function = getattr(flash_attn, name)
    assert function is getattr(flash_attn_interface, name)
    assert inspect.isfunction(function)
    parameters = inspect.signature(function).parameters
    assert {key: p.default for key, p in parameters.items()} == PUBLIC[name]
    assert list(parameters) == list(PUBLIC[name])
    assert {p.kind for p in parameters.values()} == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
    assert "Arguments:" in function.__doc__


@pytest.mark.parametrize("name", INTERNAL)
def test_internal_function(name):
    function = getattr(flash_attn_interface, name)
    assert inspect.isfunction(function)
    parameters = inspect.signature(function).parameters
    assert {key: p.default for key, p in parameters.items()} == INTERNAL[name]
    assert list(parameters) == list(INTERNAL[name])
    assert {key: p.annotation for key, p in parameters.items()} == {
        key: annotation(key) for key in parameters
    }
    # Ring attention reads the defaults like this.
    spec = inspect.getfullargspec(function)
    assert spec.args == list(INTERNAL[name])
    assert spec.varargs is None and spec.varkw is None and not spec.kwonlyargs


@pytest.mark.parametrize("name", INTERNAL)
def test_op_takes_the_arguments_of_the_function(name):
    op = getattr(torch.ops.flash_attn, name)
    assert getattr(flash_attn_interface, f"_wrapped{name}") is op
    arguments = op.default._schema.arguments
    names = [argument.name for argument in arguments]
    names = [argument for argument in names if argument != "deterministic" or "backward" in name]
    assert names == list(INTERNAL[name])
    for argument in arguments:
        default = INTERNAL[name].get(argument.name, False)
        if default is REQUIRED:
            assert not argument.has_default_value(), argument.name
        else:
            assert argument.default_value == default, argument.name
    written = {argument.name for argument in arguments if argument.is_write}
    assert written == ({"dq", "dk", "dv", "ds_aux"} if "backward" in name else set())
    results = [str(result.type) for result in op.default._schema.returns]
    assert results == ["Tensor"] * (1 if "backward" in name else 4)


APPLY_TAIL = "dropout_p softmax_scale causal window_size softcap alibi_slopes deterministic"
AUTOGRAD = {
    "FlashAttnFunc": f"q k v {APPLY_TAIL} return_softmax",
    "FlashAttnKVPackedFunc": f"q kv {APPLY_TAIL} return_softmax",
    "FlashAttnQKVPackedFunc": f"qkv {APPLY_TAIL} return_softmax",
    "FlashAttnVarlenFunc": f"q k v {VARLEN} {APPLY_TAIL} return_softmax block_table",
    "FlashAttnVarlenKVPackedFunc": f"q kv {VARLEN} {APPLY_TAIL} return_softmax",
    "FlashAttnVarlenQKVPackedFunc": f"qkv cu_seqlens max_seqlen {APPLY_TAIL} return_softmax",
}


@pytest.mark.parametrize("name", AUTOGRAD)
def test_autograd_function(name):
    function = getattr(flash_attn_interface, name)
    assert issubclass(function, torch.autograd.Function)
    parameters = list(inspect.signature(function.forward).parameters)
    assert parameters == ["ctx", *AUTOGRAD[name].split(), "is_grad_enabled", "s_aux"]


def test_odds_and_ends_of_the_interface():
    assert flash_attn_interface.USE_TRITON_ROCM is False
    assert flash_attn_interface._get_block_size_n("cpu", 64, False, True) == 1 << 30
    assert flash_attn_interface.round_multiple(129, 128) == 256
    assert flash_attn_interface.round_multiple(128, 128) == 128
    assert flash_attn_interface.maybe_contiguous(None) is None
    x = torch.randn(4, 6)
    assert flash_attn_interface.maybe_contiguous(x[::2]).data_ptr() == x.data_ptr()
    transposed = flash_attn_interface.maybe_contiguous(x.t())
    assert transposed.stride(-1) == 1 and torch.equal(transposed, x.t())


def test_raw_entry_points_are_reachable():
    import flash_attn_2_cuda

    assert flash_attn_interface.flash_attn_gpu is flash_attn_2_cuda


@pytest.mark.parametrize("name", flash_attn.__all__)
def test_every_exported_name_exists(name):
    assert getattr(flash_attn, name) is not None


@pytest.mark.parametrize("name", flash_attn_interface.__all__)
def test_every_name_of_the_interface_exists(name):
    assert getattr(flash_attn_interface, name) is not None


def test_unknown_names_are_attribute_errors():
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flash_attn.nonsense  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        flash_attn_interface.nonsense  # noqa: B018
