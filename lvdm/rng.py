"""Order and noise as functions of (seed, sample index), never of a process, its rank or its history.

A run killed at any moment and started again, or split over more processes, therefore sees the same clips in the same
order with the same noise.
"""

import hashlib
from functools import lru_cache

import torch


def generator(seed: int, *keys: int | str) -> torch.Generator:
    """A CPU generator that depends on `seed` and `keys` alone, e.g. `generator(0, "noise", sample_index)`."""
    digest = hashlib.blake2b(repr((seed, *keys)).encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


@lru_cache(maxsize=4)
def _permutation(seed: int, epoch: int, n: int) -> torch.Tensor:
    return torch.randperm(n, generator=generator(seed, "order", epoch))


def item_at(seed: int, index: int, n: int) -> int:
    """Which of `n` items the sample `index` (counted since the start of training) shows; each epoch permutes anew."""
    if n < 1:
        raise ValueError("no items to draw from")
    return int(_permutation(seed, index // n, n)[index % n])
