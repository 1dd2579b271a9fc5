"""One small call of every public function, forward and backward, as functions of nothing.

They return lists of tensors that are bitwise reproducible.
"""

import torch

import flash_attn

BF16 = torch.bfloat16
LENGTHS_Q, LENGTHS_K = (70, 1, 130), (70, 200, 33)


def int32(*values):
    return torch.tensor(values, dtype=torch.int32)


def cumulative(lengths):
    return int32(0, *lengths).cumsum(0, dtype=torch.int32)


def leaves(*shapes, dtype=BF16):
    return [torch.randn(shape).to(dtype).requires_grad_() for shape in shapes]


def differentiated(function, *tensors):
    """Results and gradients of a function whose results are tensors."""
    outputs = function(*tensors)
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    outputs = [x for x in outputs if x.requires_grad]
    gradients = torch.autograd.grad(outputs, tensors, [torch.ones_like(x) for x in outputs])
    return [*(x.detach() for x in outputs), *gradients]


def dense(deterministic=True, **options):
    q, k, v = leaves((2, 140, 4, 64), (2, 200, 2, 64), (2, 200, 2, 64))
    options.update(causal=True, deterministic=deterministic)

    def call():
        results = differentiated(lambda *x: flash_attn.flash_attn_func(*x, **options), q, k, v)
        if not deterministic:
            del results[1]  # dq, which may be added up in any order
        return results

    return call


def packed(**options):
    (qkv,) = leaves((2, 150, 3, 4, 128))
    return lambda: differentiated(
        lambda x: flash_attn.flash_attn_qkvpacked_func(
            x, window_size=(40, 10), deterministic=True, **options
        ),
        qkv,
    )


def varlen(**options):
    q, k, v = leaves((sum(LENGTHS_Q), 4, 64), *[(sum(LENGTHS_K), 2, 64)] * 2)
    cu_q, cu_k = cumulative(LENGTHS_Q), cumulative(LENGTHS_K)
    # 0-d tensors on the device, as some clients pass them
    longest = torch.tensor(max(LENGTHS_Q)), torch.tensor(max(LENGTHS_K))
    return lambda: differentiated(
        lambda *x: flash_attn.flash_attn_varlen_func(
            *x, cu_q, cu_k, *longest, deterministic=True, **options
        ),
        q,
        k,
        v,
    )


def cache(**options):
    q, k, v = (x.detach() for x in leaves((3, 1, 8, 128), (3, 1, 2, 128), (3, 1, 2, 128)))
    k_cache, v_cache = torch.randn(2, 3, 600, 2, 128).to(BF16)
    lengths = int32(500, 3, 0)
    angles = torch.rand(600, 32)
    tables = angles.cos().to(BF16), angles.sin().to(BF16)

    def call():
        caches = k_cache.clone(), v_cache.clone()
        out, lse = flash_attn.flash_attn_with_kvcache(
            q,
            *caches,
            k,
            v,
            *tables,
            cache_seqlens=lengths,
            causal=True,
            return_softmax_lse=True,
            **options,
        )
        return [out, lse, *caches]

    return call


def paged(**options):
    q = torch.randn(3, 2, 4, 64).to(BF16)
    k_cache, v_cache = torch.randn(2, 40, 16, 4, 64).to(BF16)
    table = torch.randperm(39).view(3, 13).to(torch.int32)
    lengths = int32(200, 17, 100)

    def call():
        return [
            flash_attn.flash_attn_with_kvcache(
                q, k_cache, v_cache, cache_seqlens=lengths, block_table=table, **options
            )
        ]

    return call


EVERY = {
    "dense": dense,
    "softcap, alibi, sinks": lambda: dense(
        softcap=3.0, alibi_slopes=torch.rand(4), s_aux=torch.randn(4)
    ),
    "default backward": lambda: dense(deterministic=False),
    "packed": packed,
    "varlen": varlen,
    "cache": cache,
    "cache in splits": lambda: cache(num_splits=3),
    "paged": paged,
}
WITH_DROPOUT = {
    "dense": lambda: dense(dropout_p=0.3),
    "packed": lambda: packed(dropout_p=0.3),
    "varlen": lambda: varlen(dropout_p=0.3),
}


def assert_equal(actual, expected):
    """Bitwise, NaN included; the GPU is waited for once."""
    same = [
        (x.view(torch.uint8) == y.view(torch.uint8)).all()
        for x, y in zip(actual, expected, strict=True)
    ]
    assert torch.stack(same).all(), f"same: {[bool(x) for x in same]}"
