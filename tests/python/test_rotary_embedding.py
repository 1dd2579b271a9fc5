"""The module `RotaryEmbedding`."""

import torch
from rotary_checks import check_rotation

from flash_attn.layers.rotary import (
    RotaryEmbedding,
)


def test_embedding_angles():
    embedding = RotaryEmbedding(8, base=100.0, interleaved=True)
    x = torch.randn(2, 7, 2, 8)
    q, _ = embedding(x.clone(), torch.randn(2, 7, 2, 2, 8), seqlen_offset=3)
    angle = torch.outer(torch.arange(10.0), 100.0 ** (-torch.arange(0, 8, 2) / 8))
    check_rotation(q, x, angle.cos(), angle.sin(), offsets=3, interleaved=True)


def test_embedding_forms_agree():
    embedding = RotaryEmbedding(16)
    qkv = torch.randn(2, 7, 3, 4, 16)
    out = embedding(qkv.clone())
    q, kv = embedding(qkv[:, :, 0].clone(), qkv[:, :, 1:].clone())
    assert torch.equal(out[:, :, 0], q) and torch.equal(out[:, :, 1:], kv)
    grouped = embedding(qkv.flatten(2, 3).clone(), num_heads_q=4)
    assert torch.equal(grouped, out.flatten(2, 3))
    offsets = torch.tensor([3, 8])
    by_tensor = embedding(qkv.clone(), seqlen_offset=offsets)
    assert torch.equal(by_tensor, embedding(qkv.clone(), seqlen_offset=offsets, max_seqlen=40))
    for row, offset in enumerate(offsets.tolist()):
        assert torch.equal(by_tensor[row], embedding(qkv.clone(), seqlen_offset=offset)[row])
    cu_seqlens = torch.tensor([0, 7, 14], dtype=torch.int32)
    packed = embedding(qkv.flatten(0, 1).clone(), cu_seqlens=cu_seqlens, max_seqlen=7)
    assert torch.equal(packed, out.flatten(0, 1))


def test_embedding_works_in_place():
    qkv = torch.randn(2, 7, 3, 4, 16)
    assert RotaryEmbedding(16)(qkv) is qkv


def test_embedding_depends_on_distance_only():
    for scale_base in (None, 64):
        embedding = RotaryEmbedding(16, scale_base=scale_base)
        q, k = torch.randn(1, 1, 1, 16), torch.randn(1, 1, 1, 16)
        rows = torch.stack([q, k, k], dim=2).expand(1, 40, 3, 1, 16).clone()
        q, k, v = embedding(rows)[0, :, :, 0].unbind(1)
        scores = q @ k.T
        for distance in (1, 5, 20):
            diagonal = scores.diagonal(distance)
            torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal))
        assert torch.equal(v, v[:1].expand_as(v))


def test_embedding_keeps_float32_angles_when_it_is_cast():
    embedding, reference_embedding = RotaryEmbedding(16).to(torch.bfloat16), RotaryEmbedding(16)
    x = torch.randn(1, 700, 3, 1, 16)
    embedding(x.to(torch.bfloat16))
    reference_embedding(x.clone())
    assert torch.equal(embedding._cos_cached, reference_embedding._cos_cached.to(torch.bfloat16))
    assert not embedding.state_dict()


def test_embedding_tables_grow_and_follow_the_dtype():
    embedding = RotaryEmbedding(16)
    embedding(torch.randn(1, 5, 3, 1, 16))
    first = embedding._cos_cached
    embedding(torch.randn(1, 3, 3, 1, 16))
    assert embedding._cos_cached is first
    embedding(torch.randn(1, 9, 3, 1, 16))
    assert embedding._cos_cached.shape == (9, 8)
    embedding(torch.randn(1, 9, 3, 1, 16).to(torch.bfloat16))
    assert embedding._cos_cached.dtype == torch.bfloat16


def test_embedding_made_in_inference_mode_trains():
    embedding = RotaryEmbedding(16)
    with torch.inference_mode():
        embedding(torch.randn(1, 9, 3, 1, 16))
    x = torch.randn(1, 9, 3, 1, 16, requires_grad=True)
    embedding(x * 1).sum().backward()
