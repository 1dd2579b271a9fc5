"""What the benchmark times: cases, their work, and both sides' calls."""

import dataclasses
import re

import torch
import torch.nn.functional as F

import flash_attn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclasses.dataclass(frozen=True)
class Features:
    """Everything beyond plain attention. `parse` reads `causal+window=256+gqa=4`."""

    causal: bool = False
    window: int = -1  # keys to the left, and to the right unless causal; -1: all
    softcap: float = 0.0
    alibi: bool = False
    dropout: float = 0.0
    gqa: int = 1  # query heads per key head
    sinks: bool = False
    varlen: bool = False  # lengths from s / 2 to s, packed; the peer gets them padded
    deterministic: bool = False

    @classmethod
    def parse(cls, text):
        values, types = {}, {field.name: field.type for field in dataclasses.fields(cls)}
        for part in filter(None, text.replace("plain", "").split("+")):
            name, _, value = part.partition("=")
            if name not in types or (types[name] is bool) == bool(value):
                raise ValueError(f"unknown feature {part!r}; known: {', '.join(types)}")
            values[name] = types[name](value) if value else True
        return cls(**values)

    def __str__(self):
        given = [
            (field.name, getattr(self, field.name))
            for field in dataclasses.fields(self)
            if getattr(self, field.name) != field.default
        ]
        return "+".join(name if value is True else f"{name}={value}" for name, value in given)

    def missing_in_peer(self):
        """Features that scaled_dot_product_attention lacks: it is timed without them."""
        return [name for name in ("softcap", "sinks") if getattr(self, name)]


@dataclasses.dataclass(frozen=True)
class Case:
    """One row: kind is forward, backward, decode, host or memory; decode has one query row."""

    kind: str
    batch: int
    heads: int
    seqlen: int
    head_dim: int
    dtype: str
    features: Features = Features()

    @property
    def heads_k(self):
        return max(1, self.heads // self.features.gqa)

    def __str__(self):
        shape = f"({self.batch},{self.heads},{self.seqlen},{self.head_dim})"
        return f"{shape} {self.features}".rstrip()

    def lengths(self):
        """Length of each sequence."""
        if not self.features.varlen:
            return [self.seqlen] * self.batch
        half = self.seqlen // 2
        return [self.seqlen - half * i // max(1, self.batch - 1) for i in range(self.batch)]

    def visible_pairs(self):
        """Pairs of query and key that no mask removes, in all sequences of one head."""
        left = self.features.window if self.features.window >= 0 else self.seqlen
        right = 0 if self.features.causal else left
        total = 0
        for length in self.lengths():
            # Row i sees itself, min(i, left) keys before and min(length - 1 - i, right) after.
            total += length + _clipped_sum(length, left) + _clipped_sum(length, right)
        return total

    def flops(self):
        """Operations of the two (backward: five) products, visible entries only."""
        products = 2 if self.kind == "forward" else 5
        return products * 2 * self.heads * self.visible_pairs() * self.head_dim

    def cache_bytes(self):
        """Keys and values that a decode step reads."""
        size = DTYPES[self.dtype].itemsize
        return 2 * sum(self.lengths()) * self.heads_k * self.head_dim * size


def _clipped_sum(length, limit):
    """Sum of min(i, limit) for i in 0 ... length - 1."""
    limit = min(limit, length - 1)
    return limit * (limit + 1) // 2 + (length - 1 - limit) * limit


class Inputs:
    """Tensors of a case, and the two sides as functions without arguments."""

    def __init__(self, case, device, requires_grad=False):
        self.case, self.features, self.device = case, case.features, device
        self.dtype = DTYPES[case.dtype]
        generator = torch.Generator(device).manual_seed(0)
        self.generator = generator
        seqlen_q = 1 if case.kind == "decode" else case.seqlen
        shapes = [
            (case.batch, seqlen_q, case.heads, case.head_dim),
            (case.batch, case.seqlen, case.heads_k, case.head_dim),
            (case.batch, case.seqlen, case.heads_k, case.head_dim),
        ]
        self.dense = [self._randn(*shape) for shape in shapes]
        # Each side gets its own natural layout: (b, s, h, d) here, (b, h, s, d) for the peer.
        self.peer_tensors = [t.transpose(1, 2).contiguous() for t in self.dense]
        self.tensors = self.dense
        self.cache_seqlens = case.seqlen
        if self.features.varlen:
            self.cache_seqlens = torch.tensor(case.lengths(), dtype=torch.int32, device=device)
            self.cu_seqlens = F.pad(self.cache_seqlens.cumsum(0, dtype=torch.int32), (1, 0))
            self.tensors = [
                torch.cat([t[i, :n] for i, n in enumerate(case.lengths())]) for t in self.dense
            ]
        for tensor in self.tensors + self.peer_tensors:
            tensor.requires_grad_(requires_grad)
        self.keywords = self._keywords()
        self.peer_keywords = self._peer_keywords(seqlen_q)

    def _randn(self, *shape):
        return torch.randn(*shape, dtype=self.dtype, device=self.device, generator=self.generator)

    def _slopes(self):
        heads = torch.arange(1, self.case.heads + 1, device=self.device, dtype=torch.float32)
        return torch.exp2(-8 * heads / self.case.heads)

    def _keywords(self):
        """What differs from the defaults: passing more would cost a tiny call some of its time."""
        f = self.features
        keywords = {}
        if f.causal:
            keywords["causal"] = True
        if f.window >= 0:
            keywords["window_size"] = (f.window, 0 if f.causal else f.window)
        if f.softcap:
            keywords["softcap"] = f.softcap
        if f.alibi:
            keywords["alibi_slopes"] = self._slopes()
        if f.sinks:
            keywords["s_aux"] = torch.zeros(self.case.heads, device=self.device)
        if self.case.kind != "decode":
            if f.dropout:
                keywords["dropout_p"] = f.dropout
            if f.deterministic:
                keywords["deterministic"] = True
        return keywords

    def _peer_keywords(self, seqlen_q):
        f, seqlen = self.features, self.case.seqlen
        keywords = {}
        if f.dropout and self.case.kind != "decode":
            keywords["dropout_p"] = f.dropout
        if f.gqa > 1:
            keywords["enable_gqa"] = True
        masked = f.window >= 0 or f.alibi
        if not masked:
            # One query row sees the whole cache, and torch aligns its causal mask at the top left.
            return keywords | ({"is_causal": True} if f.causal and seqlen_q > 1 else {})
        rows = torch.arange(seqlen - seqlen_q, seqlen, device=self.device)[:, None]
        distance = torch.arange(seqlen, device=self.device) - rows
        left = f.window if f.window >= 0 else seqlen
        visible = (distance >= -left) & (distance <= (0 if f.causal else left))
        if not f.alibi:
            return keywords | {"attn_mask": visible}
        bias = -self._slopes()[:, None, None] * distance.abs()
        return keywords | {"attn_mask": bias.masked_fill(~visible, -torch.inf).to(self.dtype)}

    def forward(self):
        if self.features.varlen:
            return flash_attn.flash_attn_varlen_func(
                *self.tensors,
                self.cu_seqlens,
                self.cu_seqlens,
                self.case.seqlen,
                self.case.seqlen,
                **self.keywords,
            )
        return flash_attn.flash_attn_func(*self.tensors, **self.keywords)

    def peer_forward(self):
        return F.scaled_dot_product_attention(*self.peer_tensors, **self.peer_keywords)

    def decode(self):
        return flash_attn.flash_attn_with_kvcache(
            *self.dense, cache_seqlens=self.cache_seqlens, **self.keywords
        )

    def plain(self):
        """The same inputs with causal as the only feature, to measure what the others cost."""
        plain = Features(causal=self.features.causal)
        other = object.__new__(Inputs)
        other.__dict__.update(self.__dict__, features=plain)
        other.keywords = other._keywords()
        other.tensors = self.dense
        return other


def gradients(forward, tensors):
    """A function that runs only the backward pass of a recorded forward."""
    out = forward()
    dout = torch.randn_like(out)
    return lambda: torch.autograd.grad(out, tensors, dout, retain_graph=True)


def shape_of(text):
    """`1,8,1024,64` as numbers."""
    if not re.fullmatch(r"\d+(,\d+){3}", text):
        raise ValueError(f"a shape is batch,heads,length,head_dim, not {text!r}")
    return tuple(map(int, text.split(",")))
