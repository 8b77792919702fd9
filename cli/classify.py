"""`llama3v-mlx classify`: SigLIP's own answer to "does this text fit this picture"."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Offline


def register(app: typer.Typer) -> None:
    app.command()(classify)


def classify(
    model: Annotated[str, typer.Option("--model", help="SigLIP checkpoint, or a model directory.", show_default=False)],
    image: Annotated[
        list[Path], typer.Option("--image", metavar="<path>", help="Picture; repeat for more.", show_default=False)
    ],
    text: Annotated[list[str], typer.Option("--text", help="Text to score; repeat for more.", show_default=False)],
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
    offline: Offline = False,
) -> None:
    """Print the sigmoid probability of each text for each picture. They need not add up to one.

    Example: `llama3v-mlx classify --model google/siglip-base-patch16-224 --image cat.jpg --text "a cat" --text "a dog"`
    """
    from mlx_llama3v.checkpoint import load_siglip
    from mlx_llama3v.hub import resolve
    from mlx_llama3v.score import probabilities

    siglip = load_siglip(resolve(model, offline=offline))
    scores = probabilities(siglip, image, text)
    if json:
        rows = [dict(zip(text, map(float, row), strict=True)) for row in scores]
        show.as_json([{"image": str(path), "probabilities": row} for path, row in zip(image, rows, strict=True)])
        return
    for path, row in zip(image, scores, strict=True):
        ranked = sorted(zip(row, text, strict=True), reverse=True)
        show.table(str(path), ["text", "probability"], [[name, f"{score:.4f}"] for score, name in ranked])
