"""The imports and calls of the libraries that use flash_attn, one group for each.

A test makes a client's calls as the client makes them: positionally, by keyword, through
inspection, in its shapes. What the functions compute is tested elsewhere; here the results are
compared with the reference only so far that an argument in the wrong place would show.
"""

import importlib.metadata
import inspect
import os
import subprocess
import sys

import pytest
import reference
import torch
from checks import BF16, FP32, assert_close
from packaging.specifiers import SpecifierSet
from packaging.version import Version

import flash_attn
from flash_attn import flash_attn_interface

BATCH, HEADS, HEADS_K, HEAD_DIM = 2, 4, 2, 32


def qkv(sq=19, sk=None, heads_k=HEADS_K, dtype=FP32, batch=BATCH):
    sk = sq if sk is None else sk
    q = torch.randn(batch, sq, HEADS, HEAD_DIM)
    k, v = (torch.randn(batch, sk, heads_k, HEAD_DIM) for _ in range(2))
    return tuple(x.to(dtype) for x in (q, k, v))


def check_out(out, q, k, v, **options):
    expected, _ = reference.attention(q, k, v, **options)
    naive, _ = reference.attention(q, k, v, **options, dtype=q.dtype)
    assert_close(out, expected, naive, "out")


def cumulative(lengths):
    return torch.nn.functional.pad(torch.tensor(lengths).cumsum(0), (1, 0)).to(torch.int32)


def reference_gradients(q, k, v, dout, **options):
    _, _, gradients = reference.with_gradients(reference.attention, (q, k, v), dout, **options)
    return [gradient.to(q.dtype) for gradient in gradients]


# --------------------------------------------------------------------------------------------------
# The distribution

VERSIONS = {
    "transformers": ">=2.3.3",
    "diffusers": ">=2.6.3",
    "TransformerEngine": ">=2.1.1,<2.8.4",
    "Megatron-LM": ">=2.7.3",
    "axolotl": "==2.8.3",
}


@pytest.mark.parametrize("client", VERSIONS)
def test_version_is_one_that_the_client_takes(client):
    assert flash_attn.__version__ in SpecifierSet(VERSIONS[client])
    assert Version("2.1.1") <= Version(flash_attn.__version__) < Version("2.8.4")
    assert not flash_attn.__version__ < "2.6.3"  # yunchang compares strings


def test_distribution():
    distributions = importlib.metadata.packages_distributions()
    if "flash_attn" not in distributions:
        pytest.skip("flash_attn is not installed: the source tree is on the path")
    assert "flash-attn" in distributions["flash_attn"]
    assert "flash-attn" in distributions["flash_attn_2_cuda"]
    for name in ("flash_attn", "flash-attn"):
        assert importlib.metadata.version(name) == flash_attn.__version__


def test_every_module_imports_without_optional_packages():
    """No module needs Triton, einops or FlagGems, none prints."""
    code = """
import pkgutil, sys
for name in ("triton", "einops", "flag_gems", "transformers"):
    sys.modules[name] = None
import flash_attn, flash_attn_2_cuda
for module in pkgutil.walk_packages(flash_attn.__path__, "flash_attn."):
    if not module.name.endswith("__main__"):
        __import__(module.name)
import torch
assert not torch.cuda.is_initialized()
"""
    result = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
    )
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


# --------------------------------------------------------------------------------------------------
# transformers


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
    cu_seq_lens_k = cumulative([n + 1 for n in lengths])
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
    q = torch.randn(1, HEADS, sum(lengths_q), HEAD_DIM)
    k, v = (torch.randn(sum(lengths_k), HEADS_K, HEAD_DIM) for _ in range(2))
    cu_q, cu_k = cumulative(lengths_q), cumulative(lengths_k)
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
                self._update_cos_sin_cache(max_seqlen, device=torch.device("cpu"), dtype=dtype)

    embedding = UnpaddedEmbedding(HEAD_DIM, 160000.0, max_seqlen=13, dtype=FP32)
    cu_seqlens = cumulative([13, 4])
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


# --------------------------------------------------------------------------------------------------
# diffusers


def test_diffusers_imports():
    from flash_attn import flash_attn_func, flash_attn_varlen_func
    from flash_attn.flash_attn_interface import (
        _wrapped_flash_attn_backward,
        _wrapped_flash_attn_forward,
        _wrapped_flash_attn_varlen_backward,
        _wrapped_flash_attn_varlen_forward,
    )

    for function in (
        flash_attn_func,
        flash_attn_varlen_func,
        _wrapped_flash_attn_backward,
        _wrapped_flash_attn_forward,
        _wrapped_flash_attn_varlen_backward,
        _wrapped_flash_attn_varlen_forward,
    ):
        assert callable(function)


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
def test_diffusers_context_parallel(causal):
    q, k, v = (x.requires_grad_() for x in qkv(19, heads_k=HEADS))
    scale, dropout_p = HEAD_DIM**-0.5, 1e-30  # which asks for the lse, not for dropout

    with torch.set_grad_enabled(True):
        out, lse, _, rng_state = flash_attn_interface._wrapped_flash_attn_forward(
            q, k, v, dropout_p, scale, causal, -1, -1, 0.0, None, True
        )
    lse = lse.permute(0, 2, 1)
    assert lse.shape == (BATCH, 19, HEADS)
    q, k, v, out, lse = (x.detach() for x in (q, k, v, out, lse))
    check_out(out, q, k, v, causal=causal)
    dout = torch.randn(out.shape)
    gradients = [torch.full_like(x, torch.nan) for x in (q, k, v)]
    flash_attn_interface._wrapped_flash_attn_backward(
        dout,
        q,
        k,
        v,
        out,
        lse.permute(0, 2, 1).contiguous(),
        *gradients,
        dropout_p,
        scale,
        causal,
        -1,
        -1,
        0.0,
        None,
        False,
        rng_state,
    )
    expected = reference_gradients(q, k, v, dout, causal=causal)
    for actual, wanted in zip(gradients, expected, strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)


def test_diffusers_varlen():
    q, k, v = qkv(19, 23, heads_k=HEADS)
    lengths = [23, 9]
    keep = torch.arange(23) < torch.tensor(lengths)[:, None]
    out = flash_attn.flash_attn_varlen_func(
        q=q.flatten(0, 1),
        k=k[keep],
        v=v[keep],
        cu_seqlens_q=cumulative([19, 19]),
        cu_seqlens_k=cumulative(lengths),
        max_seqlen_q=19,
        max_seqlen_k=23,
        dropout_p=0.0,
        softmax_scale=None,
        causal=False,
        window_size=(-1, -1),
        softcap=0.0,
        alibi_slopes=None,
        deterministic=False,
        return_attn_probs=False,
    ).unflatten(0, (BATCH, -1))
    for row, length in enumerate(lengths):
        part = slice(row, row + 1)
        check_out(out[part], q[part], k[part, :length], v[part, :length])


# --------------------------------------------------------------------------------------------------
# TransformerEngine: internals by keyword


def test_transformer_engine_imports():
    from flash_attn_2_cuda import varlen_bwd

    assert callable(varlen_bwd)
    assert flash_attn_interface.flash_attn_gpu.varlen_bwd is varlen_bwd
    assert flash_attn_interface.USE_TRITON_ROCM is False


@pytest.mark.parametrize("causal", [False, True], ids=["full", "causal"])
@pytest.mark.parametrize("packed", [False, True], ids=["bshd", "thd"])
def test_transformer_engine_tile(packed, causal):
    q, k, v = qkv(16)
    lengths = [9, 7]
    padding = [cumulative(lengths), cumulative(lengths), 9, 9] if packed else []
    if packed:
        q, k, v = (x[:1].flatten(0, 1) for x in (q, k, v))
        forward = flash_attn_interface._flash_attn_varlen_forward
        backward = flash_attn_interface._flash_attn_varlen_backward
    else:
        forward = flash_attn_interface._flash_attn_forward
        backward = flash_attn_interface._flash_attn_backward
    common = {
        "softmax_scale": 0.2,
        "dropout_p": 0.0,
        "window_size_left": -1,
        "window_size_right": 0 if causal else -1,
        "alibi_slopes": None,
        "softcap": 0.0,
    }
    extra = {"block_table": None} if packed else {}
    outputs = forward(q, k, v, *padding, causal=causal, return_softmax=False, **common, **extra)
    out, lse, s_dmask, rng_state = outputs
    assert s_dmask.numel() == 0 and rng_state.dtype == torch.int64
    assert lse.shape == ((HEADS, 16) if packed else (BATCH, HEADS, 16))

    dout = torch.randn(out.shape)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    backward(
        dout,
        q,
        k,
        v,
        out,
        lse,
        dq,
        dk,
        dv,
        *padding,
        causal=causal,
        deterministic=False,
        rng_state=rng_state,
        **common,
    )
    tensors = [out, q, k, v, dout, dq, dk, dv]
    if packed:
        parts = [[x[None, slice(*cumulative(lengths)[i : i + 2])] for x in tensors] for i in (0, 1)]
    else:
        parts = [tensors]
    for out, q, k, v, dout, *actual in parts:
        check_out(out, q, k, v, causal=causal, softmax_scale=0.2)
        expected = reference_gradients(q, k, v, dout, causal=causal, softmax_scale=0.2)
        for gradient, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


# --------------------------------------------------------------------------------------------------
# ring-flash-attention and yunchang: internals with inspected defaults, blocks merged by their lse


def default_arguments(function):
    assert inspect.isfunction(function)
    spec = inspect.getfullargspec(function)
    defaults = spec.defaults or ()
    padded = (None,) * (len(spec.args) - len(defaults)) + defaults
    arguments = dict(zip(spec.args, padded, strict=True))
    if "softcap" in arguments:
        arguments["softcap"] = 0.0
    return arguments


def merged(out, lse, block_out, block_lse):
    block_out, block_lse = block_out.float(), block_lse.transpose(-2, -1).unsqueeze(-1)
    if out is None:
        return block_out, block_lse
    logsigmoid = torch.nn.functional.logsigmoid
    out = out - torch.sigmoid(block_lse - lse) * (out - block_out)
    return out, lse - logsigmoid(lse - block_lse)


@pytest.mark.parametrize("dtype", [FP32, BF16], ids=str)
def test_ring_attention(dtype):
    """The second of two processes: its own keys causally, then all keys of the first."""
    q, k, v = qkv(16, 32, dtype=dtype)
    blocks = [(k[:, 16:].contiguous(), v[:, 16:].contiguous(), True), (k[:, :16], v[:, :16], False)]
    common = {"softmax_scale": 0.2, "dropout_p": 0, "alibi_slopes": None}
    common |= {"window_size_left": -1, "window_size_right": -1}
    out = lse = None
    for block_k, block_v, causal in blocks:
        arguments = default_arguments(flash_attn_interface._flash_attn_forward)
        assert "window_size" not in arguments
        arguments |= {"q": q, "k": block_k, "v": block_v, "causal": causal, **common}
        arguments["return_softmax"] = False
        outputs = flash_attn_interface._flash_attn_forward(**arguments)
        assert len(outputs) == 4
        out, lse = merged(out, lse, *outputs[:2])
    out = out.to(dtype)
    lse = lse.squeeze(dim=-1).transpose(1, 2)
    check_out(out, q, k, v, causal=True, softmax_scale=0.2)

    dout = torch.randn(out.shape).to(dtype)
    dq = torch.zeros(q.shape)
    dk_dv = []
    for block_k, block_v, causal in blocks:
        buffers = [torch.empty(x.shape, dtype=x.dtype) for x in (q, block_k, block_v)]
        arguments = default_arguments(flash_attn_interface._flash_attn_backward)
        arguments |= {"dout": dout, "q": q, "k": block_k, "v": block_v, "causal": causal, **common}
        arguments |= {"out": out, "softmax_lse": lse, "deterministic": False}
        arguments |= dict(zip(("dq", "dk", "dv"), buffers, strict=True))
        flash_attn_interface._flash_attn_backward(**arguments)
        dq += buffers[0]
        dk_dv.insert(0, buffers[1:])
    dk, dv = (torch.cat(parts, dim=1) for parts in zip(*dk_dv, strict=True))
    expected = reference_gradients(q, k, v, dout, causal=True, softmax_scale=0.2)
    tolerance = {"rtol": 1e-4, "atol": 1e-5} if dtype == FP32 else {"rtol": 0.05, "atol": 0.05}
    for actual, wanted in zip((dq.to(dtype), dk, dv), expected, strict=True):
        torch.testing.assert_close(actual, wanted, **tolerance)


def test_ring_attention_varlen():
    lengths = [10, 6]
    q, k, v = (x[:1].flatten(0, 1) for x in qkv(16))
    cu_seqlens = cumulative(lengths)
    common = {
        "cu_seqlens_q": cu_seqlens,
        "cu_seqlens_k": cu_seqlens,
        "max_seqlen_q": 10,
        "max_seqlen_k": 10,
        "dropout_p": 0,
        "softmax_scale": 0.2,
        "causal": True,
        "alibi_slopes": None,
        "window_size_left": -1,
        "window_size_right": -1,
    }
    arguments = default_arguments(flash_attn_interface._flash_attn_varlen_forward)
    arguments |= {"q": q, "k": k, "v": v, "return_softmax": False, **common}
    out, lse, _, _ = flash_attn_interface._flash_attn_varlen_forward(**arguments)
    dout = torch.randn(out.shape)
    dq, dk, dv = (torch.empty_like(x) for x in (q, k, v))
    arguments = default_arguments(flash_attn_interface._flash_attn_varlen_backward)
    arguments |= {"dout": dout, "q": q, "k": k, "v": v, "out": out, "softmax_lse": lse, **common}
    arguments |= {"dq": dq, "dk": dk, "dv": dv, "deterministic": False}
    flash_attn_interface._flash_attn_varlen_backward(**arguments)
    for index in (0, 1):
        part = slice(*cu_seqlens[index : index + 2].tolist())
        q_part, k_part, v_part = (x[None, part] for x in (q, k, v))
        check_out(out[None, part], q_part, k_part, v_part, causal=True, softmax_scale=0.2)
        expected = reference_gradients(
            q_part, k_part, v_part, dout[None, part], causal=True, softmax_scale=0.2
        )
        for actual, wanted in zip((dq, dk, dv), expected, strict=True):
            torch.testing.assert_close(actual[None, part], wanted, rtol=1e-4, atol=1e-5)


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
    k, v = (torch.randn(6, page_size, HEADS_K, HEAD_DIM) for _ in range(2))
    block_table = torch.tensor([[3, 1, 0], [5, 0, 2]], dtype=torch.int32)
    q = torch.randn(4, HEADS, HEAD_DIM)
    prefill = flash_attn.flash_attn_varlen_func(
        q,
        k,
        v,
        cumulative(lengths_q),
        cumulative(lengths_k),
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


# --------------------------------------------------------------------------------------------------
# The raw entry points

RAW_ARGUMENTS = {
    "fwd": "q, k, v, out, alibi_slopes, p_dropout, softmax_scale, is_causal, window_size_left, "
    "window_size_right, softcap, return_softmax, generator",
    "varlen_fwd": "q, k, v, out, cu_seqlens_q, cu_seqlens_k, seqused_k, leftpad_k, block_table, "
    "alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, "
    "window_size_left, window_size_right, softcap, return_softmax, generator, num_splits",
    "bwd": "dout, q, k, v, out, softmax_lse, dq, dk, dv, alibi_slopes, p_dropout, softmax_scale, "
    "is_causal, window_size_left, window_size_right, softcap, deterministic, generator, rng_state",
    "varlen_bwd": "dout, q, k, v, out, softmax_lse, dq, dk, dv, cu_seqlens_q, cu_seqlens_k, "
    "alibi_slopes, max_seqlen_q, max_seqlen_k, p_dropout, softmax_scale, zero_tensors, is_causal, "
    "window_size_left, window_size_right, softcap, deterministic, generator, rng_state",
    "fwd_kvcache": "q, kcache, vcache, k, v, seqlens_k, rotary_cos, rotary_sin, cache_batch_idx, "
    "leftpad_k, block_table, alibi_slopes, out, softmax_scale, is_causal, window_size_left, "
    "window_size_right, softcap, is_rotary_interleaved, num_splits",
}


@pytest.mark.parametrize("name", RAW_ARGUMENTS)
def test_raw_order_of_arguments(name):
    function = getattr(flash_attn_interface.flash_attn_gpu, name)
    assert ", ".join(inspect.signature(function).parameters) == RAW_ARGUMENTS[name]


@pytest.mark.parametrize("given", [False, True], ids=["allocated", "given"])
@pytest.mark.parametrize("dropout_p", [0.0, 0.3])
def test_raw_dense(dropout_p, given):
    import flash_attn_2_cuda as raw

    q, k, v = qkv(17, 23)
    slopes = torch.rand(HEADS)
    mine = [torch.full_like(x, torch.nan) for x in (q, q, k, v)] if given else [None] * 4
    out, lse, s_dmask, rng_state = results = raw.fwd(
        q, k, v, mine[0], slopes, dropout_p, 0.2, True, 9, -1, 15.0, True, None
    )
    assert type(results) is list and rng_state.shape == (2,)
    options = {
        "softmax_scale": 0.2,
        "causal": True,
        "window_size": (9, -1),
        "softcap": 15.0,
        "alibi_slopes": slopes,
        "dropout_p": dropout_p,
    }
    if dropout_p > 0:
        options["keep_mask"] = ~torch.signbit(s_dmask[:, :, :17, :23])
    else:
        assert s_dmask.shape == (0,)
    check_out(out, q, k, v, **options)
    dout = torch.randn(out.shape)
    dq, dk, dv, softmax_d = results = raw.bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        *mine[1:],
        slopes,
        dropout_p,
        0.2,
        True,
        9,
        -1,
        15.0,
        False,
        None,
        rng_state,
    )
    assert type(results) is list
    if given:
        assert out is mine[0]
        assert all(a is b for a, b in zip(results, mine[1:], strict=False))
    for actual, wanted in zip(
        (dq, dk, dv), reference_gradients(q, k, v, dout, **options), strict=True
    ):
        torch.testing.assert_close(actual, wanted, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(
        softmax_d, (dout * out).sum(-1).transpose(1, 2), rtol=1e-4, atol=1e-4
    )


def test_raw_varlen():
    import flash_attn_2_cuda as raw

    q, k, v = (x.flatten(0, 1) for x in qkv(8))
    cu_q, cu_k = cumulative([10, 6]), cumulative([4, 12])
    out, lse, s_dmask, rng_state = raw.varlen_fwd(
        q,
        k,
        v,
        None,
        cu_q,
        cu_k,
        None,
        None,
        None,
        None,
        10,
        12,
        0.0,
        0.2,
        False,
        False,
        -1,
        -1,
        0.0,
        False,
        None,
    )
    assert lse.shape == (HEADS, 16) and s_dmask.shape == (0,)
    dout = torch.randn(out.shape)
    dq, dk, dv, softmax_d = raw.varlen_bwd(
        dout,
        q,
        k,
        v,
        out,
        lse,
        None,
        None,
        None,
        cu_q,
        cu_k,
        None,
        10,
        12,
        0.0,
        0.2,
        False,
        False,
        -1,
        -1,
        0.0,
        False,
        None,
        rng_state,
    )
    assert softmax_d.shape == (HEADS, 16)
    for row in (0, 1):
        rows, keys = slice(*cu_q[row : row + 2]), slice(*cu_k[row : row + 2])
        q_row, k_row, v_row, dout_row = (
            q[None, rows],
            k[None, keys],
            v[None, keys],
            dout[None, rows],
        )
        check_out(out[None, rows], q_row, k_row, v_row, softmax_scale=0.2)
        expected = reference_gradients(q_row, k_row, v_row, dout_row, softmax_scale=0.2)
        actual = (dq[None, rows], dk[None, keys], dv[None, keys])
        for gradient, wanted in zip(actual, expected, strict=True):
            torch.testing.assert_close(gradient, wanted, rtol=1e-4, atol=1e-5)


def test_raw_kvcache():
    import flash_attn_2_cuda as raw

    q, k, v = qkv(1)
    k_cache, v_cache = (torch.randn(BATCH, 20, HEADS_K, HEAD_DIM) for _ in range(2))
    lengths = torch.tensor([7, 19], dtype=torch.int32)
    mine = torch.empty_like(q)
    out, lse = results = raw.fwd_kvcache(
        q,
        k_cache,
        v_cache,
        k,
        v,
        lengths,
        None,
        None,
        None,
        None,
        None,
        None,
        mine,
        0.2,
        True,
        -1,
        -1,
        0.0,
        False,
        0,
    )
    assert type(results) is list and out is mine and lse.shape == (BATCH, HEADS, 1)
    for row, length in enumerate(lengths.tolist()):
        part = slice(row, row + 1)
        assert torch.equal(k_cache[row, length], k[row, 0])
        keys, values = k_cache[part, : length + 1], v_cache[part, : length + 1]
        check_out(out[part], q[part], keys, values, softmax_scale=0.2)


def test_raw_errors():
    import flash_attn_2_cuda as raw

    q, k, v = qkv(8)
    tail = (0.2, False, -1, -1, 0.0, False)
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        raw.fwd(q, k, v, None, None, 0.0, *tail, torch.Generator())
    with pytest.raises(RuntimeError, match="`generator` argument is no longer supported"):
        raw.bwd(q, q, k, v, q, q, None, None, None, None, 0.0, *tail, torch.Generator(), None)
    with pytest.raises(RuntimeError, match="Input tensor must have contiguous last dimension"):
        raw.fwd(q.transpose(1, 3), k, v, None, None, 0.0, *tail, None)
