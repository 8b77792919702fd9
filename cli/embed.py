"""`llama3v-mlx embed`: every picture through the frozen SigLIP, once, into a store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Config, MaxSlices, Model, Offline
from mlx_llama3v.stages import EmbedReport, embed_data


def register(app: typer.Typer) -> None:
    app.command()(embed)


def embed(
    model: Model,
    data: Annotated[
        Path,
        typer.Option("--data", help="LLaVA-format JSON or JSONL, or a folder of pictures.", show_default=False),
    ],
    output: Annotated[Path, typer.Option("--output", help="Store to fill; an existing one goes on.")] = Path("store"),
    image_folder: Annotated[Path | None, typer.Option("--image-folder", help="Where names in DATA start.")] = None,
    codec: Annotated[
        Literal["float16", "int8", "int4"],
        typer.Option("--codec", help="How embeddings are held: int8 is half of float16, int4 0.28 of it."),
    ] = "float16",
    pool: Annotated[
        int | None,
        typer.Option("--pool", min=1, help="Store the mean over N x N patches.", show_default=False),
    ] = None,
    after_projector: Annotated[
        Path | None,
        typer.Option("--after-projector", help="Run whose projector's output is stored instead, for stage sft."),
    ] = None,
    shard_size: Annotated[
        int, typer.Option("--shard-size", min=1, help="Megabytes a shard: what an interruption loses at most.")
    ] = 512,
    batch_size: Annotated[int, typer.Option("--batch-size", min=1, help="Slices a forward pass.")] = 16,
    workers: Annotated[int, typer.Option("--workers", min=1, help="Threads that open and cut pictures.")] = 2,
    max_slices: MaxSlices = None,
    offline: Offline = False,
    config: Config = None,
) -> None:
    """Encode every picture of a data set once. Interrupt it at any time; the same command goes on.

    Example: `llama3v-mlx embed --model my-model --data llava.json --image-folder images --output my-store`
    """
    with show.bar("embed", "images") as bar:
        report = embed_data(
            model,
            data,
            output,
            image_folder=image_folder,
            codec=codec,
            pool=pool,
            after_projector=after_projector,
            shard_bytes=shard_size << 20,
            batch_size=batch_size,
            workers=workers,
            max_slices=max_slices,
            offline=offline,
            progress=lambda p: bar.update(p.done, p.total, f"{p.slices:,} slices, {show.size(p.bytes)}"),
        )
    print_report(report)


def print_report(report: EmbedReport) -> None:
    """What was left out and why, and what the store holds now."""
    for problem in report.problems[:20]:
        show.err.print(f"left out: {problem}")
    if len(report.problems) > 20:
        show.err.print(
            f"... and {len(report.problems) - 20} more; pictures are listed in {report.store}/failures.jsonl"
        )
    summary, info = report.summary, report.info
    show.out.print(
        f"{summary.new:,} pictures encoded ({summary.slices:,} slices), {summary.reused:,} were there, "
        f"{summary.failed:,} could not be read, in {show.duration(summary.seconds)}."
    )
    show.out.print(f"Store: {report.store} ({info['images']:,} images, {show.size(info['bytes'])}, {info['codec']})")
