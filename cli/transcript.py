"""A conversation as a Markdown file that people can read and `/load` can take up again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from mlx_llama3v.errors import DataError

_HEAD = "# Conversation with llama3v-mlx"
_SECTIONS = ("System", "Question", "Answer")
_PICTURE = re.compile(r"^!\[\]\(<(.*)>\)$", re.M)


@dataclass(frozen=True)
class Exchange:
    """A question with the files of its pictures, and the answer."""

    question: str
    images: tuple[Path, ...]
    answer: str


def to_markdown(system: str | None, exchanges: Sequence[Exchange]) -> str:
    """The whole conversation; `#` and `![` at the beginning of a line are escaped in what was said."""
    parts = [_HEAD]
    if system:
        parts.append(f"## System\n\n{_escaped(system)}")
    for exchange in exchanges:
        pictures = "".join(f"![](<{path}>)\n" for path in exchange.images)
        parts.append(f"## Question\n\n{pictures}{_escaped(exchange.question)}")
        parts.append(f"## Answer\n\n{_escaped(exchange.answer)}")
    return "\n\n".join(parts) + "\n"


def from_markdown(text: str, name: str) -> tuple[str | None, list[Exchange]]:
    """What `to_markdown` wrote. Raises DataError for another file."""
    if not text.startswith(_HEAD):
        raise DataError(f"{name} is no conversation of ours; expected a file from /save.")
    system, found = None, []
    pieces = re.split(r"^## (System|Question|Answer)\n", text, flags=re.M)[1:]
    sections = list(zip(pieces[::2], pieces[1::2], strict=True))
    for number, (kind, body) in enumerate(sections):
        if kind == "System":
            system = _plain(body)
        elif kind == "Question":
            if number + 1 == len(sections) or sections[number + 1][0] != "Answer":
                raise DataError(f"{name}: a question has no answer; expected a whole conversation.")
            images = tuple(Path(path) for path in _PICTURE.findall(body))
            body = "\n".join(line for line in body.split("\n") if not _PICTURE.fullmatch(line))
            found.append(Exchange(_plain(body), images, _plain(sections[number + 1][1])))
    return system, found


def _escaped(text: str) -> str:
    return re.sub(r"^(\\*)(#|!\[)", r"\\\1\2", text.strip(), flags=re.M)


def _plain(text: str) -> str:
    return re.sub(r"^\\(\\*)(#|!\[)", r"\1\2", text.strip(), flags=re.M)
