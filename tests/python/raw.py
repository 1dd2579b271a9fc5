"""The raw entry points of the core by keyword: the fields of the structs of attention.h."""

import torch

from flash_attn import _core

FORWARD = (
    *("q", "k", "v", "out", "softmax_lse", "softmax_scale", "window_left", "window_right"),
    *("causal", "num_threads", "stream", "workspace", "workspace_size", "softcap"),
    *("alibi_slopes", "s_aux", "dropout_p", "rng_state", "s_dmask", "cu_seqlens_q"),
    *("cu_seqlens_k", "max_seqlen_q", "max_seqlen_k", "seqused_k", "leftpad_k", "block_table"),
    *("num_splits",),
)

BACKWARD = (
    *("dout", "q", "k", "v", "out", "softmax_lse", "dq", "dk", "dv", "softmax_d"),
    *("softmax_scale", "window_left", "window_right", "causal", "deterministic", "num_threads"),
    *("stream", "workspace", "workspace_size", "softcap", "alibi_slopes", "s_aux", "ds_aux"),
    *("dsoftmax_lse", "dropout_p", "rng_state", "cu_seqlens_q", "cu_seqlens_k", "max_seqlen_q"),
    *("max_seqlen_k", "seqused_k"),
)

KVCACHE = (
    *("q", "k_cache", "v_cache", "out", "softmax_lse", "softmax_scale", "window_left"),
    *("window_right", "causal", "num_threads", "stream", "workspace", "workspace_size"),
    *("cache_seqlens", "k", "v", "cache_batch_idx", "cache_leftpad", "block_table", "rotary_cos"),
    *("rotary_sin", "rotary_interleaved", "softcap", "alibi_slopes", "s_aux", "num_splits"),
)

ROTARY = (
    *("x", "out", "cos", "sin", "seqlen_offset", "interleaved", "conjugate", "num_threads"),
    *("stream", "seqlen_offsets", "cu_seqlens", "max_seqlen"),
)

NUMBERS = {
    "max_seqlen_q": 0,
    "max_seqlen_k": 0,
    "softmax_scale": 1.0,
    "softcap": 0.0,
    "dropout_p": 0.0,
    "window_left": -1,
    "window_right": -1,
    "causal": 0,
    "deterministic": 0,
    "rotary_interleaved": 0,
    "num_splits": 0,
    "num_threads": 2,
    "stream": 0,
    "workspace": 0,
    "workspace_size": 0,
    "seqlen_offset": 0,
    "max_seqlen": 0,
    "interleaved": 0,
    "conjugate": 0,
}


def _call(function, names, arguments):
    unknown = set(arguments) - set(names)
    assert not unknown, unknown
    num_bytes = function(*(arguments.get(name, NUMBERS.get(name)) for name in names))
    if num_bytes:  # on a GPU
        workspace = torch.full((num_bytes,), 255, dtype=torch.uint8)  # NaN, and wild numbers
        given = arguments | {"workspace": workspace.data_ptr(), "workspace_size": num_bytes}
        assert function(*(given.get(name, NUMBERS.get(name)) for name in names)) == 0


def forward(**arguments):
    _call(_core.forward, FORWARD, arguments)


def backward(**arguments):
    _call(_core.backward, BACKWARD, arguments)


def kvcache(**arguments):
    _call(_core.kvcache, KVCACHE, arguments)


def rotary(**arguments):
    _call(_core.rotary, ROTARY, arguments)
