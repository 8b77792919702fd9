"""`llama3v-mlx convert`: two Hugging Face checkpoints -> one model directory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, Any

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import MaxSlices, Offline, given, settings_options, split_settings, tiling
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.knob import knob
from mlx_llama3v.weights.convert import ConvertReport, Plan, open_parts, plan
from mlx_llama3v.weights.convert import convert as convert_checkpoints
from mlx_llama3v.weights.quantize import QuantConfig
from mlx_llama3v.weights.storage import Storage
from mlx_llama3v.weights.vlm import convert_vlm, open_vlm, plan_vlm


@dataclass(frozen=True)
class Making:
    """How the directory is made, beside the checkpoints and the quantization."""

    projector: str = knob(
        "attention", "attention, linear or mlp; or a trained one: the .safetensors file of a LLaVA projector."
    )
    tiling: str = knob(
        "uhd",
        "Pictures of a model to be trained. uhd: in their own shape, large ones split; squash: one square, as the "
        "formats of `export` see them.",
        choices=("uhd", "squash"),
    )
    dtype: str | None = knob(
        None,
        "float32, float16 or bfloat16; default: as stored, but 16 bit at most for tower and trained projector "
        "beside a decoder of 16 bit or fewer.",
    )
    seed: int = knob(0, "Seed of the fresh projector.")
    prompt_layout: str | None = knob(None, "Of a trained model: another prompt than the checkpoint's.")
    vision_mode: str | None = knob(None, "With --hf-path, MiniCPM-V 2.5: strip (as published) or strip-2d.")


def register(app: typer.Typer) -> None:
    app.command()(convert)


@settings_options(QuantConfig)
@settings_options(Making)
def convert(
    ctx: typer.Context,
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
    mlx_path: Annotated[
        Path, typer.Option("--mlx-path", help="Model directory to write; one of the same checkpoints is replaced.")
    ] = Path("mlx_model"),
    quantize: Annotated[bool, typer.Option("-q", "--quantize", help="Quantize the decoder.")] = False,
    max_slices: MaxSlices = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show family, names, what does not fit, and sizes; write nothing.")
    ] = False,
    offline: Offline = False,
    **settings: Any,
) -> None:
    """Join a SigLIP and a Llama-3 checkpoint in a model directory with a fresh projector, or convert a finished model.

    Example: `llama3v-mlx convert --vision google/siglip-so400m-patch14-384 --llm meta-llama/Llama-3.2-1B-Instruct -q`,
    or `llama3v-mlx convert --hf-path TIGER-Lab/Mantis-8B-siglip-llama3 -q`
    """
    _check_given(given(ctx), quantize, whole=hf_path is not None)
    quant = split_settings(settings, QuantConfig)[0] if quantize else None
    (making,) = split_settings(settings, Making)
    if hf_path is not None:
        if vision is not None or llm is not None:
            raise CheckpointError("--hf-path is a whole model; leave --vision and --llm out.")
        _finished(hf_path, mlx_path, making, quant, dry_run, offline)
        return
    if vision is None or llm is None:
        raise CheckpointError("expected --vision and --llm, or --hf-path for a finished model.")
    if making.vision_mode:
        raise CheckpointError("--vision-mode goes with --hf-path only.")
    if making.tiling == "squash" and max_slices:
        raise CheckpointError("--tiling squash makes no slices; leave --max-slices out.")
    slices = None if max_slices is None else tiling(TilingConfig(), max_slices)
    if making.tiling == "squash":
        slices = TilingConfig("squash", 0)
    _joined(vision, llm, mlx_path, making, slices, quant, dry_run, offline)


def _check_given(asked: set[str], quantize: bool, whole: bool) -> None:
    """Refuse what would have no effect. Raises CheckpointError."""
    how = {f.name: f.metadata["flags"][0] for f in fields(QuantConfig)}
    if not quantize and (unused := [flag for name, flag in how.items() if name in asked]):
        raise CheckpointError(f"{' and '.join(unused)} say how to quantize; expected -q with them.")
    if {"recipe", "bits"} <= asked:
        raise CheckpointError("--quant-predicate has bits of its own; leave --q-bits out.")
    fresh = {"projector": "--projector", "seed": "--seed", "max_slices": "--max-slices", "tiling": "--tiling"}
    if whole and (unused := [flag for name, flag in fresh.items() if name in asked]):
        raise CheckpointError(
            f"{' and '.join(unused)} go with --vision and --llm; --hf-path has a projector and tiling."
        )


def _joined(
    vision: str,
    llm: str,
    mlx_path: Path,
    making: Making,
    slices: TilingConfig | None,
    quant: QuantConfig | None,
    dry_run: bool,
    offline: bool,
) -> None:
    """Join two models, or say what that would do."""
    parts: dict[str, Any] = {
        "projector": making.projector,
        "tiling": slices,
        "prompt_layout": making.prompt_layout,
        "offline": offline,
    }
    if dry_run:
        print_plan(plan(open_parts(vision, llm, Storage(quant, making.dtype), **parts)))
        return
    stored: dict[str, Any] = {"quantize": quant, "dtype": making.dtype, "seed": making.seed}
    with show.bar("convert", "MB") as bar:
        report = convert_checkpoints(vision, llm, mlx_path, progress=megabytes(bar), **stored, **parts)
    print_report(report)


def megabytes(bar: show.Bar) -> Callable[[int, int], None]:
    """A conversion's progress on a bar."""
    return lambda done, total: bar.update(done // 10**6, total // 10**6)


def _finished(
    hf_path: str, mlx_path: Path, making: Making, quant: QuantConfig | None, dry_run: bool, offline: bool
) -> None:
    """Convert a finished model, or say what that would do."""
    whole: dict[str, Any] = {
        "prompt_layout": making.prompt_layout,
        "vision_mode": making.vision_mode,
        "offline": offline,
    }
    if dry_run:
        print_plan(plan_vlm(open_vlm(hf_path, Storage(quant, making.dtype), **whole)))
        return
    with show.bar("convert", "MB") as bar:
        report = convert_vlm(hf_path, mlx_path, quantize=quant, dtype=making.dtype, progress=megabytes(bar), **whole)
    family = report.config.sources.get("family", "Exported by llama3v-mlx")
    show.out.print(f"{family}, prompt layout {report.config.prompt_layout.name}.")
    print_report(report)


def print_plan(found: Plan) -> None:
    """Family, every rename, what is left over or missing, and sizes."""
    for theirs, ours in found.renamed.names.items():
        show.out.print(f"{theirs} -> {ours}")
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
