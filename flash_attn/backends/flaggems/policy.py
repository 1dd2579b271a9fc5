"""Which requests go to FlagGems' own operator, and which to our kernels: one table.

FlagGems' operator is taken where a vendor has written its own and it is known to be right; our
kernels are taken for everything else, and always on NVIDIA GPUs. `python -m flash_attn doctor`
prints the table.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

HEAD_DIMS = (16, 32, 64, 96, 128, 192, 256)
TILE = 128


class Request(NamedTuple):
    """A forward call as the table sees it.

    Attributes:
        vendor: FlagGems' name of it.
        overridden: whether the vendor has a flash_attention_forward of its own.
        dense: (b, s, h, d), no sequences of varying length.
        inference: only the output is asked for, no log-sum-exp and no gradient.
        has_dropout, has_score_features: softcap, ALiBi or sinks.
        softmax_scale, causal: as in `Options`.
        window_left, window_right: -1 where infinite or hiding nothing.
        seqlen_q, seqlen_k, head_dim: sizes.
        same_strides: k and v have the same ones.
    """

    vendor: str
    overridden: bool
    dense: bool
    inference: bool
    has_dropout: bool
    has_score_features: bool
    softmax_scale: float
    causal: bool
    window_left: int
    window_right: int
    seqlen_q: int
    seqlen_k: int
    head_dim: int
    same_strides: bool

    @property
    def has_window(self) -> bool:
        return self.window_left >= 0 or (self.window_right >= 0 and not self.causal)


class Rule(NamedTuple):
    """What FlagGems' operator needs, and why a request without it goes to our kernels."""

    needs: str
    holds: Callable[[Request], bool]
    because: str


RULES = (
    Rule(
        "another vendor than NVIDIA",
        lambda r: r.vendor != "nvidia",
        "on NVIDIA GPUs our kernels serve, so that dropout is one function everywhere",
    ),
    Rule(
        "flash_attention_forward written by the vendor",
        lambda r: r.overridden,
        "FlagGems' generic one has no feature and no speed that ours lack",
    ),
    Rule(
        "dense inputs",
        lambda r: r.dense,
        "its variable length takes pages only, and returns a scrambled log-sum-exp for GQA",
    ),
    Rule(
        "inference",
        lambda r: r.inference,
        "a backward pass needs the log-sum-exp by our conventions",
    ),
    Rule(
        "no dropout",
        lambda r: not r.has_dropout,
        "its dropout is another function, in the backward pass another one still",
    ),
    Rule(
        "no softcap, ALiBi or sinks",
        lambda r: not r.has_score_features,
        "vendors differ in these",
    ),
    Rule(
        "a softmax_scale that is positive",
        lambda r: r.softmax_scale > 0,
        "it takes 0 as not given",
    ),
    Rule(
        "a window on both sides or none, and not with causal",
        lambda r: not r.has_window or (r.window_left >= 0 and r.window_right >= 0 and not r.causal),
        "it ignores a window of one side",
    ),
    Rule(
        f"at most {TILE} queries or a multiple of them, if causal or with a window",
        lambda r: not (r.causal or r.has_window) or r.seqlen_q <= TILE or r.seqlen_q % TILE == 0,
        "the last tile loses keys that it sees where it has more rows than its blocks have keys",
    ),
    Rule(
        "a key for every query",
        lambda r: r.seqlen_k > 0 and (not (r.causal or r.has_window) or r.seqlen_q <= r.seqlen_k),
        "a row without keys is 0 here",
    ),
    Rule(
        "keys and values of the same strides",
        lambda r: r.same_strides,
        "it addresses values with the strides of keys",
    ),
    Rule(
        f"a head dimension of {', '.join(map(str, HEAD_DIMS))}",
        lambda r: r.head_dim in HEAD_DIMS,
        "others are copied to be padded",
    ),
)


def broken_rule(request: Request) -> Rule | None:
    """The first rule that keeps a request from FlagGems' operator; None when it goes there."""
    return next((rule for rule in RULES if not rule.holds(request)), None)


def describe() -> list[str]:
    """The table as lines: what FlagGems' operator needs, and why ours serves without it."""
    return [f"{rule.needs}; else ours: {rule.because}" for rule in RULES]
