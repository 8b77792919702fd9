"""`llama3v-mlx convert`: two Hugging Face checkpoints -> one model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import MaxSlices, Offline, tiling
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.weights.convert import ConvertReport, QuantConfig
from mlx_llama3v.weights.convert import convert as convert_checkpoints


def register(app: typer.Typer) -> None:
    app.command()(convert)


def convert(
    vision: Annotated[str, typer.Option("--vision", help="SigLIP: directory or Hub id.", show_default=False)],
    llm: Annotated[str, typer.Option("--llm", help="Llama-3, 3.1 or 3.2: directory or Hub id.", show_default=False)],
    mlx_path: Annotated[Path, typer.Option("--mlx-path", help="Model directory to write.")] = Path("mlx_model"),
    projector: Annotated[str, typer.Option("--projector", help="attention, linear or mlp.")] = "attention",
    quantize: Annotated[bool, typer.Option("-q", "--quantize", help="Quantize the decoder.")] = False,
    q_bits: Annotated[int, typer.Option("--q-bits", help="Bits per weight.")] = 4,
    q_group_size: Annotated[int, typer.Option("--q-group-size", help="Weights that share a scale.")] = 64,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: as stored.")
    ] = None,
    max_slices: MaxSlices = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the fresh projector.")] = 0,
    offline: Offline = False,
) -> None:
    """Join a SigLIP and a Llama-3 checkpoint in a model directory with a fresh projector.

    Example: `llama3v-mlx convert --vision google/siglip-so400m-patch14-384 --llm meta-llama/Llama-3.2-1B-Instruct -q`
    """
    with show.bar("convert", "MB") as bar:
        report = convert_checkpoints(
            vision,
            llm,
            mlx_path,
            projector=projector,
            tiling=tiling(TilingConfig(), max_slices),
            quantize=QuantConfig(q_bits, q_group_size) if quantize else None,
            dtype=dtype,
            seed=seed,
            offline=offline,
            progress=lambda done, total: bar.update(done // 10**6, total // 10**6),
        )
    print_report(report)


def print_report(report: ConvertReport) -> None:
    """Sizes by part, what was quantized, and where the model is."""
    rows = [[part, f"{report.parameters[part]:,}", show.size(size)] for part, size in report.bytes.items()]
    show.table("parts", ["part", "parameters", "size"], rows)
    if report.layers:
        left = [layer.name for layer in report.layers if layer.bits is None]
        show.table(
            "quantization",
            ["layer", "bits", "size"],
            [[layer.name, str(layer.bits or "-"), show.size(layer.bytes)] for layer in report.layers],
        )
        kept = f"; {len(left)} layers kept their precision" if left else ""
        show.out.print(f"{len(report.quantized)} layers quantized, {report.bits_per_weight:.2f} bits per weight{kept}.")
    show.out.print(f"Model directory: {report.path}")
