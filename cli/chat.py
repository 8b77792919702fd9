"""`llama3v-mlx chat`: a conversation in the terminal."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.dropped import take_dropped, typed_path
from mlx_llama3v.cli.interrupt import interruptible
from mlx_llama3v.cli.options import (
    Config,
    MaxSlices,
    Model,
    Offline,
    Run,
    open_session,
    settings_options,
    split_settings,
)
from mlx_llama3v.cli.terminal import CONTROLS, typed_lines
from mlx_llama3v.cli.transcript import Exchange, from_markdown, to_markdown
from mlx_llama3v.errors import DataError, UserError
from mlx_llama3v.inference import Answer, Memory, Picture, Sampling, Session
from mlx_llama3v.vision.image import image_size

HELP = """/image FILE    show a picture with the next question (also: drop it here, or type its path)
/images        list the pictures of the conversation
/system TEXT   set the system text (without TEXT: none); the conversation begins anew
/retry         answer the last question again
/edit TEXT     ask the last question with this text instead
/reset         forget the conversation
/save FILE.md  write the conversation to a file
/load FILE.md  take up a saved conversation
/stats         token counts and times of the last answer
/help          this list
/exit          leave (also Ctrl-D); Ctrl-C stops an answer"""


def register(app: typer.Typer) -> None:
    app.command()(chat)


@settings_options(Memory)
@settings_options(Sampling)
def chat(
    model: Model,
    image: Annotated[
        list[Path] | None, typer.Option("--image", metavar="<path>", help="Picture to begin with; repeat for more.")
    ] = None,
    run: Run = None,
    system_prompt: Annotated[str | None, typer.Option("--system-prompt", help="System text.")] = None,
    max_slices: MaxSlices = None,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print /stats after every answer.")] = False,
    offline: Offline = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Talk about pictures; answers stream, earlier turns stay in memory.

    Example: `llama3v-mlx chat --model my-model --run runs/sft --image photo.jpg`, then type questions.
    """
    sampling, memory = split_settings(settings, Sampling, Memory)
    session = open_session(model, run, system_prompt, max_slices, offline, memory)
    conversation = Conversation(session, sampling, verbose)
    for path in image or []:
        conversation.show(str(path))
    if sys.stdin.isatty():
        show.out.print("Ask away; /help lists the commands, Ctrl-D leaves.")
    for line in typed_lines({line.split()[0]: "FILE" in line.split()[1] for line in HELP.splitlines()}):
        if line.strip() in ("/exit", "/quit"):
            break
        try:
            conversation.take(line.strip())
        except UserError as error:  # a conversation survives a wrong path
            show.err.print(f"error: {error}")


class Conversation:
    """Takes typed lines: commands, pictures and questions."""

    def __init__(self, session: Session, sampling: Sampling, verbose: bool = False) -> None:
        self.session, self.sampling, self.verbose = session, sampling, verbose
        self.waiting: list[Path] = []  # pictures for the next question
        self.asked: list[tuple[Path, ...]] = []  # the pictures of every turn
        self.last: Answer | None = None
        self._answers = 0  # since the beginning, also those that others replaced
        self._commands: dict[str, Callable[[str], None]] = {
            "/help": lambda _: _say(f"{HELP}\n"),
            "/image": self.show,
            "/images": self.list_pictures,
            "/system": self.set_system,
            "/reset": self.reset,
            "/retry": self.retry,
            "/edit": self.edit,
            "/save": self.save,
            "/load": self.load,
            "/stats": self.stats,
        }

    def take(self, line: str) -> None:
        """One line. Raises UserError; the conversation is then as it was."""
        if not line:
            return
        word, _, rest = line.partition(" ")
        if word in self._commands:
            self._commands[word](rest.strip())
            return
        files, question = take_dropped(line)
        if not files and line.startswith("/"):
            raise DataError(f"{word} is neither a command (see /help) nor a file.")
        count = len(self.waiting)
        try:
            for path in files:
                self.show(str(path))
        except UserError:
            del self.waiting[count:]
            raise
        if question:
            self.ask(question)

    def show(self, text: str) -> None:
        """Take a picture for the next question. Raises ImageError at once where it cannot be read."""
        path = typed_path(text)
        width, height = image_size(path, self.session.model.config.image.max_pixels)
        self.waiting.append(path)
        _say(f"{path.name}: {width} x {height}; it goes with your next question.\n")

    def list_pictures(self, _: str) -> None:
        for turn, paths in enumerate(self.asked, 1):
            for path in paths:
                _say(f"question {turn}: {path}\n")
        for path in self.waiting:
            _say(f"next question: {path}\n")
        if not self.waiting and not any(self.asked):
            _say("There is no picture yet; /image FILE shows one.\n")

    def set_system(self, text: str) -> None:
        self.session.system = text or None
        self.session.reset()
        self.asked, self.last = [], None
        _say("The system text is set; the conversation begins anew.\n" if text else "There is no system text now.\n")

    def reset(self, _: str) -> None:
        self.session.reset()
        self.waiting, self.asked, self.last = [], [], None
        _say("The conversation is forgotten.\n")

    def retry(self, _: str) -> None:
        self._again(None)

    def edit(self, text: str) -> None:
        if not text:
            raise DataError("/edit needs the new text of the last question.")
        self._again(text)

    def save(self, name: str) -> None:
        path = _named(name, "/save")
        turns = zip(self.session.turns, self.asked, self.session.answers(), strict=True)
        found = [Exchange(turn.text, tuple(p.absolute() for p in paths), said) for turn, paths, said in turns]
        try:
            path.write_text(to_markdown(self.session.system, found), encoding="utf-8", errors="surrogateescape")
        except OSError as error:
            raise DataError(f"{path} cannot be written: {error.strerror}.") from error
        _say(f"{show.plural(len(found), 'turn')} saved to {path}\n")

    def load(self, name: str) -> None:
        path = _named(name, "/load")
        try:
            text = path.read_text(encoding="utf-8", errors="surrogateescape")  # names of files may be any bytes
        except OSError as error:
            raise DataError(f"{path} cannot be read as a saved conversation.") from error
        system, found = from_markdown(text, str(path))
        pictures = [[self.session.encode(image) for image in exchange.images] for exchange in found]  # or nothing
        self.session.system = system
        self.session.restore([(e.question, images, e.answer) for e, images in zip(found, pictures, strict=True)])
        self.asked, self.waiting, self.last = [exchange.images for exchange in found], [], None
        _say(f"{show.plural(len(found), 'turn')} taken up from {path}\n")

    def stats(self, _: str) -> None:
        _say(f"{show.answer_stats(self.last)}\n" if self.last else "There is no answer yet.\n")

    def ask(self, text: str) -> None:
        """Stream an answer; Ctrl-C ends the answer, not the program."""
        paths = tuple(self.waiting)
        self._stream(text, paths, paths)

    def _again(self, text: str | None) -> None:
        """Ask the last question anew; where that fails or is stopped at once, the old answer stays."""
        mark, turn = self.session.mark(), self.session.undo()
        if turn is None:
            raise DataError("there is no question yet.")
        paths, count = self.asked.pop(), len(self.asked)
        waiting, self.waiting = self.waiting, []
        try:
            self._stream(text or turn.text, turn.pictures, paths)
        finally:
            self.waiting = waiting
            if len(self.asked) == count:
                self.session.back(mark)
                self.asked.append(paths)

    def _stream(self, text: str, pictures: Sequence[Picture], paths: tuple[Path, ...]) -> None:
        before, found = len(self.session.turns), None
        try:
            with interruptible() as stopped:
                for piece in self.session.ask(text, pictures, self.sampling.nth(self._answers)):
                    _say(piece.text.translate(CONTROLS))
                    found = piece.answer
                    if stopped() and piece.answer is None:
                        raise KeyboardInterrupt
        except KeyboardInterrupt:
            _say(" (stopped)")
        _say("\n")
        if len(self.session.turns) == before:
            return  # stopped before the first token: the pictures wait for the next question
        self.asked.append(paths)
        self.waiting = []
        self.last = found  # none of an answer that was stopped
        self._answers += 1
        if self.last and self.last.finish_reason == "repetition":
            _say("(ended: the answer began to repeat itself)\n")
        if self.verbose and self.last:
            show.err.print(show.answer_stats(self.last))


def _say(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _named(text: str, command: str) -> Path:
    if not text:
        raise DataError(f"{command} needs the name of a file.")
    return typed_path(text)
