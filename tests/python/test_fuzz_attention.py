"""Random calls of the raw entry points of forward and backward; `fuzz.py` says what of."""

import math
import random

import pytest
import raw
import reference
import torch
from checks import DTYPES, FP32, assert_close, cumulative
from fuzz import (
    EXAMPLES,
    HEAD_DIMS,
    LENGTHS,
    SEEDS,
    Output,
    attempt,
    lengths_are_known,
    strided,
)


def attention_call(rng, backward):
    """Arguments that forward and backward share."""
    heads_k = rng.choice((1, 1, 2, 3))
    heads = heads_k * rng.choice((1, 1, 2, 3))
    head_dim = rng.choice(HEAD_DIMS)
    dtype = rng.choice(DTYPES)
    batch = rng.choice((0, 1, 1, 2, 3))
    arguments = {
        "softmax_scale": rng.choice((head_dim**-0.5, 0.3, -0.2)),
        "softcap": rng.choice((0.0, 0.0, 3.0)),
        "dropout_p": rng.choice((0.0, 0.0, 0.2)),
        "window_left": rng.choice((-1, -1, 0, 3, 20)),
        "window_right": rng.choice((-1, -1, 0, 3, 20)),
        "causal": rng.choice((0, 1)),
        "num_threads": rng.choice((0, 1, 2, 3)),
    }
    lengths_q = [rng.choice(LENGTHS) for _ in range(batch)]
    lengths_k = [rng.choice(LENGTHS) for _ in range(batch)]
    q_shape = (batch, rng.choice(LENGTHS), heads, head_dim)
    k_shape = (batch, rng.choice(LENGTHS), heads_k, head_dim)
    if rng.random() < 0.6:
        q_shape = (sum(lengths_q) + rng.choice((0, 0, 3)), heads, head_dim)
        arguments["cu_seqlens_q"] = cumulative(*lengths_q)
        arguments["max_seqlen_q"] = max([0, *lengths_q]) + rng.choice((0, 0, 9, 2**40))
    else:
        lengths_q = [q_shape[1]] * batch
    paged = not backward and rng.random() < 0.25
    variable_k = rng.random() < (0.5 if paged else 0.6) and "cu_seqlens_q" in arguments
    if variable_k:
        k_shape = (sum(lengths_k) + rng.choice((0, 0, 3)), heads_k, head_dim)
        arguments["cu_seqlens_k"] = cumulative(*lengths_k)
        arguments["max_seqlen_k"] = max([0, *lengths_k]) + rng.choice((0, 0, 9, 2**40))
    else:
        lengths_k = [k_shape[1]] * batch
    if paged:
        page_size = rng.choice((1, 4, 16, 33))
        columns = max([0, *(-(-n // page_size) for n in lengths_k)]) + rng.choice((0, 1))
        pages = batch * columns + 2
        k_shape = (pages, page_size, heads_k, head_dim)
        order = rng.sample(range(pages), batch * columns)
        table = torch.tensor(order, dtype=torch.int32).view(batch, columns)
        arguments["block_table"] = table
        if not variable_k:
            lengths_k = [columns * page_size] * batch
    if rng.random() < 0.3:
        lengths_k = [rng.randint(0, n) for n in lengths_k]
        arguments["seqused_k"] = torch.tensor(lengths_k, dtype=torch.int32)
    if not backward and rng.random() < 0.2:
        padding = [rng.randint(0, n) for n in lengths_k]
        arguments["leftpad_k"] = torch.tensor(padding, dtype=torch.int32)
    if rng.random() < 0.3:
        shape = rng.choice(((heads,), (batch, heads)))
        arguments["alibi_slopes"] = strided(rng, (*shape, 2), FP32)[..., 0].abs()
    if rng.random() < 0.3:
        arguments["s_aux"] = torch.randn(heads, 3)[:, 1]
    if arguments["dropout_p"] > 0:
        arguments["rng_state"] = torch.tensor([rng.getrandbits(63), rng.choice((0, -1, 5))])
    arguments["q"] = strided(rng, q_shape, dtype)
    arguments["k"] = strided(rng, k_shape, dtype)
    arguments["v"] = strided(rng, k_shape, dtype)
    row_shape = (heads, q_shape[0]) if len(q_shape) == 3 else (batch, heads, q_shape[1])
    return arguments, row_shape, lengths_q, lengths_k


@reference.on_the_cpu
def expected_attention(arguments, dtype, s_aux=None, tensors=None):
    """out and lse of a call, one sequence at a time."""
    a = arguments
    q, k, v = tensors or (a["q"], a["k"], a["v"])
    s_aux = a.get("s_aux") if s_aux is None else s_aux
    cu_q, cu_k, table = a.get("cu_seqlens_q"), a.get("cu_seqlens_k"), a.get("block_table")
    batch = len(q) if cu_q is None else len(cu_q) - 1
    heads = q.shape[-2]
    outs, lses = [], []
    for i in range(batch):
        q_rows = q[i] if cu_q is None else q[cu_q[i] : cu_q[i + 1]]
        if cu_k is not None:
            length = int(cu_k[i + 1] - cu_k[i])
        else:
            length = k.shape[1] * (1 if table is None else table.shape[1])
        if a.get("seqused_k") is not None:
            length = int(a["seqused_k"][i])
        rows = []
        for x in (k, v):
            if table is not None:
                x = reference.gather_pages(x, table[i], length)
            elif cu_k is not None:
                x = x[int(cu_k[i]) : int(cu_k[i]) + length]
            else:
                x = x[i, :length]
            rows.append(x[int(a["leftpad_k"][i]) if a.get("leftpad_k") is not None else 0 :])
        slopes = a.get("alibi_slopes")
        keep_mask = None
        if a["dropout_p"] > 0:
            keep_mask = reference.dropout_keep_mask(
                a["dropout_p"],
                a["rng_state"].tolist(),
                *(1, heads, len(q_rows), len(rows[0])),
                first_batch=i,
            )
        window_size = [max(-1, min(a[name], 10**6)) for name in ("window_left", "window_right")]
        out, lse = reference.attention(
            q_rows[None],
            *(x[None] for x in rows),
            softmax_scale=a["softmax_scale"],
            causal=bool(a["causal"]),
            window_size=window_size,
            softcap=a["softcap"],
            alibi_slopes=slopes if slopes is None or slopes.dim() == 1 else slopes[i],
            s_aux=s_aux,
            dropout_p=a["dropout_p"],
            keep_mask=keep_mask,
            dtype=dtype,
        )
        outs.append(out)
        lses.append(lse)
    if cu_q is None:
        empty = q[..., 0].transpose(1, 2).to(dtype)
        return (torch.cat(outs), torch.cat(lses)) if batch else (q.to(dtype), empty)
    rest = len(q) - int(cu_q[-1])
    outs = [out[0] for out in outs] + [torch.zeros(rest, *q.shape[1:]).to(dtype)]
    lses = [lse[0] for lse in lses] + [torch.full((heads, rest), math.inf).to(dtype)]
    return torch.cat(outs), torch.cat(lses, 1)


@pytest.mark.parametrize("seed", SEEDS)
def test_forward(seed):
    check_forward_calls(seed, EXAMPLES)


def check_forward_calls(seed, examples):
    """Returns how many results were compared."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    compared = 0
    for _ in range(examples):
        arguments, row_shape, lengths_q, lengths_k = attention_call(rng, backward=False)
        q = arguments["q"]
        arguments["num_splits"] = rng.choice((0, 0, 1, 2, 5, 1000))
        outputs = {
            "out": Output(rng, q.shape, q.dtype),
            "softmax_lse": Output(rng, row_shape, FP32),
        }
        wants_mask = arguments["dropout_p"] > 0 and max([0, *lengths_q, *lengths_k]) < 2**20
        if wants_mask and arguments.get("max_seqlen_q", 0) + arguments.get("max_seqlen_k", 0) < 999:
            batch = len(lengths_q)
            rows = max([arguments.get("max_seqlen_q", 0), *lengths_q, q.shape[1]])
            capacity = arguments["k"].shape[1]
            if arguments.get("block_table") is not None:
                capacity *= max(1, arguments["block_table"].shape[1])
            columns = max([arguments.get("max_seqlen_k", 0), *lengths_k, capacity])
            shape = (batch, q.shape[-2], rows + 1, columns + 3)
            outputs["s_dmask"] = Output(rng, shape, q.dtype)
        arguments.update({name: output.tensor for name, output in outputs.items()})
        valid = arguments
        done, arguments = attempt(raw.forward, rng, valid, outputs)
        if not (done and lengths_are_known(arguments, valid)):
            continue
        compared += 1
        out, lse = expected_attention(arguments, torch.float64)
        naive_out, _ = expected_attention(arguments, q.dtype)
        _, naive_lse = expected_attention(arguments, FP32)
        assert_close(outputs["out"].tensor, out, naive_out, "out")
        assert_close(outputs["softmax_lse"].tensor, lse, naive_lse, "lse", input_dtype=q.dtype)
        if "s_dmask" in outputs:
            assert outputs["s_dmask"].tensor.isfinite().all()
    return compared


@pytest.mark.parametrize("seed", SEEDS)
def test_backward(seed):
    check_backward_calls(seed, EXAMPLES)


def check_backward_calls(seed, examples):
    """Returns how many results were compared."""
    rng = random.Random(1000 + seed)
    torch.manual_seed(seed)
    compared = 0
    for _ in range(examples):
        valid, row_shape, _, _ = attention_call(rng, backward=True)
        dtype = valid["q"].dtype
        valid["dout"] = strided(rng, valid["q"].shape, dtype)
        if rng.random() < 0.4:
            valid["dsoftmax_lse"] = torch.randn(row_shape)
        out, lse = expected_attention(valid, torch.float64)
        valid["out"], valid["softmax_lse"] = out.to(dtype), lse.to(FP32)
        outputs = {
            "dq": Output(rng, valid["q"].shape, dtype),
            "dk": Output(rng, valid["k"].shape, dtype),
            "dv": Output(rng, valid["v"].shape, dtype),
            "softmax_d": Output(rng, row_shape, FP32),
        }
        if "s_aux" in valid:
            outputs["ds_aux"] = Output(rng, valid["s_aux"].shape, FP32)
        valid.update({name: output.tensor for name, output in outputs.items()})
        done, arguments = attempt(raw.backward, rng, valid, outputs)
        changed = [
            name
            for name in ("out", "softmax_lse", "dropout_p", "rng_state", "softcap", "softmax_scale")
            if arguments.get(name) is not valid.get(name)
        ]
        if not (done and lengths_are_known(arguments, valid)):
            continue
        # A forward that does not belong to the call has no reference; it must be finished, no more.
        same_forward = not changed and all(
            arguments.get(name) is valid.get(name)
            for name in raw.BACKWARD
            if name not in ("dout", "dsoftmax_lse", "num_threads", "deterministic", *outputs)
        )
        if not same_forward:
            continue
        compared += 1
        names = ["dq", "dk", "dv"] + (["ds_aux"] if "s_aux" in arguments else [])
        expected, naive = (
            gradients(arguments, computed_in) for computed_in in (torch.float64, dtype)
        )
        # Where dP - D cancels, the rounding of out is what remains; a naive result of a few rows
        # can be free of it by luck.
        rows = (arguments["dout"].double() * arguments["out"].double()).abs().sum(-1)
        rounding = torch.finfo(dtype).eps * abs(arguments["softmax_scale"]) * largest(rows)
        slack = {"dq": rounding * largest(arguments["k"]), "dk": rounding * largest(arguments["q"])}
        # The weights are exp(score - lse): both are rounded in float32.
        lse = arguments["softmax_lse"]
        if "ds_aux" in outputs:
            # It is -sum weight * D, whose terms may cancel as well.
            s_aux = arguments["s_aux"].double()
            sums = (torch.exp(s_aux[:, None] - lse) * rows.transpose(-1, -2)).sum(-1)
            slack["ds_aux"] = torch.finfo(dtype).eps * largest(sums.view(-1, len(s_aux)).sum(0))
        exponent = torch.finfo(FP32).eps * largest(lse[lse.isfinite()])
        for name, want, plain in zip(names, expected, naive, strict=True):
            plain = plain.double() + slack.get(name, 0.0) + exponent * largest(want)
            assert_close(outputs[name].tensor, want, plain, name, dtype=dtype)
    return compared


def largest(x):
    return float(x.abs().max()) if x.numel() else 0.0


@reference.on_the_cpu
def gradients(arguments, dtype):
    leaves = [arguments[name].detach().to(dtype).requires_grad_() for name in "qkv"]
    s_aux = arguments.get("s_aux")
    if s_aux is not None:
        s_aux = s_aux.detach().to(dtype).requires_grad_()
    out, lse = expected_attention(arguments, dtype, s_aux, leaves)
    total = (out * arguments["dout"].to(dtype)).sum()
    if arguments.get("dsoftmax_lse") is not None:
        dlse = arguments["dsoftmax_lse"].to(lse.dtype)
        total = total + torch.where(lse.isfinite(), lse * dlse, 0.0).sum()
    leaves += [] if s_aux is None else [s_aux]
    if not total.requires_grad:
        return [torch.zeros_like(x) for x in leaves]
    return torch.autograd.grad(total, leaves, allow_unused=True, materialize_grads=True)


def test_examples_of_both_kinds():
    """The generator makes calls that succeed and calls that fail, in numbers."""
    rng = random.Random(1)
    torch.manual_seed(1)
    counts = {True: 0, False: 0}
    for _ in range(100):
        arguments, row_shape, _, _ = attention_call(rng, backward=False)
        q = arguments["q"]
        outputs = {
            "out": Output(rng, q.shape, q.dtype),
            "softmax_lse": Output(rng, row_shape, FP32),
        }
        arguments.update({name: output.tensor for name, output in outputs.items()})
        done, _ = attempt(raw.forward, rng, arguments, outputs)
        counts[done] += 1
    assert min(counts.values()) >= 20, counts
