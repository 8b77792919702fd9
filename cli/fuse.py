"""`llama3v-mlx fuse`: what a run trained, merged into a model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Model, Offline, warn_decoder


def register(app: typer.Typer) -> None:
    app.command()(fuse)


def fuse(
    model: Model,
    run: Annotated[Path, typer.Option("--run", help="Run directory (from `train`) to merge in.", show_default=False)],
    output: Annotated[
        Path, typer.Option("--output", "-o", "--save-path", help="Model directory to write.", show_default=False)
    ],
    dequantize: Annotated[
        bool,
        typer.Option(
            "--dequantize", help="Write a quantized model at full precision, so that nothing is rounded again."
        ),
    ] = False,
    offline: Offline = False,
) -> None:
    """Merge a run into a model directory: `--model OUTPUT` then stands for `--model MODEL --run RUN`.

    A quantized decoder stays quantized: all weights of the layers that the run adapted are rounded again, so it answers
    otherwise than the run does, unless with --dequantize.

    Example: `llama3v-mlx fuse --model my-model --run runs/sft --output my-tuned-model`
    """
    from mlx_llama3v.hub import resolve
    from mlx_llama3v.weights.fuse import fuse as merge

    path = resolve(model, offline=offline)
    warn_decoder(path, run)
    written = merge(path, run, output, dequantize=dequantize)
    show.out.print(f"Model directory: {written}")
    show.leftovers(written)
