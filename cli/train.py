"""`llama3v-mlx train`: one stage of the recipe on stored embeddings."""

from __future__ import annotations

import json
import math
import os
import shlex
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.text import Text

from mlx_llama3v.ahead import AheadConfig
from mlx_llama3v.cli import show
from mlx_llama3v.cli.interrupt import interruptible
from mlx_llama3v.cli.options import (
    Offline,
    TrainConfigFile,
    byte_count,
    given,
    settings_options,
    split_settings,
    warn_decoder,
)
from mlx_llama3v.embeddings.codec import CODECS
from mlx_llama3v.embeddings.codec import DEFAULT as DEFAULT_CODEC
from mlx_llama3v.embeddings.store import MANIFEST, Manifest
from mlx_llama3v.errors import RunError
from mlx_llama3v.hub import resolve
from mlx_llama3v.knob import knob
from mlx_llama3v.stages import train_stage
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks, Evaluation, Progress, Skipped, Start
from mlx_llama3v.train.trainer import TrainResult

# What stage sft takes over from the run that trained its projector, beside the model and the store.
INHERITED = ("max_seq_length", "long_rows", "pack", "seed", "val_split", "val_rows", "grad_checkpoint")
AHEAD = ("codec", "pool", "max_slices")  # and with --embed-ahead, which makes no store to take over
COLOURS = {"prompt": "dim", "target": "bold green", "marker": "magenta", "visual": "cyan"}
Data = Annotated[
    Path,
    typer.Option(
        "--data",
        help="What `embed` was given: LLaVA-format JSON or JSONL, a folder of captioned pictures, parquet, a "
        "save_to_disk folder, tar shards.",
        show_default=False,
    ),
]


@dataclass(frozen=True)
class Embedding:
    """A run that encodes its pictures itself, in place of a store."""

    image_folder: Path | None = knob(None, "With --embed-ahead: where names in DATA start.")  # noqa: RUF009
    embed_ahead: bool = knob(
        False,
        "No store: a second process encodes what is read next, and drops it after.",
        flags=["--embed-ahead"],
    )
    store_budget: str = knob("50GB", "Disk that --embed-ahead may use, as 50GB or 800MB.")
    codec: str = knob(DEFAULT_CODEC, "How --embed-ahead holds embeddings.", choices=tuple(CODECS))
    pool: int | None = knob(None, "With --embed-ahead: hold the mean over N x N patches, as `embed` does.", min=1)
    max_slices: int | None = knob(None, "With --embed-ahead: slices beside the overview; 0: none.", min=0)

    def ahead(self, model: str, offline: bool) -> AheadConfig | None:
        """Its configuration; None for a run on a store."""
        if not self.embed_ahead:
            return None
        budget = byte_count(self.store_budget)
        return AheadConfig(model, budget, self.codec, self.pool, max_slices=self.max_slices, offline=offline)


def register(app: typer.Typer) -> None:
    app.command()(train)


@settings_options(TrainConfig)
@settings_options(Embedding)
def train(
    ctx: typer.Context,
    data: Data,
    output: Annotated[Path, typer.Option("--output", help="Run directory to write.", show_default=False)],
    model: Annotated[
        str,
        typer.Option("--model", help="Model directory or Hub id [default: that of --projector].", show_default=False),
    ] = "",
    embeddings: Annotated[
        Path | None,
        typer.Option(
            "--embeddings",
            help="Store (from `embed`) [default: that of --projector]; text alone needs none.",
            show_default=False,
        ),
    ] = None,
    projector: Annotated[
        Path | None,
        typer.Option(
            "--projector",
            help="Run (or file) to take the projector from; sft needs one, unless the model's is trained.",
        ),
    ] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Go on from the newest checkpoint of --output.")] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check all data and show what would be trained; write nothing.")
    ] = False,
    offline: Offline = False,
    config: TrainConfigFile = None,
    **settings: Any,
) -> None:
    """Train the projector (stage pretrain) or the decoder (stage sft); the rest stays frozen.

    Example: `llama3v-mlx train --model my-model --data captions.json --embeddings my-store --output runs/pretrain`
    """
    before = _before(projector)
    embedding, wanted = _settled(ctx, settings, _inherited(before, settings))
    model, embeddings = _sources(model, embeddings, before, embedding.embed_ahead)
    _compare_slices(before, embeddings)
    ahead = embedding.ahead(model, offline)
    if projector is not None:
        warn_decoder(resolve(model, offline=offline), projector)
    with show.bar(wanted.stage, "steps") as bar, interruptible(_stopping) as stop:
        result = train_stage(
            model,
            data,
            output / "ahead" if ahead is not None else embeddings,
            output,
            wanted,
            projector=projector,
            ahead=ahead,
            image_folder=embedding.image_folder,
            resume=resume,
            offline=offline,
            callbacks=_watch(bar, stop, wanted.val_split, resume),
            dry_run=dry_run,
        )
    _say(result, dry_run)


def _say(result: TrainResult, dry_run: bool) -> None:
    """How it ended; an interrupted run ends the command with status 130."""
    print_problems(result.unseen)
    if dry_run:
        left_out = f" ({show.plural(len(result.problems), 'row')} left out)" if result.problems else ""
        rows = f"{show.plural(result.rows, 'row')}{left_out}"
        show.out.print(f"{show.plural(result.steps, 'step')} on {rows} would be trained; nothing was written.")
    elif result.stopped is not None:
        again = [word for word in sys.argv[1:] if word != "--resume"]
        how, launcher = ("", "")
        if "MLX_RANK" in os.environ:
            how, launcher = " (mlx.launch with its options as before)", "mlx.launch ... -- "
        show.out.print(f"Stopped after step {result.stopped:,}, which is saved. Go on with{how}:")
        show.out.print(f"{launcher}llama3v-mlx {shlex.join([*again, '--resume'])}")
        raise typer.Exit(130)
    else:
        print_result(result)


def _before(projector: Path | None) -> dict[str, Any]:
    """config.json of the run that a projector is taken from; nothing where it is a bare file."""
    file = projector / "config.json" if projector is not None else None
    if file is None or not file.is_file():
        return {}
    try:
        values: dict[str, Any] = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunError(f"{file} is damaged: {error}.") from error
    return values


def _inherited(before: dict[str, Any], settings: dict[str, Any]) -> dict[str, Any]:
    """What stage sft may take over from the run before, by option."""
    if settings["stage"] != "sft":
        return {}
    held = before.get("store", {}) if settings["embed_ahead"] else {}
    made = {**held, "pool": held.get("post", {}).get("pool"), **(held.get("tiling") or {})}
    return before.get("train", {}) | {key: made[key] for key in AHEAD if made.get(key) is not None}


def _compare_slices(before: dict[str, Any], embeddings: Path | None) -> None:
    """Say where a projector meets pictures in more or fewer slices than it learned from."""
    learned = (before.get("store", {}).get("tiling") or {}).get("max_slices")
    if learned is None or embeddings is None or not (embeddings / MANIFEST).is_file():
        return
    held = Manifest.read(embeddings).fingerprint.get("tiling", {}).get("max_slices", learned)
    if held != learned:
        show.err.print(f"{embeddings} holds up to {held} slices beside the overview; the pretrain run had {learned}")


def _sources(model: str, embeddings: Path | None, before: dict[str, Any], embed_ahead: bool) -> tuple[str, Path | None]:
    """Model and store, where not given those of the run before; no store with `embed_ahead`. Raises RunError."""
    model = model or before.get("model_path", "")
    held = before.get("store", {}).get("path")
    if embeddings is None and not embed_ahead and held:
        embeddings = Path(held)
    if not model:
        raise RunError("give the model directory with --model.")
    if embed_ahead and embeddings is not None:
        raise RunError("give either --embeddings STORE, or --embed-ahead to embed while training.")
    return model, embeddings


def _settled(ctx: typer.Context, settings: dict[str, Any], before: dict[str, Any]) -> list[Any]:
    """Embedding and TrainConfig as the options and the run before have it."""
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in settings.items()}
    asked = given(ctx)
    _check_used(values, before, asked)
    _inherit(values, before, asked)
    return split_settings(values, Embedding, TrainConfig)


def _check_used(values: dict[str, Any], before: dict[str, Any], asked: set[str]) -> None:
    """Refuse options that would have no effect: a forgotten --stage sft would train something else for hours.

    Raises RunError.
    """
    lora = ("lora_rank", "lora_scale", "lora_dropout", "lora_layers", "lora_keys")
    pretrain, added = values["stage"] == "pretrain", bool(values["rows_per_step"])
    compiled = TrainConfig(compile=values["compile"]).resolved().compile
    evaluated = values["val_split"] or before.get("val_split") or "val_split" in asked  # switched off in a preset: 0
    for unused, names, why in (
        (
            pretrain,
            ("tune", *lora, "projector_learning_rate"),
            "stage pretrain trains the projector alone; expected --stage sft",
        ),
        (values["tune"] == "full", lora, "--tune full has no low-rank matrices"),
        (
            not values["tune_projector"],
            ("projector_learning_rate",),
            "the projector is frozen; expected --tune-projector",
        ),
        (
            not values["embed_ahead"],
            ("codec", "store_budget", "pool", "max_slices", "image_folder"),
            "a store has these of its own; expected --embed-ahead",
        ),
        (not evaluated, ("steps_per_eval", "val_rows"), "no rows are held out; expected --val-split"),
        (
            values["lanes"] > 1 and bool(values["lora_dropout"] or compiled),
            ("lanes",),
            "dropout and a compiled step (the default on Metal) keep to one",
        ),
        (added, ("grad_accumulation_steps",), "rows_per_step says how much is added up (0: leave it to the other)"),
    ):
        if unused and (found := [f"--{name.replace('_', '-')}" for name in names if name in asked]):
            raise RunError(f"{', '.join(found)} would have no effect: {why}.")


def _inherit(values: dict[str, Any], before: dict[str, Any], asked: set[str]) -> None:
    """Take over what the run before had, unless it was given, and say so. Changes `values`."""
    for name in (*INHERITED, *AHEAD):
        if name not in before or before[name] == values[name]:
            continue
        if name == "grad_checkpoint" and values["lora_dropout"]:  # do not go together
            continue
        if name in asked:
            show.err.print(f"{name} is {values[name]}; the pretrain run had {before[name]}")
        else:
            values[name] = before[name]
            show.err.print(f"{name} is {before[name]}, as in the pretrain run")


def _stopping() -> None:
    show.err.print("stopping after this step; press Ctrl-C again to stop at once")


def print_start(start: Start) -> None:
    """What will be trained on what, and one row as the model will see it, its targets in green."""
    print_problems(start.problems)
    for problem in start.shortened[:10]:
        show.err.print(f"shortened: {problem}")
    if len(start.shortened) > 10:
        show.err.print(f"... and {len(start.shortened) - 10} more")
    limit = f"about {show.size(start.memory)} of the {show.size(start.memory_limit)} here"
    show.err.print(f"a step on the longest rows takes {limit}")
    learned = start.trainable
    show.err.print(
        f"{start.rows:,} rows (none over {start.longest} tokens), {start.held_out} held out; "
        f"{show.plural(start.steps, 'step')} of {start.batches_per_step} x {start.batch_size} rows"
        f"{f', {start.done:,} of them done' if start.done else ''}"
    )
    made = start.batches_per_step * start.batch_size
    if made > start.rows:
        show.err.print(f"a step takes {made} rows, more than there are: with fewer there would be more steps")
    if start.rows_per_step not in (0, made):
        show.err.print(f"{start.rows_per_step} rows a step make no equal batches, so there are {made}")
    show.err.print(f"training {learned.count:,} of {learned.total:,} parameters ({', '.join(learned.parts)})")
    count = {kind: sum(n for _, k, n in start.sample if k == kind) for kind in ("visual", "target")}
    sample = Text(f"first row ({count['visual']} visual tokens, {count['target']} targets): ")
    for text, kind, _ in start.sample:
        sample.append(text.replace("\n", "\\n"), style=COLOURS[kind])
    show.err.print(sample)


def print_problems(problems: tuple[Any, ...], most: int = 10) -> None:
    """Rows that were left out, and why."""
    for problem in problems[:most]:
        show.err.print(f"left out: {problem}")
    if len(problems) > most:
        show.err.print(f"... and {len(problems) - most} more")


def _watch(bar: show.Bar, stop: Callable[[], bool], val_split: float, resume: bool) -> Callbacks:
    """Print what happens, and move the bar."""

    def started(start: Start) -> None:
        print_start(start)
        if resume and not start.done:
            show.err.print("there is no checkpoint to go on from yet, so this begins with step 1")
        if val_split and not start.held_out:
            why = f"val_split {val_split:g} leaves none beside {show.plural(start.rows, 'row')}"
            show.err.print(f"no row is held out, so nothing is evaluated: {why}")
        bar.begin(start.done, start.steps)

    def progress(p: Progress) -> None:
        rates = f"{p.tokens_per_second:,.0f} tokens/s, {p.images_per_second:,.1f} images/s"
        bar.update(p.step, p.steps, f"loss {p.loss:.3f}, {rates}, {show.size(p.peak_memory)}")

    def skipped(event: Skipped) -> None:
        show.err.print(f"step {event.step} was skipped, it is not a number: rows {', '.join(event.skipped_rows)}")

    return Callbacks(started=started, progress=progress, evaluated=print_evaluation, skipped=skipped, stop=stop)


def print_evaluation(evaluation: Evaluation) -> None:
    """Held-out loss beside the same with wrong pictures and with none: who looks has a gap."""
    if not math.isfinite(evaluation.eval_loss):
        show.err.print(f"step {evaluation.step}: the held-out loss is no number; the weights may be damaged")
        return
    parts = [f"held-out loss {evaluation.eval_loss:.3f}"]
    if evaluation.eval_right is not None:
        parts.append(f"{evaluation.eval_right:.3f} where wrong pictures fit")
    if evaluation.eval_shuffled is not None:
        parts.append(f"{evaluation.eval_shuffled:.3f} with wrong pictures")
    if evaluation.eval_blind is not None:
        parts.append(f"{evaluation.eval_blind:.3f} without")
    show.err.print(f"step {evaluation.step}: {', '.join(parts)}")
    if not evaluation.looks and (gap := evaluation.gap) is not None:
        how = f"grows by {gap:.4f} only" if gap >= 0 else f"is {-gap:.4f} lower"
        show.err.print(f"  the pictures do not help yet: without the right ones the loss {how}")


def print_result(result: TrainResult) -> None:
    """Final loss and where the run is."""
    rows = len(result.problems) + len(result.unseen)
    left_out = f", {show.plural(rows, 'row')} left out" if rows else ""
    if result.skipped:
        left_out += f", {show.plural(result.skipped, 'step')} skipped"
    none = "every step that was left was skipped" if result.skipped else "nothing was left to do"
    loss = f"last loss {result.last.loss:.3f}" if result.last else none
    padding = f", {result.last.padding:.1%} padding" if result.last else ""
    show.out.print(
        f"{show.plural(result.steps, 'step')} on {show.plural(result.rows, 'row')} in {show.duration(result.seconds)}"
        f"{left_out}; {loss}{padding}."
    )
    show.out.print(f"Run: {result.run_dir} ({', '.join(written(result))}, metrics.jsonl, loss.png)")


def written(result: TrainResult) -> list[str]:
    """The weights of a run, in words: what learned first."""
    if result.trainable.adapter_config is None:
        return ["projector"]
    learned = any(name.startswith("projector.") for name in result.trainable.shapes)
    kind = result.trainable.adapter_config["fine_tune_type"]
    return [
        "adapters: the whole decoder" if kind == "full" else f"adapters ({kind})",
        "projector" if learned else "projector as it was",
    ]
