"""The batches of a run, in order, read ahead of the step that needs them."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.data.batches import Batch, Row, collate, order
from mlx_llama3v.embeddings.store import Reader
from mlx_llama3v.train.config import TrainConfig

_AHEAD = 2  # batches that are read while a step computes


class Feed:
    """Batch n of a run is a pure function of the rows, the seed and n; so a position in the data is a number.

    Attributes:
        steps: optimizer steps of the whole run.
        total: batches of the whole run.
        per_epoch: batches of one pass over the rows.
    """

    def __init__(self, rows: Sequence[Row], store: Reader, model: ModelConfig, config: TrainConfig) -> None:
        self._rows, self._store, self._model, self._config = rows, store, model, config
        # A compiled step wants few shapes; without, what pads least is best.
        self._pad_to = 32 if config.compile else 4
        self._lanes = max(1, config.lanes)
        self._accumulate = config.grad_accumulation_steps
        self.per_epoch = -(-len(rows) // config.batch_size)
        self.total = config.iters * self._accumulate or config.epochs * self.per_epoch
        self.steps = -(-self.total // self._accumulate)
        self._epoch, self._batches = -1, list[list[int]]()

    def first(self, step: int) -> int:
        """The first batch of `step`; the last step may have fewer batches than the others."""
        return min(step * self._accumulate, self.total)

    def batches(self, step: int) -> Generator[list[Batch], None, None]:
        """All batches from `step` on, each in `config.lanes` parts; close it when done, a thread reads ahead.

        Raises StoreError.
        """
        numbers = range(self.first(step), self.total)
        self._store.expect((n, [name for row in self._pick(n) for name in row.images]) for n in numbers)
        waiting: deque[Future[list[Batch]]] = deque()
        pool = ThreadPoolExecutor(1, "batches")
        try:
            for number in numbers:
                waiting.append(pool.submit(self._collate, number, self._pick(number)))
                if len(waiting) > _AHEAD:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            pool.shutdown(cancel_futures=True)

    def _collate(self, number: int, rows: list[Row]) -> list[Batch]:
        """The parts have like lengths: the rows of a batch are sorted, and dealt in turn."""
        self._store.begin(number)
        parts = [rows[lane :: self._lanes] for lane in range(self._lanes)]
        return [collate(part, self._store, self._model, self._pad_to) for part in parts if part]

    def _pick(self, number: int) -> list[Row]:
        epoch, place = divmod(number, self.per_epoch)
        if epoch != self._epoch:
            lengths = [len(row) for row in self._rows]
            self._batches = order(lengths, self._config.batch_size, self._config.seed, epoch)
            self._epoch = epoch
        return [self._rows[i] for i in self._batches[place]]
