"""The name under which other libraries import these; nothing here needs Triton."""

from flash_attn.ops.cross_entropy import CrossEntropyLoss, cross_entropy_loss

__all__ = ["CrossEntropyLoss", "cross_entropy_loss"]
