"""Fills a store: threads prepare pictures, the main thread encodes slices of many pictures at a time, and one more
thread compresses and writes what was encoded before. All three work at once, each at most one window ahead.

Pictures are stored in the order given and nothing depends on timing; a run that was killed goes on where the
last complete shard ends. All that it had encoded beyond that, or was encoding, takes no more than a shard
(`_Behind`), but for the sample that a codec is fitted to before the first one. Names that need no encoder (of known
bytes, unreadable) do not wait for those that do. Ctrl-C loses only what is under way.
"""

from __future__ import annotations

import math
import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field, fields
from itertools import islice

import numpy as np

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.form import Made, gather
from mlx_llama3v.embeddings.prepare import Encoder, Prepared, prepare
from mlx_llama3v.embeddings.sample import check_names, fit_sample
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.source import Source
from mlx_llama3v.vision.encode import Form, as_values

_WINDOW = 4  # batches that are collected before encoding: slices of like shape find each other there
_NAMES = 256  # that need no encoder, and are handed on together
_WINDOWS = 8  # a shard holds at least: it is closed when two more could exceed it (`_Behind`)


@dataclass(frozen=True)
class EmbedProgress:
    """Where a run is: names done of total, and what it made so far."""

    done: int
    total: int
    slices: int  # encoded
    bytes: int  # of embeddings made, as stored
    seconds: float
    waiting_seconds: float  # that the encoder waited for pictures
    before: str = ""  # what is done before the first picture


@dataclass(frozen=True)
class EmbedSummary:
    """What a run did. new + duplicates + reused + failed = names given."""

    new: int  # pictures that were encoded
    duplicates: int  # names whose bytes were known under another name
    reused: int  # names that were in the store before
    failed: int  # see failures.jsonl
    slices: int
    patches: int
    rows: int  # that the tower ran over: patches and padding
    bytes: int  # of the new embeddings, as stored
    seconds: float
    waiting_seconds: float


@dataclass
class _Window:
    """Names that are stored together, and what is known of them."""

    # content hash -> names, layout, patches of each slice: what the encoder has to make
    pictures: dict[str, tuple[list[str], SliceLayout, Sequence[np.ndarray]]] = field(default_factory=dict)
    known: list[tuple[str, str]] = field(default_factory=list)  # name, content hash of a stored picture
    failed: list[tuple[str, str]] = field(default_factory=list)  # name, reason
    bytes: float = 0  # that the pictures will take

    @property
    def slices(self) -> int:
        return sum(len(patches) for _, _, patches in self.pictures.values())

    def take_names(self) -> _Window:
        """What needs no encoder, which leaves this window."""
        taken = _Window(known=self.known, failed=self.failed)
        self.known, self.failed = [], []
        return taken


@dataclass
class _Run:
    """Counts of a run."""

    total: int
    new: int = 0
    duplicates: int = 0
    reused: int = 0
    failed: int = 0
    slices: int = 0
    patches: int = 0
    rows: int = 0
    bytes: int = 0
    waiting_seconds: float = 0.0
    started: float = field(default_factory=time.perf_counter)

    def ahead(self, slices: int) -> int:
        """About how many pictures hold that many slices, by what was seen so far."""
        return -(-slices * max(1, self.new) // max(1, self.slices))

    def progress(self, before: str = "") -> EmbedProgress:
        done = self.new + self.duplicates + self.reused + self.failed
        seconds = time.perf_counter() - self.started
        return EmbedProgress(done, self.total, self.slices, self.bytes, seconds, self.waiting_seconds, before)

    def summary(self) -> EmbedSummary:
        counts = {f.name: getattr(self, f.name) for f in fields(EmbedSummary) if f.name != "seconds"}
        return EmbedSummary(**counts, seconds=time.perf_counter() - self.started)


def embed_images(
    images: Iterable[tuple[str, Source]],
    encoder: Encoder,
    writer: StoreWriter,
    *,
    batch_size: int = 8,
    workers: int | None = None,
    progress: Callable[[EmbedProgress], None] | None = None,
    whole: Sequence[Source] = (),
) -> EmbedSummary:
    """Put every (name, path) that is not there yet into the store, and flush it.

    A picture that cannot be read is listed in the store's failures and the run goes on. Files with equal
    bytes are encoded once.

    Args:
        batch_size: slices in the tower at a time.
        workers: threads that open, split and cut pictures; default: one a core, at most eight.
        progress: called in this thread after every picture that was taken up; keep it cheap.
        whole: the pictures of which these are a part: a new store's codec is fitted to a sample of all of them.

    Raises:
        StoreError: the store cannot be written, belongs to another encoder, or holds other pictures of these names.
    """
    writer.require(encoder.fingerprint())
    names = dict(images)
    run = _Run(len(names))
    todo = [(name, path) for name, path in names.items() if not writer.has(name)]
    run.reused = run.total - len(todo)
    if run.reused:
        check_names(writer.path, [(name, path) for name, path in names.items() if writer.has(name)], writer.sha_of)
    workers = workers or min(8, os.cpu_count() or 1)
    if todo and not writer.fitted:
        if progress is not None:
            progress(run.progress("fitting the codec to a sample"))
        sources = whole or [source for _, source in todo]
        fit = fit_sample(writer.codec, sources, encoder, writer.post, batch_size=batch_size, workers=workers)
        if fit is not None:
            writer.fit(fit)
    most = batch_size * _WINDOW
    window = _Window()
    with _Behind(writer, run) as behind:
        try:
            for name, prepared in _prepare_ahead(todo, encoder, writer, workers, most, run):
                if window.pictures and window.bytes + behind.bytes(prepared.layout) > writer.most_lost / _WINDOWS:
                    window = _encode(window, encoder, batch_size, behind, run)
                _take(name, prepared, window, behind, run)
                if window.slices >= most:
                    window = _encode(window, encoder, batch_size, behind, run)
                if progress is not None:
                    progress(run.progress())
            _encode(window, encoder, batch_size, behind, run)
            behind.wait()
        except KeyboardInterrupt:
            behind.end(window.take_names())
            raise
    writer.flush()
    if progress is not None:
        progress(run.progress())
    return run.summary()


class _Behind:
    """Compresses and writes one window while the next one is encoded: a thread, and never more than one window in it.

    It alone changes the writer meanwhile. What goes wrong there is raised by the next call here.

    It also keeps what a kill costs, which is all that was encoded and is on no disk, at `writer.most_lost` bytes or one
    picture. The thread closes a shard while there is still room for the two windows that can be encoded before it is
    asked again, so that nobody has to wait.
    """

    def __init__(self, writer: StoreWriter, run: _Run) -> None:
        self.writer, self._run = writer, run
        self.hashes: frozenset[str] = frozenset()  # of the pictures that are being written
        self._unsafe = self._largest = self._width = 0  # bytes encoded and on no disk, of a window; of an embedding
        self._pool = ThreadPoolExecutor(1, thread_name_prefix="write")
        self._running: Future[int] | None = None

    def bytes(self, layout: SliceLayout | None) -> float:
        """What a picture will take. Infinity before the first one, which is therefore encoded alone."""
        if layout is None or not self._width:
            return 0 if layout is None else math.inf
        stored = layout if self.writer.post is None else self.writer.post.layout(layout)
        return self.writer.codec.row_bytes(self._width) * stored.patches

    def form(self) -> Form:
        """What the encoder is asked for. The first picture tells the width, so it comes as it is."""
        return self.writer.form() if self._width else as_values

    def room(self, window: _Window) -> None:
        """Wait until `window` may be encoded: with it, what a kill costs is within the limit. Raises StoreError."""
        if self._unsafe + window.bytes > self.writer.most_lost:
            self.wait()
            _close(self.writer, window.bytes)

    def start(self, window: _Window, made: Mapping[str, Made]) -> None:
        """Write `window` and its pictures' embeddings, once the window before it is written. Raises StoreError."""
        self.wait()
        self.hashes = frozenset(made)
        self._width = next((one.patches.shape[-1] for one in made.values() if isinstance(one, Encoded)), self._width)
        size = self.writer.codec.row_bytes(self._width) * sum(one.layout.patches for one in made.values())
        self._unsafe, self._largest = self.writer.pending_bytes + size, max(self._largest, size)
        self._running = self._pool.submit(_write, self.writer, window, made, 2 * self._largest)

    def wait(self) -> None:
        """Until all that was started is the writer's. Raises StoreError."""
        running, self._running = self._running, None
        if running is not None:
            self._run.bytes += running.result()
        self.hashes = frozenset()

    def end(self, window: _Window) -> None:
        """Write what was started, and the names of `window`. Raises StoreError."""
        self._pool.shutdown()  # first, since `wait` may have been interrupted
        self.wait()
        _write(self.writer, window, {}, 0)

    def __enter__(self) -> _Behind:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _close(writer: StoreWriter, size: float) -> None:
    """Write a shard, unless `size` bytes more are within what a kill may cost. Raises StoreError."""
    if writer.pending_bytes + size > writer.most_lost:
        writer.flush()


def _write(writer: StoreWriter, window: _Window, made: Mapping[str, Made], room: int) -> int:
    """Runs in the writing thread; bytes of embeddings. Leaves room for `room` bytes."""
    for name, reason in window.failed:
        writer.fail(name, reason)
    for name, sha in window.known:
        writer.alias(name, sha)
    size = 0
    for sha, one in made.items():
        first, *others = window.pictures[sha][0]
        size += writer.put(first, sha, one)
        for name in others:
            writer.alias(name, sha)
    _close(writer, room)
    return size


def _prepare_ahead(
    todo: Sequence[tuple[str, Source]],
    encoder: Encoder,
    writer: StoreWriter,
    workers: int,
    window: int,
    run: _Run,
) -> Iterator[tuple[str, Prepared]]:
    """Prepared pictures in the order given. While one window is encoded, the threads prepare the next one."""
    pool = ThreadPoolExecutor(workers, thread_name_prefix="prepare")
    ahead: deque[tuple[str, Future[Prepared]]] = deque()
    waiting = iter(todo)
    try:
        while True:
            for name, path in islice(waiting, max(0, workers + run.ahead(window) - len(ahead))):
                ahead.append((name, pool.submit(prepare, path, encoder, writer.has_hash)))
            if not ahead:
                return
            name, future = ahead.popleft()
            started = time.perf_counter()
            prepared = future.result()
            run.waiting_seconds += time.perf_counter() - started
            yield name, prepared
    finally:
        pool.shutdown(cancel_futures=True)


def _take(name: str, prepared: Prepared, window: _Window, behind: _Behind, run: _Run) -> None:
    """Sort one picture in: failed, known, or waiting for the encoder."""
    if prepared.sha in behind.hashes:
        behind.wait()  # then the writer knows whether it has it
    if prepared.reason:
        window.failed.append((name, prepared.reason))
        run.failed += 1
    elif behind.writer.has_hash(prepared.sha):
        window.known.append((name, prepared.sha))
        run.duplicates += 1
    elif prepared.sha in window.pictures:
        window.pictures[prepared.sha][0].append(name)
    elif prepared.layout is not None:
        window.pictures[prepared.sha] = ([name], prepared.layout, prepared.patches)
        window.bytes += behind.bytes(prepared.layout)
    if len(window.known) + len(window.failed) >= _NAMES:
        behind.start(window.take_names(), {})


def _encode(window: _Window, encoder: Encoder, batch_size: int, behind: _Behind, run: _Run) -> _Window:
    """Encode a window, and hand it over to be written; the next window."""
    behind.room(window)
    waiting = window.pictures.items()
    slices = [item for _, (_, layout, patches) in waiting for item in zip(layout.grids, patches, strict=True)]
    run.rows -= encoder.rows
    found = iter(encoder.encode_as(behind.form(), slices, batch_size) if slices else [])
    run.rows += encoder.rows
    made = {}
    for sha, (names, layout, _) in waiting:
        made[sha] = behind.writer.ready(names[0], gather(layout, [next(found) for _ in layout.grids]))
        run.new += 1
        run.duplicates += len(names) - 1
        run.slices += len(layout.grids)
        run.patches += layout.patches
    behind.start(window, made)
    return _Window()
