"""The Typer application: registers the commands, and turns what goes wrong into one sentence and a status."""

from __future__ import annotations

import errno
import inspect
import os
import re
import sys
import warnings
from collections.abc import Iterable
from importlib import import_module
from io import TextIOWrapper
from typing import Any, NoReturn

import typer
from typer.core import TyperGroup

from mlx_llama3v.errors import UserError
from mlx_llama3v.version import __version__

DEBUG = "LLAMA3V_DEBUG"
_EXAMPLE = re.compile(r"`(llama3v-mlx [^`]+)`")
COMMANDS = (
    "convert", "embed", "train", "fuse", "export", "chat", "generate", "serve", "classify", "store", "demo", "doctor",
)  # fmt: skip


def _version(wanted: bool) -> None:
    if wanted:
        typer.echo(__version__)
        raise typer.Exit()


def options(
    version: bool = typer.Option(
        False, "--version", callback=_version, is_eager=True, help="Print the version and stop."
    ),
    debug: bool = typer.Option(False, "--debug", help="Show the traceback of an error."),
) -> None:
    """Options of every command."""
    if debug:
        os.environ[DEBUG] = "1"


class _Commands(TyperGroup):
    """The commands; Ctrl-C in one of them is told, which Typer ends with the bare status."""

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except KeyboardInterrupt:
            _interrupted()


def build(commands: Iterable[str] = COMMANDS) -> typer.Typer:
    """The application with these commands."""
    app = typer.Typer(
        name="llama3v-mlx",
        cls=_Commands,
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode=None,
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110},
        help="Build and run a SigLIP + Llama-3 vision-language model on this machine, offline.\n\n"
        "convert two checkpoints, embed every picture once, train the projector, train the decoder, chat. "
        "Start with `llama3v-mlx demo`.",
    )
    app.callback()(options)
    for name in commands:
        import_module(f"mlx_llama3v.cli.{name}").register(app)
    _plain_help(app)
    return app


def _plain_help(app: typer.Typer) -> None:
    """Help for 80 columns, where Typer's boxes cut the names of options: plain, and examples as lines to copy."""
    for group in app.registered_groups:
        if group.typer_instance is not None:
            _plain_help(group.typer_instance)
    for command in app.registered_commands:
        said = (inspect.getdoc(command.callback) or "").split("\n\n")
        examples = [line for part in said for line in _EXAMPLE.findall(" ".join(part.split()))]
        told = [part for part in said if not _EXAMPLE.search(" ".join(part.split()))]
        command.short_help = " ".join(told[0].split()).partition(". ")[0].removesuffix(".") + "."
        command.help = "\n\n".join([*told, "\b\n" + "\n  ".join(["Example:", *examples])])


def run() -> None:
    """Run the command line; every expected failure ends in one sentence on stderr and a non-zero status."""
    # Pillow warns of what it mends (a broken EXIF block); what it cannot mend is listed with its reason.
    warnings.filterwarnings("ignore", module="PIL")
    for stream in (sys.stdin, sys.stdout):  # bytes that are no UTF-8: file names are shown, questions refused in words
        if isinstance(stream, TextIOWrapper):
            stream.reconfigure(errors="surrogateescape")
    words = [word for word in sys.argv[1:] if word == "--version" or not word.startswith("-")]
    # Importing all commands takes seconds (mlx-lm brings transformers): import the one that is asked for.
    wanted = [name for name in COMMANDS if words[:1] in ([name], [])]
    try:
        build(wanted if wanted or "--version" in words else COMMANDS)()
    except UserError as error:
        _fail(str(error), error)
    except KeyboardInterrupt:  # while the command was imported
        _interrupted()
    except BrokenPipeError:  # `llama3v-mlx ... | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            _fail(
                f"the disk is full: {error.filename or 'no space left'}; free some and run it again{_again()}.", error
            )
        if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
            _fail(f"{error.filename}: {error.strerror}; choose a place that you may write to.", error)
        if error.filename is None:  # not a file that somebody named: a bug
            raise
        _fail(f"{error.filename}: {error.strerror or error}.", error)


def _again() -> str:
    return " with --resume" if sys.argv[1:2] == ["train"] else ""


def _interrupted() -> NoReturn:
    typer.echo(f"\nInterrupted; run the same command again{_again()} to go on where it can.", err=True)
    sys.exit(130)


def _fail(sentence: str, error: Exception) -> None:
    if os.environ.get(DEBUG):
        raise error
    typer.secho(f"error: {sentence}", err=True, fg="red" if sys.stderr.isatty() else None)
    sys.exit(1)
