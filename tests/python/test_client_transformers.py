"""The imports and calls of transformers, as it makes them."""

import inspect

import pytest
import reference
import torch
from checks import BF16, DEVICE, FP32, cumulative, randn
from client_calls import BATCH, HEAD_DIM, HEADS, HEADS_K, check_out, qkv

import flash_attn


def test_transformers_discovers_what_is_supported():
    # Its names on the left, where they differ ours on the right.
    wanted = {
        "dropout": "dropout_p",
        "sliding_window": "window_size",
        "softmax_scale": "softmax_scale",
        "softcap": "softcap",
        "deterministic": "deterministic",
        "s_aux": "s_aux",
        "max_seqlen_q": "max_seqlen_q",
        "max_seqlen_k": "max_seqlen_k",
    }
    for function in (flash_attn.flash_attn_varlen_func, flash_attn.flash_attn_func):
        parameters = inspect.signature(function).parameters
        kinds = {parameter.kind for parameter in parameters.values()}
        assert kinds == {inspect.Parameter.POSITIONAL_OR_KEYWORD}
        names = set(wanted.values())
        if function is flash_attn.flash_attn_func:
            names -= {"max_seqlen_q", "max_seqlen_k"}
        assert names <= set(parameters)
    assert "block_table" in inspect.signature(flash_attn.flash_attn_with_kvcache).parameters
    assert "page_table" not in inspect.signature(flash_attn.flash_attn_with_kvcache).parameters


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("decode", [False, True], ids=["prefill", "decode"])
def test_transformers_padded_batch(decode, side):
    from flash_attn.bert_padding import index_first_axis, pad_input, unpad_input

    lengths, seqlen, window = [19, 7], 19, 6
    position = torch.arange(seqlen)
    mask = torch.stack(
        [position >= seqlen - n if side == "left" else position < n for n in lengths]
    ).long()
    query_length = 1 if decode else seqlen
    q, k, v = qkv(seqlen, dtype=BF16)
    sinks = torch.randn(HEADS).to(BF16)

    # _upad_input
    seqlens = mask.sum(dim=-1, dtype=torch.int32)
    indices_k = torch.nonzero(mask.flatten(), as_tuple=False).flatten()
    cu_seqlens_k = torch.nn.functional.pad(torch.cumsum(seqlens, dim=0, dtype=torch.int32), (1, 0))
    k_unpad = index_first_axis(k.reshape(BATCH * seqlen, HEADS_K, HEAD_DIM), indices_k)
    v_unpad = index_first_axis(v.reshape(BATCH * seqlen, HEADS_K, HEAD_DIM), indices_k)
    if decode:
        q = q[:, -1:]
        cu_seqlens_q = torch.arange(BATCH + 1, dtype=torch.int32)
        indices_q, max_seqlen_q, q_unpad = cu_seqlens_q[:-1], 1, q.squeeze(1)
    else:
        q_unpad, indices_q, cu_seqlens_q, max_seqlen_q, *_ = unpad_input(q, mask)
    out = flash_attn.flash_attn_varlen_func(
        q_unpad,
        k_unpad,
        v_unpad,
        cu_seqlens_q=cu_seqlens_q,
        cu_seqlens_k=cu_seqlens_k,
        max_seqlen_q=max_seqlen_q,
        max_seqlen_k=seqlens.max(),  # a 0-d tensor
        causal=True,
        softmax_scale=HEAD_DIM**-0.5,
        dropout_p=0.0,
        window_size=(window - 1, window - 1),
        deterministic=False,
        softcap=30.0,
        s_aux=sinks,
    )
    padded = pad_input(out, indices_q, BATCH, query_length)
    assert padded.shape == q.shape
    for row, keep in enumerate(mask.bool()):
        q_row = q[row : row + 1] if decode else q[row : row + 1, keep]
        got = padded[row : row + 1] if decode else padded[row : row + 1, keep]
        options = {"window_size": (window - 1, 0), "softcap": 30.0, "s_aux": sinks}
        check_out(
            got, q_row, k[row : row + 1, keep], v[row : row + 1, keep], causal=True, **options
        )


def test_transformers_packed_by_position_ids():
    q, k, v = qkv(12, batch=1)
    position_ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2, 3, 0, 1, 2]])
    flat = position_ids.flatten()
    starts = torch.arange(12, dtype=torch.int32)[flat == 0]
    cu_seqlens = torch.cat((starts, torch.tensor(flat.size(), dtype=torch.int32)))
    max_length = flat.max() + 1  # a 0-d int64 tensor
    out = flash_attn.flash_attn_varlen_func(
        q.view(-1, HEADS, HEAD_DIM),
        k.contiguous().view(-1, HEADS_K, HEAD_DIM),
        v.contiguous().view(-1, HEADS_K, HEAD_DIM),
        cu_seqlens_q=cu_seqlens,
        cu_seqlens_k=cu_seqlens,
        max_seqlen_q=max_length,
        max_seqlen_k=max_length,
        causal=True,
    ).view(1, -1, HEADS, HEAD_DIM)
    for part in (slice(0, 5), slice(5, 9), slice(9, 12)):
        check_out(out[:, part], q[:, part], k[:, part], v[:, part], causal=True)


def test_transformers_dense():
    q, k, v = qkv(8, 19, dtype=BF16)
    out = flash_attn.flash_attn_func(
        q,
        k,
        v,
        causal=True,
        softmax_scale=0.2,
        dropout_p=0.0,
        deterministic=False,
        window_size=(4, 4),
    )
    check_out(out, q, k, v, causal=True, softmax_scale=0.2, window_size=(4, 0))


@pytest.mark.parametrize("window", [(-1, -1), (4, 0)], ids=["full", "window"])
@pytest.mark.parametrize("page_size", [16, 256])
def test_transformers_continuous_batching(page_size, window):
    lengths = [21, 5, 40]  # keys in the cache; one more comes now
    batch, pages = len(lengths), 12
    cache = torch.randn(2, pages * page_size, HEADS_K, HEAD_DIM).to(BF16)
    k_cache, v_cache = (c.view(-1, page_size, HEADS_K, HEAD_DIM) for c in cache)
    needed = [n // page_size + 1 for n in lengths]
    block_table = torch.full((batch, max(needed) + 2), -1, dtype=torch.int32)  # -1: no page
    free = iter(torch.randperm(pages).tolist())
    for row, count in enumerate(needed):
        block_table[row, :count] = torch.tensor([next(free) for _ in range(count)])
    q = torch.randn(1, HEADS, batch, HEAD_DIM).to(BF16)
    k, v = (torch.randn(1, HEADS_K, batch, HEAD_DIM).to(BF16) for _ in range(2))
    sinks = torch.randn(HEADS)

    def contents(row, length):
        page_numbers = block_table[row, : needed[row]].long()
        return [c[page_numbers].flatten(0, 1)[None, :length].clone() for c in (k_cache, v_cache)]

    before = [contents(row, length) for row, length in enumerate(lengths)]
    cu_seq_lens_k = cumulative(*[n + 1 for n in lengths])
    q_in, k_in, v_in = (x.permute(2, 0, 1, 3).contiguous() for x in (q, k, v))
    out = flash_attn.flash_attn_with_kvcache(
        q=q_in,
        k_cache=k_cache,
        v_cache=v_cache,
        k=k_in,
        v=v_in,
        cache_seqlens=(cu_seq_lens_k[1:] - cu_seq_lens_k[:-1] - 1).to(torch.int32),
        softmax_scale=0.2,
        causal=True,
        window_size=window,
        block_table=block_table,
        s_aux=sinks,
    )
    assert out.shape == (batch, 1, HEADS, HEAD_DIM)
    for row, length in enumerate(lengths):
        keys, values = contents(row, length + 1)
        assert torch.equal(keys, torch.cat([before[row][0], k_in[row : row + 1]], dim=1))
        assert torch.equal(values, torch.cat([before[row][1], v_in[row : row + 1]], dim=1))
        options = {"softmax_scale": 0.2, "window_size": window, "s_aux": sinks}
        check_out(out[row : row + 1], q_in[row : row + 1], keys, values, causal=True, **options)


def test_transformers_continuous_batching_prefill():
    lengths_q, lengths_k = [5, 1, 3], [9, 21, 3]
    q = randn(1, HEADS, sum(lengths_q), HEAD_DIM)
    k, v = (randn(sum(lengths_k), HEADS_K, HEAD_DIM) for _ in range(2))
    cu_q, cu_k = cumulative(*lengths_q), cumulative(*lengths_k)
    packed = q.transpose(1, 2).squeeze(0).contiguous()
    out = flash_attn.flash_attn_varlen_func(
        packed,
        k,
        v,
        cu_q.to(torch.int32),
        cu_k.to(torch.int32).clone(),
        max(lengths_q),
        max(lengths_k),
        softmax_scale=0.2,
        causal=True,
        window_size=(-1, -1),
        s_aux=None,
    )
    for row in range(3):
        rows, keys = slice(*cu_q[row : row + 2]), slice(*cu_k[row : row + 2])
        options = {"causal": True, "softmax_scale": 0.2}
        check_out(out[None, rows], packed[None, rows], k[None, keys], v[None, keys], **options)


def test_transformers_older_rotary():
    from flash_attn.layers.rotary import apply_rotary_emb

    # Qwen2-VL's vision tower: float32, halves of cos and sin.
    angle = torch.rand(19, HEAD_DIM // 2).repeat(1, 2)
    cos, sin = (t.chunk(2, dim=-1)[0].contiguous() for t in (angle.cos(), angle.sin()))
    x = torch.randn(1, 19, HEADS, HEAD_DIM).to(BF16)
    out = apply_rotary_emb(x.float(), cos.float(), sin.float()).type_as(x)
    expected = reference.apply_rotary(x[0], cos, sin, positions=torch.arange(19))
    torch.testing.assert_close(out[0], expected.to(BF16), rtol=0.01, atol=0.01)


def test_transformers_modernbert_rotary():
    from flash_attn.layers.rotary import RotaryEmbedding
    from flash_attn.ops.triton.rotary import apply_rotary

    class UnpaddedEmbedding(RotaryEmbedding):
        def __init__(self, dim, base, max_seqlen=None, device=None, dtype=None):
            super().__init__(dim=dim, base=base, device=device, interleaved=False)
            if max_seqlen is not None and dtype is not None:
                self._update_cos_sin_cache(max_seqlen, device=DEVICE, dtype=dtype)

    embedding = UnpaddedEmbedding(HEAD_DIM, 160000.0, max_seqlen=13, dtype=FP32)
    cu_seqlens = cumulative(13, 4)
    packed = torch.randn(17, 3, HEADS, HEAD_DIM)
    rotated = packed.clone()
    apply_rotary(
        rotated[:, :2].view(17, -1, HEAD_DIM),
        embedding._cos_cached,
        embedding._sin_cached,
        seqlen_offsets=0,
        cu_seqlens=cu_seqlens,
        max_seqlen=13,
        interleaved=False,
        inplace=True,
    )
    expected = embedding(packed.clone(), cu_seqlens=cu_seqlens, max_seqlen=13)
    assert torch.equal(rotated, expected)
