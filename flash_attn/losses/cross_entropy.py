"""Cross entropy as a module."""

from torch import Tensor, nn

from flash_attn.ops.cross_entropy import cross_entropy_loss


class CrossEntropyLoss(nn.Module):
    """`flash_attn.ops.cross_entropy.cross_entropy_loss`, reduced.

    Args:
        ignore_index: rows with this label have loss 0 and do not count in a mean.
        reduction: "mean", "sum" or "none".
        label_smoothing: the share of the target that is spread evenly over all classes.
        logit_scale: what logits are multiplied with first.
        lse_square_scale: lse_square_scale * lse ** 2 is added to the loss (z-loss).
        inplace_backward: overwrite the logits with their gradient.
        process_group: the processes that hold the parts of the vocabulary (tensor parallelism).
        return_z_loss: return the z-loss beside the loss, for logging.

    Raises:
        ValueError: another reduction.
    """

    def __init__(
        self,
        ignore_index: int = -100,
        reduction: str = "mean",
        label_smoothing: float = 0.0,
        logit_scale: float = 1.0,
        lse_square_scale: float = 0.0,
        inplace_backward: bool = False,
        process_group=None,
        return_z_loss: bool = False,
    ):
        super().__init__()
        if reduction not in ("mean", "none", "sum"):
            raise ValueError(f"reduction must be 'mean', 'none' or 'sum', got {reduction!r}")
        self.ignore_index = ignore_index
        self.reduction = reduction
        self.label_smoothing = label_smoothing
        self.logit_scale = logit_scale
        self.lse_square_scale = lse_square_scale
        self.inplace_backward = inplace_backward
        self.process_group = process_group
        self.return_z_loss = return_z_loss

    def forward(
        self, input: Tensor, target: Tensor, precomputed_lse: Tensor | None = None
    ) -> Tensor | tuple[Tensor, Tensor]:
        """input (batch, vocab_size), target (batch,).

        Returns:
            The loss: () or, with reduction "none", (batch,); with return_z_loss a pair with the
            z-loss. The mean over no rows at all is NaN, as torch's.
        """
        losses = cross_entropy_loss(
            input,
            target,
            precomputed_lse=precomputed_lse,
            label_smoothing=self.label_smoothing,
            logit_scale=self.logit_scale,
            lse_square_scale=self.lse_square_scale,
            ignore_index=self.ignore_index,
            inplace_backward=self.inplace_backward,
            process_group=self.process_group,
        )
        if self.reduction != "none":
            losses = tuple(loss.sum() for loss in losses)
        if self.reduction == "mean":
            count = (target != self.ignore_index).sum()
            losses = tuple(loss / count for loss in losses)
        return losses if self.return_z_loss else losses[0]
