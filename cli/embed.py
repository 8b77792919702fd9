"""`llama3v-mlx embed`: every picture through the frozen SigLIP, once, into a store."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Config, MaxSlices, Model, Offline, settings_options
from mlx_llama3v.data.records import Problem
from mlx_llama3v.embeddings.codec import CODECS
from mlx_llama3v.embeddings.codec import DEFAULT as DEFAULT_CODEC
from mlx_llama3v.embeddings.damage import Losses
from mlx_llama3v.embeddings.embed import EmbedProgress
from mlx_llama3v.errors import DataError
from mlx_llama3v.estimate import Estimate
from mlx_llama3v.knob import knob
from mlx_llama3v.storing import EmbedReport, embed_data, estimate_data


@dataclass(frozen=True)
class Reading:
    """What `estimate_data` and `embed_data` both take: the fields are named as their arguments."""

    image_folder: Path | None = knob(None, "Where names in DATA start.")  # noqa: RUF009
    allow_outside: bool = knob(
        False, "Read pictures outside that folder, too (../, absolute, links).", flags=["--allow-outside"]
    )
    codec: str = knob(
        DEFAULT_CODEC, "How embeddings are held: int8 is half of float16, int4 0.28 of it.", choices=tuple(CODECS)
    )
    pool: int | None = knob(
        None, "Store the mean over N x N patches [default: the model's or that of --after-projector, mostly 1].", min=1
    )
    after_projector: Path | None = knob(  # noqa: RUF009
        None, "Run whose projector's output is stored instead, for stage sft."
    )
    batch_size: int = knob(16, "Slices a forward pass.", min=1)
    workers: int = knob(2, "Threads that open and cut pictures; each holds a whole one in memory.", min=1)


def register(app: typer.Typer) -> None:
    app.command()(embed)


@settings_options(Reading)
def embed(
    model: Model,
    data: Annotated[
        Path,
        typer.Option(
            "--data",
            help="LLaVA-format JSON or JSONL, a folder of pictures (with captions: a.txt beside a.jpg, metadata.jsonl "
            "or .csv), parquet (images + messages), a `save_to_disk` folder, or tar shards; a file, a folder or a "
            "pattern such as 'shard-{000..010}.tar'.",
            show_default=False,
        ),
    ],
    output: Annotated[Path, typer.Option("--output", help="Store to fill; an existing one goes on.")] = Path("store"),
    shard_size: Annotated[
        int,
        typer.Option(
            "--shard-size",
            min=1,
            help="Megabytes a shard at most. A kill loses no more than that, pictures under way included; before the "
            "first one also the sample that the codec was fitted to. Ctrl-C loses only what is under way.",
        ),
    ] = 512,
    max_slices: MaxSlices = None,
    estimate: Annotated[
        bool, typer.Option("--estimate", help="Only say what it would cost: slices, bytes, time, free disk.")
    ] = False,
    json: Annotated[bool, typer.Option("--json", help="With --estimate: print JSON and nothing else.")] = False,
    check_disk: Annotated[
        bool, typer.Option("--check-disk/--no-check-disk", help="Refuse to start what the disk cannot hold.")
    ] = True,
    strict: Annotated[bool, typer.Option("--strict", help="Exit with 1 where anything could not be read.")] = False,
    offline: Offline = False,
    config: Config = None,
    **settings: Any,
) -> None:
    """Encode every picture of a data set once. Interrupt it at any time; the same command goes on.

    Example: `llama3v-mlx embed --model my-model --data llava.json --image-folder images --output my-store`
    """
    settings |= {"max_slices": max_slices, "offline": offline}
    if estimate:
        _estimate(model, data, output, settings, json, strict)
        return
    if json:
        raise DataError("--json belongs to --estimate; `llama3v-mlx store info --json` describes the store itself.")
    settings |= {"check_disk": check_disk, "shard_bytes": shard_size << 20}
    losses = Losses(show.warn)
    with show.bar("embed", "images") as bar:
        settings["progress"] = lambda p: bar.update(p.done, p.total, _note(p))
        report = embed_data(model, data, output, **settings, losses=losses)
    print_report(report)
    done = report.summary
    if done.failed and not (done.new or done.duplicates or done.reused):
        raise DataError(f"not one picture of {data} could be read; --image-folder says where their names start.")
    _check_all_read(strict, len(report.problems), "could not be read")
    if strict and report.damage:
        raise DataError(
            f"{show.plural(len(report.damage), 'damaged shard')} of {output}; --strict makes that an error."
        )


def _estimate(model: str, data: Path, output: Path, settings: dict[str, Any], json: bool, strict: bool) -> None:
    """Say what `embed` would cost."""
    with show.bar("scan", "images") as bar:
        found = estimate_data(model, data, output, **settings, progress=lambda done, total: bar.update(done, total, ""))
    if json:
        show.as_json(found.to_dict())
    else:
        print_estimate(found, output)
    _check_all_read(strict, len(found.problems), "would be left out")


def _note(progress: EmbedProgress) -> str:
    """Slices and bytes so far, their rate, and whether the encoder has to wait for pictures."""
    if progress.before:
        return progress.before
    seconds = max(progress.seconds, 1e-9)
    return (
        f"{progress.slices / seconds:,.1f} slices/s, {show.size(progress.bytes)}, "
        f"{progress.waiting_seconds / seconds:.0%} waiting for pictures"
    )


def _check_all_read(strict: bool, count: int, what: str) -> None:
    """Raises DataError, for an exit status of 1, where --strict was given and something was left out."""
    if strict and count:
        raise DataError(f"{count:,} pictures or records {what}; --strict makes that an error.")


def print_estimate(found: Estimate, store: Path) -> None:
    """The whole answer as two tables."""
    _print_problems(found.problems, "")
    for sentence in found.damage:
        show.err.print(f"{sentence}; its pictures count as not stored.")
    volume, speed = found.volume, found.speed
    rate = f" ({1 / speed.slice_seconds:,.1f} slices/s, {speed.slices} timed)" if speed.slices else ""
    rows = [
        ["pictures to encode (by name)", f"{volume.pictures:,}"],
        ["in the store already", f"{found.reused:,}"],
        ["unreadable", f"{len(found.unreadable):,}"],
        [f"slices (--max-slices {found.max_slices})", f"{volume.slices:,}"],
        ["tokens (patches of the tower)", f"{volume.patches:,}"],
        ["tokens as stored", f"{volume.rows:,}"],
        ["time on this device", f"{show.duration(found.seconds)}{rate}" if speed.slices else "not measured"],
        ["free disk", show.size(found.free)],
    ]
    show.table(f"embed --output {store}", ["", ""], rows)
    fits = {True: "fits", False: "does not fit"}
    sizes = [[name, show.size(size), fits[size <= found.free]] for name, size in volume.bytes.items()]
    show.table("store", ["codec", "bytes", ""], sizes)
    show.out.print("Equal files under several names are stored once, but counted each: contents were not compared.")
    if volume.bytes[found.codec] > found.free:
        show.out.print(f"{found.codec} does not fit; {found.advice or 'nothing'} would.")


def _print_problems(problems: Sequence[Problem], where: str, most: int = 20) -> None:
    for problem in problems[:most]:
        show.err.print(f"left out: {problem}")
    if len(problems) > most:
        show.err.print(f"... and {len(problems) - most:,} more{where}")


def print_report(report: EmbedReport) -> None:
    """What was left out and why, and what the store holds now."""
    _print_problems(report.problems, f"; pictures are listed in {report.store}/failures.jsonl")
    show.lost(report.store, report.lost)
    summary, info = report.summary, report.info
    copies = f"{summary.duplicates:,} are copies of others, " if summary.duplicates else ""
    show.out.print(
        f"{summary.new:,} pictures encoded ({summary.slices:,} slices), {summary.reused:,} were there, "
        f"{copies}{summary.failed:,} could not be read, in {show.duration(summary.seconds)}."
    )
    found = report.to_dict()
    if summary.slices:
        show.out.print(
            f"{found['slices_per_second']:,.1f} slices/s, {found['images_per_second']:,.1f} images/s, "
            f"{found['waiting_share']:.0%} of the time waiting for pictures, {found['padding_share']:.0%} padding, "
            f"peak memory {show.size(found['peak_memory'])}."
        )
    show.out.print(f"Store: {report.store} ({info['images']:,} images, {show.size(info['bytes'])}, {info['codec']})")
