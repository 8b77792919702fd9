"""One picture on its way to the tower: read, known by its hash, opened and cut, without the tower: for threads."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from mlx_llama3v.config import Grid, SliceLayout
from mlx_llama3v.errors import ImageError
from mlx_llama3v.source import Loaded, Source, load_source
from mlx_llama3v.vision.encode import Form


class Encoder(Protocol):
    """What is asked of vision.encode.Encoder."""

    rows: int  # patches of layouts that the tower ran over so far, padding included

    def prepare(self, source: Loaded) -> tuple[SliceLayout, list[np.ndarray]]:
        """Layout and the patches [P_i, C] of each slice; called in threads. Raises ImageError."""

    def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int) -> Sequence[np.ndarray]:
        """(patch grid, patches) of slices of any pictures -> embeddings [P_i, D] of each."""

    def encode_as(
        self, form: Form, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int
    ) -> Sequence[Mapping[str, np.ndarray]]:
        """The same, but what `form` makes of the embeddings."""

    def fingerprint(self) -> dict[str, Any]:
        """What the store's manifest must say."""


@dataclass(frozen=True)
class Prepared:
    """What a thread hands over: a picture, or only its hash when that is stored, or why it cannot be read."""

    sha: str = ""
    layout: SliceLayout | None = None
    patches: Sequence[np.ndarray] = ()
    reason: str = ""


def prepare(source: Source, encoder: Encoder, has_hash: Callable[[str], bool]) -> Prepared:
    """The hash comes first, so that bytes which are stored cost no decoding."""
    try:
        return _prepare(source, encoder, has_hash)
    except MemoryError:
        return Prepared(reason=f"{source} takes more memory than there is.")


def _prepare(source: Source, encoder: Encoder, has_hash: Callable[[str], bool]) -> Prepared:
    try:
        loaded = load_source(source)
    except FileNotFoundError:
        return Prepared(reason=f"{source} does not exist.")
    except (OSError, ValueError) as error:  # ValueError: a NUL in the name
        return Prepared(reason=f"{source} cannot be read: {getattr(error, 'strerror', None) or error}.")
    sha = hashlib.sha256(loaded.content).hexdigest()
    if has_hash(sha):
        return Prepared(sha)
    try:
        return Prepared(sha, *encoder.prepare(loaded))
    except ImageError as error:
        return Prepared(sha, reason=str(error))
