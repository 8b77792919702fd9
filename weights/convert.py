"""SigLIP + Llama-3 -> one model directory with a fresh projector: the work of `llama3v-mlx convert`.

Every tensor is checked before one is read, then they pass through one at a time: read, cast, quantized,
written. The same input gives the same bytes: nothing depends on the clock, and the projector's values come
from the seed.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx

from mlx_llama3v.checkpoint import save_model
from mlx_llama3v.config import ModelConfig, ProjectorConfig, TilingConfig
from mlx_llama3v.directory import check_output, leftovers
from mlx_llama3v.errors import CheckpointError, size
from mlx_llama3v.hub import resolve
from mlx_llama3v.layout import named_layout
from mlx_llama3v.model import Llama3V, quantize_layers
from mlx_llama3v.tensors import SHARD_BYTES, mismatches, parameters, refuse
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.vision.siglip import SiglipModel, VisionTower
from mlx_llama3v.weights import llama as llama_files
from mlx_llama3v.weights import siglip as siglip_files
from mlx_llama3v.weights.card import model_card
from mlx_llama3v.weights.family import SQUASH, Renamed
from mlx_llama3v.weights.licences import licence_of
from mlx_llama3v.weights.llama import LlamaSource, read_llama
from mlx_llama3v.weights.probe import Probe, probe
from mlx_llama3v.weights.projector_file import ProjectorFile, is_file_like, read_projector
from mlx_llama3v.weights.quantize import LayerReport, QuantConfig, measure
from mlx_llama3v.weights.siglip import SiglipSource, read_siglip
from mlx_llama3v.weights.storage import Storage, stored


@dataclass(frozen=True)
class ConvertReport:
    """What a conversion made. Sizes are by part: vision_tower, text_tower, projector, language_model."""

    path: Path
    config: ModelConfig
    parameters: dict[str, int]
    bytes: dict[str, int]
    layers: tuple[LayerReport, ...]  # empty where nothing is quantized
    bits_per_weight: float  # of the decoder, scales and biases included
    probe: Probe | None = None  # what quantization did to the logits of a sentence

    @property
    def quantized(self) -> tuple[LayerReport, ...]:
        """The layers that were quantized."""
        return tuple(layer for layer in self.layers if layer.bits is not None)


@dataclass(frozen=True)
class Plan:
    """What a conversion would do: `convert --dry-run`."""

    name: str
    title: str
    config: ModelConfig
    renamed: Renamed
    problems: tuple[str, ...]  # missing and misshapen tensors
    bytes_before: int
    bytes_after: int  # 0 where it does not fit


@dataclass(frozen=True)
class Parts:
    """The checkpoints of a conversion, and the model that they make."""

    siglip: SiglipSource
    llama: LlamaSource
    given: ProjectorFile | None  # a projector that others trained
    config: ModelConfig
    storage: Storage


def plan(parts: Parts) -> Plan:
    """What `convert` would do, without writing."""
    siglip, llama, given = parts.siglip, parts.llama, parts.given
    model = _model(parts)
    wanted = expected(parts.config, model)
    kept = model.sanitize(llama.weights)
    names = {f"vision: {theirs}": ours for theirs, ours in siglip.names.items()}
    names |= {f"llm: {theirs}": ours if ours in kept else "" for theirs, ours in llama.names.items()}
    names |= {f"projector: {theirs}": ours for theirs, ours in given.names.items()} if given else {}
    renamed = Renamed(
        {theirs: ours for theirs, ours in names.items() if ours in wanted},
        tuple(theirs for theirs, ours in names.items() if not ours),
        tuple(theirs for theirs, ours in names.items() if ours and ours not in wanted)
        + tuple(f"projector: {theirs}" for theirs in (given.left_over if given else ())),
    )
    read = {**siglip.weights, **llama.weights, **(given.weights if given else {})}
    fresh = {name: v for name, v in parameters(model).items() if name.startswith("projector.")}
    found = {name: v for name, v in {**fresh, **read}.items() if name in wanted}
    problems = tuple(mismatches(wanted, found))
    before = sum(value.nbytes for value in read.values())
    finished = {} if problems or renamed.unknown else _finish(parts, model)[0]
    after = sum(value.nbytes for value in finished.values())
    name = "siglip + llama + projector" if given else "siglip + llama"
    title = "a trained projector between two models" if given else "two models and a fresh projector"
    return Plan(name, title, parts.config, renamed, problems, before, after)


def convert(
    vision: str | Path,
    llm: str | Path,
    mlx_path: str | Path,
    *,
    projector: str | Path = "attention",
    pool: int | None = None,
    tiling: TilingConfig | None = None,
    quantize: QuantConfig | None = None,
    dtype: str | None = None,
    seed: int = 0,
    prompt_layout: str | None = None,
    offline: bool = False,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int, int], None] | None = None,
) -> ConvertReport:
    """Join a SigLIP and a Llama-3 checkpoint in a new model directory; see `open_parts` and Storage for the arguments.

    `seed` makes a fresh projector (it seeds MLX's global generator), which is float32 (see `stored`);
    `progress(done, total)` counts bytes. Raises CheckpointError, and before anything is written names every tensor
    that is missing, unexpected or of the wrong shape.
    """
    target, storage = check_output(mlx_path), Storage(quantize, dtype)
    parts = open_parts(
        vision,
        llm,
        storage,
        projector=projector,
        pool=pool,
        tiling=tiling,
        prompt_layout=prompt_layout,
        offline=offline,
    )
    config = parts.config
    mx.random.seed(seed)
    model = _model(parts)
    refuse(_mismatches(parts, model), f"{parts.siglip.directory} + {parts.llama.directory}")
    weights, layers = _finish(parts, model)
    del model  # or a tensor's memory would not be free once it is written
    files = matching(parts.llama.directory, llama_files.FILES)
    files += [(f"siglip/{name}", path) for name, path in matching(parts.siglip.directory, siglip_files.FILES)]
    report = write(target, config, weights, layers, files, shard_bytes, progress)
    if quantize:
        report = replace(report, probe=probe(read_llama(parts.llama.directory).weights, target, config))
    return report


def open_parts(
    vision: str | Path,
    llm: str | Path,
    storage: Storage,
    *,
    projector: str | Path = "attention",
    pool: int | None = None,
    tiling: TilingConfig | None = None,
    prompt_layout: str | None = None,
    offline: bool = False,
) -> Parts:
    """Two checkpoints (directories or Hub ids), lazily read, and the projector between them.

    `projector` is the kind of a fresh one, or a file (directory, Hub id) with a trained one of LLaVA's kinds: the model
    is then run as llama-3-vision-alpha is (last but one hidden state, one square, its prompt or `prompt_layout`).
    `pool` is the projector's pooling factor (default 3, or 2 for towers of fewer than 12 patches a side). Raises
    CheckpointError for other models.
    """
    siglip, llama = read_siglip(resolve(vision, offline)), read_llama(resolve(llm, offline))
    if storage.quantize and llama.quantization:
        raise CheckpointError(f"{llm} is already quantized to {llama.quantization['bits']} bits; leave -q out.")
    given = read_projector(projector, offline) if is_file_like(str(projector)) else None
    sources = {
        "vision": source_name(vision),
        "llm": source_name(llm),
        "vision_licence": licence_of(source_name(vision), siglip.directory),
        "llm_licence": licence_of(source_name(llm), llama.directory),
    }
    config = ModelConfig(
        vision_config=siglip.vision,
        text_config=llama.config,
        projector_config=_projector_config(given.kind if given else str(projector), pool, siglip, llama),
        tiling=tiling or (SQUASH if given else TilingConfig()),
        image=siglip.image,
        marker_ids=marker_ids(llama.directory, llama.config["vocab_size"]),
        eos_token_ids=llama.eos_token_ids,
        siglip_text_config=siglip.text,
        quantization=llama.quantization or storage.setting(llama.config),
        sources=sources,
    )
    if given:
        layout = named_layout(prompt_layout or "vision-alpha")
        sources["projector"] = source_name(projector)
        config = replace(config, vision_feature_layer=-2, prompt_layout=layout)
    elif prompt_layout:
        raise CheckpointError("a prompt layout goes with a trained model; a fresh projector is trained with ours.")
    return Parts(siglip, llama, given, config, storage)


def _projector_config(kind: str, pool: int | None, siglip: SiglipSource, llama: LlamaSource) -> ProjectorConfig:
    """The projector's shape, which follows from the two models it joins."""
    width, grid = siglip.vision.hidden_size, siglip.vision.grid
    if kind != "attention":
        pool = 1
    pool = (3 if grid >= 12 else 2) if pool is None else pool
    if not 1 <= pool <= grid:
        raise CheckpointError(f"pool is {pool}; expected 1 to {grid}, the patches along a side of a slice.")
    return ProjectorConfig(
        kind=kind,
        in_dim=width,
        out_dim=llama.config["hidden_size"],
        hidden_dim=width,
        num_heads=siglip.vision.num_attention_heads,
        pool=pool,
    )


def marker_ids(directory: Path, vocabulary: int) -> tuple[int, ...]:
    """Ids for the markers from a tokenizer, which the decoder's vocabulary must contain. Raises CheckpointError."""
    tokens = Tokens.load(directory)
    if max(tokens.marker_ids) >= vocabulary:
        raise CheckpointError(
            f"{directory}: tokenizer.json has the reserved id {max(tokens.marker_ids)}, but vocab_size "
            f"is {vocabulary}; expected a tokenizer and weights that belong together."
        )
    return tokens.marker_ids


def source_name(path_or_repo: str | Path) -> str:
    """A Hub id as it is; of a local path the last part only, since model directories are shared."""
    path = Path(path_or_repo).expanduser()
    return path.resolve().name if path.exists() else str(path_or_repo)


def _model(parts: Parts) -> Llama3V:
    """The model without the decoder's weights: layers as they are stored, a fresh projector."""
    model, llama = Llama3V(parts.config), parts.llama
    if llama.quantization:
        quantize_layers(model, llama.quantization, only=llama_files.PREFIX, stored=llama.weights)
    if parts.given:
        dtype = next(iter(parts.given.weights.values())).dtype
        model.projector.markers = mx.zeros(model.projector.markers.shape, dtype)  # its layout has none
    return model


def expected(config: ModelConfig, model: Llama3V) -> dict[str, mx.array]:
    """All tensors of a model directory, by the shapes they must have."""
    vision, text = config.vision_config, config.siglip_text_config
    tower = parameters(SiglipModel(vision, text)) if text is not None else {}
    if text is None:
        tower = {f"vision_model.{name}": value for name, value in parameters(VisionTower(vision)).items()}
    return {**siglip_files.rename(tower), **parameters(model)}


def _mismatches(parts: Parts, model: Llama3V) -> list[str]:
    """A phrase for each tensor that does not fit, in all checkpoints."""
    found = model.sanitize(parts.llama.weights)
    named = {name.removeprefix(llama_files.PREFIX): value for name, value in found.items()}
    phrases = [f"--vision: {text}" for text in parts.siglip.problems]
    phrases += [f"--llm: {text}" for text in mismatches(parameters(model.language_model), named)]
    if parts.given:
        body = parameters(model.projector.body)
        phrases += [f"--projector: {text}" for text in mismatches(body, parts.given.weights, "projector.body.")]
        phrases += [f"--projector: unexpected {name}" for name in parts.given.left_over]
    return phrases


def _finish(parts: Parts, model: Llama3V) -> tuple[dict[str, mx.array], tuple[LayerReport, ...]]:
    """All lazy tensors of the new directory, and the quantization of each layer.

    The sources are emptied, so that a tensor's memory is free once it is written.
    """
    given = parts.given.weights if parts.given else {}
    read = {**model.sanitize(parts.llama.weights), **given}
    model.load_weights(list(read.items()), strict=False)
    finished = stored(model, parts.siglip.weights, parts.storage, trained=parts.given is not None)
    for source in (parts.siglip.weights, parts.llama.weights, given):
        source.clear()
    return finished


def write(
    target: Path,
    config: ModelConfig,
    weights: dict[str, mx.array],
    layers: tuple[LayerReport, ...],
    files: Iterable[tuple[str, Path]],
    shard_bytes: int,
    progress: Callable[[int, int], None] | None,
) -> ConvertReport:
    """Write a model directory: `weights`, which are emptied, copies of `files`, and what is written by us.

    Raises CheckpointError where the disk cannot hold it.
    """
    counts, sizes = measure(weights, config.quantization)
    decoder, total = 8 * sizes["language_model"] / counts["language_model"], sum(sizes.values())
    _check_space(target, total)
    card = model_card(config, sum(counts.values()))
    save_model(
        target,
        config,
        drain(weights),
        files={**dict(files), "preprocessor_config.json": _pixels_file(config), "README.md": card},
        shard_bytes=shard_bytes,
        progress=progress and (lambda done: progress(done, total)),
    )
    return ConvertReport(target, config, counts, sizes, layers, decoder)


def _check_space(target: Path, total: int) -> None:
    """Stop before the disk is full, not after an hour. What was left under the same name will be cleared."""
    parent = next(path for path in target.parents if path.exists())
    left = leftovers(parent)
    own = sum(held for path, held in left if path.name == f".{target.name}.partial")
    free = shutil.disk_usage(parent).free + own
    if free < total:
        others = [f"{path} ({size(held)})" for path, held in left if path.name != f".{target.name}.partial"]
        hint = f"; {', '.join(others)} was left by a command that was killed and can be deleted" if others else ""
        raise CheckpointError(f"{parent} has {size(free)} free; the model directory needs {size(total)}{hint}.")


def drain(weights: dict[str, mx.array]) -> Iterator[tuple[str, mx.array]]:
    """Every tensor in the order of names, let go as it is handed out."""
    for name in sorted(weights):
        yield name, weights.pop(name)


def _pixels_file(config: ModelConfig) -> str:
    """preprocessor_config.json of a model directory."""
    side, image = config.vision_config.image_size, config.image
    pixels = {
        "image_processor_type": "SiglipImageProcessor",
        "size": {"height": side, "width": side},
        "resample": image.resample,
        "rescale_factor": image.rescale_factor,
        "image_mean": image.image_mean,
        "image_std": image.image_std,
    }
    return json.dumps(pixels, indent=2, sort_keys=True) + "\n"


def matching(directory: Path, patterns: Iterable[str]) -> list[tuple[str, Path]]:
    """(name, path) of the files of a directory that match one of `patterns`."""
    found = (path for path in sorted(directory.iterdir()) if path.is_file())
    return [(path.name, path) for path in found if any(fnmatch(path.name, pattern) for pattern in patterns)]
