"""What stands at each place of a conversation: vectors for the decoder, and keys that say what is the same.

Two conversations may share keys and values as far as their `place_keys` agree: the same text ids, the same
visual tokens of the same picture, cut the same way.
"""

from __future__ import annotations

from collections.abc import Sequence
from hashlib import blake2b

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import Encoded, ProjectorConfig
from mlx_llama3v.errors import ContextError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.projector import pack
from mlx_llama3v.text.prompt import FIRST_VISUAL, Rendered


def embed_rows(
    model: Llama3V, rows: Sequence[Rendered], pictures: Sequence[Sequence[Encoded]]
) -> tuple[mx.array, mx.array]:
    """Rows and their pictures -> ids [B, L] and the decoder's inputs [B, L, D], padded at the end."""
    shape = (len(rows), max(map(len, rows)))
    ids, source = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
    slices = pack(pictures, model.config.projector_config)
    for i, row in enumerate(rows):
        ids[i, : len(row)] = row.ids
        source[i, : len(row)] = slices.place(i, row.source) if slices else row.source
    inputs = mx.array(ids)
    if slices is None:
        return inputs, model.embed(inputs, mx.array(source) if source.any() else None)
    patches, grid = mx.array(slices.patches), mx.array(slices.grid)
    return inputs, model.embed(inputs, mx.array(source), patches, grid, slices.num_tokens)


def embed_rest(model: Llama3V, row: Rendered, pictures: Sequence[Encoded], start: int) -> tuple[mx.array, mx.array]:
    """The row from `start` on -> ids [L] and vectors [L, D]; pictures that ended before are left alone."""
    source = row.source[start:]
    visual = source[source >= FIRST_VISUAL]
    if len(visual):
        firsts = FIRST_VISUAL + np.cumsum([0, *(visual_tokens(model, [picture]) for picture in pictures)])
        skip = int(np.searchsorted(firsts, visual.min(), "right")) - 1
        source = np.where(source >= FIRST_VISUAL, source - firsts[skip] + FIRST_VISUAL, source).astype(np.int32)
        pictures = pictures[skip:]
    else:
        pictures = ()
    rest = Rendered(row.ids[start:], source, row.supervised[start:])
    ids, vectors = embed_rows(model, [rest], [pictures])
    return ids[0], vectors[0]


def visual_tokens(model: Llama3V, pictures: Sequence[Encoded]) -> int:
    """Visual tokens of some pictures."""
    projector: ProjectorConfig = model.config.projector_config
    return sum(projector.num_tokens(grid) for picture in pictures for grid in picture.layout.grids)


def place_keys(row: Rendered, pictures: Sequence[Encoded], model: Llama3V) -> np.ndarray:
    """int64 [L]: text ids as they are, for a visual token a negative number made from its picture's content."""
    numbers = [_fingerprint(picture) + np.arange(visual_tokens(model, [picture])) for picture in pictures]
    visual = np.concatenate(numbers) if numbers else np.zeros(1, np.int64)
    at = np.maximum(row.source.astype(np.int64) - FIRST_VISUAL, 0)
    return np.where(row.source >= FIRST_VISUAL, -1 - visual[np.minimum(at, len(visual) - 1)], row.ids)


def _fingerprint(picture: Encoded) -> int:
    digest = blake2b(repr(picture.layout).encode(), digest_size=8)
    digest.update(np.ascontiguousarray(picture.patches).data)
    return int.from_bytes(digest.digest(), "little") >> 2  # leaves room to count up


def common(a: np.ndarray, b: np.ndarray) -> int:
    """Length of the beginning that two rows of keys share."""
    n = min(len(a), len(b))
    different = np.flatnonzero(a[:n] != b[:n])
    return int(different[0]) if len(different) else n


def room(model: Llama3V, used: int, max_kv_size: int | None = None) -> int:
    """Tokens that still fit behind `used`. Raises ContextError where none does."""
    limit = int(model.config.text_config["max_position_embeddings"])
    limit = min(limit, max_kv_size or limit)
    if used >= limit:
        raise ContextError(
            f"the conversation is {used} tokens long with its pictures, but the context holds {limit}; "
            "start a new one, or use fewer or smaller pictures (--max-slices)."
        )
    return limit - used
