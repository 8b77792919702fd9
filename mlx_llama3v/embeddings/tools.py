"""Looking after a store: verify, prune, merge. Each may be interrupted at any moment and run again."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator, Mapping
from pathlib import Path
from typing import Any

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.damage import Losses, note_damage
from mlx_llama3v.embeddings.lock import Lock
from mlx_llama3v.embeddings.shard import Picture, Shard, clear_leftovers, read_shard, verify_shard, write_shard
from mlx_llama3v.embeddings.store import (
    MANIFEST,
    Manifest,
    Store,
    open_shard,
    read_failures,
    shard_files,
    write_failures,
)
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import ManifestError, StoreError

Progress = Callable[[int, int], None]  # shards done, of how many


def verify(path: Path, progress: Progress | None = None) -> dict[str, str]:
    """Read everything and compare the checksums: file name -> what is wrong with it, for every shard that is damaged or
    cannot be read, or for the manifest where all others agree on other settings.

    The damaged ones are noted in the store for the next `embed`, which sets them aside and makes their pictures anew.
    Raises StoreError: no store there, of another version.
    """
    manifest, files, found = Manifest.read(path), shard_files(path), dict[str, StoreError]()
    made, own = set[tuple[str, str]](), False  # settings of other shards; whether any has the manifest's
    for number, (_, file) in enumerate(files):
        try:
            open_shard(file, manifest)
            own = True
            verify_shard(file)
        except StoreError as error:
            found[file.name] = error
            if isinstance(error, ManifestError):
                shard = read_shard(file)
                made.add((shard.codec, shard.fingerprint))
        if progress is not None:
            progress(number + 1, len(files))
    if len(made) == 1 and not own:  # not all shards of a store came from elsewhere
        ((codec, fingerprint),) = made
        others = {name: error for name, error in found.items() if not isinstance(error, ManifestError)}
        found = {MANIFEST: _wrong(path, manifest, codec, fingerprint, len(found) - len(others)), **others}
    note_damage(path, found)
    return {name: str(error) for name, error in found.items()}


def _wrong(path: Path, manifest: Manifest, codec: str, fingerprint: str, shards: int) -> ManifestError:
    """Of a manifest that is not that of its shards."""
    theirs, ours = f"the codec {codec!r}", f"{manifest.codec!r}"
    if codec == manifest.codec:  # shards have a digest of both
        theirs, ours = f"another fingerprint or post ({fingerprint[:12]})", f"others ({manifest.digest[:12]})"
    count = f"all {shards} whole shards have" if shards > 1 else "the one whole shard has"
    return ManifestError(
        f"{path / MANIFEST} is not that of its shards: {count} {theirs}, it says {ours}; the `embed` that made "
        "the store, run again, writes it anew."
    )


def prune(path: Path, keep: Collection[str], progress: Progress | None = None) -> tuple[int, int]:
    """Keep only the pictures that the names of `keep` stand for; returns (pictures dropped, bytes freed).

    Shards that lose all are deleted first: the disk may be full. One that loses a part is written anew under the next
    number before the old one is deleted, so that at most one shard's room is needed and a kill leaves a picture twice
    at worst, which the next run clears.
    Raises StoreError: no store there, damaged, in use, none of its pictures named (a wrong data file would empty it),
    or the disk refuses.
    """
    Manifest.read(path)  # a directory that is no store gets no lock file
    lock = Lock(path)
    try:
        clear_leftovers(path)
        store = Store(path)
        wanted = set(keep)
        shas = {sha for shard in store.shards for name, sha in shard.index.names() if name in wanted}
        if store.shards and not shas:
            raise StoreError(
                f"none of the {len(store)} pictures of {path} is named by what to keep ({len(wanted)} names); "
                "nothing was dropped. To drop all of them, delete the directory."
            )
        number = max([number for number, _ in shard_files(path)], default=-1) + 1
        before = store.info()
        seen: set[str] = set()
        left = [(shard, _kept(shard, shas, seen)) for shard in store.shards]
        left.sort(key=lambda found: bool(found[1] or _names(found[0], wanted)))
        for done, (shard, kept) in enumerate(left):
            number += _prune_shard(shard, number, store.manifest, kept, _names(shard, wanted))
            if progress is not None:
                progress(done + 1, len(store.shards))
        failures = {name: why for name, why in read_failures(path).items() if name in wanted}
        if failures != store.failures:
            write_failures(path, failures)
        after = Store(path).info()
        return before["images"] - after["images"], before["bytes"] - after["bytes"]
    finally:
        lock.release()


def _kept(shard: Shard, shas: set[str], seen: set[str]) -> list[int]:
    """Which pictures stay in a shard: each in the first one that has it."""
    kept = []
    for i in range(shard.index.pictures):
        sha = shard.index.sha(i)
        if sha in shas and sha not in seen:
            kept.append(i)
            seen.add(sha)
    return kept


def _names(shard: Shard, wanted: set[str]) -> dict[str, str]:
    return {name: sha for name, sha in shard.index.names() if name in wanted}


def _prune_shard(shard: Shard, number: int, manifest: Manifest, kept: list[int], names: Mapping[str, str]) -> bool:
    """Whether a shard was written in the place of this one."""
    if len(kept) == shard.index.pictures and len(names) == shard.index.name_count:
        return False
    if names or kept:
        verify_shard(shard.path)  # what was damaged would be whole by its new checksum
        write_shard(
            shard.path.with_name(f"shard-{number:05d}.safetensors"),
            codec=manifest.codec,
            fingerprint=manifest.digest,
            pictures=[picture(shard, i) for i in kept],
            names=names,
            channels=shard.channels,
        )
    try:
        shard.path.unlink()
    except OSError as error:
        raise StoreError(f"{shard.path} cannot be deleted: {error.strerror or error}.") from error
    return bool(names or kept)


def merge(
    sources: Collection[Path],
    output: Path,
    progress: Progress | None = None,
    *,
    move: bool = False,
    losses: Losses | None = None,
) -> dict[str, int]:
    """Join stores of the same encoder and codec into the store `output`, each picture once: codes are copied as
    they are. Returns {"images": added, "duplicates": left out, "conflicts": names that stand for another picture in
    an earlier store, which keeps them}. A picture that has no other name is not copied.

    What `output` holds stays, and a run that was interrupted goes on. With `move` the sources lose every shard that
    has arrived, and a shard of which all is new is renamed, not copied. `losses` takes what `output` lost to damaged
    shards. Raises StoreError: settings that differ, a damaged source, a full disk.
    """
    stores = [Store(path) for path in sources]
    if not stores:
        raise StoreError("there is nothing to merge; name at least one store.")
    first = stores[0].manifest
    for store in stores[1:]:
        store.manifest.check(store.path, fingerprint=first.fingerprint, codec=first.codec, post=first.post)
    if any(store.path.resolve() == output.resolve() for store in stores):
        raise StoreError(f"{output} is one of the stores to merge; give another directory for the result.")
    total = sum(len(store.shards) for store in stores)
    counts = {"images": 0, "duplicates": 0, "conflicts": 0}
    with StoreWriter(output, first.fingerprint, first.codec, post=_Described(first.post), losses=losses) as writer:
        writer.adopt(first.fidelity)
        done = 0
        for store in stores:
            nameless = _nameless(store, writer, counts)
            for shard in store.shards:
                _merge_shard(shard, nameless, writer, move, counts)
                done += 1
                if progress is not None:
                    progress(done, total)
        for store in stores:
            for name, why in store.failures.items():
                if not writer.has(name):
                    writer.fail(name, why)
    return counts


def _nameless(store: Store, writer: StoreWriter, counts: dict[str, int]) -> set[str]:
    """Pictures whose names all stand for others in what was merged before: nothing could read them."""

    def names() -> Iterator[tuple[str, str]]:
        return (pair for shard in store.shards for pair in shard.index.names())

    clashes = [sha for name, sha in names() if writer.sha_of(name) not in (None, sha)]
    counts["conflicts"] += len(clashes)
    found = set(clashes)
    return found - {sha for name, sha in names() if sha in found and writer.sha_of(name) in (None, sha)}


def _merge_shard(shard: Shard, nameless: set[str], writer: StoreWriter, move: bool, counts: dict[str, int]) -> None:
    """What is new of a shard; with `move` it is gone then."""
    shas = [shard.index.sha(i) for i in range(shard.index.pictures)]
    fresh = [i for i, sha in enumerate(shas) if sha not in nameless and not writer.has_hash(sha)]
    counts["images"] += len(fresh)
    counts["duplicates"] += sum(map(writer.has_hash, shas))
    new = {name: sha for name, sha in shard.index.names() if not writer.has(name)}
    if move and len(fresh) == len(shas) and len(new) == shard.index.name_count:
        writer.take(shard)
        return
    if fresh and not move:
        verify_shard(shard.path)  # its codes get a checksum of their own in the new shard
    writer.copy([picture(shard, i) for i in fresh], new, shard.channels)
    if move:
        shard.path.unlink(missing_ok=True)


class _Described:
    """The `post` of a writer that only copies."""

    def __init__(self, description: Mapping[str, Any]) -> None:
        self._description = dict(description)

    def describe(self) -> dict[str, Any]:
        """See Post."""
        return self._description

    def layout(self, layout: SliceLayout) -> SliceLayout:
        """Never called, as below."""
        raise NotImplementedError

    def __call__(self, encoded: Encoded) -> Encoded:
        """Never called: codes are copied as they are."""
        raise NotImplementedError


def picture(shard: Shard, i: int) -> Picture:
    """One picture as it lies in a shard."""
    return shard.index.sha(i), shard.index.layout(i), shard.read(i)
