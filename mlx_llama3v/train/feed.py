"""The batches of a run, in order, read ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from hashlib import sha256

import mlx.core as mx

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.data.batches import Batch, Order, collate
from mlx_llama3v.data.records import Problem
from mlx_llama3v.data.rows import Row
from mlx_llama3v.embeddings.store import Reader
from mlx_llama3v.train.config import TrainConfig

_AHEAD = 2  # batches that are read while a step computes


class Feed:
    """Batch n of a run is a pure function of the rows, the seed and n; so a position in the data is a number.

    Each rank reads its part of every batch: what is trained does not depend on how many there are.

    Attributes:
        steps: optimizer steps of the whole run.
        total: batches of the whole run.
        per_epoch: batches of one pass over the rows.
        unseen: rows that were left out of their batch by now, as a picture could not be decoded (--embed-ahead).
    """

    def __init__(
        self,
        rows: Sequence[Row],
        store: Reader,
        model: ModelConfig,
        config: TrainConfig,
        rank: int = 0,
        ranks: int = 1,
    ) -> None:
        self._rows, self._store, self._model, self._config = rows, store, model, config
        self._pad_to = pad_to(config)
        self._rank, self._ranks, self._lanes = rank, ranks, max(1, config.lanes)
        self._walk = self._begin()
        self._accumulate = config.grad_accumulation_steps
        self.per_epoch = batches_of(rows, config)
        self.total = config.iters * self._accumulate or config.epochs * self.per_epoch
        self.steps = -(-self.total // self._accumulate)
        self.unseen: dict[str, Problem] = {}
        self._waiting = deque[Future[list[Batch]]]()

    def first(self, step: int) -> int:
        """The first batch of `step`; the last step may have fewer batches than the others."""
        return min(step * self._accumulate, self.total)

    def seed(self, batch: int) -> int:
        """What dropout draws from there: another stream on each rank, the same whatever was drawn before."""
        return int.from_bytes(sha256(f"{self._config.seed} {batch} {self._rank}".encode()).digest()[:8], "big")

    def batches(self, step: int) -> Generator[list[Batch], None, None]:
        """This rank's part of all batches from `step` on, each in `config.lanes` parts, or fewer where there are not
        as many rows. Close it when done, a thread reads ahead.

        Raises StoreError.
        """
        numbers, ahead = range(self.first(step), self.total), self._begin()
        self._waiting = waiting = deque[Future[list[Batch]]]()
        self._store.expect((n, [name for row in ahead.rows(n) for name in row.images]) for n in numbers)
        pool = ThreadPoolExecutor(1, "batches")
        try:
            for number in numbers:
                waiting.append(pool.submit(self._collate, number))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            self._store.leave()
            pool.shutdown(cancel_futures=True)

    def decode_next(self) -> None:
        """Let the device make embeddings of the next batch's codes, if those have been read; returns at once."""
        following = self._waiting[0] if self._waiting else None
        if following is not None and following.done() and following.exception() is None:
            decode(following.result())

    def _collate(self, number: int) -> list[Batch]:
        """The parts have like lengths: the rows of a batch are sorted, and dealt in turn."""
        rows = self._walk.rows(number)
        unread = self._store.begin(number, [name for row in rows for name in row.images])
        for row in rows if unread else ():
            if name := next((name for name in row.images if name in unread), None):
                why = f"its picture {name!r} cannot be read: {unread[name]}"
                self.unseen[row.id] = Problem(f"record {row.id}", why)
        rows = [row for row in rows if unread.keys().isdisjoint(row.images)]
        parts = [rows[lane :: self._lanes] for lane in range(self._lanes)]
        packed = self._config.pack
        return [collate(part, self._store, self._model, self._pad_to, packed=packed) for part in parts if part]

    def _begin(self) -> _Walk:
        return _Walk(self._rows, self._config, self._rank, self._ranks)


def decode(parts: Sequence[Batch]) -> list[mx.array]:
    """Embeddings of all pictures of a batch, which the device makes of the codes meanwhile."""
    made = [part.patches for part in parts if part.patches is not None]
    mx.async_eval(made)
    return made


class _Walk:
    """One rank's rows of batch after batch. Rows are laid out once an epoch: those of a window when its turn comes."""

    def __init__(self, rows: Sequence[Row], config: TrainConfig, rank: int, ranks: int) -> None:
        self._rows, self._config, self._rank, self._ranks = rows, config, rank, ranks
        self._epoch, self._window, self._order = -1, -1, Order(0, 1, 0, 0)
        self._made: dict[int, Row] = {}
        self._batches: list[list[int]] = []

    def rows(self, number: int) -> list[Row]:
        """Of that batch of the run."""
        config = self._config
        epoch, place = divmod(number, batches_of(self._rows, config))
        if epoch != self._epoch:
            lengths = None if config.pack else self._lengths
            self._order = Order(len(self._rows), config.batch_size, config.seed, epoch, lengths)
            self._epoch, self._window = epoch, -1
        window, place = divmod(place, self._order.per_window)
        if window != self._window:
            self._made = {}
            self._batches, self._window = self._order.window(window), window
        mine = self._batches[place][self._rank :: self._ranks]
        return [self._made[i] if i in self._made else self._rows[i] for i in mine]

    def _lengths(self, rows: Sequence[int]) -> list[int]:
        self._made = {i: self._rows[i] for i in rows}
        return [len(self._made[i]) for i in rows]


def batches_of(rows: Sequence[Row], config: TrainConfig) -> int:
    """Batches of one pass over the rows."""
    return -(-len(rows) // config.batch_size)


def pad_to(config: TrainConfig) -> int:
    """Of what the length of a batch is a multiple: a compiled step wants few shapes."""
    return 8 if config.compile else 4
