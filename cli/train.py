"""`llama3v-mlx train`: one stage of the recipe on stored embeddings."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer
from rich.text import Text

from mlx_llama3v.ahead import AheadConfig
from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Config, Model, Offline, byte_count, settings_options
from mlx_llama3v.embeddings.codec import DEFAULT as DEFAULT_CODEC
from mlx_llama3v.errors import RunError
from mlx_llama3v.stages import train_stage
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks, Evaluation, Progress, Start
from mlx_llama3v.train.trainer import TrainResult

COLOURS = {"prompt": "dim", "target": "bold green", "marker": "magenta", "visual": "cyan"}


def register(app: typer.Typer) -> None:
    app.command()(train)


@settings_options(TrainConfig)
def train(
    model: Model,
    data: Annotated[Path, typer.Option("--data", help="LLaVA-format JSON or JSONL.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="Run directory to write.", show_default=False)],
    embeddings: Annotated[
        Path | None, typer.Option("--embeddings", help="Store (from `embed`).", show_default=False)
    ] = None,
    image_folder: Annotated[
        Path | None,
        typer.Option("--image-folder", help="With --embed-ahead: where names in DATA start.", show_default=False),
    ] = None,
    embed_ahead: Annotated[
        bool,
        typer.Option("--embed-ahead", help="No store: a second process encodes what is read next, and drops it after."),
    ] = False,
    store_budget: Annotated[
        str, typer.Option("--store-budget", help="Disk that --embed-ahead may use, as 50GB or 800MB.")
    ] = "50GB",
    codec: Annotated[
        Literal["float16", "int8", "int4"], typer.Option("--codec", help="How --embed-ahead holds embeddings.")
    ] = DEFAULT_CODEC,  # type: ignore[assignment]
    projector: Annotated[
        Path | None,
        typer.Option("--projector", help="Run (or file) to take the projector from; sft needs one."),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of --output.")] = False,
    offline: Offline = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Train the projector (stage pretrain) or the decoder (stage sft); the rest stays frozen.

    Example: `llama3v-mlx train --model my-model --data captions.json --embeddings my-store --output runs/pretrain`
    """
    values: dict[str, Any] = {
        key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()
    }
    if embed_ahead == (embeddings is not None):
        raise RunError("give either --embeddings STORE, or --embed-ahead to embed while training.")
    ahead = AheadConfig(model, byte_count(store_budget), codec, offline=offline) if embed_ahead else None
    with show.bar(values["stage"], "steps") as bar:
        result = train_stage(
            model,
            data,
            embeddings or output / "ahead",
            output,
            TrainConfig(**values),
            projector=projector,
            ahead=ahead,
            image_folder=image_folder,
            resume=resume,
            offline=offline,
            callbacks=_watch(bar),
        )
    print_result(result)


def print_start(start: Start) -> None:
    """What will be trained on what, and one row as the model will see it, its targets in green."""
    print_problems(start.problems)
    learned = start.trainable
    show.err.print(
        f"{start.rows:,} rows (longest {start.longest} tokens), {start.held_out} held out; {start.steps:,} steps"
        f"{f', {start.done:,} of them done' if start.done else ''}; "
        f"training {learned.count:,} of {learned.total:,} parameters."
    )
    sample = Text("first row: ")
    for text, kind in start.sample:
        sample.append(text.replace("\n", "\\n"), style=COLOURS[kind])
    show.err.print(sample)


def print_problems(problems: tuple[Any, ...], most: int = 10) -> None:
    """Rows that were left out, and why."""
    for problem in problems[:most]:
        show.err.print(f"left out: {problem}", markup=False)
    if len(problems) > most:
        show.err.print(f"... and {len(problems) - most} more")


def _watch(bar: show.Bar) -> Callbacks:
    """Print what happens, and move the bar."""

    def started(start: Start) -> None:
        print_start(start)
        bar.update(start.done, start.steps)

    def progress(p: Progress) -> None:
        bar.update(p.step, p.steps, f"loss {p.loss:.3f}, {p.tokens_per_second:,.0f} tokens/s")

    return Callbacks(started=started, progress=progress, evaluated=print_evaluation)


def print_evaluation(evaluation: Evaluation) -> None:
    """Held-out loss beside the same with wrong pictures and with none: who looks has a gap."""
    parts = [f"held-out loss {evaluation.eval_loss:.3f}"]
    if evaluation.eval_shuffled is not None:
        parts.append(f"{evaluation.eval_shuffled:.3f} with wrong pictures")
    if evaluation.eval_blind is not None:
        parts.append(f"{evaluation.eval_blind:.3f} without")
    show.err.print(f"step {evaluation.step}: {', '.join(parts)}")


def print_result(result: TrainResult) -> None:
    """Final loss and where the run is."""
    left_out = f", {len(result.problems)} rows left out" if result.problems else ""
    loss = f"last loss {result.last.loss:.3f}" if result.last else "nothing was left to do"
    show.out.print(
        f"{result.steps:,} steps on {result.rows:,} rows in {show.duration(result.seconds)}{left_out}; {loss}."
    )
    show.out.print(f"Run: {result.run_dir} (projector, metrics.jsonl, loss.png)")
