"""`llama3v-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Config, MaxSlices, Model, Offline, Run, open_session, settings_options
from mlx_llama3v.errors import UserError
from mlx_llama3v.inference import Sampling, Session
from mlx_llama3v.vision.image import open_image

HELP = """/image FILE   show a picture with the next question (also: type or drop just its path)
/reset        forget the conversation
/help         this list
/exit         leave (also Ctrl-D); Ctrl-C stops an answer"""


def register(app: typer.Typer) -> None:
    app.command()(chat)


@settings_options(Sampling)
def chat(
    model: Model,
    image: Annotated[list[Path] | None, typer.Option("--image", help="Picture to begin with; repeat for more.")] = None,
    run: Run = None,
    system_prompt: Annotated[str | None, typer.Option("--system-prompt", help="System text.")] = None,
    max_slices: MaxSlices = None,
    offline: Offline = False,
    config: Config = None,
    **sampling: Any,
) -> None:
    """Talk about pictures; answers stream, earlier turns stay in memory.

    Example: `llama3v-mlx chat --model my-model --image photo.jpg`, then type questions; `/help` lists the commands.
    """
    session = open_session(model, run, system_prompt, max_slices, offline)
    conversation = Conversation(session, Sampling(**sampling))
    for path in image or []:
        conversation.show(path)
    if sys.stdin.isatty():
        show.out.print("Ask away; /help lists the commands, Ctrl-D leaves.")
    for line in _lines():
        if line.strip() in ("/exit", "/quit"):
            break
        try:
            conversation.take(line.strip())
        except UserError as error:  # a conversation survives a wrong path
            show.err.print(f"error: {error}")


class Conversation:
    """Takes typed lines: commands, pictures and questions."""

    def __init__(self, session: Session, sampling: Sampling) -> None:
        self.session, self.sampling = session, sampling
        self.waiting: list[Path] = []  # pictures for the next question

    def take(self, line: str) -> None:
        """One line. Raises UserError; the conversation is then as it was."""
        if not line:
            return
        if line == "/help":
            _say(f"{HELP}\n")
        elif line == "/reset":
            self.session.reset()
            self.waiting.clear()
            _say("The conversation is forgotten.\n")
        elif line.split()[0] == "/image":
            self.show(_path(line.removeprefix("/image")))
        elif line.startswith("/"):
            self._slash(line)
        elif _path(line).is_file():
            self.show(_path(line))
        else:
            self.ask(line)

    def _slash(self, line: str) -> None:
        """An absolute path that was dropped on the terminal, else an unknown command."""
        if _path(line).is_file():
            self.show(_path(line))
        else:
            _say(f"{line.split()[0]} is no command.\n{HELP}\n")

    def show(self, path: Path) -> None:
        """Take a picture for the next question. Raises ImageError at once where it cannot be read."""
        limit = self.session.model.config.image.max_pixels
        width, height = open_image(path, limit).size
        self.waiting.append(path)
        _say(f"{path.name}: {width} x {height}; it goes with your next question.\n")

    def ask(self, text: str) -> None:
        """Stream an answer; Ctrl-C ends the answer, not the program."""
        pieces = self.session.ask(text, self.waiting, self.sampling)
        self.waiting = []
        try:
            for piece in pieces:
                _say(piece.text)
        except KeyboardInterrupt:
            _say(" (stopped)")
        _say("\n")


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _path(text: str) -> Path:
    """A path as people type or drop it: quoted, with escaped spaces, with ~."""
    text = text.strip().replace("\\ ", " ")
    if len(text) > 1 and text[0] == text[-1] and text[0] in "'\"":
        text = text[1:-1]
    return Path(text or ".").expanduser()


def _lines() -> Iterator[str]:
    """Typed lines, with history and editing on a terminal; plain lines from a pipe."""
    if not sys.stdin.isatty():
        yield from sys.stdin
        return
    from prompt_toolkit import PromptSession
    from prompt_toolkit.history import InMemoryHistory

    prompt: PromptSession[str] = PromptSession(history=InMemoryHistory())
    while True:
        try:
            yield prompt.prompt("> ")
        except KeyboardInterrupt:
            continue
        except EOFError:
            return
