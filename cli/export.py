"""`llama3v-mlx export`: a model directory, or what a run trained, in the formats of other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import Annotated

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.cli.options import Model, Offline, Run, given, warn_misfit
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.weights.gguf_file import TYPES


class Format(str, Enum):
    """What `export` writes."""

    hf = "hf"
    peft = "peft"
    gguf = "gguf"
    hub = "hub"


def register(app: typer.Typer) -> None:
    app.command()(export)


# Options of single formats; with another one they would have no effect, which is worst for --dry-run.
ONLY = {
    "squash": ("hf", "gguf"),
    "gguf_type": ("gguf",),
    "repo": ("hub",),
    "private": ("hub",),
    "dry_run": ("hub",),
}


def export(
    ctx: typer.Context,
    model: Model,
    output: Annotated[Path, typer.Option("--output", "-o", help="Directory to write.", show_default=False)],
    run: Run = None,
    format: Annotated[
        Format,
        typer.Option(
            "--format",
            help="hf: LlavaForConditionalGeneration with its processor; peft: the decoder's LoRA of --run; "
            "gguf: text model and mmproj for llama.cpp; hub: a model directory with its card, uploaded to --repo.",
        ),
    ] = Format.hf,
    squash: Annotated[
        bool, typer.Option("--squash", help="hf, gguf: export a model that splits pictures, to see one square only.")
    ] = False,
    gguf_type: Annotated[
        str, typer.Option("--gguf-type", help=f"gguf: what the decoder is stored as: {', '.join(TYPES)}.")
    ] = "f16",
    repo: Annotated[
        str | None, typer.Option("--repo", help="hub: owner/name to upload to.", show_default=False)
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="hub: make a new repository private.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="hub: write to --output, upload nothing.")] = False,
    offline: Offline = False,
) -> None:
    """Write a model so that other programs can use it.

    Example: `llama3v-mlx export --model model --run runs/sft --format hf --output hf-model`

    `llama3v-mlx export --model model --run runs/sft --format peft --output adapter`

    `llama3v-mlx export --model model --run runs/sft --format gguf --gguf-type q8_0 --output gguf`

    `llama3v-mlx export --model model --run runs/sft --format hub --repo me/my-model --output upload --dry-run`
    """
    from mlx_llama3v.hub import resolve
    from mlx_llama3v.weights.hub import export_hub

    for name, formats in ONLY.items():
        if name in given(ctx) and format.value not in formats:
            flag = f"--{name.replace('_', '-')}"
            raise CheckpointError(f"{flag} goes with --format {' or '.join(formats)}; --format is {format.value}.")
    path = resolve(model, offline=offline)
    show.leftovers(output)
    warn_misfit(path, run)
    if format is Format.hub:
        if repo is None:
            raise CheckpointError("--format hub uploads a model; expected --repo owner/name (also with --dry-run).")
        written = export_hub(path, output, repo=repo, run=run, private=private, dry_run=dry_run or offline)
        where = "nothing was uploaded" if dry_run or offline else f"uploaded to https://huggingface.co/{repo}"
        show.out.print(f"Exported (hub): {written}; {where}.")
    else:
        written = _converted(path, output, run, format, squash, gguf_type)
        show.out.print(f"Exported ({format.value}): {written}")


def _converted(path: Path, output: Path, run: Path | None, format: Format, squash: bool, gguf_type: str) -> Path:
    """Write the files of another program; returns where."""
    from mlx_llama3v.checkpoint import load_config
    from mlx_llama3v.weights.export import export_hf
    from mlx_llama3v.weights.gguf_export import export_gguf
    from mlx_llama3v.weights.peft import export_peft

    if format is Format.gguf:
        return export_gguf(path, output, run=run, squash=squash, type=gguf_type)
    if format is Format.hf:
        written = export_hf(path, output, run=run, squash=squash)
        if load_config(path).projector_config.kind == "linear":
            show.err.print("note: transformers runs this; vLLM and mlx-vlm expect a GELU in the projector (kind mlp).")
        return written
    if run is None:
        raise CheckpointError("--format peft exports what a run trained; expected --run.")
    return export_peft(path, run, output)
