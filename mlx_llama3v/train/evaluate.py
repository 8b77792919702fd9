"""Loss on held-out rows, and the probe that tells a model that looks from one that guesses.

The same rows are scored with their own pictures, with each other's, and with none. A loss that hardly rises
means that the pictures are not used, however well it falls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from hashlib import sha256

import mlx.core as mx

from mlx_llama3v.data.batches import Row, build_rows, collate, order
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.embeddings.store import Reader
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import render
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.loss import loss_sum, weights
from mlx_llama3v.train.report import Evaluation

_EVERY = 1 << 32


def hold_out(records: Sequence[Record], share: float) -> tuple[list[Record], list[Record]]:
    """Split into (training, held out) by a hash of the id: the same rows whatever their order or the seed."""
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
        self, records: Sequence[Record], store: Reader, tokens: Tokens, model: Llama3V, config: TrainConfig
    ) -> None:
        self._model, self._store, self._config = model, store, config

        def rows(records: Sequence[Record]) -> tuple[list[Row], list[Problem]]:
            projector = model.config.projector_config
            return build_rows(records, store, tokens, projector, config.max_seq_length, config.stage)

        usable, self.problems = rows(records)
        self.rows = usable[: config.val_rows]
        ids = {row.id for row in self.rows}
        records = [record for record in records if record.id in ids]
        pictured = any(record.images for record in records)
        self._shuffled = rows(shuffled(records))[0] if pictured else []
        self._blind = [blind(record, tokens, model, config) for record in records] if pictured else []

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
        """Mean over all targets of `rows`; None without rows."""
        total, count = 0.0, 0.0
        for picked in order([len(row) for row in rows], self._config.batch_size, 0, 0):
            batch = collate([rows[i] for i in picked], self._store, self._model.config, pad_to=4)
            vectors = self._model.embed(batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens)
            loss = loss_sum(self._model, batch.ids, vectors, batch.targets, batch.supervised, batch.picks)
            targets = weights(batch.supervised, batch.picks).sum()
            mx.eval(loss, targets)
            total, count = total + float(loss), count + float(targets)
        return total / count if count else None


def shuffled(records: Sequence[Record]) -> list[Record]:
    """The records with each other's pictures: those of the next record that has as many, and others."""
    groups: dict[int, list[tuple[str, ...]]] = defaultdict(list)
    for record in records:
        if record.images not in groups[len(record.images)]:
            groups[len(record.images)].append(record.images)

    def next_of(images: tuple[str, ...]) -> tuple[str, ...]:
        group = groups[len(images)]
        return group[(group.index(images) + 1) % len(group)]

    return [replace(record, images=next_of(record.images)) for record in records]


def blind(record: Record, tokens: Tokens, model: Llama3V, config: TrainConfig) -> Row:
    """The record without pictures; a turn that was only a picture is left out."""
    messages = [replace(m, images=()) for m in record.messages if m.text.strip()]
    caption = config.stage == "pretrain" and record.caption
    return Row(record.id, render(messages, (), tokens, model.config.projector_config, caption=caption), (), ())
