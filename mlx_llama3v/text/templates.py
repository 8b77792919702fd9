"""A conversation in the layout of a finished model (layout.py), as ids and positions.

Text between two control tokens or pictures is one run and is encoded in one go, since byte pairs merge across the
seams of a template ("USER: " + question + " ASSISTANT:"). A trained answer is a run of its own.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from typing import Protocol

from mlx_llama3v.layout import PromptLayout
from mlx_llama3v.text.tokens import Tokens


class Turn(Protocol):
    """prompt.Message."""

    @property
    def role(self) -> str: ...
    @property
    def text(self) -> str: ...
    @property
    def images(self) -> tuple[int, ...]: ...


class Row(Protocol):
    """What a conversation is written into: prompt's row."""

    tokens: Tokens
    earlier: int  # pictures of the turns before this row

    def add(self, ids: Iterable[int], *, supervised: bool = False) -> None:
        """Plain tokens."""

    def visual(self, span: range) -> None:
        """Visual tokens of one slice."""

    def spans(self, index: int) -> list[range]:
        """`source` of each slice of a picture."""

    def cols(self, index: int) -> int:
        """Tiles in a row of a picture."""


def templated(
    row: Row, messages: Sequence[Turn], layout: PromptLayout, *, generate: bool, caption: bool, start: bool
) -> None:
    """Write `messages` into `row`; arguments as those of `prompt.render`, which has checked them."""
    run = _Run(row)
    run.template(layout.start if start else layout.end)
    if caption:
        _caption(run, messages, layout)
        return
    if start and layout.default_system is not None and messages[0].role != "system":
        run.template(layout.system, text=layout.default_system)
    for message in messages:
        text = message.text.strip()
        if message.role == "system":
            run.template(layout.system, text=text)
        elif message.role == "user":
            run.template(layout.user, text=text, images=message.images)
        else:
            run.template(layout.assistant)
            run.flush()
            run.template(layout.answer + layout.end, text=text)
            run.flush(supervised=True)
    if generate:
        run.template(layout.assistant)
    run.flush()


def _caption(run: _Run, messages: Sequence[Turn], layout: PromptLayout) -> None:
    for message in messages:
        run.pictures(message.images)
    run.flush()
    for message in messages:
        if message.role == "assistant":
            run.template("{text}" + layout.end, text=message.text.strip())
    run.flush(supervised=True)


class _Run:
    """Pieces that wait to be encoded together: text, ids of control tokens, spans of visual tokens."""

    def __init__(self, row: Row) -> None:
        self._row, self._layout = row, row.tokens.layout
        self._waiting: list[str | int | range] = []

    def template(self, template: str, *, text: str = "", images: Sequence[int] = ()) -> None:
        """A piece of the layout with what it names filled in; `text` is never read as a template."""
        for part in re.split(r"(\{text\}|\{images\})", template):
            if part == "{text}":
                self._waiting.append(text)
            elif part == "{images}":
                self.pictures(images)
            else:
                self._waiting += self._row.tokens.pieces(part)

    def pictures(self, images: Sequence[int]) -> None:
        for index in images:
            for part in re.split(r"(\{overview\}|\{slices\})", self._layout.picture):
                if part == "{overview}":
                    self._slice(self._layout.overview, index, self._row.spans(index)[0])
                elif part == "{slices}":
                    self._tiles(index)
                else:
                    self._waiting += self._row.tokens.pieces(part)

    def _slice(self, template: str, index: int, span: range) -> None:
        before, _, after = template.replace("{n}", str(self._row.earlier + index + 1)).partition("{visual}")
        self._waiting += [*self._row.tokens.pieces(before), span, *self._row.tokens.pieces(after)]

    def _tiles(self, index: int) -> None:
        spans = self._row.spans(index)[1:]
        if not spans:
            return
        before, _, after = self._layout.slices.partition("{tiles}")
        self._waiting += self._row.tokens.pieces(before)
        for number, span in enumerate(spans):
            if number:
                between = self._layout.col if number % self._row.cols(index) else self._layout.row
                self._waiting += self._row.tokens.pieces(between)
            self._slice(self._layout.tile, index, span)
        self._waiting += self._row.tokens.pieces(after)

    def flush(self, *, supervised: bool = False) -> None:
        """Write what waits."""
        text = ""
        for piece in [*self._waiting, range(0)]:
            if isinstance(piece, str):
                text += piece
                continue
            self._row.add(self._row.tokens.encode(text), supervised=supervised)
            text = ""
            if isinstance(piece, int):
                self._row.add([piece], supervised=supervised)
            elif piece:
                self._row.visual(piece)
        self._waiting.clear()
