"""Rotary position embedding (RoFormer, arXiv:2104.09864) as PyTorch operators.

`torch.ops.flash_attn.rotary` returns a rotated copy and has a gradient;
`torch.ops.flash_attn.rotary_` rotates in place. Devices that have a backend are served by it, the
others, and float64, by torch operations. What users call is `apply_rotary`, here, and the functions
of `flash_attn.layers.rotary`.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from flash_attn.attention.arguments import max_seqlen as max_seqlen_of
from flash_attn.attention.registry import define, fake, library
from flash_attn.backends import backend_for, serves

_OPTIONS = (
    "Tensor? seqlen_offsets=None, SymInt seqlen_offset=0, Tensor? cu_seqlens=None, "
    "SymInt? max_seqlen=None, bool interleaved=False, bool conjugate=False"
)


# --------------------------------------------------------------------------------------------------
# Kernels


def _rotate(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    out: Tensor,
    seqlen_offsets: Tensor | None = None,
    seqlen_offset: int = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | None = None,
    interleaved: bool = False,
    conjugate: bool = False,
) -> None:
    """Writes x, rotated, to `out`, which may be x itself."""
    if x.dtype in (torch.float32, torch.bfloat16, torch.float16) and serves(x):
        if cos.dtype not in (x.dtype, torch.float32) or sin.dtype != cos.dtype:
            cos, sin = cos.float(), sin.float()
        backend_for(x).rotary(
            x,
            cos.contiguous(),
            sin.contiguous(),
            out=out,
            seqlen_offsets=seqlen_offset if seqlen_offsets is None else seqlen_offsets,
            cu_seqlens=cu_seqlens,
            max_seqlen=max_seqlen,
            interleaved=interleaved,
            conjugate=conjugate,
        )
        return

    positions = _positions(x, seqlen_offsets, seqlen_offset, cu_seqlens)
    if seqlen_offsets is None and cu_seqlens is None and seqlen_offset + x.shape[1] > len(cos):
        raise RuntimeError(
            f"cos and sin must have at least seqlen_offset + seqlen = {seqlen_offset + x.shape[1]} "
            f"rows, got {len(cos)}"
        )
    if cos.shape != sin.shape or 2 * cos.shape[1] > x.shape[-1]:
        raise RuntimeError(
            f"cos and sin must both have shape (positions, rotary_dim / 2) with rotary_dim at most "
            f"head_dim = {x.shape[-1]}, got {tuple(cos.shape)} and {tuple(sin.shape)}"
        )
    dtype = torch.promote_types(x.dtype, torch.float32)
    cos, sin = (table.to(dtype)[positions].unsqueeze(-2) for table in (cos, sin))
    if conjugate:
        sin = -sin
    half, rotary_dim = cos.shape[-1], 2 * cos.shape[-1]
    first, second = (
        (slice(0, rotary_dim, 2), slice(1, rotary_dim, 2))
        if interleaved
        else (slice(0, half), slice(half, rotary_dim))
    )
    x1, x2 = x[..., first].to(dtype), x[..., second].to(dtype)
    rotated1, rotated2 = x1 * cos - x2 * sin, x1 * sin + x2 * cos
    if out is not x:
        out.copy_(x)
    out[..., first] = rotated1.to(x.dtype)
    out[..., second] = rotated2.to(x.dtype)


def _positions(x, seqlen_offsets, seqlen_offset, cu_seqlens) -> Tensor:
    """The position of every row: (1 or b, s), or (t,) with cu_seqlens."""
    if cu_seqlens is None:
        offsets = seqlen_offset if seqlen_offsets is None else seqlen_offsets[:, None]
        return torch.arange(x.shape[1], device=x.device)[None, :] + offsets
    row = torch.arange(x.shape[0], device=x.device)
    # Rows behind the last sequence belong to none: any position that has a row in the tables does.
    sequence = torch.searchsorted(cu_seqlens[1:].to(row.dtype), row, right=True)
    inside = sequence < len(cu_seqlens) - 1
    sequence = sequence.where(inside, 0)
    offsets = seqlen_offset if seqlen_offsets is None else seqlen_offsets[sequence]
    return (row - cu_seqlens[sequence] + offsets).where(inside, 0)


def _contiguous_rows(x: Tensor) -> Tensor:
    return x if x.stride(-1) == 1 else x.contiguous()


@define(f"rotary(Tensor x, Tensor cos, Tensor sin, {_OPTIONS}) -> Tensor", differentiable=True)
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, *options) -> Tensor:
    x = _contiguous_rows(x)
    out = torch.empty_like(x)
    _rotate(x, cos, sin, out, *options)
    return out


@define(f"rotary_(Tensor(a!) x, Tensor cos, Tensor sin, {_OPTIONS}) -> ()")
def _rotary_(x: Tensor, cos: Tensor, sin: Tensor, *options) -> None:
    if x.stride(-1) == 1:
        _rotate(x, cos, sin, x, *options)
    else:
        x.copy_(_rotary(x, cos, sin, *options))


# --------------------------------------------------------------------------------------------------
# Tracing and gradients


@fake("rotary")
def _rotary_fake(x, cos, sin, *options):
    return torch.empty_like(_contiguous_rows(x))


@fake("rotary_")
def _rotary_in_place_fake(x, cos, sin, *options):
    return None


def _setup_context(ctx, inputs, output):
    _, cos, sin, seqlen_offsets, ctx.seqlen_offset, cu_seqlens, *ctx.options = inputs
    ctx.save_for_backward(cos, sin, seqlen_offsets, cu_seqlens)


def _backward(ctx, dout):
    # The gradient of a rotation is its transpose: the same rotation by the negative angle.
    cos, sin, seqlen_offsets, cu_seqlens = ctx.saved_tensors
    max_seqlen, interleaved, conjugate = ctx.options
    dx = torch.ops.flash_attn.rotary(
        dout,
        cos,
        sin,
        seqlen_offsets,
        ctx.seqlen_offset,
        cu_seqlens,
        max_seqlen,
        interleaved,
        not conjugate,
    )
    return dx, *(None,) * 8


torch.library.register_autograd(
    "flash_attn::rotary", _backward, setup_context=_setup_context, lib=library
)

# The parts of a tensor that are rotated: (view, cos, sin) each.
Parts = Callable[[Tensor], list[tuple[Tensor, Tensor, Tensor]]]


class _RotateInPlace(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, parts, options):
        for part, cos, sin in parts(x):
            torch.ops.flash_attn.rotary_(part, cos, sin, **options)
        ctx.parts, ctx.options = parts, options
        if _history_can_be_rewritten(x):
            ctx.mark_dirty(x)
        return x

    @staticmethod
    def backward(ctx, dout):
        options = dict(ctx.options, conjugate=not ctx.options["conjugate"])
        dx = dout.clone(memory_format=torch.contiguous_format)  # others may hold dout
        return _RotateInPlace.apply(dx, ctx.parts, options), None, None


def _history_can_be_rewritten(x: Tensor) -> bool:
    """Whether autograd lets x be marked as changed in place.

    It does not for leaves and for views such as those of unbind and chunk. Then only the tensor
    that is returned knows of the rotation, not x: the gradient through the result is right all the
    same.
    """
    if x.is_leaf:
        return False
    default = torch._C._autograd.CreationMeta.DEFAULT
    return not x._is_view() or torch._C._autograd._get_creation_meta(x) == default


def rotate_in_place(x: Tensor, parts: Parts, options: dict) -> Tensor:
    """Rotates parts of x in place, with a gradient. Returns x, or an alias of it (see above)."""
    if not (torch.is_grad_enabled() and x.requires_grad):
        for part, cos, sin in parts(x):
            torch.ops.flash_attn.rotary_(part, cos, sin, **options)
        if not (torch.compiler.is_compiling() or x.requires_grad or x.is_inference()):
            torch.autograd.graph.increment_version(x)  # a gradient may need x as it was
        return x
    if not torch.compiler.is_compiling():
        return _RotateInPlace.apply(x, parts, options)
    out = x.clone()
    for part, cos, sin in parts(out):
        part.copy_(torch.ops.flash_attn.rotary(part, cos, sin, **options))
    if x.is_leaf:
        x.detach().copy_(out.detach())
        return out
    return x.copy_(out)


def rotary_options(
    x: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    interleaved: bool = False,
    conjugate: bool = False,
) -> dict:
    """The keyword arguments of the operators on x."""
    options = {"interleaved": interleaved, "conjugate": conjugate, "cu_seqlens": cu_seqlens}
    if isinstance(seqlen_offsets, Tensor):
        options["seqlen_offsets"] = seqlen_offsets
    else:
        options["seqlen_offset"] = seqlen_offsets
    if cu_seqlens is not None:
        if max_seqlen is None:
            raise RuntimeError("If cu_seqlens is passed in, then max_seqlen must be passed")
        if isinstance(max_seqlen, Tensor):
            max_seqlen = max_seqlen_of(max_seqlen, x.shape[0])
        options["max_seqlen"] = max_seqlen
    return options


def apply_rotary(
    x: Tensor,
    cos: Tensor,
    sin: Tensor,
    seqlen_offsets: int | Tensor = 0,
    cu_seqlens: Tensor | None = None,
    max_seqlen: int | Tensor | None = None,
    interleaved: bool = False,
    inplace: bool = False,
    conjugate: bool = False,
) -> Tensor:
    """Rotates the first rotary_dim elements of every row of x by the angle of its position.

    With c and s the row of cos and sin at the position, the pair (x1, x2) becomes
    (x1 * c - x2 * s, x1 * s + x2 * c), computed in float32. Differentiable in x.

    Args:
        x: (b, s, h, d), or (t, h, d) with cu_seqlens. Any floating dtype.
        cos, sin: (positions, rotary_dim / 2) with rotary_dim <= d. Any floating dtype.
        seqlen_offsets: the position of the first row of each sequence: int, or (b,) int32 or int64.
        cu_seqlens: (b + 1,), int32: where each sequence begins along t.
        max_seqlen: the greatest length of a sequence; needed with cu_seqlens.
        interleaved: pairs are (2i, 2i + 1) (GPT-J); otherwise (i, i + rotary_dim / 2) (GPT-NeoX).
        inplace: write to x and return it.
        conjugate: rotate by the negative angle, the inverse.

    Returns:
        As x.

    Raises:
        RuntimeError: shapes or dtypes do not fit, or a position has no row in cos and sin.
    """
    options = rotary_options(x, seqlen_offsets, cu_seqlens, max_seqlen, interleaved, conjugate)
    if inplace:
        return rotate_in_place(x, lambda x: [(x, cos, sin)], options)
    return torch.ops.flash_attn.rotary(x, cos, sin, **options)
