"""Random calls of the raw entry point of rotary embedding; `fuzz.py` says what of."""

import random

import pytest
import raw
import reference
import torch
from checks import DTYPES, FP32, assert_close, cumulative
from fuzz import EXAMPLES, HEAD_DIMS, LENGTHS, SEEDS, Output, attempt, strided


@pytest.mark.parametrize("seed", SEEDS)
def test_rotary(seed):
    check_rotary_calls(seed, EXAMPLES)


def check_rotary_calls(seed, examples):
    """Returns how many results were compared."""
    rng = random.Random(3000 + seed)
    torch.manual_seed(seed)
    compared = 0
    for _ in range(examples):
        heads, head_dim = rng.choice((1, 2, 3)), rng.choice(HEAD_DIMS)
        dtype = rng.choice(DTYPES)
        batch, length = rng.choice((0, 1, 2, 3)), rng.choice(LENGTHS)
        half = rng.randint(0, head_dim // 2)
        lengths = [length] * batch
        arguments = {
            "interleaved": rng.choice((0, 1)),
            "conjugate": rng.choice((0, 1)),
            "num_threads": rng.choice((0, 1, 2)),
            "seqlen_offset": 0,
        }
        if rng.random() < 0.4:
            lengths = [rng.choice(LENGTHS) for _ in range(batch)]
            arguments["cu_seqlens"] = cumulative(*lengths)
            arguments["max_seqlen"] = max([0, *lengths])
            x = strided(rng, (sum(lengths) + rng.choice((0, 2)), heads, head_dim), dtype)
        else:
            x = strided(rng, (batch, length, heads, head_dim), dtype)
        offsets = [rng.choice((0, 0, 1, 9)) for _ in range(batch)]
        if rng.random() < 0.5:
            arguments["seqlen_offsets"] = torch.tensor(offsets).to(
                rng.choice((torch.int32, torch.int64))
            )
        else:
            arguments["seqlen_offset"] = rng.choice((0, 4))
            offsets = [arguments["seqlen_offset"]] * batch
        table_dtype = rng.choice((dtype, FP32))
        angles = torch.rand(max(LENGTHS) + 20, half) * 6
        arguments["x"], arguments["cos"] = x, angles.cos().to(table_dtype)
        arguments["sin"] = angles.sin().to(table_dtype)
        outputs = {"out": Output(rng, x.shape, dtype)}
        arguments["out"] = outputs["out"].tensor
        done, changed = attempt(raw.rotary, rng, arguments, outputs)
        if not done or any(changed.get(name) is not arguments.get(name) for name in arguments):
            continue
        compared += 1
        for computed in ("expected", "naive"):
            computed_in = torch.float64 if computed == "expected" else dtype
            parts = []
            begin = 0
            for i, n in enumerate(lengths):
                rows = x[i] if "cu_seqlens" not in arguments else x[begin : begin + n]
                begin += n
                parts.append(
                    reference.apply_rotary(
                        rows,
                        *(arguments["cos"], arguments["sin"]),
                        positions=torch.arange(n) + offsets[i],
                        interleaved=bool(arguments["interleaved"]),
                        conjugate=bool(arguments["conjugate"]),
                        dtype=computed_in,
                    )
                )
            if "cu_seqlens" in arguments:
                parts.append(x[begin:].to(computed_in))
                result = torch.cat(parts)
            else:
                result = torch.stack(parts) if parts else x.to(computed_in)
            if computed == "expected":
                expected = result
            else:
                naive = result
        rows = slice(None) if "cu_seqlens" not in arguments else slice(0, begin)
        assert_close(outputs["out"].tensor[rows], expected[rows], naive[rows], "rotary")
    return compared
