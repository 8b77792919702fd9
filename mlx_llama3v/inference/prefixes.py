"""Keys and values of past requests, kept for later ones that begin alike: the same picture, the next turn."""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.compat import KVCache
from mlx_llama3v.inference.rows import common


@dataclass(frozen=True)
class _Entry:
    keys: np.ndarray  # see rows.place_keys
    cache: list[Any]
    nbytes: int


class Prefixes:
    """The most recently used rows of keys and values, up to `limit` bytes."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._entries: OrderedDict[int, _Entry] = OrderedDict()
        self._next = 0
        self.nbytes = 0

    def __len__(self) -> int:
        return len(self._entries)

    def find(self, keys: np.ndarray) -> tuple[int, list[Any] | None]:
        """How many of `keys` an entry holds at most, one of them left over for its logits, and a copy of those."""
        shared = {name: min(common(entry.keys, keys), len(keys) - 1) for name, entry in self._entries.items()}
        best = max(shared, key=shared.__getitem__, default=None)
        if best is None or shared[best] == 0:
            return 0, None
        self._entries.move_to_end(best)
        return shared[best], _copied(self._entries[best].cache, shared[best])

    def add(self, keys: np.ndarray, cache: list[Any]) -> None:
        """Keep the first `len(keys)` places of `cache`, in place of entries that it continues."""
        for name, entry in list(self._entries.items()):
            shared = common(entry.keys, keys)
            if shared == len(keys):
                self._entries.move_to_end(name)
                return
            if shared == len(entry.keys):
                self._drop(name)
        kept = _copied(cache, len(keys))
        mx.eval([layer.state for layer in kept])
        size = sum(layer.nbytes for layer in kept)
        if size > self._limit:
            return
        self._entries[self._next] = _Entry(keys, kept, size)
        self._next, self.nbytes = self._next + 1, self.nbytes + size
        while self.nbytes > self._limit:
            self._drop(next(iter(self._entries)))

    def _drop(self, name: int) -> None:
        self.nbytes -= self._entries.pop(name).nbytes


def _copied(cache: list[Any], length: int) -> list[Any]:
    """Caches of the first `length` places, of which later writes to `cache` change nothing."""
    found = []
    for layer in cache:
        copy = KVCache()
        copy.keys = mx.contiguous(layer.keys[..., :length, :])
        copy.values = mx.contiguous(layer.values[..., :length, :])
        copy.offset = length
        found.append(copy)
    return found
