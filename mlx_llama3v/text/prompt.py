"""Messages -> ids, image positions and loss mask, in one pass: the joint sequence of DESIGN 6.

    <|begin_of_text|>{header user}<image>V…V</image><text>What is it?</text><|eot_id|>
    {header assistant}A cat.<|eot_id|>

Only slice *shapes* enter, so that lengths are known before one embedding is read. The same function lays out
training rows, a fresh chat prompt and the next turn of a chat: what is trained is what is asked.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import groupby

import msgspec
import numpy as np

from mlx_llama3v.config import MARKERS, ProjectorConfig, SliceLayout
from mlx_llama3v.errors import ContextError, DataError
from mlx_llama3v.text.templates import templated
from mlx_llama3v.text.tokens import Tokens

FIRST_VISUAL = 1 + len(MARKERS)  # `source` of a row's first visual token
ROLES = ("system", "user", "assistant")


class Message(msgspec.Struct, frozen=True, gc=False):
    """One turn. `images` are indices into the row's pictures that this turn brings, in order.

    Held in millions: made in a tenth of a frozen dataclass's time, and the garbage collector passes it by.
    """

    role: str  # system | user | assistant
    text: str
    images: tuple[int, ...] = ()


@dataclass(frozen=True)
class Rendered:
    """One row, laid out.

    `source` says where a position's vector comes from: 0 the decoder's embedding of its id; 1..8 row
    `source - 1` of the projector's markers; 9 + k the row's k-th visual token, counted over pictures, their
    slices (`SliceLayout.grids` order) and each slice's tokens. `ids` are marker ids there, <image>'s
    for visual tokens. `supervised` marks the training targets: every answer with the token that ends it.
    """

    ids: np.ndarray  # int32 [L]
    source: np.ndarray  # int32 [L]
    supervised: np.ndarray  # bool [L]

    def __len__(self) -> int:
        return len(self.ids)


def render(
    messages: Sequence[Message],
    layouts: Sequence[SliceLayout],
    tokens: Tokens,
    projector: ProjectorConfig,
    *,
    generate: bool = False,
    caption: bool = False,
    start: bool = True,
    earlier: int = 0,
) -> Rendered:
    """Lay out `messages`, whose pictures have the shapes `layouts`.

    `generate` ends with what the model answers after (the assistant header; with `caption` nothing).
    `caption` is the bare form of stage pretrain: pictures, then the one answer; user text is left out.
    `start=False` is the next turn of a chat whose KV cache is kept: it begins with the <|eot_id|> that ends
    the answer before it, where a fresh row has <|begin_of_text|>; `earlier` pictures came in the turns before,
    for layouts that number them.
    Raises ContextError for a picture that is not there, that no turn brings, or that has no visual token, and
    DataError for messages that make no row: none at all, an unknown role, pictures outside user turns, an
    empty turn, nothing to train on.
    """
    check_messages(messages, len(layouts), generate=generate, caption=caption)
    row = _Row(layouts, tokens, projector, earlier)
    if not tokens.layout.markers:
        templated(row, messages, tokens.layout, generate=generate, caption=caption, start=start)
        return row.rendered()
    row.add([tokens.bos if start else tokens.eot])
    if caption:
        _render_caption(row, messages)
    else:
        for message in messages:
            _render_turn(row, message)
        if generate:
            row.add(tokens.header("assistant"))
    return row.rendered()


def describe(rendered: Rendered, tokens: Tokens) -> list[tuple[str, str, int]]:
    """A row as (text, kind, number of tokens) spans for people: kind is "prompt", "target", "marker" or "visual".

    Runs of visual tokens are collapsed to "<81 visual tokens>", markers are named as in MARKERS.
    """

    def kind(position: int) -> str:
        source = rendered.source[position]
        if source:
            return "visual" if source >= FIRST_VISUAL else "marker"
        return "target" if rendered.supervised[position] else "prompt"

    spans = []
    for name, run in groupby(range(len(rendered)), kind):
        positions = list(run)
        if name == "visual":
            text = f"<{len(positions)} visual tokens>"
        elif name == "marker":
            text = "".join(MARKERS[rendered.source[i] - 1] for i in positions)
        else:
            text = tokens.decode(rendered.ids[positions], special=True)
        spans.append((text, name, len(positions)))
    return spans


class _Row:
    """A row under construction."""

    def __init__(
        self, layouts: Sequence[SliceLayout], tokens: Tokens, projector: ProjectorConfig, earlier: int
    ) -> None:
        self.tokens, self.earlier = tokens, earlier
        self._layouts = layouts
        self._slices = [[projector.num_tokens(grid) for grid in layout.grids] for layout in layouts]
        for number, (layout, counts) in enumerate(zip(layouts, self._slices, strict=True), 1):
            if min(counts) < 1:
                raise ContextError(f"picture {number} has no visual tokens (patch grids {layout.grids}).")
        self._first = np.cumsum([0, *map(sum, self._slices)])  # first visual token of each picture
        self._ids: list[int] = []
        self._source: list[int] = []
        self._supervised: list[bool] = []

    def add(self, ids: Iterable[int], *, supervised: bool = False) -> None:
        """Plain tokens."""
        ids = list(ids)
        self._ids += ids
        self._source += [0] * len(ids)
        self._supervised += [supervised] * len(ids)

    def mark(self, name: str) -> None:
        """One marker."""
        index = MARKERS.index(name)
        self._put(self.tokens.marker_ids[index], [1 + index])

    def picture(self, index: int) -> None:
        """<image>overview</image>, then the slices of a split picture in reading order."""
        layout, spans = self._layouts[index], self.spans(index)
        self.mark("<image>")
        self.visual(spans[0])
        self.mark("</image>")
        for number, span in enumerate(spans[1:]):
            self.mark("<slices>" if number == 0 else "<col>" if number % layout.cols else "<row>")
            self.visual(span)
        if spans[1:]:
            self.mark("</slices>")

    def spans(self, index: int) -> list[range]:
        """`source` of the visual tokens of each slice of a picture."""
        ends = FIRST_VISUAL + self._first[index] + np.cumsum(self._slices[index])
        return [range(int(end) - count, int(end)) for end, count in zip(ends, self._slices[index], strict=True)]

    def visual(self, span: range) -> None:
        """The visual tokens of one slice."""
        self._put(self.tokens.marker_ids[0], span)

    def cols(self, index: int) -> int:
        """Tiles in a row of a picture."""
        return self._layouts[index].cols

    def _put(self, token_id: int, sources: Sequence[int]) -> None:
        self._ids += [token_id] * len(sources)
        self._source += sources
        self._supervised += [False] * len(sources)

    def rendered(self) -> Rendered:
        return Rendered(
            np.array(self._ids, np.int32),
            np.array(self._source, np.int32),
            np.array(self._supervised, np.bool_),
        )


def _render_turn(row: _Row, message: Message) -> None:
    tokens, text = row.tokens, row.tokens.encode(message.text.strip())
    answer = message.role == "assistant"
    row.add(tokens.header(message.role))
    for index in message.images:
        row.picture(index)
    if message.images:
        row.mark("<text>")
    row.add(text, supervised=answer)
    if message.images:
        row.mark("</text>")
    row.add([tokens.eot], supervised=answer)


def _render_caption(row: _Row, messages: Sequence[Message]) -> None:
    for message in messages:
        for index in message.images:
            row.picture(index)
    for message in messages:
        if message.role == "assistant":
            row.add([*row.tokens.encode(message.text.strip()), row.tokens.end_of_text], supervised=True)


def check_messages(messages: Sequence[Message], pictures: int, *, generate: bool, caption: bool) -> None:
    """Raise for messages that make no row of so many pictures; see `render`."""
    if not messages:
        raise DataError("the conversation has no message.")
    answers = 0
    for number, message in enumerate(messages, 1):
        role, images = message.role, message.images
        if role not in ROLES:
            raise DataError(f"message {number} has the role {role!r}; expected {', '.join(ROLES)}.")
        answers += role == "assistant"
        if images:
            if role != "user":
                raise DataError(f"message {number} ({role}) brings a picture; only user turns may.")
            for index in images:
                if not 0 <= index < pictures:
                    raise ContextError(
                        f"message {number} brings picture {index + 1}, but there are {pictures} pictures."
                    )
        elif not message.text or message.text.isspace():
            raise DataError(f"message {number} ({role}) is empty; expected text.")
    if pictures and messages[0].images != tuple(range(pictures)):  # in order at the start: none is left
        unused = set(range(pictures)) - {index for message in messages for index in message.images}
        if unused:
            raise ContextError(f"no message brings picture {min(unused) + 1} of {pictures}.")
    if generate and messages[-1].role != "user":
        raise ContextError(f"the last message is from {messages[-1].role}; expected a user turn to answer.")
    if not generate and not answers:
        raise DataError("the conversation has no answer to train on.")
    if caption and answers != (0 if generate else 1):
        raise DataError(f"a caption row has {answers} answers; expected exactly one.")
