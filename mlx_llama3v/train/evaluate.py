"""Loss on held-out rows, and the probe that tells a model that looks from one that guesses.

The same rows are scored with their own pictures, with each other's, and with none. A loss that hardly rises
means that the pictures are not used, however well it falls.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from contextlib import suppress
from dataclasses import replace
from hashlib import sha256

import mlx.core as mx
from msgspec import structs

from mlx_llama3v.data.batches import collate, order
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.data.rows import Row, RowLayout, build_rows, cut
from mlx_llama3v.errors import ContextError, DataError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import render
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.loss import loss_sum, weights
from mlx_llama3v.train.ranks import all_sum
from mlx_llama3v.train.report import Evaluation

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
        self._choose(records)

    def hold(self) -> None:
        """Have the store keep the pictures of these rows. Before step 1: others stand in for those that it cannot read.

        Raises StoreError.
        """
        told: list[Problem] = []
        while unread := self._layout.store.hold([*dict.fromkeys(name for row in self.rows for name in row.images)]):
            for record in self._records:
                if name := next((name for name in record.images if name in unread), None):
                    told.append(Problem(f"record {record.id}", f"its picture {name!r} cannot be read: {unread[name]}"))
            self._choose([record for record in self._records if unread.keys().isdisjoint(record.images)])
        self.problems += told

    def _choose(self, records: Sequence[Record]) -> None:
        """The first rows that can be used."""
        self._records, layout = records, self._layout
        usable, self.problems = build_rows(records, layout)
        usable = usable[: self._config.val_rows]
        self.rows: list[Row] = [*usable]
        pictured, rights = [r for r in usable.records if r.images], [row for row in self.rows if row.images]
        lent = zip(shuffled(pictured, self._shape), rights, strict=False)
        wrong = [self._like(record, right) for record, right in lent]
        # The three are compared on the same rows: pictured ones that the wrong picture does not make too long.
        kept = [n for n, row in enumerate(wrong) if row is not None] or [*range(len(rights))]
        self._right = [rights[n] for n in kept]
        self._shuffled = [row for row in wrong if row is not None]
        self._blind = [blind(pictured[n], layout, rights[n]) for n in kept]

    def _shape(self, images: tuple[str, ...]) -> Hashable:
        return tuple(self._layout.store.layout(name) for name in images)

    def _like(self, record: Record, right: Row) -> Row | None:
        """Laid out with the targets of `right`; None where its pictures make it too long."""
        with suppress(DataError, ContextError):
            row = self._layout.whole(record)
            row = replace(row, rendered=cut(row.rendered, right.targets))
            return row if len(row) <= self._layout.max_length else None
        return None

    def run(self, step: int) -> Evaluation:
        """Evaluate after `step` steps; the model's mode and random state are as before."""
        training = self._model.training
        self._model.eval()
        try:
            whole, wrong, none = map(self._loss, (self.rows, self._shuffled, self._blind))
            right = self._loss(self._right) if 0 < len(self._right) < len(self.rows) else None
        finally:
            self._model.train(training)
        return Evaluation(step, whole or 0.0, wrong, none, right)

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


def shuffled(records: Sequence[Record], shape: Callable[[tuple[str, ...]], Hashable] = len) -> list[Record]:
    """The records with each other's pictures: those of the next record that has others of that `shape`, or as many.

    None where no record has any to lend: their own would pass for wrong ones.
    """
    groups: dict[Hashable, dict[tuple[str, ...], None]] = defaultdict(dict)  # in order
    for images in dict.fromkeys(record.images for record in records):
        for key in (("shape", shape(images)), ("count", len(images))):
            groups[key][images] = None
    lists = {key: [*group] for key, group in groups.items()}
    places = {(key, images): n for key, group in lists.items() for n, images in enumerate(group)}

    def next_of(images: tuple[str, ...]) -> tuple[str, ...]:
        key: Hashable = ("shape", shape(images))
        key = key if len(lists[key]) > 1 else ("count", len(images))
        return lists[key][(places[key, images] + 1) % len(lists[key])]

    if all(next_of(record.images) == record.images for record in records):
        return []
    return [structs.replace(record, images=next_of(record.images)) for record in records]


def blind(record: Record, layout: RowLayout, right: Row) -> Row:
    """The record without pictures, with the targets of `right`; a turn that was only a picture is left out."""
    messages = [structs.replace(m, images=()) for m in record.messages if m.text.strip()]
    rendered = render(messages, (), layout.tokens, layout.projector, caption=layout.caption(record))
    return Row(record.id, cut(rendered, right.targets), (), ())
