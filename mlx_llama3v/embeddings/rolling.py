"""A store that is filled while training reads it, and never holds more than a budget: more data than disk.

One process writes (`RollingWriter`, fed by `embed_images` with the pictures in the order in which training will read
them), another reads (`RollingStore`) and deletes what it has read. A turn is one batch of the run. They share only a
directory:

- `shard-NNNNN.safetensors` as in any store; its names are reads, `TURN:NAME`: in a later pass over the data the same
  picture is another read, mostly of another shard.
- `ahead.json`: up to which turn every read is on disk; written after the shard, so a kill leaves too little, never
  too much.
- `wanted.json`: which turn the reader waits for, while it does.

The budget is kept by the writer, which waits before it writes while the directory is too large; the reader makes room
by deleting shards whose last turn is over. A reader that waits gets its turn all the same: at worst the directory is
one shard over the budget, never are both stuck.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.codec import DEFAULT, get_codec, width
from mlx_llama3v.embeddings.form import Made, choose_form
from mlx_llama3v.embeddings.lock import Lock
from mlx_llama3v.embeddings.shard import Parts, Picture, Shard, write_atomic, write_shard
from mlx_llama3v.embeddings.store import (
    Coded,
    Manifest,
    Store,
    open_shard,
    plain,
    read_failures,
    shard_files,
    write_failures,
)
from mlx_llama3v.embeddings.writer import Post
from mlx_llama3v.errors import StoreError
from mlx_llama3v.vision.encode import Form

Turn = tuple[int, Sequence[str]]  # number, names of the pictures that it reads
AHEAD, WANTED = "ahead.json", "wanted.json"
_PAUSE = 0.02  # seconds between two looks at the directory
_SHARD_BYTES = 512 << 20


class RollingWriter:
    """What `embed_images` takes for a StoreWriter; names are reads (see `read_name`), in the order of their turns.

    Nothing is known in advance (`has` is always false): what was read is gone. Call `end` after the last picture.
    """

    fitted = True

    def __init__(
        self,
        path: Path,
        fingerprint: Mapping[str, Any],
        codec: str,
        budget: int,
        post: Post | None = None,
        channels: Parts | None = None,
        check: Callable[[], None] = lambda: None,
    ) -> None:
        """Open the directory and empty it: a resumed run reads from another turn on.

        Args:
            channels: of the codec, fitted to a sample (Codec.fit).
            budget: bytes that the shards may take.
            check: called while waiting for room; raises where nobody reads any more.

        Raises:
            StoreError: not writable, or another process is writing to it.
        """
        self.path, self.budget = path, budget
        self.most_lost = math.inf  # nothing outlives its run
        self._shard_bytes = max(1, min(_SHARD_BYTES, budget // 8))
        self.codec, self.post, self._check = get_codec(codec), post, check
        self.manifest = Manifest(plain(fingerprint), codec, plain(post.describe()) if post else {})
        self._lock = Lock(path)
        for file in [*(file for _, file in shard_files(path)), *path.glob(".*.tmp"), path / AHEAD]:
            file.unlink(missing_ok=True)
        write_failures(path, {})
        self.manifest.write(path)
        self._channels = channels or {}
        self._number = self.pending_bytes = 0
        self._turn = self._complete = self._told = -1  # of the last picture; without a gap; in ahead.json
        self._looked = 0.0
        self._pictures: list[Picture] = []
        self._hashes: set[str] = set()  # of the pending shard
        self._names: dict[str, str] = {}
        self._failures: dict[str, str] = {}

    def require(self, fingerprint: Mapping[str, Any]) -> None:
        """See StoreWriter."""
        self.manifest.check(self.path, fingerprint=fingerprint)

    def has(self, name: str) -> bool:
        """See StoreWriter."""
        return False

    def has_hash(self, sha: str) -> bool:
        """See StoreWriter; what is read again much later is encoded again, or its shard would have to stay."""
        return False

    def form(self) -> Form:
        """See StoreWriter."""
        return choose_form(self.codec, self._channels, self.post is not None)

    def ready(self, name: str, made: Made) -> Made:
        """See StoreWriter."""
        return made if self.post is None or isinstance(made, Coded) else self.post(made)

    def put(self, name: str, sha: str, made: Made) -> int:
        """See StoreWriter."""
        turn = turn_of(name)
        if turn > self._turn:  # pictures come in order, so the turns before are complete
            self._turn, self._complete = turn, turn - 1
            if self.pending_bytes >= self._shard_bytes or self._hungry():
                self._write()
        size = 0
        if sha not in self._hashes:
            parts = made.parts if isinstance(made, Coded) else self.codec.encode(made.patches, self._channels)
            self._pictures.append((sha, made.layout, parts))
            self._hashes.add(sha)
            size = self.codec.row_bytes(width(parts, self._channels)) * made.layout.patches
            self.pending_bytes += size
        self.alias(name, sha)
        return size

    def alias(self, name: str, sha: str) -> None:
        """See StoreWriter."""
        self._names[name] = sha

    def fail(self, name: str, reason: str) -> None:
        """See StoreWriter."""
        self._failures[name] = reason
        write_failures(self.path, self._failures)

    def flush(self) -> None:
        """Every turn that was begun is complete. Raises StoreError when the disk refuses."""
        self._complete = self._turn
        if self._hungry():
            self._write()

    def end(self, turn: int) -> None:
        """All is encoded, up to that turn: write what waits."""
        self._complete = turn
        self._write()

    def close(self) -> None:
        """Let other writers in."""
        self._lock.release()

    def _write(self) -> None:
        """The pending shard, as soon as there is room."""
        while self._held() + self.pending_bytes > self.budget and not self._hungry(pause=0):
            self._check()
            time.sleep(_PAUSE)
        if self._names:
            write_shard(
                self.path / f"shard-{self._number:05d}.safetensors",
                codec=self.codec.name,
                fingerprint=self.manifest.digest,
                pictures=self._pictures,
                names=self._names,
                channels=self._channels,
            )
            self._number += 1
        write_atomic(self.path / AHEAD, [json.dumps({"turn": self._complete}).encode()])
        self._told = self._complete
        self._pictures, self._names, self.pending_bytes = [], {}, 0
        self._hashes.clear()

    def _hungry(self, pause: float = 0.2) -> bool:
        """Whether the reader waits for a turn that is complete here, not on disk; looked up every `pause` seconds."""
        if time.monotonic() - self._looked < pause:
            return False
        self._looked = time.monotonic()
        return self._told < _number(self.path / WANTED) <= self._complete

    def _held(self) -> int:
        total = 0
        for _, file in shard_files(self.path):
            with suppress(FileNotFoundError):  # read and deleted in between
                total += file.stat().st_size
        return total


class RollingStore:
    """What training takes for a Store. Layouts are known from the pictures' headers; embeddings are waited for."""

    def __init__(
        self,
        path: Path,
        manifest: Manifest,
        width: int,
        layouts: Mapping[str, SliceLayout],
        problems: Mapping[str, str],
        hold: Callable[[Sequence[str]], Store] | None = None,
        check: Callable[[], None] = lambda: None,
        start: Callable[[Iterable[Turn]], Path] | None = None,
    ) -> None:
        """See the module.

        Args:
            layouts: slice shapes of every picture as they will be stored.
            problems: pictures that have no readable header, and why.
            hold: makes a store of pictures that are read at any time (of held-out rows).
            check: called while waiting; raises StoreError where the writing process has ended badly.
            start: starts that process on the reads of a run, and returns the directory that it fills.
        """
        self.path, self.manifest, self._width = path, manifest, width
        self.codec = get_codec(manifest.codec)
        self.failures = dict(problems)
        self._layouts, self._hold, self._check, self._start = layouts, hold, check, start
        self._held: Store | None = None
        self._turn, self._left = -1, False
        self._shards: dict[Path, int] = {}  # with the last turn that reads it
        self._where: dict[str, tuple[Shard, int]] = {}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """See Store."""
        return self.manifest.fingerprint

    @property
    def width(self) -> int:
        """See Store."""
        return self._width

    def __len__(self) -> int:
        return len(self._layouts)

    def __contains__(self, name: object) -> bool:
        return name in self._layouts

    def layout(self, name: str) -> SliceLayout:
        """See Store."""
        if name not in self._layouts:
            raise StoreError(f"{self.path} has no embedding of {name!r}.")
        return self._layouts[name]

    def layouts(self, names: Iterable[str]) -> dict[str, SliceLayout]:
        """See Store."""
        return {name: self._layouts[name] for name in names if name in self._layouts}

    @property
    def held_names(self) -> tuple[str, ...]:
        """Names of the pictures that may be read at any time."""
        return self._held.names if self._held is not None else ()

    def hold(self, names: Sequence[str]) -> dict[str, str]:
        """Have these pictures read at any time, whatever the turn; those that cannot be decoded, and why."""
        if self._hold is None or not names:
            return {}
        self._held = self._hold(names)
        return {name: self._held.failures[name] for name in names if name not in self._held}

    def expect(self, turns: Iterable[Turn]) -> None:
        """What will be read, turn by turn: the writer starts on it."""
        if self._start is not None:
            self.path = self._start(turns)
        self._turn, self._left, self._shards, self._where = -1, False, {}, {}

    def begin(self, turn: int, names: Sequence[str] = ()) -> dict[str, str]:
        """Reads from now on are those of `turn`: delete what only earlier ones read, and wait until they are there.

        Which of `names` are not, and why: their headers had promised more. Raises StoreError where the writer has
        ended, or nothing is to be read any more.
        """
        self._turn = turn
        self._forget(turn)
        if _number(self.path / AHEAD) < turn:
            write_atomic(self.path / WANTED, [json.dumps({"turn": turn}).encode()])
            while _number(self.path / AHEAD) < turn:
                if self._left:
                    raise StoreError(f"{self.path} is read no more.")
                self._check()
                time.sleep(_PAUSE)
                self._forget(turn)
            (self.path / WANTED).unlink(missing_ok=True)
        self._forget(turn)
        keys = {name: read_name(turn, name) for name in names if self._held is None or name not in self._held}
        if self._where.keys() >= set(keys.values()):
            return {}
        found = read_failures(self.path)
        return {name: found[key] for name, key in keys.items() if key in found}

    def leave(self) -> None:
        """Nothing is read any more: who waits in `begin` is let go."""
        self._left = True

    def read_coded(self, name: str) -> Coded:
        """See Store. Raises StoreError for a picture that is not among the reads of this turn."""
        if self._held is not None and name in self._held:
            return self._held.read_coded(name)
        key = read_name(self._turn, name)
        if key not in self._where:
            raise StoreError(f"{self.path} has no embedding of {name!r} in turn {self._turn}.")
        shard, i = self._where[key]
        layout = shard.index.layout(i)
        if layout != self.layout(name):
            raise StoreError(f"{name!r} has slices {layout}, but its header promised {self.layout(name)}.")
        return Coded(layout, shard.read(i) | shard.channels)

    def read_batch(self, names: Sequence[str]) -> list[Coded]:
        """See Store."""
        return [self.read_coded(name) for name in names]

    def read(self, name: str) -> Encoded:
        """See Store."""
        return self.read_coded(name).decoded(self.codec)

    def announce(self, names: Iterable[str]) -> None:
        """Nothing: what is read next was written a moment ago."""

    def _forget(self, turn: int) -> None:
        """Take up new shards, and delete those that only turns before `turn` read."""
        for _, path in shard_files(self.path):
            if path not in self._shards:
                shard = open_shard(path, self.manifest)
                places = {shard.index.sha(i): i for i in range(shard.index.pictures)}
                reads = {name: (shard, places[sha]) for name, sha in shard.index.names()}
                self._where |= reads
                self._shards[path] = max(map(turn_of, reads))
        gone = [path for path, last in self._shards.items() if last < turn]
        for path in gone:
            path.unlink(missing_ok=True)
            del self._shards[path]
        if gone:
            self._where = {name: place for name, place in self._where.items() if turn_of(name) >= turn}


class NoPictures(RollingStore):
    """The store of data that is text alone."""

    def __init__(self, path: Path) -> None:
        super().__init__(path, Manifest({}, DEFAULT, {}), 0, {}, {})

    def begin(self, turn: int, names: Sequence[str] = ()) -> dict[str, str]:
        """Nothing is waited for."""
        return {}


def read_name(turn: int, name: str) -> str:
    """What a picture is called in a rolling store."""
    return f"{turn}:{name}"


def turn_of(read: str) -> int:
    """The inverse of `read_name`, as far as the turn goes."""
    return int(read.partition(":")[0])


def _number(file: Path) -> int:
    """The turn that a file names, -1 where it is absent. Raises StoreError where it is damaged."""
    try:
        return int(json.loads(file.read_bytes())["turn"])
    except FileNotFoundError:
        return -1
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise StoreError(f"{file} is damaged; start the training again with --resume.") from error
