"""The raw entry points of the core by keyword: the fields of the structs of attention.h."""

from flash_attn import _core

FORWARD = (
    *("q", "k", "v", "out", "softmax_lse", "s_dmask", "cu_seqlens_q", "cu_seqlens_k"),
    *("seqused_k", "leftpad_k", "block_table", "alibi_slopes", "s_aux", "rng_state"),
    *("max_seqlen_q", "max_seqlen_k", "softmax_scale", "softcap", "dropout_p"),
    *("window_left", "window_right", "causal", "num_splits", "num_threads", "stream"),
)

BACKWARD = (
    *("dout", "q", "k", "v", "out", "softmax_lse", "dsoftmax_lse", "dq", "dk", "dv"),
    *("softmax_d", "ds_aux", "cu_seqlens_q", "cu_seqlens_k", "seqused_k", "alibi_slopes", "s_aux"),
    *("rng_state", "max_seqlen_q", "max_seqlen_k", "softmax_scale", "softcap", "dropout_p"),
    *("window_left", "window_right", "causal", "deterministic", "num_threads", "stream"),
)

KVCACHE = (
    *("q", "k_cache", "v_cache", "k", "v", "out", "softmax_lse", "rotary_cos", "rotary_sin"),
    *("cache_seqlens", "cache_batch_idx", "cache_leftpad", "block_table", "alibi_slopes", "s_aux"),
    *("softmax_scale", "softcap", "window_left", "window_right", "causal", "rotary_interleaved"),
    *("num_splits", "num_threads", "stream"),
)

ROTARY = (
    *("x", "out", "cos", "sin", "seqlen_offsets", "cu_seqlens", "seqlen_offset", "max_seqlen"),
    *("interleaved", "conjugate", "num_threads", "stream"),
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
    "seqlen_offset": 0,
    "max_seqlen": 0,
    "interleaved": 0,
    "conjugate": 0,
}


def _call(function, names, arguments):
    unknown = set(arguments) - set(names)
    assert not unknown, unknown
    function(*(arguments.get(name, NUMBERS.get(name)) for name in names))


def forward(**arguments):
    _call(_core.forward, FORWARD, arguments)


def backward(**arguments):
    _call(_core.backward, BACKWARD, arguments)


def kvcache(**arguments):
    _call(_core.kvcache, KVCACHE, arguments)


def rotary(**arguments):
    _call(_core.rotary, ROTARY, arguments)
