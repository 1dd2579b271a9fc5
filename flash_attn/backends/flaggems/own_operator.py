"""FlagGems' own attention, for the requests that policy.py gives it."""

from __future__ import annotations

from torch import Tensor

from flash_attn.backends.flaggems.launch import window
from flash_attn.backends.flaggems.policy import Request, broken_rule
from flash_attn.backends.flaggems.runtime import Runtime
from flash_attn.backends.interface import Options


def is_overridden(where: Runtime) -> bool:
    """Whether the vendor has an attention of its own: it then replaces the package's global."""
    operator = getattr(where.flag_gems, "flash_attention_forward", None)
    return operator is not None and not operator.__module__.startswith("flag_gems.ops")


def serves(
    where: Runtime, q: Tensor, k: Tensor, v: Tensor, options: Options, dense: bool, inference: bool
) -> bool:
    """Whether a request goes to FlagGems' operator."""
    if where.is_nvidia:
        return False
    left, right = window(options, q.shape[-3], k.shape[-3])
    request = Request(
        vendor=where.vendor,
        overridden=is_overridden(where),
        dense=dense,
        inference=inference,
        has_dropout=options.dropout_p > 0,
        has_score_features=options.softcap > 0
        or options.alibi_slopes is not None
        or options.s_aux is not None,
        softmax_scale=options.softmax_scale,
        causal=options.causal,
        window_left=left,
        window_right=right,
        seqlen_q=q.shape[-3],
        seqlen_k=k.shape[-3],
        head_dim=q.shape[-1],
        same_strides=k.stride() == v.stride(),
    )
    return broken_rule(request) is None


def forward(where: Runtime, q: Tensor, k: Tensor, v: Tensor, options: Options) -> Tensor:
    """The output of dense attention."""
    left, right = window(options, q.shape[1], k.shape[1])
    has_window = left >= 0 and not options.causal
    with where.guard(q.device):
        # The package's global, which a vendor overrides; in one part, because its merging of parts
        # is wrong for more than one head.
        return where.flag_gems.flash_attention_forward(
            q,
            k,
            v,
            None,
            None,
            q.shape[1],
            k.shape[1],
            0.0,
            options.causal,
            False,
            scale=options.softmax_scale,
            softcap=0.0,
            window_size_left=left if has_window else None,
            window_size_right=right if has_window else None,
            alibi_slopes=None,
            disable_splitkv=True,
        )[0]
