"""The SigLIP side of a conversion: a Hugging Face checkpoint, recognised, read and renamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_llama3v.checkpoint import SIGLIP_NAMES, read_siglip_config
from mlx_llama3v.config import ImageConfig, SiglipTextConfig, VisionConfig
from mlx_llama3v.directory import TOKENIZER_FILES
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import mismatches, parameters, read_json, read_tensors
from mlx_llama3v.vision import siglip

KINDS = {
    "siglip": "a SigLIP model",
    "siglip_vision_model": "a SigLIP vision tower",
    "siglip2": "a SigLIP 2 NaFlex model",
    "siglip2_vision_model": "a SigLIP 2 NaFlex vision tower",
    "clip": "a CLIP model",
    "clip_vision_model": "a CLIP vision tower",
    "llama": "a Llama language model",
    "mllama": "a Llama 3.2 Vision model",
    "llava": "a finished vision-language model",
    "llama3v": "an already converted model directory",
}
FILES = ("config.json", "preprocessor_config.json", "processor_config.json", *TOKENIZER_FILES)


@dataclass(frozen=True)
class SiglipSource:
    """A SigLIP checkpoint under the names of a model directory; `problems`: its tensors that do not fit.

    `names`: theirs -> ours, or "" for what is dropped.
    """

    directory: Path
    vision: VisionConfig
    text: SiglipTextConfig | None
    image: ImageConfig
    names: dict[str, str]
    weights: dict[str, mx.array] = field(repr=False)
    problems: list[str]


def describe(kind: object) -> str:
    """What a `model_type` is, for an error message."""
    return KINDS.get(str(kind), f"a model of type {kind!r}")


def read_siglip(directory: Path) -> SiglipSource:
    """Read a full SigLIP or a lone vision tower lazily. Raises CheckpointError for any other model.

    Recognised by `model_type`, and CLIP once more by its class token, since the two towers look alike.
    """
    kind = read_json(directory / "config.json").get("model_type")
    if kind not in ("siglip", "siglip_vision_model"):
        hint = "; are --vision and --llm swapped?" if kind == "llama" else "."
        raise CheckpointError(f"--vision {directory} is {describe(kind)}, expected a SigLIP checkpoint{hint}")
    vision, text, image = read_siglip_config(directory)
    tensors = read_tensors(directory)
    names = {name: next(iter(rename(siglip.sanitize({name: value}))), "") for name, value in tensors.items()}
    raw = siglip.sanitize(tensors)
    if any(name.endswith(("class_embedding", "pre_layrnorm.weight")) for name in raw):
        raise CheckpointError(f"--vision {directory} has a class token: CLIP's tower, expected SigLIP's.")
    expected = siglip.VisionTower(vision) if text is None else siglip.SiglipModel(vision, text)
    problems = mismatches(parameters(expected), raw, "vision_model." if text is None else "")
    return SiglipSource(directory, vision, text, image, names, rename(raw), problems)


def rename(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """transformers' names -> a model directory's; idempotent."""
    renamed = {}
    for name, value in weights.items():
        for theirs, ours in SIGLIP_NAMES.items():
            if name.startswith(theirs):
                name = ours + name.removeprefix(theirs)
                break
        renamed[name] = value
    return renamed
