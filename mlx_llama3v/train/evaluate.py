"""Loss on held-out rows, and the probe that tells a model that looks from one that guesses.

The same rows are scored with their own pictures, with each other's, and with none. A loss that hardly rises
means that the pictures are not used, however well it falls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from contextlib import suppress
from hashlib import sha256

import mlx.core as mx
from msgspec.structs import replace

from mlx_llama3v.data.batches import collate, order
from mlx_llama3v.data.records import Record
from mlx_llama3v.data.rows import Row, RowLayout, build_rows
from mlx_llama3v.errors import ContextError, DataError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import render
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.loss import loss_sum, weights
from mlx_llama3v.train.report import Evaluation
from mlx_llama3v.train.step import all_sum

_EVERY = 1 << 32


def hold_out(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Split into (training, held out) by a hash of the id: the same rows whatever their order or the seed."""
    if not share:
        return list(records), []
    parts: tuple[list[Record], list[Record]] = ([], [])
    for record in records:
        value = int.from_bytes(sha256(record.id.encode()).digest()[:4], "big")
        parts[value < share * _EVERY].append(record)
    return parts


class Evaluator:
    """Held-out rows, laid out once in three ways.

    Attributes:
        rows: as they are, at most `config.val_rows`.
        problems: of all held-out records that make no row.
    """

    def __init__(
        self,
        records: Sequence[Record],
        layout: RowLayout,
        model: Llama3V,
        config: TrainConfig,
        group: mx.distributed.Group | None = None,
    ) -> None:
        """`group`: ranks that share the work."""
        self._model, self._layout, self._config = model, layout, config
        self._group = group or mx.distributed.init()
        usable, self.problems = build_rows(records, layout)
        usable = usable[: config.val_rows]
        self.rows: list[Row] = [*usable]
        pictured = any(record.images for record in usable.records)
        self._shuffled = self._rows(shuffled(usable.records)) if pictured else []
        self._blind = [blind(record, layout) for record in usable.records] if pictured else []

    def _rows(self, records: Sequence[Record]) -> list[Row]:
        """Those that other pictures do not make too long."""
        found = []
        for record in records:
            with suppress(DataError, ContextError):
                found.append(self._layout.row(record))
        return found

    def run(self, step: int) -> Evaluation:
        """Evaluate after `step` steps; the model's mode and random state are as before."""
        training = self._model.training
        self._model.eval()
        try:
            right, wrong, none = map(self._loss, (self.rows, self._shuffled, self._blind))
        finally:
            self._model.train(training)
        return Evaluation(step, right or 0.0, wrong, none)

    def _loss(self, rows: Sequence[Row]) -> float | None:
        """Mean over all targets of `rows`; None without rows. Each rank computes some of the batches."""
        model, store = self._model, self._layout.store
        total, count = mx.array(0.0), mx.array(0.0)
        batches = order([len(row) for row in rows], max(1, self._config.batch_size // self._group.size()), 0, 0)
        for picked in batches[self._group.rank() :: self._group.size()]:
            batch = collate([rows[i] for i in picked], store, model.config, pad_to=4)
            vectors = model.embed(batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens)
            loss = loss_sum(model, vectors, batch.targets, batch.supervised, batch.picks, gradient=False)
            total, count = total + loss, count + weights(batch.supervised, batch.picks).sum()
            mx.eval(total, count)
        total, count = all_sum([total, count], self._group)
        return float(total) / float(count) if float(count) else None


def shuffled(records: Sequence[Record]) -> list[Record]:
    """The records with each other's pictures: those of the next record that has as many, and others.

    None where no record has any to lend: their own would pass for wrong ones.
    """
    groups: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for record in records:
        if record.images not in groups[len(record.images)]:
            groups[len(record.images)].append(record.images)

    def next_of(images: tuple[str, ...]) -> tuple[str, ...]:
        group = groups[len(images)]
        return group[(group.index(images) + 1) % len(group)]

    if all(len(group) == 1 for group in groups.values()):
        return []
    return [replace(record, images=next_of(record.images)) for record in records]


def blind(record: Record, layout: RowLayout) -> Row:
    """The record without pictures; a turn that was only a picture is left out."""
    messages = [replace(m, images=()) for m in record.messages if m.text.strip()]
    rendered = render(messages, (), layout.tokens, layout.projector, caption=layout.caption(record))
    return Row(record.id, rendered, (), ())
