"""Paths as people type them or as terminals type them when a file is dropped on the window."""

from __future__ import annotations

import os
import re
import shlex
from pathlib import Path
from urllib.parse import unquote

# One word of a shell: terminals quote a dropped path ('a b.png', also 'it'\''s.png') or escape it (a\ b\ \(1\).png).
# Not \s: a Mac's screenshots have a narrow no-break space (U+202F) in their names, which no terminal escapes.
_WORD = re.compile(r"""(?:'[^']*'|"[^"]*"|\\.|[^ \t\r\n'"\\])+""")


def typed_path(text: str) -> Path:
    """A path, quoted, escaped, as file:// address or as it is; ~ is the home folder."""
    text = text.strip()
    if _WORD.fullmatch(text) and not os.path.exists(text):  # a name may hold backslashes
        text = shlex.split(text)[0]
    if text.startswith("file://"):
        text = unquote(text.removeprefix("file://").removeprefix("localhost"))
    return Path(os.path.expanduser(text or "."))


def take_dropped(line: str) -> tuple[list[Path], str]:
    """The files that a line begins with, and the text behind them.

    A name without a folder counts only where it is the whole line: questions begin with words, too.
    """
    rest = line.strip()
    if _is_file(rest):
        return [typed_path(rest)], ""
    found: list[Path] = []
    while (word := _WORD.match(rest)) and "/" in word[0] and _is_file(word[0]):
        found.append(typed_path(word[0]))
        rest = rest[word.end() :].lstrip()
    return found, rest


def _is_file(text: str) -> bool:
    return os.path.isfile(typed_path(text))  # False also for what no name can be
