"""`llama3v-mlx generate`: one answer on stdout, or a file of questions in batches."""

from __future__ import annotations

import os
import sys
from contextlib import ExitStack
from pathlib import Path
from typing import Annotated, Any, TextIO

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import (
    Config,
    MaxSlices,
    Model,
    Offline,
    Run,
    given,
    open_session,
    settings_options,
    split_settings,
)
from mlx_llama3v.cli.terminal import CONTROLS
from mlx_llama3v.errors import DataError
from mlx_llama3v.hub import resolve
from mlx_llama3v.inference import Answer, Memory, Picture, Sampling, Session
from mlx_llama3v.inference.jobs import Job, Result, answer_jobs, read_jobs, unanswered, write_results


def register(app: typer.Typer) -> None:
    app.command()(generate)


@settings_options(Memory)
@settings_options(Sampling)
def generate(
    ctx: typer.Context,
    model: Model,
    prompt: Annotated[str | None, typer.Option("--prompt", help="The question; `-` reads it from stdin.")] = None,
    image: Annotated[
        list[str] | None, typer.Option("--image", metavar="<path>", help="Picture; repeat for more; `-`: stdin.")
    ] = None,
    prompts: Annotated[
        str | None, typer.Option("--prompts", help='JSONL of {"prompt", "image" or "images", "id"}; `-`: stdin.')
    ] = None,
    output: Annotated[str, typer.Option("--output", help="JSONL of answers to `--prompts`; `-`: stdout.")] = "-",
    image_folder: Annotated[
        Path | None, typer.Option("--image-folder", help="Where pictures of `--prompts` lie [default: beside it].")
    ] = None,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Questions answered side by side.")] = 8,
    run: Run = None,
    system_prompt: Annotated[str | None, typer.Option("--system-prompt", help="System text.")] = None,
    max_slices: MaxSlices = None,
    json: Annotated[bool, typer.Option("--json", help="Print text, tokens and timings as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print token counts and rates on stderr.")] = False,
    offline: Offline = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Answer one question about any number of pictures, or a file of questions.

    Example: `llama3v-mlx generate --model my-model --run runs/sft --image sign.jpg --prompt "What does the sign say?"`

    Example: `llama3v-mlx generate --model my-model --run runs/sft --prompts questions.jsonl --output answers.jsonl`
    (run it again to go on where it was interrupted)
    """
    if (prompt is None) == (prompts is None):
        raise DataError("give either --prompt TEXT or --prompts FILE.jsonl.")
    if [prompt, prompts, *(image or [])].count("-") > 1:
        raise DataError("stdin (-) can be only one of --prompt, --prompts and --image.")
    if prompts is not None and image:
        raise DataError("--image goes with --prompt; with --prompts each line names its own pictures.")
    flags = {"output": "--output", "image_folder": "--image-folder", "batch_size": "--batch-size"}
    if prompts is None and (unused := [flag for name, flag in flags.items() if name in given(ctx)]):
        raise DataError(f"{', '.join(unused)} would have no effect with --prompt; expected --prompts FILE.jsonl.")
    if prompts is not None and json:
        raise DataError("--json goes with --prompt; the answers to --prompts are JSON in any case.")
    sampling, memory = split_settings(settings, Sampling, Memory)
    if prompts is not None:
        if memory.kv_bits:
            raise DataError("--kv-bits goes with --prompt; batches keep their keys and values whole.")
        jobs = _read(prompts, output, image_folder)
        by = {"model": str(resolve(model, offline=offline).resolve()), "run": str(run.resolve()) if run else ""}
        left = unanswered(jobs, Path(output), by) if output != "-" else jobs
        session = open_session(model, run, system_prompt, max_slices, offline, memory)
        _many(session, left, len(jobs) - len(left), output, sampling, batch_size, verbose, by)
        return
    text = sys.stdin.read() if prompt == "-" else prompt
    images: list[Picture] = [sys.stdin.buffer.read() if name == "-" else name for name in image or []]
    session = open_session(model, run, system_prompt, max_slices, offline, memory)
    _one(session, str(text), images, sampling, json, verbose)


def _one(session: Session, text: str, images: list[Picture], sampling: Sampling, json: bool, verbose: bool) -> None:
    answer: Answer | None = None
    hidden = CONTROLS if sys.stdout.isatty() else {}  # a file gets the answer as it is
    for piece in session.ask(text, images, sampling):
        answer = piece.answer or answer
        if not json:
            sys.stdout.write(piece.text.translate(hidden))
            sys.stdout.flush()
    assert answer is not None  # the last piece carries it
    if json:
        show.as_json(show.answer_json(answer))
    else:
        sys.stdout.write("\n")
    if answer.finish_reason == "repetition" and not verbose:
        show.err.print("The answer began to repeat itself and was ended (--loop-guard).")
    if verbose:
        show.err.print(show.answer_stats(answer))


def _read(prompts: str, output: str, image_folder: Path | None) -> list[Job]:
    if prompts == "-":
        return read_jobs(sys.stdin, "stdin", image_folder or Path())
    path = Path(prompts)
    if not path.is_file():
        raise DataError(f"{path} is missing; expected a JSONL file of questions.")
    if os.path.exists(output) and path.samefile(output):
        raise DataError(f"{output} holds the questions; expected another --output for the answers.")
    try:
        lines = path.read_text(encoding="utf-8").split("\n")  # not splitlines(): JSON may hold U+2028 and its kin
    except UnicodeDecodeError as error:
        raise DataError(f"{path} is not UTF-8 text (byte {error.start}); expected JSONL.") from error
    return read_jobs(lines, str(path), image_folder or path.parent)


def _many(
    session: Session,
    jobs: list[Job],
    there: int,
    output: str,
    sampling: Sampling,
    batch_size: int,
    verbose: bool,
    by: dict[str, str],
) -> None:
    done = 0
    with ExitStack() as stack:
        out: TextIO = sys.stdout
        if output != "-":
            out = stack.enter_context(Path(output).open("a", encoding="utf-8"))
        bar = stack.enter_context(show.bar("Answering", "answers"))
        bar.update(0, len(jobs))

        def tell(result: Result) -> None:
            nonlocal done
            done += 1
            if result.error:
                show.err.print(f"{result.job.id}: {result.error}")
            bar.update(done, len(jobs))
            if verbose and result.answer:
                show.err.print(f"{result.job.id}\n{show.answer_stats(result.answer)}")

        found, failed = write_results(answer_jobs(session, jobs, sampling, batch_size), out, tell, by)
    say = show.err if output == "-" else show.out
    where = "stdout" if output == "-" else output
    already = f", {there} were there" if there else ""
    say.print(f"{found} answered, {failed} failed{already}. Answers: {where}")
    if failed:
        raise typer.Exit(1)
