"""Lines that a person types: editing, history and Tab on a terminal, plain lines from a pipe."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Mapping

from prompt_toolkit import PromptSession
from prompt_toolkit.completion import CompleteEvent, Completer, Completion, PathCompleter
from prompt_toolkit.document import Document
from prompt_toolkit.history import InMemoryHistory

# An answer is shown, never obeyed: a picture could make the model write what moves the cursor or renames the window.
CONTROLS = dict.fromkeys([*range(9), *range(11, 32), *range(127, 160)])


def typed_lines(commands: Mapping[str, bool]) -> Iterator[str]:
    """Lines until Ctrl-D or the pipe's end. `commands`: for each whether a file follows it."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    prompt: PromptSession[str] = PromptSession(
        history=InMemoryHistory(), completer=Commands(commands), complete_while_typing=False
    )
    while True:
        try:
            yield prompt.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return


class Commands(Completer):
    """Completes commands, and file names behind those that take one."""

    def __init__(self, commands: Mapping[str, bool]) -> None:
        self._commands, self._files = commands, PathCompleter(expanduser=True)

    def get_completions(self, document: Document, complete_event: CompleteEvent) -> Iterable[Completion]:
        word, space, rest = document.text_before_cursor.partition(" ")
        if space and self._commands.get(word):
            yield from self._files.get_completions(Document(rest), complete_event)
        elif not space and word:
            yield from (Completion(name, -len(word)) for name in self._commands if name.startswith(word))
