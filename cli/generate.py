"""`llama3v-mlx generate`: one answer on stdout."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Config, MaxSlices, Model, Offline, Run, open_session, settings_options
from mlx_llama3v.inference import Answer, Sampling


def register(app: typer.Typer) -> None:
    app.command()(generate)


@settings_options(Sampling)
def generate(
    model: Model,
    prompt: Annotated[str, typer.Option("--prompt", help="The question; `-` reads it from stdin.")],
    image: Annotated[list[Path] | None, typer.Option("--image", help="Picture; repeat for more.")] = None,
    run: Run = None,
    system_prompt: Annotated[str | None, typer.Option("--system-prompt", help="System text.")] = None,
    max_slices: MaxSlices = None,
    json: Annotated[bool, typer.Option("--json", help="Print text, tokens and timings as JSON.")] = False,
    verbose: Annotated[bool, typer.Option("--verbose", help="Print token counts and rates on stderr.")] = False,
    offline: Offline = False,
    config: Config = None,
    **sampling: Any,
) -> None:
    """Answer one question about any number of pictures.

    Example: `llama3v-mlx generate --model my-model --image sign.jpg --prompt "What does the sign say?"`
    """
    text = sys.stdin.read() if prompt == "-" else prompt
    session = open_session(model, run, system_prompt, max_slices, offline)
    answer: Answer | None = None
    for piece in session.ask(text, image or [], Sampling(**sampling)):
        answer = piece.answer or answer
        if not json:
            sys.stdout.write(piece.text)
            sys.stdout.flush()
    assert answer is not None  # the last piece carries it
    if json:
        show.as_json(
            {
                "text": answer.text,
                "tokens": list(answer.tokens),
                "finish_reason": answer.finish_reason,
                "prompt_tokens": answer.prompt_tokens,
                "timings": vars(answer.timings),
            }
        )
    else:
        sys.stdout.write("\n")
    if verbose:
        show.err.print(show.answer_stats(answer))
