"""Packing and unpacking of padded batches: values, gradients, corner cases."""

import builtins
import sys

import pytest
import torch

from flash_attn import bert_padding
from flash_attn.bert_padding import (
    index_first_axis,
    index_first_axis_residual,
    index_put_first_axis,
    pad_input,
    unpad_input,
    unpad_input_for_concatenated_sequences,
)

MASKS = {
    "right": [[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]],
    "left": [[0, 0, 1, 1, 1], [1, 1, 1, 1, 1], [0, 0, 0, 0, 1]],
    "holes": [[1, 0, 1, 0, 1], [0, 1, 1, 1, 0], [0, 0, 1, 0, 0]],
    "empty_sequence": [[1, 1, 0, 0, 0], [0, 0, 0, 0, 0], [1, 1, 1, 0, 0]],
    "nothing": [[0, 0, 0, 0, 0]] * 3,
    "everything": [[1, 1, 1, 1, 1]] * 3,
}


@pytest.mark.parametrize("dtype", [torch.bool, torch.int32, torch.int64], ids=str)
@pytest.mark.parametrize("shape", [(), (4,), (2, 3)], ids=["no_features", "features", "heads"])
@pytest.mark.parametrize("name", MASKS)
def test_round_trip(name, shape, dtype):
    mask = torch.tensor(MASKS[name], dtype=dtype)
    x = torch.randn(*mask.shape, *shape)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)

    lengths = mask.bool().sum(-1)
    assert torch.equal(packed, x[mask.bool()])
    assert torch.equal(indices, mask.bool().flatten().nonzero().flatten())
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, *lengths.cumsum(0).tolist()]
    assert type(max_seqlen) is int and max_seqlen == lengths.max()
    assert seqused.dtype == torch.int32 and torch.equal(seqused, lengths.int())

    padded = pad_input(packed, indices, *mask.shape)
    keep = mask.bool().reshape(*mask.shape, *[1] * len(shape))
    assert torch.equal(padded, x.where(keep, 0.0))


def test_unused_tokens_have_a_place_and_are_not_counted():
    mask = torch.tensor([[1, 1, 0, 0], [1, 0, 0, 0]])
    unused = torch.tensor([[0, 0, 1, 0], [0, 1, 1, 1]])
    x = torch.arange(8.0).reshape(2, 4, 1)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask, unused)
    assert packed.flatten().tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert indices.tolist() == [0, 1, 2, 4, 5, 6, 7]
    assert cu_seqlens.tolist() == [0, 3, 7]
    assert max_seqlen == 4
    assert seqused.tolist() == [2, 1]
    results = unpad_input(x, mask.bool(), unused_mask=unused.bool())
    assert torch.equal(results[0], packed) and torch.equal(results[4], seqused)


def test_concatenated_sequences():
    lengths = torch.tensor([[2, 3, 0, 0, 0, 0], [3, 2, 0, 0, 0, 0], [6, 0, 0, 0, 0, 0]])
    x = torch.randn(3, 6, 4)
    packed, indices, cu_seqlens, max_seqlen = unpad_input_for_concatenated_sequences(x, lengths)
    assert torch.equal(packed, torch.cat([x[0, :5], x[1, :5], x[2]]))
    assert indices.tolist() == [*range(5), *range(6, 11), *range(12, 18)]
    assert cu_seqlens.dtype == torch.int32
    assert cu_seqlens.tolist() == [0, 2, 5, 8, 10, 16]
    assert max_seqlen == 6


def test_empty_batch():
    x, mask = torch.randn(0, 5, 2), torch.ones(0, 5, dtype=torch.bool)
    packed, indices, cu_seqlens, max_seqlen, seqused = unpad_input(x, mask)
    assert packed.shape == (0, 2) and indices.shape == (0,) and seqused.shape == (0,)
    assert cu_seqlens.tolist() == [0] and max_seqlen == 0
    assert pad_input(packed, indices, 0, 5).shape == (0, 5, 2)


@pytest.mark.cpu  # one element after the other
def test_gradients():
    mask = torch.tensor(MASKS["holes"])
    x = torch.randn(3, 5, 2, dtype=torch.float64, requires_grad=True)
    indices = mask.flatten().nonzero().flatten()
    rows = torch.randn(15, 2, dtype=torch.float64, requires_grad=True)
    values = torch.randn(len(indices), 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: unpad_input(x, mask)[0], x)
    assert torch.autograd.gradcheck(lambda v: pad_input(v, indices, 3, 5), values)
    assert torch.autograd.gradcheck(lambda r: index_first_axis(r, indices), rows)
    assert torch.autograd.gradcheck(lambda r: index_first_axis_residual(r, indices), rows)
    assert torch.autograd.gradcheck(lambda v: index_put_first_axis(v, indices, 15), values)


def test_residual_is_the_input():
    rows = torch.randn(6, 2)
    taken, residual = index_first_axis_residual(rows, torch.tensor([4, 0]))
    assert torch.equal(taken, rows[[4, 0]])
    assert torch.equal(residual, rows)


def test_int32_indices():
    # transformers passes cu_seqlens[:-1], int32, when it decodes.
    values = torch.randn(3, 2)
    indices = torch.arange(3, dtype=torch.int32)
    assert torch.equal(pad_input(values, indices, 3, 1), values[:, None])
    assert torch.equal(index_first_axis(values, indices), values)


def test_einops_functions():
    einops = pytest.importorskip("einops")
    from flash_attn.bert_padding import rearrange, repeat

    assert rearrange is einops.rearrange and repeat is einops.repeat


def test_einops_is_not_needed(monkeypatch):
    import_module = builtins.__import__

    def without_einops(name, *args, **kwargs):
        if name == "einops":
            raise ImportError(name)
        return import_module(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", without_einops)
    monkeypatch.delitem(sys.modules, "einops", raising=False)
    with pytest.raises(ImportError, match="install einops"):
        bert_padding.rearrange  # noqa: B018
    with pytest.raises(AttributeError, match="no attribute 'reduce'"):
        bert_padding.reduce  # noqa: B018
