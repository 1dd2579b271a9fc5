"""Cross entropy of large vocabularies, optionally spread over processes.

Rows are taken in blocks, so that no copy of the logits in float32 is ever whole in memory.
"""

import torch
import torch.distributed as dist
from torch import Tensor

# Elements of the logits that are worked on at a time: 16 MiB in float32.
_BLOCK_ELEMENTS = 1 << 22


def _row_blocks(logits: Tensor):
    rows = max(1, _BLOCK_ELEMENTS // max(1, logits.shape[1]))
    return (slice(start, start + rows) for start in range(0, logits.shape[0], rows))


class CrossEntropyLoss(torch.autograd.Function):
    """See `cross_entropy_loss`, which calls it."""

    @staticmethod
    def forward(
        ctx,
        logits: Tensor,
        labels: Tensor,
        precomputed_lse: Tensor | None = None,
        smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        ignore_index: int = -100,
        inplace_backward: bool = False,
        process_group=None,
    ) -> tuple[Tensor, Tensor]:
        world_size = 1 if process_group is None else dist.get_world_size(process_group)
        rank = 0 if process_group is None else dist.get_rank(process_group)
        _check(logits, labels, precomputed_lse, ignore_index, world_size)
        num_rows, num_columns = logits.shape
        total_classes = world_size * num_columns
        dtype = torch.promote_types(logits.dtype, torch.float32)

        # The column of each label here; columns of other processes and ignored rows have none.
        column = labels.long() - rank * num_columns
        ignored = labels == ignore_index
        elsewhere = (column < 0) | (column >= num_columns) | ignored
        column = column.masked_fill(elsewhere, 0)

        use_lse = precomputed_lse is not None and logit_scale == 1.0 and smoothing == 0.0
        lse = precomputed_lse.to(dtype) if use_lse else logits.new_empty(num_rows, dtype=dtype)
        target = logits.new_empty(num_rows, dtype=dtype)  # what lse is reduced by to give the loss
        for rows in _row_blocks(logits):
            block = logits[rows].to(dtype) * logit_scale
            if not use_lse:
                lse[rows] = torch.logsumexp(block, dim=-1)
            at_label = block.gather(1, column[rows, None]).squeeze(1)
            at_label = at_label.masked_fill(elsewhere[rows], 0.0)
            target[rows] = (1.0 - smoothing) * at_label
            if smoothing != 0.0:
                target[rows] += block.sum(dim=-1) * (smoothing / total_classes)
        if world_size > 1:
            dist.all_reduce(target, group=process_group)
            if not use_lse:
                parts = [torch.empty_like(lse) for _ in range(world_size)]
                dist.all_gather(parts, lse, group=process_group)
                lse = torch.stack(parts).logsumexp(dim=0)

        z_losses = (lse_square_scale * lse.square()).masked_fill(ignored, 0.0)
        losses = (lse - target).masked_fill(ignored, 0.0) + z_losses
        ctx.save_for_backward(logits, lse, column, elsewhere, ignored)
        ctx.mark_non_differentiable(z_losses)
        ctx.smoothing = smoothing
        ctx.logit_scale = logit_scale
        ctx.lse_square_scale = lse_square_scale
        ctx.total_classes = total_classes
        ctx.inplace_backward = inplace_backward
        return losses, z_losses

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, dlosses: Tensor, _dz_losses: Tensor | None):
        logits, lse, column, elsewhere, ignored = ctx.saved_tensors
        dlogits = logits if ctx.inplace_backward else torch.empty_like(logits)
        dlosses = dlosses.to(lse.dtype).masked_fill(ignored, 0.0) * ctx.logit_scale
        dlse = dlosses * (1.0 + 2.0 * ctx.lse_square_scale * lse)
        dtarget = (dlosses * (1.0 - ctx.smoothing)).masked_fill(elsewhere, 0.0)
        for rows in _row_blocks(logits):
            block = logits[rows].to(lse.dtype) * ctx.logit_scale
            block = torch.exp(block - lse[rows, None]) * dlse[rows, None]
            if ctx.smoothing != 0.0:
                block -= dlosses[rows, None] * (ctx.smoothing / ctx.total_classes)
            block.scatter_add_(1, column[rows, None], -dtarget[rows, None])
            # An ignored row may hold NaN or infinity, of which 0 * exp(...) makes NaN.
            dlogits[rows] = block.masked_fill(ignored[rows, None], 0.0).to(dlogits.dtype)
        return dlogits, None, None, None, None, None, None, None, None


def _check(logits, labels, precomputed_lse, ignore_index, world_size) -> None:
    if logits.dim() != 2 or labels.shape != logits.shape[:1]:
        raise RuntimeError(
            f"logits must have shape (batch, vocab_size) and labels (batch,), "
            f"got {tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    if precomputed_lse is not None and precomputed_lse.shape != labels.shape:
        raise RuntimeError(
            f"precomputed_lse must have shape (batch,), got {tuple(precomputed_lse.shape)}"
        )
    if labels.is_cpu and not torch.compiler.is_compiling():  # elsewhere it would synchronise
        total_classes = world_size * logits.shape[1]
        wrong = ((labels < 0) | (labels >= total_classes)) & (labels != ignore_index)
        if wrong.any():
            raise RuntimeError(
                f"labels must be in [0, {total_classes}) or ignore_index = {ignore_index}, "
                f"got {int(labels[wrong][0])}"
            )


def cross_entropy_loss(
    logits: Tensor,
    labels: Tensor,
    precomputed_lse: Tensor | None = None,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    lse_square_scale: float = 0.0,
    ignore_index: int = -100,
    inplace_backward: bool = False,
    process_group=None,
) -> tuple[Tensor, Tensor]:
    """The cross entropy of each row, computed in float32 (float64 for float64 logits).

    With s = logit_scale * logits and lse = log sum exp(s), both over all classes, a row's loss is
        lse - (1 - label_smoothing) s[label] - label_smoothing mean(s) + lse_square_scale lse^2
    The last term is known as z-loss (PaLM, arXiv:2204.02311).

    Args:
        logits: (batch, vocab_size); with process_group this process's part of the vocabulary.
        labels: (batch,), integers in [0, vocab_size of all processes), or ignore_index.
        precomputed_lse: (batch,): lse, if it is known; used without smoothing and scale only.
        label_smoothing: the share of the target that is spread evenly over all classes.
        logit_scale: see above.
        lse_square_scale: see above.
        ignore_index: rows with this label have loss and gradient 0.
        inplace_backward: overwrite the logits with their gradient. Saves memory; nothing else may
            need them.
        process_group: the processes that hold the parts of the vocabulary, equal in size and in the
            order of their ranks. All get the same losses.

    Returns:
        losses: (batch,).
        z_losses: (batch,), the z-loss within each, for logging: it has no gradient.

    Raises:
        RuntimeError: shapes do not fit, or (on the CPU) a label is out of range.
    """
    return CrossEntropyLoss.apply(
        logits,
        labels,
        precomputed_lse,
        label_smoothing,
        logit_scale,
        lse_square_scale,
        ignore_index,
        inplace_backward,
        process_group,
    )
