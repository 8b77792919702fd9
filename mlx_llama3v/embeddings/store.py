"""The embedding store: a directory of shards that is written once and read at random.

`manifest.json` says what made it (schema, fingerprint of encoder and image processing, codec), nothing else:
the set of complete shards is the index, so a kill at any moment costs at most the shard in the making.
Pictures are held once per content hash; names stand for hashes. `failures.jsonl` lists what could not be read
and why.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.codec import get_codec
from mlx_llama3v.embeddings.shard import (
    SCHEMA,
    Entry,
    Shard,
    read_header,
    verify_shard,
    write_atomic,
    write_shard,
)
from mlx_llama3v.errors import StoreError

MANIFEST = "manifest.json"
FAILURES = "failures.jsonl"
LOCK = ".lock"
_SHARD = re.compile(r"shard-(\d{5,})\.safetensors")
_MAX_NAMES = 1 << 16  # of one shard: keeps its header small where pictures are tiny


class Store:
    """A store opened for reading. Headers are read once, here; pictures when they are asked for."""

    def __init__(self, path: str | Path, fingerprint: Mapping[str, Any] | None = None) -> None:
        """Open the store at `path`.

        Args:
            fingerprint: the encoder's, where it is known; a store made with another one is refused.

        Raises:
            StoreError: no store there, another fingerprint or codec, a damaged shard.
        """
        self.path = Path(path)
        manifest = _read_manifest(self.path)
        self.fingerprint: dict[str, Any] = manifest["fingerprint"]
        if fingerprint is not None:
            _check_same(self.path, {"fingerprint": self.fingerprint}, {"fingerprint": _plain(fingerprint)})
        self.codec = get_codec(manifest["codec"])
        self.shards = tuple(_read_shards(self.path, self.codec.name, self.fingerprint))
        self._where: dict[str, tuple[Shard, Entry]] = {
            entry.sha: (shard, entry) for shard in self.shards for entry in shard.entries
        }
        found = {name: sha for shard in self.shards for name, sha in shard.names.items()}
        # A name whose picture was in a shard that is gone is not in the store: `embed` makes it anew.
        self._names = {name: sha for name, sha in found.items() if sha in self._where}
        self.failures = _read_failures(self.path)

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stored pictures, in the order in which they were added."""
        return tuple(self._names)

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def layout(self, name: str) -> SliceLayout:
        """Slice shapes of one picture; reads nothing. Raises StoreError for an unknown name."""
        return self._find(name)[1].layout

    def read(self, name: str) -> Encoded:
        """One picture's embeddings, float16 [layout.patches, D]. Safe in several threads at once.

        Raises StoreError for an unknown name, and naming the file for a shard cut short.
        """
        shard, entry = self._find(name)
        return Encoded(entry.layout, self.codec.decode(shard.read(entry)))

    @property
    def width(self) -> int:
        """D of the patch embeddings; 0 in an empty store."""
        return next((part.shape[1] for shard in self.shards for part in shard.parts.values()), 0)

    def info(self) -> dict[str, Any]:
        """JSON-ready facts: names, images (distinct), slices, tokens (patch embeddings), bytes, ..."""
        layouts = [entry.layout for _, entry in self._where.values()]
        return {
            "names": len(self._names),
            "images": len(layouts),
            "slices": sum(len(layout.grids) for layout in layouts),
            "tokens": sum(layout.patches for layout in layouts),
            "width": self.width,
            "bytes": sum(shard.bytes for shard in self.shards),
            "codec": self.codec.name,
            "shards": len(self.shards),
            "failures": len(self.failures),
            "fingerprint": self.fingerprint,
        }

    def verify(self) -> None:
        """Read everything and compare the checksums. Raises StoreError naming the first damaged file."""
        for shard in self.shards:
            verify_shard(shard.path)

    def _find(self, name: str) -> tuple[Shard, Entry]:
        if name not in self._names:
            reason = f" ({self.failures[name]})" if name in self.failures else ""
            raise StoreError(f"{self.path} has no embedding of {name!r}{reason}; run `embed` on its data first.")
        return self._where[self._names[name]]


class StoreWriter:
    """A store opened for adding pictures; a store that exists goes on where it ended.

    Pictures are held in memory until a shard is full, so a kill loses at most one shard. Use it as a context
    manager: what is complete is written even when the block ends with an exception. For one thread.
    """

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, Any],
        codec: str = "float16",
        shard_bytes: int = 512 << 20,
    ) -> None:
        """Open or create the store at `path`.

        Args:
            fingerprint: JSON-ready description of the encoder (Encoder.fingerprint()).
            shard_bytes: a shard is written when it holds that much, and so grows a little beyond it.

        Raises:
            StoreError: made with another fingerprint or codec, damaged, not writable, or another process is
                writing to it.
        """
        self.path = Path(path)
        self.shard_bytes = shard_bytes
        self.codec = get_codec(codec)
        self.fingerprint = _plain(fingerprint)
        self._lock = _lock(self.path)
        try:
            self._open()
        except BaseException:
            os.close(self._lock)
            raise

    def _open(self) -> None:
        wanted = {"schema": SCHEMA, "fingerprint": self.fingerprint, "codec": self.codec.name}
        if (self.path / MANIFEST).exists() or any(_SHARD.fullmatch(item.name) for item in self.path.iterdir()):
            _check_same(self.path, _read_manifest(self.path), wanted)
        else:
            write_atomic(self.path / MANIFEST, [json.dumps(wanted, indent=2).encode()])
        for leftover in self.path.glob(".*.tmp"):  # of a writer that was killed; the lock says none is alive
            leftover.unlink()
        store = Store(self.path)
        self._hashes = set(store._where)
        self._names = dict(store._names)
        self._failures = dict(store.failures)
        self._width = store.width
        numbers = [int(_SHARD.fullmatch(shard.path.name)[1]) for shard in store.shards]  # type: ignore[index]
        self._number = max(numbers, default=-1) + 1
        self._pictures: list[tuple[str, SliceLayout, dict[str, np.ndarray]]] = []
        self._new_names: dict[str, str] = {}
        self._pending_bytes = 0
        self._failures_changed = False

    def require(self, fingerprint: Mapping[str, Any]) -> None:
        """Raises StoreError when the store was opened for another encoder."""
        _check_same(self.path, {"fingerprint": self.fingerprint}, {"fingerprint": _plain(fingerprint)})

    def has(self, name: str) -> bool:
        """Whether a picture of that name is stored or waiting to be written."""
        return name in self._names

    def has_hash(self, sha: str) -> bool:
        """Whether a picture with those bytes is stored or waiting. May be asked from any thread."""
        return sha in self._hashes

    def add(self, name: str, sha: str, encoded: Encoded) -> int:
        """Add one picture under `name` and return the bytes it takes; a known hash only costs the name.

        Raises StoreError when the embeddings are not [layout.patches, D] or not finite, or the disk is full.
        """
        size = 0
        if sha not in self._hashes:
            values = encoded.patches
            width = self._width or values.shape[-1]
            expected = (encoded.layout.patches, width)
            if values.shape != expected:
                raise StoreError(f"{name!r}: embeddings have shape {values.shape}, expected {expected}.")
            if not np.isfinite(values).all():
                raise StoreError(f"{name!r}: the encoder gave values that are not finite; its weights are damaged.")
            parts = self.codec.encode(values)
            self._width = width
            self._hashes.add(sha)
            self._pictures.append((sha, encoded.layout, parts))
            size = sum(part.nbytes for part in parts.values())
            self._pending_bytes += size
        self.alias(name, sha)
        return size

    def alias(self, name: str, sha: str) -> None:
        """Let `name` stand for a picture that is stored or waiting; the name's failure is dropped."""
        if sha not in self._hashes:
            raise KeyError(sha)
        self._names[name] = self._new_names[name] = sha
        if self._failures.pop(name, None) is not None:
            self._failures_changed = True
        if self._pending_bytes >= self.shard_bytes or len(self._new_names) >= _MAX_NAMES:
            self.flush()

    def fail(self, name: str, reason: str) -> None:
        """List a picture that could not be read; a later run tries it again."""
        if self._failures.get(name) != reason:
            self._failures[name] = reason
            self._failures_changed = True

    def flush(self) -> None:
        """Write what waits as one shard. Raises StoreError when the disk refuses; then it still waits."""
        if self._new_names:
            write_shard(
                self.path / f"shard-{self._number:05d}.safetensors",
                codec=self.codec.name,
                fingerprint=_digest(self.fingerprint),
                pictures=self._pictures,
                names=self._new_names,
            )
            self._number += 1
            self._pictures, self._new_names, self._pending_bytes = [], {}, 0
        if self._failures_changed:
            lines = (json.dumps({"name": name, "reason": why}) + "\n" for name, why in self._failures.items())
            write_atomic(self.path / FAILURES, ["".join(lines).encode()])
            self._failures_changed = False

    def close(self) -> None:
        """Write what waits and let other writers in. A second call does nothing."""
        if self._lock < 0:
            return
        try:
            self.flush()
        finally:
            os.close(self._lock)
            self._lock = -1

    def __enter__(self) -> StoreWriter:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None and issubclass(kind, StoreError):
            os.close(self._lock)  # The disk refused once; a second try would hide the first error.
            self._lock = -1
        else:
            self.close()


def _read_manifest(path: Path) -> dict[str, Any]:
    file = path / MANIFEST
    try:
        manifest = json.loads(file.read_bytes())
        schema, known = manifest["schema"], {"schema", "fingerprint", "codec"} <= set(manifest)
    except FileNotFoundError as error:
        raise StoreError(f"{path} is not an embedding store: it has no {MANIFEST}.") from error
    except OSError as error:
        raise StoreError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, KeyError) as error:
        raise StoreError(f"{file} is damaged: it is not the manifest of an embedding store.") from error
    if schema != SCHEMA or not known:
        raise StoreError(f"{file} has schema version {schema!r}; this version reads {SCHEMA}.")
    return manifest


def _read_shards(path: Path, codec: str, fingerprint: dict[str, Any]) -> list[Shard]:
    """Headers of all shards, by number. A shard copied here from another store is refused."""
    files = sorted(
        (int(match[1]), item) for item in path.iterdir() if (match := _SHARD.fullmatch(item.name)) is not None
    )
    shards = [read_header(item) for _, item in files]
    for shard in shards:
        if shard.codec != codec:
            raise StoreError(f"{shard.path} has codec {shard.codec!r}, the store {codec!r}.")
        if shard.fingerprint != _digest(fingerprint):
            raise StoreError(
                f"{shard.path} was made with another encoder ({shard.fingerprint[:12]}) than the store "
                f"({_digest(fingerprint)[:12]})."
            )
    return shards


def _read_failures(path: Path) -> dict[str, str]:
    try:
        lines = (path / FAILURES).read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return {row["name"]: row["reason"] for row in rows}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, OSError) as error:
        raise StoreError(f"{path / FAILURES} is damaged; delete it, it only lists unread pictures.") from error


def _check_same(path: Path, have: dict[str, Any], want: dict[str, Any]) -> None:
    """Raise StoreError that names each setting in which two descriptions differ, with both values."""
    mine, yours = _flat(have), _flat(want)
    keys = [key for key in {**mine, **yours} if mine.get(key) != yours.get(key)]
    if keys:
        what = "; ".join(f"{key} is {mine.get(key)!r} there and {yours.get(key)!r} here" for key in keys)
        raise StoreError(f"{path} was made with other settings: {what}; use those, or another directory for these.")


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, without the leading "fingerprint."."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        found.update(
            _flat(value, f"{name}.".removeprefix("fingerprint.")) if isinstance(value, dict) else {name: value}
        )
    return found


def _plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back (tuples become lists), so that it can be compared with a manifest."""
    return json.loads(json.dumps(values))


def _digest(fingerprint: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(fingerprint, sort_keys=True).encode()).hexdigest()


def _lock(path: Path) -> int:
    """Take the store for this process; the system gives it back when the process ends, however it ends."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path / LOCK, os.O_RDWR | os.O_CREAT, 0o644)
    except OSError as error:
        raise StoreError(f"{path} cannot be written: {error.strerror or error}.") from error
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        os.close(descriptor)
        raise StoreError(f"{path} is being written by another process; wait for it or stop it.") from error
    return descriptor
