"""How patch embeddings are held on disk: a small family of codecs, keyed by name.

The name is part of a store's manifest, so a store is never decoded with another codec than it was written
with. A codec turns float values [N, D] into named parts whose first axis is N: parts of several pictures are
concatenated into one tensor of a shard and any picture can be read alone.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Protocol

import numpy as np

from mlx_llama3v.errors import StoreError


class Codec(Protocol):
    """What the store asks of a codec."""

    name: str

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Float values [N, D] -> parts [N, ...] to be written."""

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """The parts of `encode` -> float16 values [N, D]."""


class Float16:
    """Half precision: relative error 2**-11. Values beyond its range (massive activations) saturate."""

    name = "float16"

    def encode(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """See Codec."""
        limit = float(np.finfo(np.float16).max)
        return {"patches": np.clip(values, -limit, limit).astype(np.float16)}

    def decode(self, parts: Mapping[str, np.ndarray]) -> np.ndarray:
        """See Codec."""
        return parts["patches"]


CODECS: dict[str, Codec] = {"float16": Float16()}


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises StoreError that lists the known ones."""
    if name not in CODECS:
        raise StoreError(f"codec {name!r} is not known; this version has {', '.join(CODECS)}.")
    return CODECS[name]
