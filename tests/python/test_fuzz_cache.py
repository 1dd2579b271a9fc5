"""Random calls of the raw entry point of attention over a cache; `fuzz.py` says what of."""

import random

import pytest
import raw
import reference
import torch
from checks import DTYPES, FP32, assert_close
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


@pytest.mark.parametrize("seed", SEEDS)
def test_kvcache(seed):
    check_cache_calls(seed, EXAMPLES)


def check_cache_calls(seed, examples):
    """Returns how many results were compared."""
    rng = random.Random(2000 + seed)
    torch.manual_seed(seed)
    compared = 0
    for _ in range(examples):
        valid = cache_call(rng)
        q = valid["q"]
        outputs = {
            "out": Output(rng, q.shape, q.dtype),
            "softmax_lse": Output(rng, (len(q), q.shape[2], q.shape[1]), FP32),
        }
        valid.update({name: output.tensor for name, output in outputs.items()})
        before = {name: valid[name].clone() for name in ("k_cache", "v_cache")}
        done, arguments = attempt(raw.kvcache, rng, valid, outputs)
        if not done:
            for name, copy in before.items():
                assert torch.equal(valid[name], copy), f"{name} was written before an error"
            continue
        if not lengths_are_known(arguments, valid):
            continue
        places = ("k_cache", "v_cache", "block_table", "cache_batch_idx")
        if any(arguments.get(name) is not valid.get(name) for name in places):
            continue  # what the caches held is not known, or two sequences write to one place
        compared += 1
        options = {
            name: arguments.get(name)
            for name in ("rotary_cos", "rotary_sin", "cache_seqlens", "cache_batch_idx")
        }
        options["block_table"] = arguments.get("block_table")
        options["rotary_interleaved"] = bool(arguments["rotary_interleaved"])
        window_size = [
            max(-1, min(arguments[name], 10**6)) for name in ("window_left", "window_right")
        ]
        results = [
            reference.kvcache_attention(
                *(arguments["q"], *before.values(), arguments.get("k"), arguments.get("v")),
                **options,
                cache_leftpad=arguments.get("cache_leftpad"),
                causal=bool(arguments["causal"]),
                window_size=window_size,
                softmax_scale=arguments["softmax_scale"],
                softcap=arguments["softcap"],
                alibi_slopes=arguments.get("alibi_slopes"),
                s_aux=arguments.get("s_aux"),
                dtype=dtype,
            )
            for dtype in (torch.float64, q.dtype, FP32)
        ]
        (out, lse), (naive_out, half_lse), (_, naive_lse) = results
        rotated = options["rotary_cos"] is not None
        lse_dtype, naive_lse = (q.dtype, half_lse) if rotated else (FP32, naive_lse)
        assert_close(outputs["out"].tensor, out, naive_out, "out")
        assert_close(
            *(outputs["softmax_lse"].tensor, lse, naive_lse, "lse"),
            dtype=lse_dtype,
            input_dtype=q.dtype,
        )
        if arguments.get("k") is not None:
            expected = reference.kvcache_append(
                *before.values(), arguments["k"], arguments["v"], **options
            )
            assert torch.equal(arguments["v_cache"].double(), expected[1])
            if not rotated:
                assert torch.equal(arguments["k_cache"].double(), expected[0])
    return compared


def cache_call(rng):
    heads_k = rng.choice((1, 2, 3))
    heads = heads_k * rng.choice((1, 2, 3))
    head_dim = rng.choice(HEAD_DIMS)
    dtype = rng.choice(DTYPES)
    batch, sq = rng.choice((0, 1, 1, 2, 3)), rng.choice((0, 1, 1, 1, 2, 5, 20))
    new = rng.choice((None, None, 0, 1, 1, 3, 20))
    capacity = rng.choice(LENGTHS) + (new or 0)
    lengths = [rng.randint(0, capacity - (new or 0)) for _ in range(batch)]
    arguments = {
        "q": strided(rng, (batch, sq, heads, head_dim), dtype),
        "softmax_scale": rng.choice((head_dim**-0.5, 0.3, -0.2)),
        "softcap": rng.choice((0.0, 0.0, 3.0)),
        "window_left": rng.choice((-1, -1, 0, 3, 20)),
        "window_right": rng.choice((-1, -1, 0, 3, 20)),
        "causal": rng.choice((0, 1)),
        "rotary_interleaved": rng.choice((0, 1)),
        "num_splits": rng.choice((0, 0, 1, 2, 5, 1000)),
        "num_threads": rng.choice((0, 1, 2, 3)),
    }
    if new is not None or rng.random() < 0.7:
        arguments["cache_seqlens"] = torch.tensor(lengths, dtype=torch.int32)
    else:
        lengths = [capacity] * batch
    if rng.random() < 0.25:
        padding = [rng.randint(0, n) for n in lengths]
        arguments["cache_leftpad"] = torch.tensor(padding, dtype=torch.int32)
    shape = [batch, capacity, heads_k, head_dim]
    if rng.random() < 0.3:
        page_size = rng.choice((1, 4, 16, 33))
        columns = -(-capacity // page_size)
        shape[:2] = batch * columns + 2, page_size
        order = rng.sample(range(shape[0]), batch * columns)
        arguments["block_table"] = torch.tensor(order, dtype=torch.int32).view(batch, columns)
        if "cache_seqlens" not in arguments:
            lengths = [columns * page_size] * batch
        capacity = columns * page_size
    elif rng.random() < 0.3:
        shape[0] += 2
        arguments["cache_batch_idx"] = torch.tensor(
            rng.sample(range(shape[0]), batch), dtype=torch.int32
        )
    for name in ("k_cache", "v_cache"):
        cache = Output(rng, tuple(shape), dtype).tensor
        arguments[name] = cache.copy_(torch.randn(shape))
    if new is not None:
        for name in ("k", "v"):
            arguments[name] = strided(rng, (batch, new, heads_k, head_dim), dtype)
        if head_dim >= 16 and rng.random() < 0.5:
            half = 8 * rng.randint(1, head_dim // 16)
            angles = torch.rand(capacity + 25, half) * 6
            arguments["rotary_cos"] = angles.cos().to(dtype)
            arguments["rotary_sin"] = angles.sin().to(dtype)
    if rng.random() < 0.3:
        arguments["alibi_slopes"] = torch.rand(rng.choice(((heads,), (batch, heads))))
    if rng.random() < 0.3:
        arguments["s_aux"] = torch.randn(heads)
    return arguments
