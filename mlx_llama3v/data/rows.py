"""Training rows: every record is checked before the first step, and laid out only when a batch needs it.

The check needs no tokenizer for most records: a byte-level tokenizer makes at most one token of a byte, so a record
whose bytes, pictures and control tokens fit is known to fit. Only the others are laid out to be measured. So 600,000
rows are checked in seconds, and held as their records and one number each.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import overload

import numpy as np

from mlx_llama3v.config import MARKERS, ProjectorConfig, SliceLayout
from mlx_llama3v.data.records import Problem, Record, collector_paused
from mlx_llama3v.embeddings.store import Reader
from mlx_llama3v.errors import ContextError, DataError, StoreError
from mlx_llama3v.text.prompt import Message, Rendered, check_messages, render
from mlx_llama3v.text.tokens import Tokens

LONG_ROWS = ("drop", "truncate-text", "error")


@dataclass(frozen=True)
class Row:
    """One training row: laid out, its pictures still in the store."""

    id: str
    rendered: Rendered
    images: tuple[str, ...]
    layouts: tuple[SliceLayout, ...]

    def __len__(self) -> int:
        return len(self.rendered)

    @property
    def targets(self) -> int:
        """Positions that are trained."""
        return int(self.rendered.supervised.sum())


@dataclass(frozen=True)
class RowLayout:
    """How records become rows.

    In stage "pretrain" a record in which nothing is asked takes the bare caption form; every other record, and every
    record of another stage, is a conversation.
    """

    store: Reader
    tokens: Tokens
    projector: ProjectorConfig
    stage: str
    max_length: int
    long_rows: str = "drop"  # what becomes of longer rows: LONG_ROWS

    def __post_init__(self) -> None:
        """Raises StoreError when the store's embeddings do not fit the projector."""
        if self.store.width not in (0, self.projector.in_dim):
            raise StoreError(
                f"{self.store.path} holds embeddings of width {self.store.width}, "
                f"the projector takes {self.projector.in_dim}."
            )

    def caption(self, record: Record) -> bool:
        """Whether the record takes the bare caption form."""
        return self.stage == "pretrain" and record.caption

    def whole(self, record: Record) -> Row:
        """The record, however long. Raises DataError, ContextError."""
        for name in record.images:
            if name not in self.store:
                raise DataError(self.missing(name))
        layouts = tuple(self.store.layout(name) for name in record.images)
        rendered = render(record.messages, layouts, self.tokens, self.projector, caption=self.caption(record))
        return Row(record.id, rendered, record.images, layouts)

    def row(self, record: Record) -> Row:
        """The record, cut where it is too long and `long_rows` says so. Raises DataError, ContextError."""
        row = self.whole(record)
        if len(row) <= self.max_length:
            return row
        if self.long_rows != "truncate-text":
            raise ContextError(f"it has {len(row)} tokens, more than the longest allowed ({self.max_length})")
        return replace(row, rendered=shortened(row.rendered, self.max_length))

    def missing(self, name: str) -> str:
        """Why a picture cannot be trained on."""
        return f"its picture {name!r} is not in the store: {self.store.failures.get(name, 'not embedded')}"


def shortened(rendered: Rendered, most: int) -> Rendered:
    """What is left of a row when it ends with its last target before position `most`: never within a picture.

    Later turns go, and the end of an answer. Raises ContextError where no target is left.
    """
    targets = int(rendered.supervised[:most].sum())
    if not targets:
        raise ContextError(
            f"it has {len(rendered)} tokens, and its first answer begins after the longest allowed ({most})"
        )
    return cut(rendered, targets)


def cut(rendered: Rendered, targets: int) -> Rendered:
    """The row up to so many targets."""
    end = int(np.flatnonzero(rendered.supervised)[:targets][-1]) + 1
    return Rendered(rendered.ids[:end], rendered.source[:end], rendered.supervised[:end])


class Rows(Sequence[Row]):
    """Checked records as rows, each laid out when it is asked for.

    Attributes:
        records: what they are made of.
        bounds: int32 [n], at most so many tokens has each row.
        shortened: rows that are cut, and how long they were.
    """

    def __init__(
        self, records: Sequence[Record], layout: RowLayout, bounds: np.ndarray, shortened: tuple[Problem, ...] = ()
    ) -> None:
        self.records, self.layout, self.bounds, self.shortened = records, layout, bounds, shortened

    def __len__(self) -> int:
        return len(self.records)

    @overload
    def __getitem__(self, index: int) -> Row: ...
    @overload
    def __getitem__(self, index: slice) -> Rows: ...
    def __getitem__(self, index: int | slice) -> Row | Rows:
        if isinstance(index, slice):
            return Rows(self.records[index], self.layout, self.bounds[index])
        return self.layout.row(self.records[index])

    def __iter__(self) -> Iterator[Row]:
        return (self.layout.row(record) for record in self.records)


def build_rows(records: Iterable[Record], layout: RowLayout) -> tuple[Rows, list[Problem]]:
    """Check every record; those that cannot be trained on become Problems.

    A row over `layout.max_length` tokens is left out or cut, as `layout.long_rows` says: never within a picture.
    Raises DataError naming the rows that are too long where `long_rows` is "error".
    """
    with collector_paused():
        return _checked(list(records), layout)


def _checked(records: list[Record], layout: RowLayout) -> tuple[Rows, list[Problem]]:
    names = {name for record in records for name in record.images}
    check = _Check(layout, layout.store.layouts(names))
    kept, bounds, problems, cut, long = list[Record](), list[int](), list[Problem](), list[Problem](), list[Problem]()
    for record in records:
        try:
            bound = check.bound(record)
            if bound > layout.max_length:
                length = len(layout.whole(record))
                bound = min(bound, length)
                if length > layout.max_length:
                    long.append(Problem(f"record {record.id}", f"it has {length} tokens"))
                    bound = len(layout.row(record))
                    cut.append(Problem(f"record {record.id}", f"it was cut from {length} tokens to {bound}"))
        except (DataError, ContextError) as error:
            problems.append(Problem(f"record {record.id}", str(error).rstrip(".")))
        else:
            kept.append(record)
            bounds.append(bound)
    if long and layout.long_rows == "error":
        first = ", ".join(problem.where.removeprefix("record ") for problem in long[:10])
        more = f" and {len(long) - 10} more" if len(long) > 10 else ""
        raise DataError(
            f"{len(long)} of {len(records)} rows have more than {layout.max_length} tokens: {first}{more}; raise "
            "--max-seq-length (the decoder's max_position_embeddings at most), or use --long-rows drop or "
            "truncate-text."
        )
    return Rows(kept, layout, np.array(bounds, np.int32), tuple(cut)), problems


def usual(messages: Sequence[Message], pictures: int) -> bool:
    """Whether user and assistant take turns, all say something, and the first turn brings the pictures, at most one.

    `check_messages` passes all of these, as captions too, and takes three times as long.
    """
    if len(messages) < 2 or messages[0].images != ((0,) if pictures else ()) or pictures > 1:
        return False
    role, said = "user", bool(pictures)  # beside its picture the first turn may say nothing
    for message in messages:
        text = message.text
        if message.role != role or not (said or (text and not text.isspace() and not message.images)):
            return False
        role, said = "assistant" if role == "user" else "user", False
    return True


class _Check:
    """Everything that keeps a record from being laid out, found without laying it out."""

    def __init__(self, layout: RowLayout, found: dict[str, SliceLayout]) -> None:
        self._layout, self._found = layout, found
        self._tokens: dict[SliceLayout, int] = {}  # at most, of pictures of that layout
        # Turns: control tokens, the role's word and line breaks; as bytes of a template where there is one.
        prompt = layout.tokens.layout
        pieces = (prompt.start, prompt.user, prompt.assistant, prompt.answer, prompt.end, prompt.system)
        self._turn = 16 if prompt.markers else sum(len(piece.encode()) for piece in pieces)
        self._start = 1 if prompt.markers else len((prompt.start + (prompt.default_system or "")).encode())
        self._picture = 4
        self._slice = 1
        if not prompt.markers:
            tiles = prompt.tile + max(prompt.col, prompt.row, key=len)
            self._picture = len((prompt.picture + prompt.overview + prompt.slices).encode()) + 8
            self._slice = len(tiles.encode()) + 8

    def bound(self, record: Record) -> int:
        """At most so many tokens has its row. Raises DataError, ContextError as `RowLayout.whole` does."""
        messages = record.messages
        total = self._start + self._turn * len(messages)
        for name in record.images:
            picture = self._found.get(name)
            if picture is None:
                raise DataError(self._layout.missing(name))
            total += self._tokens.get(picture) or self._count(picture)
        if not usual(messages, len(record.images)):
            check_messages(messages, len(record.images), generate=False, caption=self._layout.caption(record))
        for message in messages:
            text = message.text
            total += len(text) if text.isascii() else len(text.encode())
        return total

    def _count(self, layout: SliceLayout) -> int:
        """Raises ContextError where a slice has no visual token."""
        counts = [self._layout.projector.num_tokens(grid) for grid in layout.grids]
        if min(counts) < 1:
            raise ContextError(f"a picture has no visual tokens (patch grids {layout.grids}).")
        self._tokens[layout] = sum(counts) + self._picture + len(MARKERS) + self._slice * len(counts)
        return self._tokens[layout]
