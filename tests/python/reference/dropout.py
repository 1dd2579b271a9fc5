"""Which entries dropout keeps."""

import math

import torch

_WORD = 0xFFFFFFFF


def philox(counter, key):
    """Philox-4x32 with 7 rounds (Salmon et al., 2011): four words from four, and a key.

    A word is an int64 tensor (or a number) that holds 32 bits. Products of two words wrap around in
    64 bits, which leaves all of their bits in place.
    """
    c0, c1, c2, c3 = (torch.as_tensor(word, dtype=torch.int64) for word in counter)
    k0, k1 = (int(word) for word in key)
    for _ in range(7):
        low_product = c0 * 0xD2511F53
        high_product = c2 * 0xCD9E8D57
        c0, c1, c2, c3 = (
            (high_product >> 32 & _WORD) ^ c1 ^ k0,
            high_product & _WORD,
            (low_product >> 32 & _WORD) ^ c3 ^ k1,
            low_product & _WORD,
        )
        k0 = (k0 + 0x9E3779B9) & _WORD
        k1 = (k1 + 0xBB67AE85) & _WORD
    return c0, c1, c2, c3


def dropout_numbers(rng_state, batch, heads, sq, sk, *, first_batch=0):
    """The 16-bit number of every entry: int64 (b, h, sq, sk).

    One block of Philox gives eight of them: the rows r and r + 8 of sixteen, from the low and the
    high half of a word, and the columns c, c + 8, c + 16, c + 24 of thirty-two, one from each word.
    """
    seed, offset = (int(x) & 0xFFFFFFFFFFFFFFFF for x in rng_state)
    key = philox((offset & _WORD, offset >> 32, 0, 0), (seed & _WORD, seed >> 32))[:2]
    row = torch.arange(sq)[:, None]
    column = torch.arange(sk)
    counter = torch.broadcast_tensors(
        row // 16 * 8 + row % 8,
        column // 32 * 8 + column % 8,
        torch.arange(heads)[:, None, None],
        first_batch + torch.arange(batch)[:, None, None, None],
    )
    words = torch.stack(philox(counter, key))
    word = words.gather(0, (column // 8 % 4).expand(words.shape[1:])[None])[0]
    return torch.where(row // 8 % 2 == 1, word >> 16, word & 0xFFFF)


def dropout_keep_mask(dropout_p, rng_state, batch, heads, sq, sk, *, first_batch=0):
    """Which entries dropout keeps: bool (b, h, sq, sk). rng_state: seed and offset."""
    if dropout_p < 2.0**-20:
        return torch.ones(batch, heads, sq, sk, dtype=torch.bool)
    threshold = math.floor((1.0 - dropout_p) * 65536.0 + 0.5)
    return dropout_numbers(rng_state, batch, heads, sq, sk, first_batch=first_batch) < threshold
