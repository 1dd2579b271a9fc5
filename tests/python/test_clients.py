"""The imports and calls of the libraries that use flash_attn, one group for each.

A test makes a client's calls as the client makes them: positionally, by keyword, through
inspection, in its shapes. What the functions compute is tested elsewhere; here the results are
compared with the reference only so far that an argument in the wrong place would show.
"""

import inspect

import pytest
import reference
import torch
from checks import BF16, FP32, cumulative, randn
from client_calls import BATCH, HEAD_DIM, HEADS, HEADS_K, check_out, qkv

import flash_attn
from flash_attn import flash_attn_interface

# --------------------------------------------------------------------------------------------------
# Megatron-LM


@pytest.mark.parametrize("position", [0, 5])
def test_megatron_static_decoding(position):
    # Everything is (s, b, h, d) there; rotary tables go in the dtype of the query.
    q, k, v = (x.transpose(0, 1).contiguous() for x in qkv(1, dtype=BF16))
    k_memory, v_memory = (torch.zeros(24, BATCH, HEADS_K, HEAD_DIM).to(BF16) for _ in range(2))
    past = torch.randn(2, position, BATCH, HEADS_K, HEAD_DIM).to(BF16)
    k_memory[:position], v_memory[:position] = past
    angle = torch.rand(24, HEAD_DIM // 2)
    cos, sin = angle.cos().to(BF16), angle.sin().to(BF16)
    out = flash_attn.flash_attn_with_kvcache(
        q=q.permute(1, 0, 2, 3),
        k_cache=k_memory.permute(1, 0, 2, 3),
        v_cache=v_memory.permute(1, 0, 2, 3),
        k=k.permute(1, 0, 2, 3),
        v=v.permute(1, 0, 2, 3),
        rotary_cos=cos,
        rotary_sin=sin,
        cache_seqlens=torch.full((BATCH,), position, dtype=torch.int32),
        rotary_interleaved=False,
    )
    assert torch.equal(v_memory[position], v[0])
    for row in range(BATCH):
        rotated = reference.apply_rotary(q[:, row], cos, sin, positions=[position]).to(BF16)
        keys, values = (m[: position + 1, row][None] for m in (k_memory, v_memory))
        check_out(out[row : row + 1], rotated[None], keys, values)


def test_megatron_dynamic_batching():
    page_size, lengths_q, lengths_k = 8, [3, 1], [11, 20]
    k, v = (randn(6, page_size, HEADS_K, HEAD_DIM) for _ in range(2))
    block_table = torch.tensor([[3, 1, 0], [5, 0, 2]], dtype=torch.int32)
    q = randn(4, HEADS, HEAD_DIM)
    prefill = flash_attn.flash_attn_varlen_func(
        q,
        k,
        v,
        cumulative(*lengths_q),
        cumulative(*lengths_k),
        3,
        20,
        softmax_scale=0.2,
        causal=True,
        block_table=block_table,
    ).unsqueeze(1)
    decode = flash_attn.flash_attn_with_kvcache(
        q=q[2:].unsqueeze(1),
        k_cache=k,
        v_cache=v,
        cache_seqlens=torch.tensor(lengths_k, dtype=torch.int32),
        causal=True,
        block_table=block_table,
    ).squeeze(1)
    for row, (rows, length) in enumerate(zip((slice(0, 3), slice(3, 4)), lengths_k, strict=True)):
        keys, values = (t[block_table[row].long()].flatten(0, 1)[None, :length] for t in (k, v))
        check_out(
            prefill[rows, 0][None], q[None, rows], keys, values, causal=True, softmax_scale=0.2
        )
        check_out(
            decode[None, row : row + 1], q[None, row + 2 : row + 3], keys, values, causal=True
        )


def test_megatron_rotary():
    from flash_attn.layers.rotary import apply_rotary_emb as apply_rotary_emb_flash

    t = torch.randn(19, BATCH, HEADS, HEAD_DIM)
    angle = torch.rand(19, HEAD_DIM // 2)
    out = apply_rotary_emb_flash(t.permute(1, 0, 2, 3), angle.cos(), angle.sin(), False)
    out = out.permute(1, 0, 2, 3)
    expected = reference.apply_rotary(t[:, 1], angle.cos(), angle.sin(), positions=torch.arange(19))
    torch.testing.assert_close(out[:, 1], expected.float())


# --------------------------------------------------------------------------------------------------
# vLLM, verl, axolotl, OLMo-core


def test_vllm_rotary():
    from flash_attn.ops.triton.rotary import apply_rotary

    x, angle = torch.randn(19, HEADS, HEAD_DIM), torch.rand(19, HEAD_DIM // 2)
    out = apply_rotary(x.unsqueeze(0), angle.cos(), angle.sin()).squeeze(0)
    expected = reference.apply_rotary(x, angle.cos(), angle.sin(), positions=torch.arange(19))
    torch.testing.assert_close(out, expected.float())


def test_verl():
    pytest.importorskip("einops")
    from flash_attn.bert_padding import index_first_axis, pad_input, rearrange, unpad_input

    mask = torch.tensor([[0, 1, 1, 1], [1, 1, 0, 0]])
    input_ids, position_ids = torch.arange(8).reshape(2, 4), torch.arange(8, 16).reshape(2, 4)
    input_ids_rmpad, indices, *rest = unpad_input(input_ids.unsqueeze(-1), mask)
    assert len(rest) == 3
    assert input_ids_rmpad.transpose(0, 1).tolist() == [[1, 2, 3, 4, 5]]
    positions = index_first_axis(
        rearrange(position_ids.unsqueeze(-1), "b s ... -> (b s) ..."), indices
    ).transpose(0, 1)
    assert positions.tolist() == [[9, 10, 11, 12, 13]]
    log_probs = torch.randn(5, requires_grad=True)
    padded = pad_input(hidden_states=log_probs.unsqueeze(-1), indices=indices, batch=2, seqlen=4)
    assert padded.shape == (2, 4, 1)
    padded.sum().backward()
    assert (log_probs.grad == 1).all()


@pytest.mark.parametrize("dtype", [FP32, torch.float64], ids=str)
def test_verl_log_probabilities(dtype):
    from flash_attn.ops.triton.cross_entropy import cross_entropy_loss

    logits, labels = torch.randn(5, 11, dtype=dtype), torch.randint(0, 11, (5,))
    output = cross_entropy_loss(logits, labels, inplace_backward=False)
    assert isinstance(output, tuple)
    expected = torch.log_softmax(logits, dim=-1).gather(1, labels[:, None])[:, 0]
    torch.testing.assert_close(-output[0], expected)


def test_axolotl():
    from flash_attn.losses.cross_entropy import CrossEntropyLoss

    logits, labels = torch.randn(5, 11, requires_grad=True), torch.randint(0, 11, (5,))
    loss = CrossEntropyLoss(inplace_backward=True)((logits * 1), labels)
    torch.testing.assert_close(loss, torch.nn.functional.cross_entropy(logits, labels))
    for name in ("_flash_attn_forward", "_flash_attn_varlen_forward"):
        schema = getattr(torch.ops.flash_attn, name).default._schema
        assert "window_size_left" in [argument.name for argument in schema.arguments]


def test_olmo_core_imports():
    from flash_attn import (
        flash_attn_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    )

    for function in (
        flash_attn_func,
        flash_attn_qkvpacked_func,
        flash_attn_varlen_func,
        flash_attn_varlen_qkvpacked_func,
        flash_attn_with_kvcache,
    ):
        assert inspect.isfunction(function)


def test_names_of_the_interface():
    for name in (
        "FlashAttnFunc",
        "FlashAttnKVPackedFunc",
        "FlashAttnQKVPackedFunc",
        "FlashAttnVarlenFunc",
        "FlashAttnVarlenKVPackedFunc",
        "FlashAttnVarlenQKVPackedFunc",
    ):
        assert issubclass(getattr(flash_attn_interface, name), torch.autograd.Function)
    assert flash_attn_interface.round_multiple(33, 32) == 64
    assert flash_attn_interface._get_block_size_n(torch.device("cpu"), 64, True, False) == 1 << 30
    x = torch.randn(3, 4).t()
    assert flash_attn_interface.maybe_contiguous(x).stride(-1) == 1
