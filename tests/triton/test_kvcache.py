"""The cache function and rotary: append, rotation, pages, and lengths that are wrong."""

import pytest
import reference
import torch
from checks import FP16, FP32, assert_attention_close, assert_close

import flash_attn
from flash_attn.backends.flaggems import embedding
from flash_attn.layers.rotary import apply_rotary_emb


def _tables(positions, half, dtype):
    angles = torch.rand(positions, half)
    return angles.cos().to(dtype), angles.sin().to(dtype)


@pytest.mark.parametrize("interleaved", (False, True), ids=("halves", "interleaved"))
@pytest.mark.parametrize(
    "sq, where, options",
    [
        (1, "rows", {"causal": True}),
        (3, "rows", {}),
        (1, "index", {"window_size": (20, 0)}),
        (2, "pages", {"causal": True, "num_splits": 2}),
        (1, "padded", {"softcap": 5.0}),
    ],
    ids=("decode", "several", "index", "pages", "padded"),
)
@pytest.mark.parametrize("dtype, head_dim", [(FP32, 40), (FP16, 64)])
def test_append_rotate_attend(dtype, head_dim, sq, where, options, interleaved):
    lengths = torch.tensor([37, 0, 61]).int()
    q = torch.randn(3, sq, 4, head_dim).to(dtype)
    k, v = torch.randn(2, 3, 3, 2, head_dim).to(dtype)
    tables = _tables(80, 8, dtype)
    place = {}
    shape = (3, 80)
    if where == "index":
        shape, place = (5, 80), {"cache_batch_idx": torch.tensor([4, 0, 2]).int()}
    elif where == "pages":
        shape, place = (17, 16), {"block_table": torch.randperm(17)[:15].view(3, 5).int()}
    elif where == "padded":
        place = {"cache_leftpad": torch.tensor([5, 0, 64]).int()}
    caches = torch.randn(2, *shape, 2, head_dim).to(dtype)
    before = caches.clone()
    actual = flash_attn.flash_attn_with_kvcache(
        *(q, *caches, k, v, *tables),
        cache_seqlens=lengths,
        rotary_interleaved=interleaved,
        return_softmax_lse=True,
        **place,
        **options,
    )
    rotary = {"rotary_cos": tables[0], "rotary_sin": tables[1], "rotary_interleaved": interleaved}
    expected = {name: x for name, x in options.items() if name != "num_splits"}
    assert_attention_close(
        actual,
        reference.kvcache_attention,
        (q, *before, k, v),
        lse_dtype=dtype,
        cache_seqlens=lengths,
        **rotary,
        **place,
        **expected,
    )
    place.pop("cache_leftpad", None)
    wanted = reference.kvcache_append(*before, k, v, cache_seqlens=lengths, **rotary, **place)
    naive = reference.kvcache_append(
        *before, k, v, cache_seqlens=lengths, **rotary, **place, dtype=dtype
    )
    assert_close(caches[0], wanted[0], naive[0], "k_cache")
    assert torch.equal(caches[1].double(), wanted[1])


def test_nothing_is_written_outside_the_cache():
    """Lengths, pages and rows that are wrong are not seen on the host when they are on a device."""
    k, v = torch.randn(2, 3, 4, 1, 16)
    caches = torch.zeros(2, 3, 10, 1, 16)
    lengths = torch.tensor([8, -2, 2**30]).int()
    embedding.append(k, v, *caches, lengths, None, None, True, None, None)
    assert torch.equal(caches[0, 0, 8:], k[0, :2]) and torch.equal(caches[1, 0, 8:], v[0, :2])
    assert torch.equal(caches[0, 1, :2], k[1, 2:])
    assert torch.count_nonzero(caches[:, 0, :8]) == torch.count_nonzero(caches[:, 1, 2:]) == 0
    assert torch.count_nonzero(caches[:, 2]) == 0

    caches.zero_()
    rows = torch.tensor([3, -1, 1]).int()
    lengths = torch.zeros(3).int()
    embedding.append(k, v, *caches, lengths, None, None, True, rows, None)
    assert torch.equal(caches[0, 1, :4], k[2])
    assert torch.count_nonzero(caches[:, [0, 2]]) == 0

    caches.zero_()
    table = torch.tensor([[5], [-1], [2]]).int()
    embedding.append(k, v, *caches, lengths, None, None, True, None, table)
    assert torch.equal(caches[0, 2, :4], k[2])
    assert torch.count_nonzero(caches[:, :2]) == 0


@pytest.mark.parametrize("conjugate", (False, True))
@pytest.mark.parametrize("interleaved", (False, True))
@pytest.mark.parametrize("inplace", (False, True))
@pytest.mark.parametrize("head_dim, half", [(24, 5), (64, 32)])
def test_rotary(head_dim, half, inplace, interleaved, conjugate):
    x = torch.randn(2, 37, 3, head_dim)
    cos, sin = _tables(50, half, FP32)
    offsets = torch.tensor([0, 11])
    given = x.clone()
    from flash_attn.backends import flaggems

    out = flaggems.rotary(
        given,
        cos,
        sin,
        out=given if inplace else None,
        seqlen_offsets=offsets,
        interleaved=interleaved,
        conjugate=conjugate,
    )
    for i in range(2):
        wanted, naive = (
            reference.apply_rotary(
                x[i],
                cos,
                sin,
                positions=torch.arange(37) + offsets[i],
                interleaved=interleaved,
                conjugate=conjugate,
                dtype=dtype,
            )
            for dtype in (torch.float64, FP32)
        )
        assert_close(out[i], wanted, naive, "out")
    assert (out.data_ptr() == given.data_ptr()) == inplace
    assert inplace or torch.equal(given, x)


@pytest.mark.parametrize("interleaved", (False, True))
def test_rotary_of_sequences_and_its_gradient(interleaved):
    x = torch.randn(50, 2, 16, requires_grad=True)
    cos, sin = _tables(40, 6, FP32)
    cu = torch.tensor([0, 7, 7, 44]).int()
    out = apply_rotary_emb(x, cos, sin, interleaved, cu_seqlens=cu, max_seqlen=37)
    wanted = x.detach().double()
    for begin, end in ((0, 7), (7, 44)):
        wanted[begin:end] = reference.apply_rotary(
            x[begin:end].detach(), cos, sin, positions=range(end - begin), interleaved=interleaved
        )
    torch.testing.assert_close(out.double(), wanted)
    (gradient,) = torch.autograd.grad(out, x, out.detach())  # a rotation back
    torch.testing.assert_close(gradient, x)
