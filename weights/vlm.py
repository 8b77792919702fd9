"""A finished vision-language model -> a model directory: the work of `llama3v-mlx convert --hf-path`.

The family is told by config.json and tensor names, never by the folder's name. Names and shapes of all tensors are
compared before one is read; then they pass through one at a time.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import mlx.core as mx

from mlx_llama3v.config import ModelConfig, stop_ids
from mlx_llama3v.directory import LEGAL_FILES, TOKENIZER_FILES, check_output
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.hub import resolve
from mlx_llama3v.layout import named_layout
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import SHARD_BYTES, mismatches, read_json, refuse
from mlx_llama3v.vision import siglip
from mlx_llama3v.weights import bunny, hf_llava, minicpm, vila, vision_alpha
from mlx_llama3v.weights.convert import (
    ConvertReport,
    Plan,
    expected,
    marker_ids,
    matching,
    source_name,
    write,
)
from mlx_llama3v.weights.export import KEPT, kept_config, restore
from mlx_llama3v.weights.family import Family, Renamed, Source, is_clip, rename
from mlx_llama3v.weights.licences import licence_of
from mlx_llama3v.weights.llama import has_own_head
from mlx_llama3v.weights.probe import probe
from mlx_llama3v.weights.projector_file import refuse_projector_only
from mlx_llama3v.weights.quantize import LayerReport, QuantConfig
from mlx_llama3v.weights.storage import Storage, stored

FAMILIES: tuple[Family, ...] = (
    hf_llava.FAMILY,
    minicpm.FAMILY,
    bunny.FAMILY,
    vision_alpha.FAMILY,
    vila.FAMILY,
)
_ZEROS = "projector.markers"  # finished models have none of our markers


def detect(source: Source) -> Family:
    """The family of a checkpoint. Raises CheckpointError, in one sentence, for one that cannot be converted."""
    kind = source.config.get("model_type")
    if kind == "llama3v" and "projector_config" in source.config:
        raise CheckpointError(f"{source.directory} is a converted model directory already; use it with --model.")
    if is_clip(source):
        raise CheckpointError(
            f"{source.directory} sees through a CLIP tower (model_type {kind!r}), which this package has not; "
            "expected a model with a SigLIP tower, or join a SigLIP and a Llama with --vision and --llm."
        )
    for family in FAMILIES:
        if family.detect(source):
            return family
    known = "; ".join(family.title for family in FAMILIES)
    raise CheckpointError(
        f"{source.directory} is a model of type {kind!r} that no family fits; expected one of: {known}; "
        "or a SigLIP and a Llama checkpoint with --vision and --llm."
    )


@dataclass(frozen=True)
class Finished:
    """A finished model as it lies on disk, and the model directory that is to be made of it."""

    source: Source
    family: Family
    config: ModelConfig
    storage: Storage


def plan_vlm(found: Finished) -> Plan:
    """What `convert_vlm` would do, without writing."""
    before = sum(value.nbytes for value in found.source.tensors.values())
    renamed, weights, problems = _weights(found)
    finished = {} if problems else _finish(found, weights)[0]
    after = sum(value.nbytes for value in finished.values())
    return Plan(found.family.name, found.family.title, found.config, renamed, tuple(problems), before, after)


def convert_vlm(
    hf_path: str | Path,
    mlx_path: str | Path,
    *,
    quantize: QuantConfig | None = None,
    dtype: str | None = None,
    prompt_layout: str | None = None,
    vision_mode: str | None = None,
    offline: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Convert a finished model (directory or Hub id); see `open_vlm` and Storage for the arguments.

    `progress(done, total)` counts bytes. Raises CheckpointError, before anything is written, for a model of no family
    and with every tensor that is missing, left over or misshapen.
    """
    target, storage = check_output(mlx_path), Storage(quantize, dtype)
    found = open_vlm(hf_path, storage, prompt_layout=prompt_layout, vision_mode=vision_mode, offline=offline)
    source, config = found.source, found.config
    renamed, weights, problems = _weights(found)
    refuse([*(f"left over {name}" for name in renamed.unknown), *problems], source.directory)
    source.tensors.clear()
    finished, layers = _finish(found, weights)
    weights.clear()  # or a tensor's memory would not be free once it is written
    files = matching(source.text_directory, (*TOKENIZER_FILES, *LEGAL_FILES))
    if (beside := source.directory / KEPT / "siglip").is_dir():
        files += [(f"siglip/{path.name}", path) for path in sorted(beside.iterdir())]
    report = write(target, config, finished, layers, files, shard_bytes, progress)
    if quantize:
        again = Source.open(source.directory)
        before = {renamed.names[name]: v for name, v in again.tensors.items() if name in renamed.names}
        again.tensors.clear()
        report = replace(report, probe=probe(before, target, config))
    return report


def open_vlm(
    hf_path: str | Path,
    storage: Storage,
    *,
    prompt_layout: str | None = None,
    vision_mode: str | None = None,
    offline: bool = False,
) -> Finished:
    """A finished model (directory or Hub id) of one of FAMILIES, lazily read.

    `prompt_layout` (a name of LAYOUTS) overrides the one that the checkpoint asks for; `vision_mode` chooses between
    MiniCPM-V 2.5's published strip and true 2-D positions. Raises CheckpointError for a model of no family.
    """
    directory = resolve(hf_path, offline)
    refuse_projector_only(directory)
    layout = None if prompt_layout is None else named_layout(prompt_layout)
    source = replace(Source.open(directory), layout=layout)
    family = detect(source)
    if source.config.get("quantization") or source.config.get("quantization_config"):
        raise CheckpointError(f"{source.directory} is already quantized; expected the original weights.")
    config = kept_config(source.directory)  # exported by us: it says what it was
    if config is None:
        config = _configured(source, family, source_name(hf_path), vision_mode)
    if layout is not None:
        config = replace(config, prompt_layout=layout)
    return Finished(source, family, replace(config, quantization=storage.setting(config.text_config)), storage)


def _configured(source: Source, family: Family, name: str, vision_mode: str | None) -> ModelConfig:
    """What a checkpoint says of itself, with what its tokenizer and its generation settings add."""
    config = family.configure(source)
    if config.text_config["tie_word_embeddings"] and has_own_head(source.text_directory):
        config = replace(config, text_config={**config.text_config, "tie_word_embeddings": False})
    if vision_mode is not None:
        if not config.vision_mode.startswith("strip") or vision_mode not in ("strip", "strip-2d"):
            raise CheckpointError(
                f"vision mode {vision_mode!r} does not go with {family.title}; "
                "strip and strip-2d do with MiniCPM-V 2.5."
            )
        config = replace(config, vision_mode=vision_mode)
    path = source.text_directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    markers = marker_ids(source.text_directory, config.text_config["vocab_size"])
    stops = config.text_config.get("eos_token_id"), source.config.get("eos_token_id"), generation.get("eos_token_id")
    licence = licence_of(name, source.directory)
    sources = {"vision": name, "llm": name, "model": name, "family": family.name, "llm_licence": licence}
    return replace(config, marker_ids=markers, eos_token_ids=stop_ids(*stops), sources=sources)


def _weights(finished: Finished) -> tuple[Renamed, dict[str, mx.array], list[str]]:
    """Lazy tensors under our names, and what is wrong with them."""
    source, family, config = finished.source, finished.family, finished.config
    renamed = rename(family, source.tensors)
    clash = len(set(renamed.names.values())) < len(renamed.names)
    if clash:
        raise CheckpointError(f"{source.directory} has the same tensor under two names; expected one layout.")
    found = siglip.sanitize({ours: source.tensors[theirs] for theirs, ours in renamed.names.items()})
    if restored := restore(source.directory, found):
        found = restored[1]
    model = Llama3V(config)
    found = model.sanitize(found)
    if not restored:
        dtype = next((v.dtype for name, v in found.items() if name.startswith("projector.")), mx.float32)
        made = {_ZEROS: mx.zeros(model.projector.markers.shape), **family.extra(source, config)}
        found.update({name: value.astype(dtype) for name, value in made.items()})
    return renamed, found, mismatches(expected(config, model), found)


def _finish(found: Finished, weights: dict[str, mx.array]) -> tuple[dict[str, mx.array], tuple[LayerReport, ...]]:
    """Cast and quantize, all of it lazily (see `stored`)."""
    tower = {name: v for name, v in weights.items() if not name.startswith(("projector.", "language_model."))}
    model = Llama3V(found.config)
    model.load_weights([(name, v) for name, v in weights.items() if name not in tower])
    return stored(model, tower, found.storage, trained=True, kept=kept_config(found.source.directory) is not None)
