"""`llama3v-mlx demo`: the whole path on the bundled tiny bases."""

from __future__ import annotations

import shlex
import shutil
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import settings_options
from mlx_llama3v.demo.run import DemoConfig, DemoResult
from mlx_llama3v.demo.run import run as run_demo
from mlx_llama3v.errors import RunError

UNITS = {"draw pictures": "images", "convert": "kB", "embed": "images", "exam": "questions"}


def register(app: typer.Typer) -> None:
    app.command()(demo)


@settings_options(DemoConfig)
def demo(
    output: Annotated[Path, typer.Option("--output", help="Where everything goes.")] = Path("demo-output"),
    quick: Annotated[
        bool, typer.Option("--quick", help="A check, not a show: fail unless it sees better than it guesses.")
    ] = False,
    **settings: Any,
) -> None:
    """Draw a tiny world, convert, embed, train both stages, and answer questions about pictures it never saw.

    Example: `llama3v-mlx demo --seed 1 --output my-demo`
    """
    with ExitStack() as stack:
        bars: dict[str, show.Bar] = {}

        def report(step: str, done: int, total: int, note: str) -> None:
            if step not in bars:
                stack.close()  # one bar at a time, each stays on the terminal
                bars[step] = stack.enter_context(show.bar(step, UNITS.get(step, "steps")))
            bars[step].update(done, total, note)

        result = run_demo(output, DemoConfig(**settings), report)
    print_result(result)
    if quick and result.exam.overall <= result.exam.blind:
        raise RunError(f"accuracy {result.exam.overall:.0%} is not above blind {result.exam.blind:.0%}.")


def print_result(result: DemoResult) -> None:
    """The table, five answers, where everything is, and what to type next."""
    exam = result.exam
    rows = [[k.kind, f"{k.score:.0%}", f"{k.blind:.0%}", str(k.n)] for k in exam.kinds]
    rows.append(["all", f"{exam.overall:.0%}", f"{exam.blind:.0%}", str(len(exam.answers))])
    show.table("exact match on unseen pictures", ["question kind", "seeing", "blind", "questions"], rows)
    show.out.print(
        f"Small text: {exam.small_text_split:.0%} with the picture split, {exam.small_text_unsplit:.0%} without.\n"
    )
    for question, answer in result.samples:
        verdict = "right" if answer == question.answer else f"wrong, it is {question.answer}"
        show.out.print(f"  {question.image}: {question.question} -> {answer} ({verdict})")
    out = result.output
    first = result.data.images / result.data.exam[0].image
    show.out.print(
        f"\nModel {result.model}, store {result.store}, runs {result.pretrain} and {result.sft}, "
        f"{result.sft}/loss.png, {out}/gallery.png, {out}/demo.json"
    )
    show.out.print(f"Done in {show.duration(result.seconds)}. Next:\n")
    # After `make demo` the executable is in .venv/bin, which is on nobody's PATH.
    program = "llama3v-mlx" if shutil.which("llama3v-mlx") else sys.argv[0]
    for words in (
        ("chat", "--model", result.model, "--run", result.sft, "--image", first),
        ("classify", "--model", result.model, "--image", first, "--text", "a red circle", "--text", "a chart"),
    ):
        show.out.print(f"  {shlex.join(map(str, (program, *words)))}")
