"""A few pictures from all over a data set: what a codec is fitted to, and what tells whether names changed their
meaning.

The first pictures are not like the others: data sets are sorted by source, so a store would hold photos with the
channels of three scanned pages.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import TypeVar

import numpy as np

from mlx_llama3v.config import Encoded, Grid, SliceLayout
from mlx_llama3v.embeddings.codec import Codec, Fit, fit_codec
from mlx_llama3v.embeddings.prepare import Encoder, prepare
from mlx_llama3v.embeddings.writer import Post
from mlx_llama3v.errors import StoreError
from mlx_llama3v.source import Source, load_source

_MOST, _LEAST, _SHARE = 32, 8, 20  # pictures: with two slices of each, a tenth of a set of as many slices as pictures
_ROWS = 128  # embeddings of a slice
_THREADS = 2

Item = TypeVar("Item")


def evenly(items: Sequence[Item], count: int) -> list[Item]:
    """The middles of `count` equal stretches; all where there are no more."""
    count = min(count, len(items))
    return [items[(2 * i + 1) * len(items) // (2 * count)] for i in range(count)]


def fit_sample(
    codec: Codec,
    pictures: Sequence[Source],
    encoder: Encoder,
    post: Post | None,
    *,
    batch_size: int = 8,
    workers: int = _THREADS,
) -> Fit | None:
    """Fit a codec to an even sample: the overview and the middle tile of up to 32 pictures, eight of a small set.

    Follows from the list and its pictures alone. Those that cannot be read are passed over; None where none can.
    """
    count = min(max(_LEAST, len(pictures) // _SHARE), _MOST)
    pool = ThreadPoolExecutor(workers, thread_name_prefix="sample")
    found = []
    try:
        for slices in pool.map(lambda source: _two(source, encoder), evenly(pictures, count)):
            made = zip(slices, encoder.encode(slices, batch_size) if slices else (), strict=True)
            if rows := [_some(Encoded(SliceLayout(grid), values), post) for (grid, _), values in made]:
                found.append(np.concatenate(rows))
    finally:
        pool.shutdown(cancel_futures=True)
    return fit_codec(codec, found) if found else None


def check_names(store: Path, reused: Sequence[tuple[str, Source]], sha_of: Callable[[str], str | None]) -> None:
    """Of names that a store holds, look at the bytes of a few: data sets are often divided into files of the same
    names, and the second one would get the embeddings of the first. Raises StoreError; a picture that is gone is none.
    """
    for name, source in evenly(reused, _MOST):
        with suppress(OSError, ValueError, MemoryError):
            if hashlib.sha256(load_source(source).content).hexdigest() != sha_of(name):
                raise StoreError(
                    f"{store} holds another picture under the name {name!r} than {source} is: it is of another data "
                    "set, or has changed since; give these pictures another --output, or drop the old ones with "
                    "`llama3v-mlx store prune`."
                )


def _two(source: Source, encoder: Encoder) -> list[tuple[Grid, np.ndarray]]:
    """Overview and middle tile; nothing of a picture that cannot be read."""
    prepared = prepare(source, encoder, lambda _: False)
    if prepared.layout is None:
        return []
    grids = prepared.layout.grids
    return [(grids[i], prepared.patches[i]) for i in sorted({0, len(grids) // 2})]


def _some(encoded: Encoded, post: Post | None) -> np.ndarray:
    values = encoded.patches if post is None else post(encoded).patches
    return values[evenly(range(len(values)), _ROWS)]
