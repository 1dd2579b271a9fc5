"""What a generation loop passes to the layers of a model."""

from dataclasses import dataclass, field

from torch import Tensor


@dataclass
class InferenceParams:
    """The state of a generation: one key and value cache for each layer, and how full they are.

    The loop that generates adds to `seqlen_offset` the number of tokens that it has passed to the
    model; the layers only read it.

    Attributes:
        max_seqlen: positions of a cache.
        max_batch_size: rows of a cache.
        seqlen_offset: tokens already in the caches; 0 while the prompt is read.
        batch_size_offset: the row of the cache of the batch's first sequence.
        key_value_memory_dict: layer_idx to cache (max_batch_size, max_seqlen, 2, hk, d). A layer
            makes its cache when it first needs it.
        lengths_per_sample: (batch,), int32: tokens in the cache of each sequence, where they
            differ. While seqlen_offset > 0 they count in its place.
    """

    max_seqlen: int
    max_batch_size: int
    seqlen_offset: int = 0
    batch_size_offset: int = 0
    key_value_memory_dict: dict = field(default_factory=dict)
    lengths_per_sample: Tensor | None = None

    def reset(self, max_seqlen: int, max_batch_size: int) -> None:
        """Begins another generation with the same caches."""
        self.max_seqlen = max_seqlen
        self.max_batch_size = max_batch_size
        self.seqlen_offset = 0
        if self.lengths_per_sample is not None:
            self.lengths_per_sample.zero_()
