"""The embedding store: a directory of shards that is written once and read at random.

`manifest.json` says what made it (schema, fingerprint of encoder and image processing, codec, and what was done to
the embeddings before the codec), and how faithful the codec is; nothing else: the set of complete shards is the
index, so a kill at any moment costs at most the shard in the making. Pictures are held once per content hash;
names stand for hashes. `failures.jsonl` lists what could not be read and why. writer.py fills a store.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Container, Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.codec import Codec, Fit, Parts, get_codec, misfit, saturate, width
from mlx_llama3v.embeddings.index import Index, distinct_layouts
from mlx_llama3v.embeddings.shard import SCHEMA, OpenFile, Shard, damaged, read_shard, verify_shard, write_atomic
from mlx_llama3v.errors import DamagedError, ManifestError, StoreError
from mlx_llama3v.tensors import MARKS

MANIFEST = "manifest.json"
FAILURES = "failures.jsonl"
_NO_MANIFEST = "it is no manifest of an embedding store; the same `embed`, run again, writes it anew"
_PLACES, _FILES = 4096, 64  # remembered, held open; macOS lets a process have 256 files
SHARD = re.compile(r"shard-(\d{5,})\.safetensors")


class Coded(NamedTuple):
    """One picture as it lies on disk: for who decodes on a device of their own."""

    layout: SliceLayout
    parts: Parts  # of the codec, each [layout.patches, ...], and its channel parts [1, D]

    def decoded(self, codec: Codec) -> Encoded:
        """float16 [layout.patches, D]; `codec` is the store's."""
        return Encoded(self.layout, saturate(codec.decode(self.parts)))


@dataclass(frozen=True)
class Manifest:
    """What a store's manifest.json says."""

    fingerprint: dict[str, Any]
    codec: str
    post: dict[str, Any] = field(default_factory=dict)  # what was done before the codec (vision/pool.py, projected.py)
    fidelity: dict[str, float] = field(default_factory=dict)  # of the codec (codec.fit_codec)

    @property
    def digest(self) -> str:
        """Stands in every shard, so that a shard of another store is noticed."""
        made = {key: value for key, value in self.fingerprint.items() if key != MARKS}
        return hashlib.sha256(json.dumps([made, self.post], sort_keys=True).encode()).hexdigest()

    @classmethod
    def read(cls, path: Path) -> Manifest:
        """Raises StoreError: no store there, damaged, of another version."""
        file = path / MANIFEST
        try:
            values = json.loads(file.read_bytes())
            schema = values.pop("schema")
        except FileNotFoundError as error:
            raise ManifestError(f"{path} is not an embedding store: it has no {MANIFEST}.") from error
        except OSError as error:
            raise StoreError(f"{file} cannot be read: {error.strerror or error}.") from error
        except (ValueError, TypeError, KeyError, AttributeError, RecursionError) as error:
            raise ManifestError(f"{file} is damaged: {_NO_MANIFEST}.") from error
        if schema != SCHEMA:
            raise StoreError(f"{file} has schema version {schema!r}; this version reads {SCHEMA}: embed anew.")
        kinds = {"fingerprint": dict, "codec": str, "post": dict, "fidelity": dict}
        if {"fingerprint", "codec"} - set(values) or any(
            key not in kinds or not isinstance(value, kinds[key]) for key, value in values.items()
        ):
            raise ManifestError(f"{file} is damaged: {_NO_MANIFEST}.")
        return cls(**values)

    def write(self, path: Path) -> None:
        """Atomic. Raises StoreError when the disk refuses."""
        write_atomic(path / MANIFEST, [json.dumps({"schema": SCHEMA} | asdict(self), indent=2).encode()])

    def check(self, path: Path, **wanted: Any) -> None:
        """Raise StoreError that names each wanted setting that differs, with both values."""
        if what := self.differences(wanted):
            raise StoreError(f"{path} was made with other settings: {what}; use those, or another directory for these.")

    def differences(self, wanted: Mapping[str, Any]) -> str:
        """Each wanted setting that differs, with both values; "" where none does."""
        mine, yours = _flat({key: getattr(self, key) for key in wanted}), _flat(plain(wanted))
        keys = [key for key in {**mine, **yours} if mine.get(key) != yours.get(key) and key != MARKS]
        return "; ".join(f"{key} is {mine.get(key)!r} there and {yours.get(key)!r} here" for key in keys)


class Reader(Protocol):
    """What training asks of a store: a Store, or a RollingStore that is filled while it is read."""

    path: Path
    manifest: Manifest
    codec: Codec
    failures: dict[str, str]

    @property
    def width(self) -> int: ...
    def __len__(self) -> int: ...
    def __contains__(self, name: object) -> bool: ...
    def layout(self, name: str) -> SliceLayout: ...
    def layouts(self, names: Iterable[str]) -> dict[str, SliceLayout]: ...
    def read(self, name: str) -> Encoded: ...
    def read_batch(self, names: Sequence[str]) -> list[Coded]: ...
    def announce(self, names: Iterable[str]) -> None: ...
    def hold(self, names: Sequence[str]) -> dict[str, str]: ...
    def expect(self, turns: Iterable[tuple[int, Sequence[str]]]) -> None: ...
    def begin(self, turn: int, names: Sequence[str] = ()) -> dict[str, str]: ...
    def leave(self) -> None: ...


def described(store: Reader) -> dict[str, Any]:
    """What a run's config.json says of its store; nothing where there are no pictures."""
    if not len(store):
        return {}
    return {
        "path": str(store.path.resolve()),
        "codec": store.codec.name,
        "post": store.manifest.post,
        "tiling": store.manifest.fingerprint.get("tiling"),
        MARKS: store.manifest.fingerprint.get(MARKS, ""),
    }


class Store:
    """A store opened for reading. Headers are read once, here; pictures when they are asked for."""

    def __init__(
        self,
        path: str | Path,
        fingerprint: Mapping[str, Any] | None = None,
        damage: list[DamagedError] | None = None,
        noted: Container[str] = (),
        manifest: Manifest | None = None,
    ) -> None:
        """Open the store at `path`.

        Args:
            fingerprint: the encoder's, where it is known; a store made with another one is refused.
            damage: takes damaged shards, which are left out then; else they are refused.
            noted: names of shards that are read whole for that (damage.read_notes).
            manifest: taken for the one that is there (damage.mendable).

        Raises:
            StoreError: no store there, another fingerprint or codec, a damaged shard.
        """
        self.path = Path(path)
        self.manifest = manifest or Manifest.read(self.path)
        if fingerprint is not None:
            self.manifest.check(self.path, fingerprint=fingerprint)
        self.codec = get_codec(self.manifest.codec)
        self.shards = tuple(self._opened(damage, noted))
        self.index = Index(shard.index for shard in self.shards)
        self._place = lru_cache(_PLACES)(self.index.find_name)  # what is announced is read a moment later
        self._file = lru_cache(_FILES)(OpenFile)  # a batch comes from many shards
        self.failures = read_failures(self.path)

    def _opened(self, damage: list[DamagedError] | None, noted: Container[str]) -> Iterator[Shard]:
        for _, file in shard_files(self.path):
            try:
                shard = open_shard(file, self.manifest)
                if file.name in noted:
                    verify_shard(file)
                yield shard
            except DamagedError as error:
                if damage is None:
                    raise
                damage.append(error)

    @property
    def fingerprint(self) -> dict[str, Any]:
        """Of the encoder that made it (Encoder.fingerprint())."""
        return self.manifest.fingerprint

    @property
    def names(self) -> tuple[str, ...]:
        """Names of all stored pictures, in the order in which they were added."""
        return tuple(self.index.names())

    def __len__(self) -> int:
        return self.index.count

    def __contains__(self, name: object) -> bool:
        return isinstance(name, str) and self.index.find_name(name) is not None

    def sha_of(self, name: str) -> str | None:
        """Content hash of the picture that `name` stands for."""
        position = self.index.find_name(name)
        return None if position is None else self.index.sha(position)

    def layout(self, name: str) -> SliceLayout:
        """Slice shapes of one picture; reads nothing. Raises StoreError for an unknown name."""
        shard, i = self._find(name)
        return shard.index.layout(i)

    def layouts(self, names: Iterable[str]) -> dict[str, SliceLayout]:
        """Slice shapes of those pictures that are here: as `layout`, for very many at once."""
        names = list(names)
        positions = self.index.find_names(names)
        tables = [np.empty((0, 6), np.int32), *(shard.index.tensors["index.layouts"] for shard in self.shards)]
        kinds, which = distinct_layouts(np.concatenate(tables)[positions[positions >= 0]])
        made = [SliceLayout((oh, ow), rows, cols, (th, tw)) for oh, ow, rows, cols, th, tw in kinds.tolist()]
        here = (name for name, position in zip(names, positions.tolist(), strict=True) if position >= 0)
        return {name: made[kind] for name, kind in zip(here, which.tolist(), strict=True)}

    def read(self, name: str) -> Encoded:
        """One picture's embeddings, float16 [layout.patches, D]. Safe in several threads at once.

        Raises StoreError for an unknown name, and naming the file for a shard cut short.
        """
        return self.read_coded(name).decoded(self.codec)

    def read_coded(self, name: str) -> Coded:
        """One picture as it lies on disk; see `Coded.decoded`. Raises as `read` does."""
        shard, i = self._find(name)
        return Coded(shard.index.layout(i), shard.read(i) | shard.channels)

    def read_batch(self, names: Sequence[str]) -> list[Coded]:
        """As `read_coded` for many pictures, which become views of one array: that spares most page faults."""
        found = [self._find(name) for name in names]
        ends = np.cumsum([0, *(shard.size(i) for shard, i in found)])
        buffer = np.empty(ends[-1], np.uint8)
        return [
            Coded(shard.index.layout(i), shard.read_from(self._file(shard.path), i, buffer[start:end]) | shard.channels)
            for (shard, i), start, end in zip(found, ends[:-1].tolist(), ends[1:].tolist(), strict=True)
        ]

    def announce(self, names: Iterable[str]) -> None:
        """Tell the system which pictures are read next, so that its disk works on many at once. Returns at once.

        On a cold disk that doubles the rate of one read after the other (benchmarks/store.py). Raises as `read` does.
        """
        for shard, i in [self._find(name) for name in names]:
            shard.advise(self._file(shard.path), i)

    def hold(self, names: Sequence[str]) -> dict[str, str]:
        """Told what is read at any time; what cannot be, and why. Nothing: all is here (see rolling.py)."""
        return {}

    def expect(self, turns: Iterable[tuple[int, Sequence[str]]]) -> None:
        """Told what will be read, batch by batch. Nothing to do."""

    def begin(self, turn: int, names: Sequence[str] = ()) -> dict[str, str]:
        """Told that a batch of these is read now; what turned out to be unreadable, and why. Nothing."""
        return {}

    def leave(self) -> None:
        """Told that nothing is read any more. Nothing to do."""

    @property
    def width(self) -> int:
        """D of the embeddings; 0 in an empty store."""
        return next((width(shard.parts, shard.channels) for shard in self.shards if shard.index.pictures), 0)

    @property
    def fit(self) -> Fit | None:
        """Of the codec, as the first shard has it; None in an empty store."""
        channels = next((shard.channels for shard in self.shards if shard.index.pictures), None)
        return None if channels is None else Fit(channels, self.manifest.fidelity)

    def info(self) -> dict[str, Any]:
        """JSON-ready facts: names, images (distinct), slices, tokens (embeddings), bytes, ..."""
        empty = [np.empty((0, 6), np.int32)]
        layouts = np.concatenate(empty + [shard.index.tensors["index.layouts"] for shard in self.shards])
        oh, ow, rows, cols, th, tw = layouts[self.index.distinct()].astype(np.int64).T
        return {
            "names": len(self),
            "images": len(oh),
            "slices": int((1 + rows * cols).sum()),
            "tokens": int((oh * ow + rows * cols * th * tw).sum()),
            "width": self.width,
            "bytes": sum(shard.bytes for shard in self.shards),
            "codec": self.codec.name,
            "fidelity": self.manifest.fidelity,
            "post": self.manifest.post,
            "shards": len(self.shards),
            "failures": len(self.failures),
            "fingerprint": self.fingerprint,
        }

    def _find(self, name: str) -> tuple[Shard, int]:
        position = self._place(name)
        if position is None:
            reason = f" ({self.failures[name]})" if name in self.failures else ""
            raise StoreError(f"{self.path} has no embedding of {name!r}{reason}; run `embed` on its data first.")
        number, i = self.index.locate(position)
        return self.shards[number], i


def shard_files(path: Path) -> list[tuple[int, Path]]:
    """(number, file) of all shards, by number. Raises StoreError where the directory cannot be read."""
    try:
        files = [*path.iterdir()]
    except OSError as error:
        raise StoreError(f"{path} cannot be read: {error.strerror or error}.") from error
    return sorted((int(match[1]), file) for file in files if (match := SHARD.fullmatch(file.name)) is not None)


def open_shard(file: Path, manifest: Manifest) -> Shard:
    """A shard of the store with that manifest; one copied here from another store is refused. Raises StoreError."""
    shard = read_shard(file)
    if (shard.codec, shard.fingerprint) != (manifest.codec, manifest.digest):
        verify_shard(file)  # a flipped bit looks like another encoder, too
        if shard.codec != manifest.codec:
            raise ManifestError(f"{file} has codec {shard.codec!r}, the store {manifest.codec!r}.")
        theirs, ours = shard.fingerprint[:12], manifest.digest[:12]
        raise ManifestError(f"{file} was made with another encoder ({theirs}) than the store ({ours}).")
    if shard.index.pictures and (wrong := misfit(get_codec(shard.codec), shard.parts, shard.channels)):
        raise damaged(file, f"its {wrong} is not what the codec {shard.codec} writes")
    return shard


def read_failures(path: Path) -> dict[str, str]:
    """Name -> why it could not be read. Raises StoreError where the list is damaged."""
    try:
        lines = (path / FAILURES).read_text("utf-8").split("\n")
        rows = [json.loads(line) for line in lines if line]
        return {str(row["name"]): str(row["reason"]) for row in rows}
    except FileNotFoundError:
        return {}
    except (ValueError, TypeError, KeyError, OSError, RecursionError) as error:
        raise StoreError(f"{path / FAILURES} is damaged; delete it, it only lists unread pictures.") from error


def write_failures(path: Path, failures: Mapping[str, str]) -> None:
    """Atomic. Raises StoreError when the disk refuses."""
    lines = (json.dumps({"name": name, "reason": why}) + "\n" for name, why in failures.items())
    write_atomic(path / FAILURES, ["".join(lines).encode()])


def plain(values: Mapping[str, Any]) -> dict[str, Any]:
    """As JSON gives it back (tuples become lists), so that it can be compared with a manifest."""
    return json.loads(json.dumps(values))


def _flat(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """{"a": {"b": 1}} -> {"a.b": 1}, without the leading "fingerprint." and "post."."""
    found: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        inner = "" if name in ("fingerprint", "post") else f"{name}."
        found.update(_flat(value, inner) if isinstance(value, dict) else {name: value})
    return found
