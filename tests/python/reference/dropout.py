"""Which entries dropout keeps."""

import math

import numpy as np
import torch


def philox(counter, key):
    """Philox-4x32 with 7 rounds (Salmon et al., 2011): four uint32 arrays from four, and a key."""
    mask = np.uint64(0xFFFFFFFF)
    shift = np.uint64(32)
    c0, c1, c2, c3 = (np.asarray(word, dtype=np.uint64) for word in counter)
    k0, k1 = (int(word) for word in key)
    for _ in range(7):
        low_product = c0 * np.uint64(0xD2511F53)
        high_product = c2 * np.uint64(0xCD9E8D57)
        c0, c1, c2, c3 = (
            (high_product >> shift) ^ c1 ^ np.uint64(k0),
            high_product & mask,
            (low_product >> shift) ^ c3 ^ np.uint64(k1),
            low_product & mask,
        )
        k0 = (k0 + 0x9E3779B9) & 0xFFFFFFFF
        k1 = (k1 + 0xBB67AE85) & 0xFFFFFFFF
    return c0, c1, c2, c3


def dropout_numbers(rng_state, batch, heads, sq, sk, *, first_batch=0):
    """The 16-bit number of every entry: numpy int64 (b, h, sq, sk).

    One block of Philox gives eight of them: the rows r and r + 8 of sixteen, from the low and the
    high half of a word, and the columns c, c + 8, c + 16, c + 24 of thirty-two, one from each word.
    """
    seed, offset = (int(x) & 0xFFFFFFFFFFFFFFFF for x in rng_state)
    key = philox((offset & 0xFFFFFFFF, offset >> 32, 0, 0), (seed & 0xFFFFFFFF, seed >> 32))[:2]
    row = np.arange(sq)[None, None, :, None]
    column = np.arange(sk)[None, None, None, :]
    words = philox(
        np.broadcast_arrays(
            row // 16 * 8 + row % 8,
            column // 32 * 8 + column % 8,
            np.arange(heads)[None, :, None, None],
            (first_batch + np.arange(batch))[:, None, None, None],
        ),
        key,
    )
    word = np.choose(np.broadcast_to(column // 8 % 4, words[0].shape), words)
    number = np.where(row // 8 % 2 == 1, word >> np.uint64(16), word & np.uint64(0xFFFF))
    return number.astype(np.int64)


def dropout_keep_mask(dropout_p, rng_state, batch, heads, sq, sk, *, first_batch=0):
    """Which entries dropout keeps: bool (b, h, sq, sk). rng_state: seed and offset."""
    if dropout_p < 2.0**-20:
        return torch.ones(batch, heads, sq, sk, dtype=torch.bool)
    threshold = math.floor((1.0 - dropout_p) * 65536.0 + 0.5)
    numbers = dropout_numbers(rng_state, batch, heads, sq, sk, first_batch=first_batch)
    return torch.from_numpy(numbers < threshold)
