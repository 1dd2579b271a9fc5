"""The headers that kernels are made of (src/cuda/kernels), each by itself, on a GPU.

Small kernels (`kernels/*.cu`, `device_code.py`) call them; what comes back is compared with plain
formulas in float64, or exactly where numbers only move.
"""

import math

import device_kernels
import pytest
import reference
import torch
from device_code import launch
from reference.dropout import dropout_keep_mask, philox

DTYPES = {
    "DType::kBFloat16": torch.bfloat16,
    "DType::kFloat16": torch.float16,
    "DType::kFloat32": torch.float32,
}
LOG2_E = math.log2(math.e)


def each(table):
    """A test for each row of a table of constants."""
    return pytest.mark.parametrize("constants", table, ids=device_kernels.name)


def bits(*shape):
    """Any 16-bit patterns, NaN among them."""
    return torch.randint(-(2**15), 2**15, shape, dtype=torch.int16)


def small_integers(*shape, dtype=torch.float32):
    """Their products and sums are exact in every dtype."""
    return torch.randint(-4, 5, shape).to(dtype)


def words(x):
    """int32 as the unsigned numbers that they stand for."""
    return x.to(torch.int64) & 0xFFFFFFFF


def run(constants, file):
    """`launch` of this file's kernels."""
    return lambda *arguments: launch(file, *arguments, **constants)


# -------------------------------------------------------------------------------------------------
# ptx.cuh


def test_approximations():
    x = torch.cat([torch.rand(5000) * 250 - 125, torch.tensor([0.0, 1.0, -math.inf])])
    positive = torch.exp2(torch.rand(x.numel()) * 240 - 120)
    for numbers in (x, positive):
        exp2, log2, reciprocal = (torch.empty_like(x) for _ in range(3))
        run(device_kernels.PTX[0], "ptx")(
            "approximations", 40, 128, numbers, exp2, log2, reciprocal, numbers.numel()
        )
        exact = numbers.double()
        if numbers is x:
            assert ((exp2 - exact.exp2()).abs() <= 2**-21.5 * exact.exp2()).all()
        else:
            # The manual's 2^-22 is absolute near 1.
            error = (log2 - exact.log2()).abs()
            assert (error <= 2**-21.5 * exact.log2().abs().clamp(min=1)).all()
            assert ((reciprocal * exact - 1).abs() <= 2**-22).all()


@each(device_kernels.PTX)
def test_rounding_to_16_bits(constants):
    dtype = DTYPES[constants["kType"]]
    x = torch.randn(10_000) * torch.exp2(torch.randint(-24, 15, (10_000,)).float())
    x[:4] = torch.tensor([math.inf, -math.inf, -0.0, 1 + 2**-8 + 2**-20])
    x[4:8] = torch.tensor([1 + 2**-8, 1 + 3 * 2**-8, 1 + 2**-11, 1 + 3 * 2**-11])  # ties
    singles, pairs = (torch.empty_like(x, dtype=torch.int16) for _ in range(2))
    run(constants, "ptx")("packed", 100, 128, x, singles, pairs, x.numel())
    expected = x.to(dtype).view(torch.int16)
    assert torch.equal(singles, expected)
    assert torch.equal(pairs, expected)


@each(device_kernels.PTX)
def test_reading_16_bits(constants):
    x = torch.arange(-(2**15), 2**15).to(torch.int16)
    singles, pairs = (torch.empty(x.numel()) for _ in range(2))
    run(constants, "ptx")("unpacked", 512, 128, x, singles, pairs, x.numel())
    expected = x.view(DTYPES[constants["kType"]]).float()
    for result in (singles, pairs):
        torch.testing.assert_close(result, expected, rtol=0, atol=0, equal_nan=True)


def test_matrices_of_fragments():
    x = bits(4, 8, 8)
    received, transposed = (torch.empty(32, 4, 2, dtype=torch.int16) for _ in range(2))
    given_back = torch.empty_like(x)
    run(device_kernels.PTX[0], "ptx")("matrices", 1, 32, x, received, transposed, given_back)
    # Lane 4 r + c has of each matrix the numbers (r, 2 c) and (r, 2 c + 1).
    for matrices, result in ((x, received), (x.mT, transposed)):
        expected = matrices.reshape(4, 8, 4, 2).permute(1, 2, 0, 3).reshape(32, 4, 2)
        assert torch.equal(result, expected)
    assert torch.equal(given_back, x)


@pytest.mark.parametrize("num_valid", [0, 1, 19, 32])
def test_asynchronous_copies(num_valid):
    x, y = bits(32, 8), bits(32, 8)
    out_x, out_y = torch.empty_like(x), torch.empty_like(y)
    run(device_kernels.PTX[0], "ptx")("copies", 1, 32, x, y, out_x, out_y, num_valid)
    assert torch.equal(out_x[:num_valid], x[:num_valid])
    assert (out_x[num_valid:] == 0).all()
    assert torch.equal(out_y, y)


def test_shared_memory():
    x = torch.randint(-(2**31), 2**31, (32, 4), dtype=torch.int32)
    out = torch.empty(32, 8, dtype=torch.int32)
    run(device_kernels.PTX[0], "ptx")("shared_accesses", 1, 32, x, out)
    assert torch.equal(out, x[:, [0, 1, 2, 3, 0, 1, 2, 3]])


@each(device_kernels.PTX)
def test_tensor_cores(constants):
    dtype = DTYPES[constants["kType"]]
    a, b, c = small_integers(16, 16), small_integers(16, 8), small_integers(16, 8)
    d = torch.empty_like(c)
    run(constants, "ptx")("multiplied", 1, 32, a.to(dtype), b.to(dtype), c, d)
    assert torch.equal(d.double(), c.double() + a.double() @ b.double())


def test_threads():
    x = small_integers(256)
    lanes, warps = (torch.empty(256, dtype=torch.int32) for _ in range(2))
    largest, sums = torch.empty(256), torch.empty(256)
    run(device_kernels.PTX[0], "ptx")("threads", 1, 256, x, lanes, warps, largest, sums)
    i = torch.arange(256, dtype=torch.int32)
    assert torch.equal(lanes, i % 32)
    assert torch.equal(warps, i // 32)
    quads = x.view(64, 4)
    assert torch.equal(largest, quads.amax(1).repeat_interleave(4))
    assert torch.equal(sums, quads.sum(1).repeat_interleave(4))


def test_barriers_of_some_threads():
    x = torch.randn(128)
    out = torch.empty_like(x)
    run(device_kernels.PTX[0], "ptx")("barriers", 1, 128, x, out)
    assert torch.equal(out, x.view(2, 64).flip(1).flatten())


def test_sums_in_memory():
    x = small_integers(40, 128)
    sums, rows = torch.zeros(16), torch.zeros(4, 4)
    run(device_kernels.PTX[0], "ptx")("added", 40, 128, x, sums, rows)
    assert torch.equal(sums, x.view(-1, 16).sum(0))
    assert torch.equal(rows, x.view(-1, 4).sum(0)[:, None] * torch.arange(1, 5))


def test_release_and_acquire():
    x = torch.randn(8, 128)
    for _ in range(50):
        written, out = torch.zeros_like(x), torch.zeros_like(x)
        count = torch.zeros(1, dtype=torch.int32)
        run(device_kernels.PTX[0], "ptx")("released", 8, 128, x, written, count, out)
        assert torch.equal(out[1:], x[1:])


# -------------------------------------------------------------------------------------------------
# tile.cuh


@each(device_kernels.COPIES)
def test_where_a_tile_keeps_its_numbers(constants):
    rows, cols = int(constants["kRows"]), int(constants["kCols"])
    at = torch.empty(rows, cols, dtype=torch.int32)
    offsets, size = torch.empty(2, dtype=torch.int32), torch.empty(1, dtype=torch.int32)
    run(constants, "tile")("addresses", 1, 128, at, offsets, size)
    assert (at >= 0).all()
    assert (at < size).all()
    assert at.unique().numel() == at.numel()
    chunks = at.view(rows, cols // 8, 8)
    assert torch.equal(chunks, chunks[..., :1] + 2 * torch.arange(8, dtype=torch.int32))
    assert (chunks[..., 0] % 16 == 0).all()
    assert (at[8:] - at[:-8] == offsets[0]).all()
    assert (at[:, 16:] - at[:, :-16] == offsets[1]).all()
    # The eight rows of a matrix, 16 bytes each, lie in all 32 banks.
    banks = chunks[..., 0].view(-1, 8, cols // 8) // 16 % 8
    assert torch.equal(banks.sort(1).values, torch.arange(8)[:, None].expand_as(banks).int())


@each(device_kernels.COPIES)
def test_copies_into_a_tile(constants):
    rows, cols, access = int(constants["kRows"]), int(constants["kCols"]), constants["kAccess"]
    head_dims = {
        "Access::kWhole": [cols],
        "Access::kPadded": [cols - 8, 8],
        "Access::kElement": [cols, cols - 5, 1],
    }[access]
    threads = int(constants["kThreads"])
    for head_dim in head_dims:
        stride = head_dim + (3 if access == "Access::kElement" else 16)
        x = bits(rows, stride)
        order = torch.randperm(rows).to(torch.int32)
        for first_valid, num_valid in ((0, -1), (0, rows), (0, 0), (0, 5), (3, rows - 2)):
            for use_order in (False, True):
                if use_order and (first_valid > 0 or num_valid < 0):
                    continue
                out = torch.empty(rows, cols, dtype=torch.int16)
                run(constants, "tile")(
                    *("copied", 1, threads, x, order if use_order else None, out),
                    *(stride, head_dim, first_valid, num_valid),
                )
                expected = torch.zeros_like(out)
                end = rows if num_valid < 0 else num_valid
                source = x[order.long()] if use_order else x
                expected[first_valid:end, :head_dim] = source[first_valid:end, :head_dim]
                assert torch.equal(out, expected), (head_dim, first_valid, num_valid, use_order)


@each(device_kernels.PRODUCTS)
def test_products_of_tiles(constants):
    dtype, cols = DTYPES[constants["kType"]], int(constants["kCols"])
    a, b, w = (small_integers(n, d, dtype=dtype) for n, d in ((32, cols), (32, cols), (16, 32)))
    scores, out = torch.empty(16, 32), torch.empty(16, cols)
    run(constants, "tile")("multiplied", 1, 32, a, b, w, scores, out)
    assert torch.equal(scores.double(), a[16:].double() @ b.double().T)
    assert torch.equal(out.double(), w.double() @ b.double())


# -------------------------------------------------------------------------------------------------
# key_tiles.cuh, key_steps.cuh


def stored_keys(paged, access):
    """k and v in one tensor (2, pages or batch, rows, heads, d), table, and keys of batch row 1."""
    batch, heads, capacity, page_size = 3, 2, 90, 7
    head_dim = {"Access::kWhole": 64, "Access::kPadded": 40, "Access::kElement": 37}[access]
    gap = 5 if access == "Access::kElement" else 8
    if not paged:
        kv = bits(2, batch, capacity, heads, head_dim + gap)[..., :head_dim]
        return kv, None, kv[:, 1]
    pages = 50
    kv = bits(2, pages, page_size, heads, head_dim + gap)[..., :head_dim]
    table = torch.randperm(pages)[: batch * 13].view(batch, 13).to(torch.int32)
    table[1, 2], table[1, 4] = -9, 1 << 30  # outside: the first page and the last
    used = table[1].long().clamp(0, pages - 1)
    return kv, table, kv[:, used].flatten(1, 2)[:, :capacity]


@each(device_kernels.KEYS)
@pytest.mark.parametrize("kernel", ["tiles", "steps"])
@pytest.mark.parametrize("length, leftpad", [(90, 0), (90, 11), (64, 0), (33, 1), (1, 0)])
def test_keys_of_a_sequence(constants, kernel, length, leftpad):
    paged = constants["kPaged"] == "true"
    rows, cols = int(constants["kRows"]), int(constants["kCols"])
    kv, table, keys = stored_keys(paged, constants["kAccess"])
    head, head_dim = 1, kv.shape[-1]
    pads = torch.tensor([0, leftpad, 0], dtype=torch.int32) if leftpad else None
    num_tiles = -(-(length - leftpad) // rows)
    outs = [torch.full((num_tiles * rows, cols), 99, dtype=torch.int16) for _ in range(2)]
    strides = (*kv.stride()[1:4], 13)
    sizes = (kv.shape[2], kv.shape[1], length, head_dim, 1, head)
    if kernel == "tiles":
        threads = int(constants["kThreads"])
        for x, out in zip(kv, outs, strict=True):
            run(constants, "keys")(kernel, 1, threads, x, table, pads, out, *strides, *sizes)
    else:
        threads = int(constants["kThreads"]) * int(constants["kGroups"])
        run(constants, "keys")(
            *(kernel, 1, threads, kv, kv.stride(0), table, pads, *outs, *strides, *sizes)
        )
    for out, x in zip(outs, keys, strict=True):
        expected = torch.zeros_like(out)
        expected[: length - leftpad, :head_dim] = x[leftpad:length, head]
        assert torch.equal(out, expected)


# -------------------------------------------------------------------------------------------------
# scores.cuh


def blocks_of(constants):
    """Rows and columns of a warp's block."""
    return 16 * int(constants["kM"]), 8 * int(constants["kN"])


def test_tanh():
    x = torch.cat([torch.linspace(-12, 12, 20_001), torch.randn(2000) * 1e-4, torch.randn(2000)])
    x = torch.cat([x, torch.tensor([0.0, 0.25, -0.25, 80.0, -80.0, math.inf, -math.inf])])
    out = torch.empty_like(x)
    run(device_kernels.BLOCKS[0], "scores")("capped", 200, 128, x, out, x.numel())
    exact = x.double().tanh()
    assert ((out - exact).abs() <= 1e-6 * exact.abs()).all()


@each(device_kernels.MASKS)
def test_every_entry_of_small_masks(constants):
    block_rows, block_cols = blocks_of(constants)
    windows = {
        "Masking::kNone": [(-1, -1)],
        "Masking::kCausal": [(-1, 0), (-1, 5), (-1, 70)],
        "Masking::kWindow": [(0, 0), (7, 0), (3, 4), (20, -1), (-1, 2), (100, 100)],
    }[constants["kMasking"]]
    for seqlen_q, seqlen_k in ((1, 1), (1, 70), (70, 1), (33, 64), (64, 33), (70, 70), (5, 0)):
        rows = -(-seqlen_q // block_rows) * block_rows
        cols = -(-(seqlen_k + 1) // block_cols) * block_cols
        blocks = rows // block_rows * (cols // block_cols)
        i, j = torch.arange(seqlen_q)[:, None] + seqlen_k - seqlen_q, torch.arange(cols)
        for left, right in windows:
            x = torch.randn(rows, cols)
            out = x.clone()
            run(constants, "scores")(
                "masked", blocks, 32, out, cols, seqlen_q, seqlen_k, left, right
            )
            visible = (j < seqlen_k) & ((left < 0) | (j >= i - left))
            visible &= (right < 0) | (j <= i + right)
            expected = x[:seqlen_q].masked_fill(~visible, -math.inf)
            assert torch.equal(out[:seqlen_q], expected), (seqlen_q, seqlen_k, left, right)


@each(device_kernels.TRANSFORMS)
def test_scores_from_products(constants):
    block_rows, block_cols = blocks_of(constants)
    rows, cols, offset = 3 * block_rows, 3 * block_cols, -20
    scale, softcap, slope = 0.3, 4.0, torch.tensor([0.7])
    x = torch.randn(rows, cols) * 20
    x[:block_rows] *= 0.01  # small beside the cap in whole blocks
    expected = scale * x.double()
    if constants["kSoftcap"] == "true":
        expected = softcap * (expected / softcap).tanh()
    if constants["kAlibi"] == "true":
        distance = torch.arange(rows)[:, None] + offset - torch.arange(cols)
        expected = expected - slope.double() * distance.abs()
    # A few roundings to float32 of terms of up to a hundred.
    out = x.clone()
    run(constants, "scores")("transformed", 9, 32, out, cols, slope, offset, scale, softcap)
    assert (out - LOG2_E * expected).abs().max() <= 2e-5
    out = x.clone()
    capped = constants["kSoftcap"] == "true"
    run(constants, "scores")(
        *("transformed_blocks", 9, 32, out, cols, offset),
        *(scale / softcap if capped else scale, softcap, slope.item()),
    )
    assert (out - expected).abs().max() <= 2e-5


@each(device_kernels.BLOCKS)
def test_what_dropout_drops(constants):
    block_rows, block_cols = blocks_of(constants)
    rows, cols = 3 * block_rows, 3 * block_cols
    state = torch.tensor([0x1234567890ABCDEF, (1 << 40) + 3])
    for p, batch, head in ((0.1, 0, 0), (0.5, 2, 5), (0.9, 1, 3), (0.0, 0, 1)):
        x = torch.randn(rows, cols)
        out = x.clone()
        run(constants, "scores")("dropped", 9, 32, out, cols, state, p, batch, head)
        keep = dropout_keep_mask(p, state.tolist(), batch + 1, head + 1, rows, cols)[batch, head]
        assert torch.equal(out, x.where(keep, 0.0))


def test_random_words():
    counters = torch.randint(-(2**31), 2**31, (3000, 4), dtype=torch.int32)
    counters[:3] = torch.tensor([[0], [-1], [1]], dtype=torch.int32)
    key = torch.tensor([0x12345678, -2], dtype=torch.int32)
    out = torch.empty_like(counters)
    run(device_kernels.BLOCKS[0], "scores")("random_words", 30, 128, counters, key, out, 3000)
    expected = philox(words(counters).unbind(1), words(key).tolist())
    assert torch.equal(words(out), torch.stack(expected, 1))


@each(device_kernels.BLOCKS)
def test_softmax_block_by_block(constants):
    rows, block_cols = blocks_of(constants)
    cols = 12 * block_cols
    multiplier = 0.8
    x = torch.randn(rows, cols) * torch.exp2(torch.arange(rows) % 7)[:, None]
    x[0] = -math.inf  # sees no key
    x[1, : 5 * block_cols] = -math.inf  # none at first
    x[2, 7 * block_cols :] = -math.inf  # none at last
    x[3] = torch.linspace(-90, 90, cols)  # its maximum moves with every block
    x[4] = torch.linspace(90, -90, cols)
    x[5, 3:] = -math.inf
    x[6] = 0.0
    for sinks in (torch.full((rows,), -math.inf), torch.randn(rows) * 20):
        out, log2_sums = torch.empty(rows, block_cols), torch.empty(rows)
        run(constants, "scores")("softmax", 1, 32, x, sinks, out, log2_sums, cols, multiplier)
        scores = torch.cat([x * multiplier, sinks[:, None]], 1).double() / LOG2_E
        lse = scores.logsumexp(1, keepdim=True)
        weights = (scores[:, :-1] - lse).exp().nan_to_num(0.0)  # -inf less -inf
        expected = weights.view(rows, 12, block_cols).sum(1)
        torch.testing.assert_close(out.double(), expected, rtol=5e-5, atol=1e-7)
        lse = (lse[:, 0] * LOG2_E).masked_fill(lse[:, 0] == -math.inf, math.inf)
        torch.testing.assert_close(log2_sums.double(), lse, rtol=1e-6, atol=5e-5)


# -------------------------------------------------------------------------------------------------
# parts.cuh


def test_rows_from_parts():
    n = 4000
    tops, sums = torch.randn(n) * 30, torch.rand(n) * 100 + 1
    sinks = (torch.randn(n) * 30).where(torch.rand(n) < 0.5, -math.inf)
    tops[:100], sums[:100] = -math.inf, 0.0  # no key; with and without a sink
    most = torch.maximum(tops, tops.roll(1))
    weights, lse, factors = (torch.empty(n) for _ in range(3))
    run(device_kernels.PARTS[0], "parts")(
        *("finished", 40, 128, tops, sums, most, sinks, weights, lse, factors, n)
    )
    expected = (tops - most).double().exp2().nan_to_num(0.0)
    torch.testing.assert_close(weights.double(), expected, rtol=1e-6, atol=1e-37)
    own = tops.double() + sums.double().log2()
    total = torch.logaddexp2(own, sinks.double())
    none = total == -math.inf
    expected = (total / LOG2_E).masked_fill(none, math.inf)
    torch.testing.assert_close(lse.double(), expected, rtol=1e-6, atol=1e-5)
    expected = (tops.double() - total).exp2().nan_to_num(0.0)
    torch.testing.assert_close(factors.double(), expected, rtol=1e-5, atol=1e-37)


@pytest.mark.parametrize("group_size", [1, 3, 8])
def test_packed_rows(group_size):
    queries, heads = (torch.empty(64, dtype=torch.int32) for _ in range(2))
    run(device_kernels.PARTS[0], "parts")("packed_rows", 1, 64, queries, heads, group_size, 5)
    rows = torch.arange(64, dtype=torch.int32)
    assert torch.equal(queries, rows // group_size)
    assert torch.equal(heads, 5 * group_size + rows % group_size)


@each(device_kernels.PARTS)
def test_stores_of_columns(constants):
    dtype, access = DTYPES[constants["kType"]], constants["kAccess"]
    cols, rows = 64, 5
    head_dims = {"Access::kWhole": [64], "Access::kPadded": [40], "Access::kElement": [37, 1, 62]}
    for head_dim in head_dims[access]:
        stride = 67 if access == "Access::kElement" else 72
        x, out = torch.randn(rows, cols), torch.full((rows, stride), 77.0, dtype=dtype)
        run(constants, "parts")("stored", rows, 32, x, out, cols, stride, head_dim)
        assert torch.equal(out[:, :head_dim], x[:, :head_dim].to(dtype))
        assert (out[:, head_dim:] == 77).all()


@pytest.mark.parametrize("with_sinks", [False, True])
def test_rows_of_no_sequence(with_sinks):
    total, heads, head_dim, used = 23, 3, 40, 17
    cu_seqlens = torch.tensor([0, 5, used], dtype=torch.int32)
    sinks = torch.randn(heads) if with_sinks else None
    out = torch.full((total, heads, head_dim), 3.0, dtype=torch.float16)
    lse = torch.full((heads, total), 3.0)
    run(device_kernels.PARTS[0], "parts")(
        *("unused_rows", 2, 128, cu_seqlens, out, lse, sinks, 2, total, heads, head_dim)
    )
    assert (out[:used] == 3).all()
    assert (lse[:, :used] == 3).all()
    assert (out[used:] == 0).all()
    assert (lse[:, used:] == math.inf).all()


# -------------------------------------------------------------------------------------------------
# rotary.cuh


def rotary_dims(constants):
    """(head_dim, rotary_dim), whose parts are made of whole units."""
    width = int(constants["kWidth"])
    return [(37, 10), (20, 20), (5, 0)] if width == 1 else [(12 * width, 4 * width), (64, 64)]


@each(device_kernels.ROTARY)
def test_rotated_rows(constants):
    dtype, table_dtype = DTYPES[constants["kType"]], DTYPES[constants["kTable"]]
    interleaved = constants["kInterleaved"] == "true"
    rows = 30
    for head_dim, rotary_dim in rotary_dims(constants):
        for conjugate in (False, True):
            x = torch.randn(rows, head_dim).to(dtype)
            angles = torch.rand(rows, rotary_dim // 2) * 6
            cos, sin = angles.cos().to(table_dtype), angles.sin().to(table_dtype)
            expected, rounded = (
                reference.apply_rotary(
                    *(x[:, None], cos, sin),
                    positions=torch.arange(rows),
                    interleaved=interleaved,
                    conjugate=conjugate,
                    dtype=computed_in,
                )[:, 0].to(torch.float64)
                for computed_in in (torch.float64, torch.float32)
            )
            for in_place in (False, True):
                source = x.clone()
                out = source if in_place else torch.empty_like(x)
                run(constants, "rotary")(
                    *("rotated", rows, 32, source, out, cos, sin),
                    *(head_dim, rotary_dim, int(conjugate)),
                )
                # Computed in float32 and rounded once.
                ulp = torch.finfo(dtype).eps / 2
                error = (out.double() - expected).abs()
                limit = 2 * (rounded - expected).abs().max() + ulp * expected.abs() + 1e-6
                assert (error <= limit).all(), (head_dim, rotary_dim, conjugate, in_place)
                assert torch.equal(out[:, rotary_dim:], x[:, rotary_dim:])


@each(device_kernels.ROTARY)
def test_rows_that_are_only_copied(constants):
    dtype = DTYPES[constants["kType"]]
    for head_dim, rotary_dim in rotary_dims(constants):
        x = torch.randn(30, head_dim).to(dtype)
        out, copy = torch.empty_like(x), torch.empty_like(x)
        run(constants, "rotary")("rotated", 30, 32, x, out, None, None, head_dim, rotary_dim, 0)
        run(constants, "rotary")("copied", 30, 32, x, copy, head_dim)
        assert torch.equal(out, x)
        assert torch.equal(copy, x)
