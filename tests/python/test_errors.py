"""Bad input: the exception, its text, and that nothing has been written by then."""

import re

import pytest
import raw
import torch

import flash_attn
import flash_attn_2_cuda
from flash_attn import _core

pytestmark = pytest.mark.cpu  # one validation serves all devices, but reads lengths on the CPU only

NAN, INFINITY = float("nan"), float("inf")


def tensor(*shape, dtype=torch.float32):
    return torch.ones(shape, dtype=dtype)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def dense(q=(2, 5, 4, 16), k=(2, 7, 2, 16), v=None, dtypes=(torch.float32,) * 3, **options):
    shapes = (q, k, k if v is None else v)
    return flash_attn.flash_attn_func(
        *(tensor(*shape, dtype=dtype) for shape, dtype in zip(shapes, dtypes, strict=True)),
        **options,
    )


def varlen(q=(12, 4, 16), k=(20, 2, 16), v=None, **changes):
    arguments = {
        "cu_seqlens_q": int32(0, 5, 12),
        "cu_seqlens_k": int32(0, 9, 20),
        "max_seqlen_q": 7,
        "max_seqlen_k": 11,
        **changes,
    }
    shapes = (q, k, k if v is None else v)
    return flash_attn.flash_attn_varlen_func(*(tensor(*shape) for shape in shapes), **arguments)


def paged(table, k=(6, 4, 2, 16), **changes):
    return varlen(k=k, block_table=table, **changes)


def cache(q=(2, 1, 4, 16), caches=(2, 10, 2, 16), **options):
    return flash_attn.flash_attn_with_kvcache(
        tensor(*q), tensor(*caches), tensor(*caches), **options
    )


NEW = tensor(2, 1, 2, 16)
LONG = tensor(2, 11, 2, 16)
LENGTHS = int32(3, 9)
TABLE = torch.arange(6, dtype=torch.int32).view(2, 3)


def rotary(rows=10, columns=8, other=None, dtype=torch.float32):
    cos = tensor(rows, columns, dtype=dtype)
    sin = tensor(*(other or (rows, columns)), dtype=dtype)
    return {"k": NEW, "v": NEW, "cache_seqlens": LENGTHS, "rotary_cos": cos, "rotary_sin": sin}


F32, BF16, F16 = torch.float32, torch.bfloat16, torch.float16
SUPPORTED = "FlashAttention only support fp16 and bf16 data type"
DIVIDE = "Number of heads in key/value must divide number of heads in query"
AT_MOST_256 = "FlashAttention forward only supports head dimension at most 256"

# id: (call, text of the message)
ERRORS = {
    # Dtypes, ranks and shapes of q, k and v.
    "float64": (lambda: dense(dtypes=(torch.float64,) * 3), SUPPORTED),
    "integers": (lambda: dense(dtypes=(torch.int32,) * 3), SUPPORTED),
    "complex": (lambda: dense(dtypes=(torch.complex64,) * 3), SUPPORTED),
    "key_dtype": (
        lambda: dense(dtypes=(F32, BF16, F32)),
        "query and key must have the same dtype",
    ),
    "value_dtype": (
        lambda: dense(dtypes=(F16, F16, BF16)),
        "query and value must have the same dtype",
    ),
    "q_rank": (lambda: dense(q=(5, 4, 16)), "q must have"),
    "k_rank": (lambda: dense(k=(7, 2, 16), v=(2, 7, 2, 16)), "k must have 4 dimensions"),
    "v_rank": (lambda: dense(v=(2, 7, 2, 16, 1)), "v must have 4 dimensions"),
    "batch": (lambda: dense(k=(3, 7, 2, 16)), "k must have shape (batch_size, seqlen_k"),
    "value_length": (lambda: dense(v=(2, 8, 2, 16)), "v must have shape (batch_size, seqlen_k"),
    "value_heads": (lambda: dense(v=(2, 7, 4, 16)), "v must have shape"),
    "key_head_dim": (lambda: dense(k=(2, 7, 2, 8)), "k must have shape"),
    "value_head_dim": (lambda: dense(v=(2, 7, 2, 8)), "v must have shape"),
    "qkv_shape": (lambda: flash_attn.flash_attn_qkvpacked_func(tensor(2, 5, 2, 4, 16)), "qkv"),
    "qkv_rank": (lambda: flash_attn.flash_attn_qkvpacked_func(tensor(5, 3, 4, 16)), "qkv"),
    "kv_shape": (
        lambda: flash_attn.flash_attn_kvpacked_func(tensor(2, 5, 4, 16), tensor(2, 7, 3, 4, 16)),
        "kv",
    ),
    # Features.
    **{
        f"dropout_{p}": (lambda p=p: dense(dropout_p=p), "dropout_p must be in [0, 1)")
        for p in (1.0, 1.5, -0.1, NAN, INFINITY)
    },
    "softcap_negative": (lambda: dense(softcap=-1.0), "softcap must be finite and not negative"),
    "softcap_nan": (lambda: dense(softcap=NAN), "softcap must be finite and not negative"),
    "scale_nan": (lambda: dense(softmax_scale=NAN), "softmax_scale must be finite"),
    "scale_infinite": (lambda: dense(softmax_scale=INFINITY), "softmax_scale must be finite"),
    "alibi_dtype": (
        lambda: dense(alibi_slopes=tensor(4, dtype=BF16)),
        "ALiBi slopes must have dtype fp32",
    ),
    "alibi_heads": (lambda: dense(alibi_slopes=tensor(2)), "alibi_slopes must have shape"),
    "alibi_batch": (lambda: dense(alibi_slopes=tensor(3, 4)), "alibi_slopes must have shape"),
    "alibi_rank": (lambda: dense(alibi_slopes=tensor(1, 2, 4)), "alibi_slopes must have shape"),
    "sinks_heads": (lambda: dense(s_aux=tensor(2)), "s_aux must have shape"),
    "sinks_rank": (lambda: dense(s_aux=tensor(1, 4)), "s_aux must have shape"),
    "window_length": (lambda: dense(window_size=(1, 2, 3)), "window_size"),
    # Variable length.
    "varlen_q_rank": (lambda: varlen(q=(1, 12, 4, 16)), "q must have"),
    "varlen_k_rank": (lambda: varlen(k=(1, 20, 2, 16)), "k must have 3 dimensions"),
    "varlen_value_rows": (lambda: varlen(v=(21, 2, 16)), "v must have shape (total_k"),
    "cu_seqlens_q_dtype": (
        lambda: varlen(cu_seqlens_q=torch.tensor([0, 5, 12])),
        "cu_seqlens_q must have dtype int32",
    ),
    "cu_seqlens_k_dtype": (
        lambda: varlen(cu_seqlens_k=torch.tensor([0, 9, 20])),
        "cu_seqlens_k must have dtype int32",
    ),
    "cu_seqlens_q_rank": (
        lambda: varlen(cu_seqlens_q=int32(0, 5, 12)[None]),
        "cu_seqlens_q must have shape (batch_size + 1)",
    ),
    "cu_seqlens_q_empty": (
        lambda: varlen(cu_seqlens_q=int32()),
        "cu_seqlens_q must have shape (batch_size + 1)",
    ),
    "cu_seqlens_k_shape": (
        lambda: varlen(cu_seqlens_k=int32(0, 9, 20, 20)),
        "cu_seqlens_k must have shape (batch_size + 1)",
    ),
    "cu_seqlens_strided": (
        lambda: varlen(cu_seqlens_q=int32(0, 9, 5, 9, 12, 9)[::2]),
        "cu_seqlens_q must be contiguous",
    ),
    "cu_seqlens_start": (
        lambda: varlen(cu_seqlens_q=int32(1, 5, 12)),
        "cu_seqlens_q must start at 0",
    ),
    "cu_seqlens_decrease": (
        lambda: varlen(cu_seqlens_k=int32(0, 15, 9)),
        "cu_seqlens_k must not decrease",
    ),
    "cu_seqlens_beyond_q": (
        lambda: varlen(cu_seqlens_q=int32(0, 6, 13)),
        "cu_seqlens_q ends at 13, beyond the 12 rows",
    ),
    "cu_seqlens_beyond_k": (
        lambda: varlen(cu_seqlens_k=int32(0, 10, 21)),
        "cu_seqlens_k ends at 21, beyond the 20 rows",
    ),
    "max_seqlen_q": (lambda: varlen(max_seqlen_q=6), "max_seqlen_q is 6"),
    "max_seqlen_k": (lambda: varlen(max_seqlen_k=10), "max_seqlen_k is 10"),
    "max_seqlen_negative": (lambda: varlen(max_seqlen_q=-1), "max_seqlen_q is -1"),
    # Pages.
    "table_dtype": (lambda: paged(TABLE.long()), "block_table must have dtype torch.int32"),
    "table_batch": (lambda: paged(TABLE[:1]), "block_table must have shape (batch_size"),
    "table_rank": (lambda: paged(TABLE[0]), "block_table must have shape (batch_size"),
    "table_outside": (lambda: paged(TABLE + 1), "block_table[1, 2] is 6, but there are 6 pages"),
    "table_negative": (lambda: paged(TABLE - 1), "block_table[0, 0] is -1"),
    "table_too_narrow": (lambda: paged(TABLE[:, :2]), "has room for 8"),
    "pages_of_nothing": (lambda: paged(TABLE, k=(6, 0, 2, 16)), "page size of at least 1"),
    # The cache.
    "key_alone": (
        lambda: cache(k=NEW, cache_seqlens=LENGTHS),
        "If key is supplied, value must also be passed in",
    ),
    "value_alone": (
        lambda: cache(v=NEW, cache_seqlens=LENGTHS),
        "If value is supplied, key must also be passed in",
    ),
    "key_without_lengths": (
        lambda: cache(k=NEW, v=NEW),
        "If key is supplied, seqlens_k must also be passed in",
    ),
    "key_longer_than_cache": (
        lambda: cache(k=LONG, v=LONG, cache_seqlens=int32(0, 0)),
        "If key is supplied, it must have seqlen <= the seqlen of the KV cache",
    ),
    "cache_overrun": (
        lambda: cache(k=NEW, v=NEW, cache_seqlens=int32(3, 10)),
        "cache_seqlens[1] is 10: with 1 new keys it passes the end of the KV cache",
    ),
    "cache_overrun_int": (
        lambda: cache(k=NEW, v=NEW, cache_seqlens=10),
        "it passes the end of the KV cache",
    ),
    "paged_overrun": (
        lambda: cache(
            caches=(6, 4, 2, 16),
            k=tensor(2, 4, 2, 16),
            v=tensor(2, 4, 2, 16),
            cache_seqlens=int32(3, 9),
            block_table=TABLE,
        ),
        "it passes the end of the KV cache",
    ),
    "new_keys_of_another_shape": (
        lambda: cache(k=tensor(2, 1, 4, 16), v=NEW, cache_seqlens=LENGTHS),
        "k must have shape (batch_size, seqlen_knew",
    ),
    "new_keys_of_another_dtype": (
        lambda: cache(k=NEW.half(), v=NEW.half(), cache_seqlens=LENGTHS),
        "new key and value must have the same dtype as query",
    ),
    "caches_of_another_shape": (
        lambda: flash_attn.flash_attn_with_kvcache(
            tensor(2, 1, 4, 16), tensor(2, 10, 2, 16), tensor(2, 9, 2, 16)
        ),
        "v_cache must have shape",
    ),
    "caches_of_another_batch": (lambda: cache(caches=(3, 10, 2, 16)), "k_cache must have shape"),
    "caches_of_another_dtype": (
        lambda: flash_attn.flash_attn_with_kvcache(
            tensor(2, 1, 4, 16), tensor(2, 9, 2, 16, dtype=BF16), tensor(2, 9, 2, 16, dtype=BF16)
        ),
        "query and key must have the same dtype",
    ),
    "cache_lengths_dtype": (
        lambda: cache(cache_seqlens=LENGTHS.long()),
        "cache_seqlens must have dtype int32",
    ),
    "cache_lengths_shape": (
        lambda: cache(cache_seqlens=int32(1, 2, 3)),
        "cache_seqlens must have shape (batch_size)",
    ),
    "cache_lengths_too_long": (
        lambda: cache(cache_seqlens=int32(3, 11)),
        "cache_seqlens[1] is 11, but must be in [0, 10]",
    ),
    "cache_lengths_negative": (
        lambda: cache(cache_seqlens=int32(-1, 3)),
        "cache_seqlens[0] is -1",
    ),
    "batch_idx_dtype": (
        lambda: cache(cache_batch_idx=torch.tensor([0, 1])),
        "cache_batch_idx must have dtype int32",
    ),
    "batch_idx_outside": (
        lambda: cache(cache_batch_idx=int32(0, 2)),
        "cache_batch_idx[1] is 2",
    ),
    "batch_idx_with_pages": (
        lambda: cache(caches=(6, 4, 2, 16), cache_batch_idx=int32(0, 1), block_table=TABLE),
        "Paged KVcache does not support cache_batch_idx",
    ),
    "leftpad_outside": (lambda: cache(cache_leftpad=int32(0, 11)), "cache_leftpad[1] is 11"),
    "leftpad_dtype": (
        lambda: cache(cache_leftpad=torch.tensor([0, 1])),
        "cache_leftpad must have dtype int32",
    ),
    "cache_table_dtype": (
        lambda: cache(caches=(6, 4, 2, 16), block_table=TABLE.long()),
        "block_table must have dtype torch.int32",
    ),
    "cache_table_outside": (
        lambda: cache(caches=(5, 4, 2, 16), block_table=TABLE),
        "block_table[1, 2] is 5, but there are 5 pages",
    ),
    "splits_negative": (lambda: cache(num_splits=-1), "num_splits must not be negative"),
    "rotary_dim": (
        lambda: cache(**rotary(columns=4)),
        "Only rotary dimensions divisible by 16 are currently supported",
    ),
    "rotary_wider_than_head": (
        lambda: cache(**rotary(columns=16)),
        "rotary_dim must be <= headdim",
    ),
    "rotary_rows": (
        lambda: cache(**rotary(rows=9)),
        "cos/sin seqlen must be at least the seqlen of KV cache",
    ),
    "rotary_tables_differ": (
        lambda: cache(**rotary(other=(11, 8))),
        "rotary_sin must have shape",
    ),
    "rotary_dtype": (
        lambda: cache(**rotary(dtype=BF16)),
        "rotary_cos must have the same dtype as query",
    ),
    "rotary_sin_missing": (
        lambda: cache(**{**rotary(), "rotary_sin": None}),
        "If rotary cos is provided, rotary sin must also be provided",
    ),
    "rotary_cos_missing": (
        lambda: cache(**{**rotary(), "rotary_cos": None}),
        "If rotary sin is provided, rotary cos must also be provided",
    ),
    "rotary_without_key": (
        lambda: cache(cache_seqlens=LENGTHS, rotary_cos=tensor(10, 8), rotary_sin=tensor(10, 8)),
        "If rotary cos/sin are provided, new key / value to be appended to KV cache must also",
    ),
    "cache_strided": (
        lambda: flash_attn.flash_attn_with_kvcache(
            tensor(2, 1, 4, 16), tensor(2, 9, 2, 16, 2)[..., 0], tensor(2, 9, 2, 16)
        ),
        "contiguous last dimension",
    ),
    "cache_expanded": (
        lambda: flash_attn.flash_attn_with_kvcache(
            *(tensor(2, 1, 4, 16), tensor(1, 9, 2, 16).expand(2, -1, -1, -1), tensor(2, 9, 2, 16)),
            *(NEW, NEW),
            cache_seqlens=int32(3, 4),
        ),
        "k_cache is written to, but is expanded (stride 0)",
    ),
    # Internals.
    "internal_strided": (
        lambda: flash_attn_2_cuda.fwd(
            *(tensor(2, 5, 4, 16, 2)[..., 0], tensor(2, 5, 4, 16), tensor(2, 5, 4, 16)),
            *(None, None, 0.0, 0.25, False, -1, -1, 0.0, False, None),
        ),
        "Input tensor must have contiguous last dimension",
    ),
    "generator": (
        lambda: flash_attn_2_cuda.fwd(
            *(tensor(2, 5, 4, 16), tensor(2, 5, 4, 16), tensor(2, 5, 4, 16)),
            *(None, None, 0.0, 0.25, False, -1, -1, 0.0, False, torch.Generator()),
        ),
        "`generator` argument is no longer supported",
    ),
}

CONSTRAINTS = {
    "head_dim": (lambda: dense(q=(1, 2, 4, 257), k=(1, 2, 4, 257)), AT_MOST_256),
    "head_dim_varlen": (lambda: varlen(q=(12, 4, 264), k=(20, 2, 264)), AT_MOST_256),
    "head_dim_cache": (lambda: cache(q=(2, 1, 4, 512), caches=(2, 9, 2, 512)), AT_MOST_256),
    "head_dim_zero": (lambda: dense(q=(1, 2, 4, 0), k=(1, 2, 4, 0)), "head dimension must be"),
    "heads": (lambda: dense(q=(2, 5, 5, 16)), DIVIDE),
    "heads_fewer": (lambda: dense(k=(2, 7, 8, 16)), DIVIDE),
    "heads_none": (lambda: dense(k=(2, 7, 0, 16)), DIVIDE),
    "heads_varlen": (lambda: varlen(q=(12, 5, 16)), DIVIDE),
    "heads_cache": (lambda: cache(q=(2, 1, 3, 16)), DIVIDE),
}


@pytest.mark.parametrize("name", ERRORS)
def test_error(name):
    call, text = ERRORS[name]
    with pytest.raises(RuntimeError, match=re.escape(text)):
        call()


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("exception", (RuntimeError, AssertionError), ids=lambda e: e.__name__)
def test_constraint(name, exception):
    """Whoever expects an assertion, as in FlashAttention-2's Python, catches it too."""
    call, text = CONSTRAINTS[name]
    with pytest.raises(exception, match=re.escape(text)):
        call()


def test_messages_say_what_was_given():
    with pytest.raises(RuntimeError, match=r"\(2, 7, 2, 16\), but got \(3, 7, 2, 16\)"):
        dense(k=(3, 7, 2, 16))
    with pytest.raises(RuntimeError, match="key has 2 and query has 5"):
        dense(q=(2, 5, 5, 16))
    with pytest.raises(RuntimeError, match="float64"):
        dense(dtypes=(torch.float64,) * 3)


@pytest.mark.parametrize("name", ("q", "k", "v"))
def test_different_devices(name):
    """One tensor elsewhere (here on the meta device)."""
    tensors = {x: tensor(2, 5, 4, 16) for x in "qkv"}
    tensors[name] = tensors[name].to("meta")
    with pytest.raises(RuntimeError, match=r"must be on the same device as q|on meta"):
        flash_attn.flash_attn_func(**tensors)


@pytest.mark.parametrize("function", (dense, varlen), ids=lambda f: f.__name__)
def test_rank_of_q_where_its_results_are_asked_for(function):
    with pytest.raises(RuntimeError, match=r"q must have shape \((total_q|batch_size), "):
        function(q=(5, 16), return_attn_probs=True)


def test_number_of_arguments_of_the_core():
    """Fields at the end may be left out, and are zero; there is nothing behind the last one."""
    q, out = torch.randn(2, 5, 4, 16), torch.empty(2, 5, 4, 16)
    expected = torch.empty_like(out)
    raw.forward(q=q, k=q, v=q, out=expected, softmax_scale=0.25, causal=1)
    _core.forward(q, q, q, out, None, 0.25, -1, -1, 1)
    assert torch.equal(out, expected)
    with pytest.raises(RuntimeError, match="q must be given"):
        _core.forward()
    with pytest.raises(TypeError, match="forward takes at most"):
        _core.forward(*[None] * (len(raw.FORWARD) + 1))


# -------------------------------------------------------------------------------------------------
# Nothing is written before an error


def filled(*shape, dtype=F32):
    return torch.full(shape, 123.0, dtype=dtype)


def test_forward_writes_nothing_before_an_error():
    q, k = tensor(2, 5, 4, 16), tensor(2, 7, 2, 16)
    out, lse = filled(2, 5, 4, 16), filled(2, 4, 5)
    for changes in (
        {"dropout_p": 2.0},
        {"softcap": -1.0},
        {"num_splits": -1},
        {"num_threads": -1},
        {"alibi_slopes": tensor(3)},
        {"v": tensor(2, 8, 2, 16)},
        {"softmax_lse": tensor(2, 4, 6)},
        {"s_dmask": tensor(2, 4, 5, 7)},
        {"out": q},
    ):
        arguments = {"q": q, "k": k, "v": k, "out": out, "softmax_lse": lse, **changes}
        with pytest.raises(RuntimeError):
            raw.forward(**arguments)
    assert (out == 123.0).all() and (lse == 123.0).all() and (q == 1.0).all()


@pytest.mark.parametrize(
    "changes",
    (
        {"cache_seqlens": int32(3, 10)},
        {"cache_seqlens": int32(3, -1)},
        {"v": None},
        {"v": tensor(2, 2, 2, 16)},
        {"num_splits": -1},
        {"softcap": -1.0},
        {"alibi_slopes": tensor(3)},
        {"s_aux": tensor(3)},
        {"cache_leftpad": int32(0, 11)},
        {"rotary_cos": tensor(10, 8)},
        {"rotary_cos": tensor(9, 8), "rotary_sin": tensor(9, 8)},
        {"q": tensor(2, 1, 3, 16)},
    ),
    ids=lambda changes: "-".join(changes),
)
def test_cache_is_not_written_before_an_error(changes):
    k_cache, v_cache = filled(2, 10, 2, 16), filled(2, 10, 2, 16)
    arguments = {
        "q": tensor(2, 1, 4, 16),
        "k_cache": k_cache,
        "v_cache": v_cache,
        "k": NEW,
        "v": NEW,
        "cache_seqlens": LENGTHS,
    }
    with pytest.raises(RuntimeError):
        flash_attn.flash_attn_with_kvcache(**{**arguments, **changes})
    assert (k_cache == 123.0).all() and (v_cache == 123.0).all()


def test_pages_are_not_written_before_an_error():
    """The table is wrong only for the page of the new keys of the last sequence."""
    pages = filled(6, 4, 2, 16)
    table = int32(0, 1, 2, 3, 4, 6).view(2, 3)
    with pytest.raises(RuntimeError, match=re.escape("block_table[1, 2] is 6")):
        flash_attn.flash_attn_with_kvcache(
            *(tensor(2, 1, 4, 16), pages, filled(6, 4, 2, 16), NEW, NEW),
            cache_seqlens=int32(3, 8),
            block_table=table,
        )
    assert (pages == 123.0).all()


def test_table_entries_that_no_row_needs_are_not_looked_at():
    table = int32(0, -7, 1000, 3, 4, 1 << 30).view(2, 3)
    out = flash_attn.flash_attn_with_kvcache(
        *(tensor(2, 1, 4, 16), tensor(6, 4, 2, 16), tensor(6, 4, 2, 16)),
        cache_seqlens=int32(4, 8),
        block_table=table,
    )
    torch.testing.assert_close(out, torch.ones_like(out))
