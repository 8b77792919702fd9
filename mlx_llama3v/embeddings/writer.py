"""Fills a store: pictures wait in memory until a shard is full.

So a kill loses at most one shard of what was put here; embed.py sees to it that what is on its way here counts, too.
Names of pictures that are stored already become a shard of their own now and then; failures, which are tried again in
any case, are listed with the next shard and at the end.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import numpy as np

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.codec import Fit, fit_codec, get_codec
from mlx_llama3v.embeddings.damage import Losses, set_damaged_aside
from mlx_llama3v.embeddings.form import Made, choose_form
from mlx_llama3v.embeddings.lock import Lock
from mlx_llama3v.embeddings.shard import Parts, Picture, Shard, clear_leftovers, write_shard
from mlx_llama3v.embeddings.store import (
    MANIFEST,
    Coded,
    Manifest,
    Store,
    plain,
    shard_files,
    write_failures,
)
from mlx_llama3v.errors import StoreError
from mlx_llama3v.vision.encode import Form

_MAX_NAMES = 1 << 16  # of one shard: keeps its index small where pictures are tiny
_MAX_ALIASES = 1 << 12  # of them for pictures that wait no more: a kill costs reading so many files again
_UNFITTED_BYTES = 64 << 20  # of float32 values that wait for the codec to be fitted to them, where nobody did before


class Post(Protocol):
    """What is done to a picture's embeddings before the codec."""

    def describe(self) -> dict[str, Any]:
        """What the manifest must say."""

    def layout(self, layout: SliceLayout) -> SliceLayout:
        """Slice shapes of what `__call__` makes."""

    def __call__(self, encoded: Encoded) -> Encoded:
        """Another layout and other values."""


class StoreWriter:
    """A store opened for adding pictures; a store that exists goes on where it ended.

    Use it as a context manager: what is complete is written even when the block ends with an exception. For one
    thread at a time. A damaged shard is set aside (renamed to *.damaged), so that its pictures can be made anew.

    Attributes:
        most_lost: bytes that a kill may cost `embed`: a shard.
        pending_bytes: of the shard that is being filled.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, Any],
        codec: str = "float16",
        shard_bytes: int = 512 << 20,
        post: Post | None = None,
        on_device: bool | None = None,
        losses: Losses | None = None,
        beside: Store | None = None,
    ) -> None:
        """Open or create the store at `path`.

        Args:
            fingerprint: JSON-ready description of the encoder (Encoder.fingerprint()).
            shard_bytes: a shard is written when it holds that much, and so grows a little beyond it.
            post: done to every picture's embeddings first (pooling, the projector).
            on_device: whether the tower's device does the coding; default: where it is a GPU.
            losses: takes what is lost to damaged shards.
            beside: its names and pictures count as held here: this store is merged into it afterwards.

        Raises:
            StoreError: made with other settings, not writable, or another process is writing to it.
        """
        self.path = Path(path)
        self.most_lost = shard_bytes
        self.codec = get_codec(codec)
        self.post, self._on_device, self._beside = post, on_device, beside
        self.manifest = Manifest(plain(fingerprint), codec, plain(post.describe()) if post else {})
        self._lock = Lock(self.path)
        try:
            self._open(losses or Losses())
        except BaseException:
            self._lock.release()
            raise

    def _open(self, losses: Losses) -> None:
        wanted = self.manifest
        numbers = [number for number, _ in shard_files(self.path)]
        if numbers or (self.path / MANIFEST).exists():
            self.manifest = Manifest.read(self.path)
            self.manifest.check(self.path, fingerprint=wanted.fingerprint, codec=wanted.codec, post=wanted.post)
        else:
            self.manifest.write(self.path)
        clear_leftovers(self.path)
        set_damaged_aside(self.path, self.manifest, losses, self.path)
        store = Store(self.path)
        self._index, self._width, self._failures = store.index, store.width, dict(store.failures)
        self._channels = None if store.fit is None else store.fit.channels
        self._number = max(numbers, default=-1) + 1
        self._hashes: set[str] = set()  # of this run
        self._names: dict[str, str] = {}
        self._unfitted: list[tuple[str, Encoded]] = []
        self._pictures: list[Picture] = []
        self._new_names: dict[str, str] = {}
        self.pending_bytes = self._unfitted_bytes = 0
        self._failures_changed = False

    def require(self, fingerprint: Mapping[str, Any]) -> None:
        """Raises StoreError when the store was opened for another encoder."""
        self.manifest.check(self.path, fingerprint=fingerprint)

    def has(self, name: str) -> bool:
        """Whether a picture of that name is stored or waiting to be written."""
        return self.sha_of(name) is not None

    def sha_of(self, name: str) -> str | None:
        """Content hash of the picture that `name` stands for."""
        if name in self._names:
            return self._names[name]
        position = self._index.find_name(name)
        if position is not None:
            return self._index.sha(position)
        return None if self._beside is None else self._beside.sha_of(name)

    def has_hash(self, sha: str) -> bool:
        """Whether a picture with those bytes is stored or waiting. May be asked from any thread."""
        if sha in self._hashes or self._index.find_sha(sha) is not None:
            return True
        return self._beside is not None and self._beside.index.find_sha(sha) is not None

    def add(self, name: str, sha: str, encoded: Encoded) -> int:
        """Add one picture under `name` and return the bytes it takes; a known hash only costs the name.

        Args:
            sha: SHA-256 of the picture's bytes, in hexadecimal.

        Raises:
            StoreError: the embeddings are not [layout.patches, D] or not finite, or the disk is full.
        """
        return self.put(name, sha, encoded if self.has_hash(sha) else self.ready(name, encoded))

    @property
    def fitted(self) -> bool:
        """Whether the codec needs no `fit`: this store has pictures, or the codec has no channels."""
        return self._channels is not None or not self.codec.has_channels

    def fit(self, found: Fit) -> None:
        """Encode with these channels, and say in the manifest how well that does. Raises StoreError."""
        self.manifest = replace(self.manifest, fidelity=dict(found.fidelity))
        self.manifest.write(self.path)
        self._channels = found.channels

    def form(self) -> Form:
        """What `Encoder.encode_as` should make for this store: codes on a GPU, once the codec is fitted."""
        return choose_form(self.codec, self._channels, self.post is not None, self._on_device)

    def ready(self, name: str, made: Made) -> Made:
        """The first half of `add`: check the embeddings and do to them what comes before the codec.

        For the thread that runs the tower: that may be another model. Changes nothing. Raises StoreError.
        """
        self._check(name, made)
        return made if self.post is None or isinstance(made, Coded) else self.post(made)

    def put(self, name: str, sha: str, made: Made) -> int:
        """The second half of `add`: compress what `ready` returned, and write a shard when one is full."""
        size = 0
        if not self.has_hash(sha):
            width = made.patches.shape[-1] if isinstance(made, Encoded) else self._width
            if self._width not in (0, width):
                raise StoreError(f"{name!r}: embeddings have width {width}, those of the store {self._width}.")
            self._width = width
            self._hashes.add(sha)
            size = self.codec.row_bytes(width) * made.layout.patches
            self.pending_bytes += size
            if isinstance(made, Coded):
                self._pictures.append((sha, *made))
            elif self._channels is None:
                self._unfitted.append((sha, made))
                self._unfitted_bytes += 4 * made.patches.size
                if self._unfitted_bytes >= _UNFITTED_BYTES:
                    self._settle()
            else:
                self._pictures.append((sha, made.layout, self.codec.encode(made.patches, self._channels)))
        self.alias(name, sha)
        return size

    def alias(self, name: str, sha: str) -> None:
        """Let `name` stand for a picture that is stored or waiting; the name's failure is dropped."""
        if not self.has_hash(sha):
            raise KeyError(sha)
        self._names[name] = self._new_names[name] = sha
        if self._failures.pop(name, None) is not None:
            self._failures_changed = True
        aliases = len(self._new_names) - len(self._pictures) - len(self._unfitted)
        if self.pending_bytes >= self.most_lost or len(self._new_names) >= _MAX_NAMES or aliases >= _MAX_ALIASES:
            self.flush()

    def fail(self, name: str, reason: str) -> None:
        """List a picture that could not be read; a later run tries it again."""
        if self._failures.get(name) != reason:
            self._failures[name] = reason
            self._failures_changed = True

    def flush(self) -> None:
        """Write what waits as one shard. Raises StoreError when the disk refuses; then it still waits."""
        self._settle()
        if self._new_names:
            self._write(self._pictures, self._new_names, self._channels or {})
            self._pictures, self._new_names, self.pending_bytes = [], {}, 0
        if self._failures_changed:
            write_failures(self.path, self._failures)
            self._failures_changed = False

    def copy(self, pictures: list[Picture], names: Mapping[str, str], channels: Parts) -> None:
        """Write coded pictures of another store and names as a shard, as they are. Raises StoreError."""
        self.flush()
        if pictures or names:
            self._write(pictures, names, channels)
            self._note((sha for sha, _, _ in pictures), names)

    def take(self, shard: Shard) -> None:
        """Make a shard file of another store of the same settings one of this one. Raises StoreError."""
        self.flush()
        file = self._next()
        try:
            os.replace(shard.path, file)
        except OSError as error:  # another file system
            raise StoreError(f"{shard.path} cannot be moved to {file}: {error.strerror or error}.") from error
        self._number += 1
        self._note([shard.index.sha(i) for i in range(shard.index.pictures)], dict(shard.index.names()))

    def _note(self, shas: Iterable[str], names: Mapping[str, str]) -> None:
        self._hashes.update(shas)
        self._names.update(names)
        for name in names:
            self._failures_changed |= self._failures.pop(name, None) is not None

    def _next(self) -> Path:
        return self.path / f"shard-{self._number:05d}.safetensors"

    def adopt(self, found: Mapping[str, float]) -> None:
        """Take over another store's fidelity, where none is known here."""
        if found and not self.manifest.fidelity:
            self.manifest = replace(self.manifest, fidelity=dict(found))
            self.manifest.write(self.path)

    def _write(self, pictures: list[Picture], names: Mapping[str, str], channels: Parts) -> None:
        write_shard(
            self._next(),
            codec=self.codec.name,
            fingerprint=self.manifest.digest,
            pictures=pictures,
            names=names,
            channels=channels,
        )
        self._number += 1

    def _check(self, name: str, made: Made) -> None:
        arrays = [made.patches] if isinstance(made, Encoded) else [*made.parts.values()]
        for values in arrays:
            if values.ndim != 2 or len(values) != made.layout.patches:
                raise StoreError(
                    f"{name!r}: embeddings have shape {values.shape}, expected ({made.layout.patches}, ...)."
                )
        if not all(np.isfinite(values).all() for values in arrays):
            raise StoreError(f"{name!r}: the encoder gave values that are not finite; its weights are damaged.")

    def _settle(self) -> None:
        """Encode the pictures that wait for a fit: nobody fitted the codec, so it is fitted to them."""
        if not self._unfitted:
            return
        found = fit_codec(self.codec, [encoded.patches for _, encoded in self._unfitted])
        self.fit(found)
        self._pictures = [(sha, at.layout, self.codec.encode(at.patches, found.channels)) for sha, at in self._unfitted]
        self._unfitted = []

    def close(self) -> None:
        """Write what waits and let other writers in. A second call does nothing."""
        if self._lock.held:
            try:
                self.flush()
            finally:
                self._lock.release()

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, StoreError):
            self._lock.release()  # The disk refused once; a second try would hide the first error.
        else:
            self.close()
