"""`llama3v-mlx convert`: two Hugging Face checkpoints -> one model directory."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import MaxSlices, Offline, tiling
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.weights.convert import ConvertReport, Plan, plan
from mlx_llama3v.weights.convert import convert as convert_checkpoints
from mlx_llama3v.weights.quantize import BITS, RECIPES, QuantConfig, listed
from mlx_llama3v.weights.vlm import convert_vlm, plan_vlm


def register(app: typer.Typer) -> None:
    app.command()(convert)


def convert(
    vision: Annotated[
        str | None, typer.Option("--vision", help="SigLIP: directory or Hub id.", show_default=False)
    ] = None,
    llm: Annotated[
        str | None, typer.Option("--llm", help="Llama-3, 3.1 or 3.2: directory or Hub id.", show_default=False)
    ] = None,
    hf_path: Annotated[
        str | None,
        typer.Option(
            "--hf-path", help="A finished SigLIP + Llama-3 model instead: directory or Hub id.", show_default=False
        ),
    ] = None,
    mlx_path: Annotated[Path, typer.Option("--mlx-path", help="Model directory to write.")] = Path("mlx_model"),
    projector: Annotated[
        str,
        typer.Option(
            "--projector",
            help="attention, linear or mlp; or a trained one: the .safetensors file of a LLaVA projector.",
        ),
    ] = "attention",
    quantize: Annotated[bool, typer.Option("-q", "--quantize", help="Quantize the decoder.")] = False,
    q_bits: Annotated[int, typer.Option("--q-bits", help=f"Bits per weight: {listed(BITS)}.")] = 4,
    q_group_size: Annotated[
        int | None,
        typer.Option("--q-group-size", help="Weights that share a scale; default 64, mxfp4: 32.", show_default=False),
    ] = None,
    q_mode: Annotated[str, typer.Option("--q-mode", help="affine or mxfp4.")] = "affine",
    quant_predicate: Annotated[
        str | None,
        typer.Option("--quant-predicate", help=f"Mixed bits: {', '.join(RECIPES)}.", show_default=False),
    ] = None,
    q_vision: Annotated[bool, typer.Option("--q-vision", help="Quantize the blocks of the tower, too.")] = False,
    dtype: Annotated[
        str | None, typer.Option("--dtype", help="float32, float16 or bfloat16; default: as stored.")
    ] = None,
    max_slices: MaxSlices = None,
    seed: Annotated[int, typer.Option("--seed", help="Seed of the fresh projector.")] = 0,
    prompt_layout: Annotated[
        str | None,
        typer.Option(
            "--prompt-layout", help="Of a trained model: another prompt than the checkpoint's.", show_default=False
        ),
    ] = None,
    vision_mode: Annotated[
        str | None,
        typer.Option(
            "--vision-mode", help="With --hf-path, MiniCPM-V 2.5: strip (as published) or strip-2d.", show_default=False
        ),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show family, names, what does not fit, and sizes; write nothing.")
    ] = False,
    offline: Offline = False,
) -> None:
    """Join a SigLIP and a Llama-3 checkpoint in a model directory with a fresh projector, or convert a finished model.

    Example: `llama3v-mlx convert --vision google/siglip-so400m-patch14-384 --llm meta-llama/Llama-3.2-1B-Instruct -q`,
    or `llama3v-mlx convert --hf-path TIGER-Lab/Mantis-8B-siglip-llama3 -q`
    """
    group = q_group_size or (32 if q_mode == "mxfp4" else 64)
    if not quantize and (quant_predicate or q_vision):
        raise CheckpointError("--quant-predicate and --q-vision say how to quantize; expected -q with them.")
    quant = QuantConfig(q_bits, group, q_mode, quant_predicate, q_vision) if quantize else None
    if hf_path is not None:
        if vision is not None or llm is not None:
            raise CheckpointError("--hf-path is a whole model; leave --vision and --llm out.")
        options: dict[str, Any] = {
            "quantize": quant,
            "dtype": dtype,
            "prompt_layout": prompt_layout,
            "vision_mode": vision_mode,
            "offline": offline,
        }
        _finished(hf_path, mlx_path, dry_run, options)
        return
    if vision is None or llm is None:
        raise CheckpointError("expected --vision and --llm, or --hf-path for a finished model.")
    if vision_mode:
        raise CheckpointError("--vision-mode goes with --hf-path only.")
    parts: dict[str, Any] = {
        "projector": projector,
        "tiling": None if max_slices is None else tiling(TilingConfig(), max_slices),
        "quantize": quant,
        "dtype": dtype,
        "prompt_layout": prompt_layout,
        "offline": offline,
    }
    if dry_run:
        print_plan(plan(vision, llm, **parts))
        return
    with show.bar("convert", "MB") as bar:
        report = convert_checkpoints(
            vision,
            llm,
            mlx_path,
            seed=seed,
            progress=lambda done, total: bar.update(done // 10**6, total // 10**6),
            **parts,
        )
    print_report(report)


def _finished(hf_path: str, mlx_path: Path, dry_run: bool, options: dict[str, Any]) -> None:
    """Convert a finished model, or say what that would do."""
    if dry_run:
        print_plan(plan_vlm(hf_path, **options))
        return
    with show.bar("convert", "MB") as bar:
        report = convert_vlm(
            hf_path,
            mlx_path,
            progress=lambda done, total: bar.update(done // 10**6, total // 10**6),
            **options,
        )
    show.out.print(f"{report.config.sources['family']}, prompt layout {report.config.prompt_layout.name}.")
    print_report(report)


def print_plan(found: Plan) -> None:
    """Family, every rename, what is left over or missing, and sizes."""
    show.table("tensors", ["theirs", "ours"], [[a, b] for a, b in found.renamed.names.items()])
    for title, names in (
        ("not used", found.renamed.skipped),
        ("left over", found.renamed.unknown),
        ("problem", found.problems),
    ):
        for name in names:
            show.out.print(f"{title}: {name}")
    config = found.config
    show.out.print(
        f"Family: {found.name} ({found.title}); prompt layout {config.prompt_layout.name}; "
        f"projector {config.projector_config.kind}; feature layer {config.vision_feature_layer}."
    )
    fits = "fits" if not found.problems and not found.renamed.unknown else "does not fit"
    show.out.print(
        f"{len(found.renamed.names)} tensors renamed, {len(found.renamed.skipped)} not used, "
        f"{len(found.renamed.unknown)} left over, {len(found.problems)} problems: it {fits}; "
        f"{show.size(found.bytes_before)} before, {show.size(found.bytes_after)} after. Nothing was written."
    )


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
    if report.probe:
        show.out.print(
            f"On a probe sentence the logits moved by {report.probe.change:.1%} of their spread; "
            f"the likeliest token stayed at {report.probe.agreement:.0%} of the positions."
        )
    show.out.print(f"Model directory: {report.path}")
    show.leftovers(report.path)
