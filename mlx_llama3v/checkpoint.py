"""Model directories, SigLIP checkpoints and runs: found, loaded strictly, and written whole or not at all.

Loading compares every name and shape before anything is set, and one error names all that differs. Saving
builds a directory beside its place and renames it: an interrupted command leaves the old one untouched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_llama3v.compat import linear_to_lora_layers
from mlx_llama3v.config import ImageConfig, ModelConfig, SiglipTextConfig, VisionConfig, known
from mlx_llama3v.directory import replacing
from mlx_llama3v.durable import sync
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.hub import resolve
from mlx_llama3v.model import Llama3V, dequantized, quantize_layers
from mlx_llama3v.platform import device_name
from mlx_llama3v.projector import Projector
from mlx_llama3v.tensors import (
    MARKS,
    SHARD_BYTES,
    load_file,
    load_into,
    marks,
    mismatches,
    parameters,
    read_json,
    read_tensors,
    refuse,
    same_marks,
    save_safetensors_atomic,
    write_shards,
    write_text,
)
from mlx_llama3v.text.siglip import SiglipTokenizer
from mlx_llama3v.vision.siglip import SiglipModel, VisionTower, sanitize

__all__ = [
    "Siglip",
    "load_config",
    "load_model",
    "load_run",
    "load_siglip",
    "load_tower",
    "read_model",
    "save_model",
    "save_safetensors_atomic",
]

# Names in a model directory <-> names of transformers' SiglipModel, which vision/siglip.py keeps.
SIGLIP_NAMES = {"vision_model.": "vision_tower.", "text_model.": "text_tower.", "logit_": "logit_"}


def load_config(directory: str | Path) -> ModelConfig:
    """`config.json` of a model directory, strictly read. Raises CheckpointError."""
    path = resolve(directory) / "config.json"
    return ModelConfig.from_dict(read_json(path), str(path))


def read_model(directory: str | Path, *, dequantize: bool = False) -> Llama3V:
    """Projector and decoder as stored: lazy tensors, no dtype changed. For whoever writes them again.

    With `dequantize` what was quantized is float32, and the model's `config` says nothing of it. Raises CheckpointError
    with all missing, unexpected and wrong-shaped tensors.
    """
    directory = resolve(directory)
    config = load_config(directory)
    weights = read_tensors(directory, ("projector.", "language_model."))
    if dequantize and config.quantization:
        weights = dequantized(weights, config.quantization)
        config = replace(config, quantization=None)
    model = Llama3V(config)
    weights = model.sanitize(weights)
    if config.quantization:
        quantize_layers(model, config.quantization, only="language_model.", stored=weights)
    load_into(model, weights, directory)
    model.eval()
    return model


def load_model(directory: str | Path, dtype: str | mx.Dtype | None = None) -> Llama3V:
    """Projector and decoder, ready to compute.

    `dtype` is the decoder's; by default the stored one, but float32 on CPU, where 16-bit products are two
    orders of magnitude slower. The projector becomes float32, however it is stored: it may be trained on.
    """
    model = read_model(directory)
    model.projector.set_dtype(mx.float32)
    _cast(model.language_model, dtype)
    mx.eval(model.parameters())
    return model


def load_tower(directory: str | Path, dtype: str | mx.Dtype | None = None) -> VisionTower:
    """The vision tower of a model directory; `dtype` as in `load_model`. Raises CheckpointError."""
    directory = resolve(directory)
    config = load_config(directory)
    tower = VisionTower(config.vision_config)
    weights = read_tensors(directory, ("vision_tower.",))
    if not weights:
        raise CheckpointError(f"{directory} holds no vision tower (vision_tower.*); it can only read text.")
    if config.quantization:
        quantize_layers(tower, config.quantization, prefix="vision_tower.", stored=weights)
    load_into(tower, weights, directory, "vision_tower.")
    _cast(tower, dtype)
    mx.eval(tower.parameters())
    return tower


@dataclass(frozen=True)
class Siglip:
    """A whole SigLIP: what scoring a picture against texts needs."""

    model: SiglipModel
    tokenizer: SiglipTokenizer
    vision: VisionConfig
    text: SiglipTextConfig
    image: ImageConfig


def load_siglip(directory: str | Path, dtype: str | mx.Dtype | None = None) -> Siglip:
    """Both towers and the text tokenizer, from a model directory that kept them or a Hugging Face SigLIP.

    `dtype` as in `load_model`. Raises CheckpointError, also where there is no text tower.
    """
    directory = resolve(directory)
    if read_json(directory / "config.json").get("model_type") == "llama3v":
        config = load_config(directory)
        vision, text, image = config.vision_config, config.siglip_text_config, config.image
        quantization = config.quantization
        tokenizer_files = directory / "siglip"
        weights = {}
        for theirs, ours in SIGLIP_NAMES.items():
            stored = read_tensors(directory, (ours,))
            weights.update({theirs + name.removeprefix(ours): value for name, value in stored.items()})
    else:
        vision, text, image = read_siglip_config(directory)
        tokenizer_files, weights, quantization = directory, sanitize(read_tensors(directory)), None
    if text is None:
        raise CheckpointError(f"{directory} has no SigLIP text tower; expected a full SigLIP checkpoint.")
    if not weights:
        raise CheckpointError(f"{directory} holds no SigLIP (vision_tower.*, text_tower.*); it can only read text.")
    model = SiglipModel(vision, text)
    if quantization:
        quantize_layers(model, quantization, stored=weights)
    load_into(model, weights, directory)
    tokenizer = SiglipTokenizer(tokenizer_files, text.max_position_embeddings)
    _cast(model, dtype)
    mx.eval(model.parameters())
    return Siglip(model, tokenizer, vision, text, image)


def image_processor(directory: Path) -> dict[str, Any]:
    """What a Hugging Face checkpoint does to pictures, as its files say it. Raises CheckpointError where none does."""
    if (directory / "processor_config.json").is_file():
        found = read_json(directory / "processor_config.json").get("image_processor")
        if isinstance(found, dict):
            return found
    return read_json(directory / "preprocessor_config.json")


def read_siglip_config(directory: Path) -> tuple[VisionConfig, SiglipTextConfig | None, ImageConfig]:
    """Configuration of a Hugging Face SigLIP; no text part where only the vision tower was saved.

    Files leave defaults out, and transformers 5 may keep the pixel settings in processor_config.json, which
    then wins. Raises CheckpointError where they are nowhere: SigLIP 1 and 2 differ in them.
    """
    config = read_json(directory / "config.json")
    vision, text = config.get("vision_config", config), config.get("text_config")
    values = image_processor(directory)
    image = known(ImageConfig, values)
    for key in ("image_mean", "image_std"):
        if key in image:
            image[key] = tuple(image[key]) if isinstance(image[key], list) else (image[key],) * 3
    if values.get("do_rescale") is False:
        image["rescale_factor"] = 1.0
    if values.get("do_normalize") is False:
        image.update(image_mean=(0.0, 0.0, 0.0), image_std=(1.0, 1.0, 1.0))
    return (
        VisionConfig(**known(VisionConfig, vision)),
        None if text is None else SiglipTextConfig(**known(SiglipTextConfig, text)),
        ImageConfig(**image),
    )


def _cast(module: nn.Module, dtype: str | mx.Dtype | None) -> None:
    """Set the dtype of all floating parameters; None keeps them, except on CPU (see `load_model`)."""
    if dtype is None and device_name() == "cpu":
        dtype = mx.float32
    if dtype is not None:
        module.set_dtype(parse_dtype(dtype))


def parse_dtype(dtype: str | mx.Dtype) -> mx.Dtype:
    """'float32', 'float16' or 'bfloat16' -> MLX's. Raises CheckpointError for others."""
    names = {"float32": mx.float32, "float16": mx.float16, "bfloat16": mx.bfloat16}
    if isinstance(dtype, mx.Dtype) and dtype in names.values():
        return dtype
    if str(dtype) not in names:
        raise CheckpointError(f"dtype is {dtype!r}, expected one of {', '.join(names)}.")
    return names[str(dtype)]


def load_run(model: Llama3V, run_dir: str | Path) -> None:
    """Apply what a run trained: `projector.safetensors` and/or `adapters.safetensors` with its configuration.

    Projector tensors carry `Projector`'s own names; adapter tensors those of the decoder (with its LoRA or
    DoRA layers, or whole where `fine_tune_type` is "full") as mlx-lm writes them, or with `language_model.`
    before. The decoder keeps its dtype; the projector becomes float32, as it was trained: a late step changes less
    than 16 bits can tell. Raises one CheckpointError that names every tensor which is missing, unexpected or misshapen.
    """
    run = Path(run_dir).expanduser()
    projector, adapters = run / "projector.safetensors", run / "adapters.safetensors"
    _check_ended(run, projector, adapters)
    phrases: list[str] = []
    parts: list[tuple[nn.Module, dict[str, mx.array], dict[str, mx.array]]] = []
    if projector.is_file():
        weights, expected = load_file(projector), parameters(model.projector)
        phrases += [f"projector: {text}" for text in mismatches(expected, weights)]
        parts.append((model.projector, weights, expected))
    if adapters.is_file():
        found = load_file(adapters).items()
        weights = {name.removeprefix("language_model."): value for name, value in found}
        expected = _add_adapters(model.language_model, run / "adapter_config.json")
        phrases += [f"adapters: {text}" for text in mismatches(expected, weights)]
        parts.append((model.language_model, weights, expected))
    refuse(phrases, run)
    for module, weights, expected in parts:
        dtypes = {name: mx.float32 if module is model.projector else value.dtype for name, value in expected.items()}
        learned = [(name, value.astype(dtypes[name])) for name, value in weights.items()]
        mx.eval([value for _, value in learned])
        module.load_weights(learned, strict=False)
    model.eval()


def _check_ended(run: Path, projector: Path, adapters: Path) -> None:
    """Raises CheckpointError for what is no run, and for one that was stopped or killed before all was written."""
    config = run / "config.json"
    settings = read_json(config).get("train") if config.is_file() else None
    if isinstance(settings, dict):
        wanted = [projector, adapters, run / "adapter_config.json"] if settings.get("stage") == "sft" else [projector]
        if missing := [file.name for file in wanted if not file.is_file()]:
            raise CheckpointError(
                f"{run} is a run that has not ended (no {', '.join(missing)}); go on with the command that began it "
                "and --resume."
            )
    elif not projector.is_file() and not adapters.is_file():
        raise CheckpointError(f"{run} is not a run; expected projector.safetensors or adapters.safetensors.")


def load_projector(config: ModelConfig, run: str | Path) -> Projector:
    """The projector that a run (or its projector.safetensors) holds, in float32, for a model of that configuration.

    Raises one CheckpointError that names every tensor which is missing, unexpected or misshapen.
    """
    run = Path(run).expanduser()
    file = run if run.is_file() else run / "projector.safetensors"
    projector = Projector(config.projector_config)
    weights = load_file(file)
    refuse([f"projector: {text}" for text in mismatches(parameters(projector), weights)], file)
    projector.load_weights([*weights.items()])
    projector.set_dtype(mx.float32)
    mx.eval(projector.parameters())
    projector.eval()
    return projector


def check_run(directory: str | Path, run: str | Path) -> None:
    """Refuse a run that learned from the pictures of another vision tower than this model's, though of its sizes.

    `run` may be its projector.safetensors. What one of the two does not say is not compared. Raises CheckpointError.
    """
    facts = _facts(run)
    if not same_marks(facts.get("store", {}).get(MARKS), tower_marks(directory)):
        own = f": {facts['model_path']}" if facts.get("model_path") else ""
        raise CheckpointError(
            f"{run} learned from pictures as another vision tower sees them than that of {directory}, though one of "
            f"the same sizes; give the model that it was trained with{own}."
        )


def same_decoder(directory: str | Path, run: str | Path) -> bool:
    """Whether a run (or that of a projector.safetensors) was trained with this model's decoder, or does not say."""
    found = read_tensors(resolve(directory), ("language_model.",))
    return same_marks(_facts(run).get("decoder"), marks(found))


def tower_marks(directory: str | Path) -> str:
    """Of the vision tower of a model directory (tensors.marks); "" where it has none."""
    return marks(read_tensors(resolve(directory), ("vision_tower.",)))


def _facts(run: str | Path | None) -> dict[str, Any]:
    """What a run (or the one that this file of a projector lies in) says of itself; nothing where there is none."""
    path = Path(run).expanduser() if run is not None else None
    file = None if path is None else (path.parent if path.is_file() else path) / "config.json"
    values = read_json(file) if file is not None and file.is_file() else {}
    return values if isinstance(values.get("store", {}), dict) else {}


def trained_on(config: ModelConfig, run_dir: str | Path | None) -> ModelConfig:
    """`config` with pictures as the store of a run had them: at most so many slices, means over N x N patches.

    `run_dir` may be its projector.safetensors. Unchanged where the run does not say (an older one, or bare files).
    """
    values = _facts(run_dir).get("store", {})
    post, tiling = values.get("post"), values.get("tiling")
    pool = post.get("pool", 1) if isinstance(post, dict) else None
    if isinstance(pool, int) and pool > 0:
        config = replace(config, patch_pool=pool)
    most = tiling.get("max_slices") if isinstance(tiling, dict) else None
    if isinstance(most, int) and most >= 0:
        config = replace(config, tiling=replace(config.tiling, max_slices=most))
    return config


def _add_adapters(decoder: nn.Module, config_file: Path) -> dict[str, mx.array]:
    """Wrap the layers that `adapter_config.json` names; returns the parameters that the run must bring."""
    config = read_json(config_file)
    kind = config.get("fine_tune_type", "lora")
    if kind == "full":
        return parameters(decoder)
    if kind not in ("lora", "dora"):
        raise CheckpointError(f"{config_file}: fine_tune_type is {kind!r}, expected lora, dora or full.")
    lora = config.get("lora_parameters")
    lora = lora if isinstance(lora, dict) else {}
    missing = [key for key in ("num_layers", "lora_parameters") if key not in config]
    missing += [f"lora_parameters.{key}" for key in ("rank", "scale", "dropout") if key not in lora]
    if missing:
        raise CheckpointError(f"{config_file}: {', '.join(missing)} is missing.")
    linear_to_lora_layers(decoder, config["num_layers"], lora, use_dora=kind == "dora")
    added = ("lora_a", "lora_b", "m")
    return {name: v for name, v in parameters(decoder).items() if name.rpartition(".")[2] in added}


def save_model(
    directory: str | Path,
    config: ModelConfig,
    weights: Iterable[tuple[str, mx.array]],
    *,
    files: Mapping[str, Path | str] | None = None,
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a model directory, atomically, replacing one of ours that was made of the same.

    `weights` is consumed as a stream (names as in the directory); `files` maps further names to a file to
    copy or a text to write; `progress` is told the bytes done so far. Raises CheckpointError where `directory` holds
    another model (see `directory.replacing`, too).
    """
    _check_same(Path(directory).expanduser() / "config.json", config.sources)
    with replacing(directory) as partial:
        write_shards(partial, weights, shard_bytes, progress)
        for name, content in (files or {}).items():
            (partial / name).parent.mkdir(exist_ok=True)
            if isinstance(content, Path):
                shutil.copyfile(content, partial / name)
                sync(partial / name)
            else:
                write_text(partial / name, content)
        write_text(partial / "config.json", json.dumps(config.to_dict(), indent=2, sort_keys=True) + "\n")


def _check_same(file: Path, sources: Mapping[str, str]) -> None:
    """Raises CheckpointError where the model there is of other sources: a run's weeks may be in it."""
    there = read_json(file).get("sources", {}) if file.is_file() else sources
    if there != sources:
        made = " + ".join(dict.fromkeys(str(there[key]) for key in ("vision", "llm", "run") if key in there))
        raise CheckpointError(f"{file.parent} holds another model ({made}); remove it, or choose another directory.")
