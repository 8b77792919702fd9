"""Damaged shards: `verify` leaves word of them, the next writer sets them aside and says what the store lost."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Container, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from itertools import count
from pathlib import Path

from mlx_llama3v.embeddings.index import Index, ShardIndex
from mlx_llama3v.embeddings.lock import Lock
from mlx_llama3v.embeddings.shard import Shard, read_shard, verify_shard, write_atomic
from mlx_llama3v.embeddings.store import MANIFEST, Manifest, open_shard, shard_files
from mlx_llama3v.errors import DamagedError, ManifestError, StoreError

_NOTES = "damage.json"  # names of shards that `verify` found damaged, and how


@dataclass
class Losses:
    """What stores lost to damaged shards since this was made.

    Attributes:
        told: called with each sentence at once: who found the damage may fail before it can report.
        names: that the shards held and their stores had no more then, as far as they could be read.
    """

    told: Callable[[str], None] = lambda sentence: None
    sentences: list[str] = field(default_factory=list)
    names: set[str] = field(default_factory=set)

    def tell(self, sentence: str) -> None:
        """Keep a sentence, and say it."""
        self.sentences.append(sentence)
        self.told(sentence)

    def left(self, store: Container[str]) -> int:
        """How many of the names are not there (again)."""
        return sum(name not in store for name in self.names)


def set_damaged_aside(path: Path, manifest: Manifest, losses: Losses, into: Path) -> None:
    """Move what is damaged by its header, or by an earlier `verify` and still, to the directory `into`.

    Raises StoreError: a shard that cannot be read or moved.
    """
    noted, indexes = read_notes(path), []
    for _, file in shard_files(path):
        try:
            open_shard(file, manifest)
            if file.name in noted:
                verify_shard(file)
        except DamagedError as error:
            index = _salvage(file)
            held = "names that cannot be read" if index is None else f"{index.name_count:,} names"
            aside = into / f"{'' if into == path else f'{path.name}-'}{file.name}.damaged"
            _move(file, aside)
            losses.tell(f"{error.finding}; set aside as {aside.name} with {held}.")
            indexes += [index] if index is not None else []
    if indexes:
        losses.names |= _lost(indexes, [open_shard(file, manifest).index for _, file in shard_files(path)])
    if noted:
        (path / _NOTES).unlink(missing_ok=True)


def mend_manifest(path: Path, wanted: Manifest, losses: Losses) -> None:
    """Write a manifest anew that was lost or damaged, where every shard that can be read says that `wanted` made it.

    Raises StoreError: another process is writing there, or the disk refuses.
    """
    if mendable(path, wanted):
        lock = Lock(path)
        try:
            wanted.write(path)
        finally:
            lock.release()
        losses.tell(f"{path / MANIFEST} was lost or damaged; it was written anew, as all shards say what made them.")


def mendable(path: Path, wanted: Manifest) -> bool:
    """Whether the manifest is not `wanted`, but every shard that can be read says that `wanted` made it."""
    try:
        differs = Manifest.read(path).differences(
            {"fingerprint": wanted.fingerprint, "codec": wanted.codec, "post": wanted.post}
        )
    except ManifestError:
        differs = "all"
    shards: list[Shard] = []
    for _, file in shard_files(path) if differs and path.is_dir() else ():
        with suppress(StoreError):
            shards.append(read_shard(file, whole=False))
    made = (wanted.codec, wanted.digest)
    return bool(shards) and all((shard.codec, shard.fingerprint) == made for shard in shards)


def set_part_aside(part: Path, error: ManifestError, losses: Losses) -> None:
    """Move a whole store, whose shards nothing describes any more or that has other settings, beside its place.

    Raises StoreError.
    """
    found = [index for _, file in shard_files(part) if (index := _salvage(file)) is not None]
    aside = next(to for n in count(1) if not (to := part.with_name(f"damaged-{n}-{part.name}")).exists())
    _move(part, aside)
    names = {name for index in found for name, _ in index.names()}
    losses.names |= names
    losses.tell(
        f"{str(error).rstrip('.')}; set aside as {aside} with {len(names):,} names, which are made anew unless it has "
        f"the settings of {part.parent}: then `store merge` adds it, with a whole {MANIFEST} in it."
    )


def _move(file: Path, aside: Path) -> None:
    try:
        os.replace(file, aside)
    except OSError as error:
        raise StoreError(f"{file} is damaged and cannot be set aside: {error.strerror or error}.") from error


def _salvage(file: Path) -> ShardIndex | None:
    """What a damaged shard says that it holds, where that can still be read."""
    try:
        return read_shard(file, whole=False).index
    except StoreError:
        return None


def _lost(gone: list[ShardIndex], left: list[ShardIndex]) -> set[str]:
    """Names of shards that are gone, and names elsewhere of their pictures, that the shards left do not lead to."""
    shas = {index.sha(i) for index in gone for i in range(index.pictures)}
    names = {name for index in gone for name, _ in index.names()}
    names |= {name for index in left for name, sha in index.names() if sha in shas}
    index = Index(left)
    return {name for name in names if index.find_name(name) is None}


def note_damage(path: Path, found: Mapping[str, StoreError]) -> None:
    """Leave word for the next writer of what is wrong with shards, by file name; of nothing where they are whole.

    Only of damage: a shard that cannot be read (a drive that is away) may be whole. A hint, which the disk may refuse.
    """
    notes = {name: why for name, why in read_notes(path).items() if name in found}
    notes |= {name: str(error) for name, error in found.items() if isinstance(error, DamagedError)}
    with suppress(StoreError, OSError):
        if notes:
            write_atomic(path / _NOTES, [json.dumps(notes, indent=2).encode()])
        else:
            (path / _NOTES).unlink(missing_ok=True)


def read_notes(path: Path) -> dict[str, str]:
    """Name of a shard -> what `verify` found."""
    try:
        values = json.loads((path / _NOTES).read_bytes())
    except (OSError, ValueError, RecursionError):
        return {}
    return {str(name): str(why) for name, why in values.items()} if isinstance(values, dict) else {}
