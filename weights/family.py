"""What a source family is: how its checkpoints are told from others, and how their tensors are named here.

A family is data (detection, rename rules, what it leaves out) and one function that reads its configuration; the work
is done in vlm.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field, replace
from math import isqrt
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v.checkpoint import read_siglip_config
from mlx_llama3v.config import (
    ImageConfig,
    ModelConfig,
    ProjectorConfig,
    TilingConfig,
    VisionConfig,
    known,
    llama_config,
)
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import PromptLayout
from mlx_llama3v.tensors import read_json, read_tensors


@dataclass(frozen=True)
class Source:
    """A checkpoint as it lies on disk: its config.json and lazy tensors under their own names."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, mx.array] = field(repr=False)
    text_directory: Path  # where tokenizer and generation settings are
    layout: PromptLayout | None = None  # asked for, in place of the checkpoint's own

    @classmethod
    def open(cls, directory: Path) -> Source:
        """Read lazily. Sub-folders that hold weights of their own (VILA) put their name before their tensors'."""
        config = read_json(directory / "config.json")
        parts = [
            part for part in ("llm", "vision_tower", "mm_projector") if (directory / part / "config.json").is_file()
        ]
        if not parts:
            return cls(directory, config, read_tensors(directory), directory)
        tensors = {f"{part}/{name}": v for part in parts for name, v in read_tensors(directory / part).items()}
        return cls(directory, config, tensors, directory / "llm" if "llm" in parts else directory)

    def has(self, pattern: str) -> bool:
        """Whether the name of a tensor matches somewhere."""
        return any(re.search(pattern, name) for name in self.tensors)

    def shape(self, pattern: str) -> tuple[int, ...]:
        """Shape of the first tensor whose name matches. Raises CheckpointError where none does."""
        for name, value in self.tensors.items():
            if re.search(pattern, name):
                return tuple(value.shape)
        raise CheckpointError(f"{self.directory} has no tensor like {pattern}.")


@dataclass(frozen=True)
class Family:
    """One kind of finished vision-language model."""

    name: str
    title: str
    detect: Callable[[Source], bool]
    configure: Callable[[Source], ModelConfig]  # marker_ids, eos_token_ids and sources are filled in by vlm.py
    rules: tuple[tuple[str, str], ...]  # (regular expression, replacement), the first that matches wins
    skip: tuple[str, ...] = ()  # tensors that such files may carry and nothing reads
    extra: Callable[[Source, ModelConfig], dict[str, mx.array]] = lambda source, config: {}


@dataclass(frozen=True)
class Renamed:
    """A mapping of names: every tensor of the source is in one of the three."""

    names: dict[str, str]  # theirs -> ours
    skipped: tuple[str, ...]
    unknown: tuple[str, ...]


def rename(family: Family, names: Iterable[str]) -> Renamed:
    """Names of a family's files -> those of a model directory."""
    found, skipped, unknown = {}, [], []
    for name in sorted(names):
        if any(re.search(pattern, name) for pattern in (*family.skip, r"position_ids$", r"rotary_emb\.inv_freq$")):
            skipped.append(name)
            continue
        for pattern, replacement in family.rules:
            if re.match(pattern, name):
                found[name] = re.sub(pattern, replacement, name, count=1)
                break
        else:
            unknown.append(name)
    return Renamed(found, tuple(skipped), tuple(unknown))


def is_clip(source: Source) -> bool:
    """CLIP's tower has a class token and a norm before its blocks; SigLIP's has neither.

    Names are asked only where they say what a tower is: vision_config's model_type, and mm_vision_tower where the
    checkpoint has no tower of its own.
    """
    names = [str((source.config.get("vision_config") or {}).get("model_type", ""))]
    if not source.has(r"embeddings\.patch_embedding\.weight$"):
        names.append(str(source.config.get("mm_vision_tower")))
    return source.has(r"class_embedding|pre_layrnorm") or any(
        "clip" in name.lower() and "siglip" not in name.lower() for name in names
    )


_LLAMA_KEYS = (
    *(
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "num_key_value_heads",
        "head_dim",
    ),
    *("vocab_size", "rms_norm_eps", "max_position_embeddings", "rope_theta", "rope_scaling", "rope_parameters"),
    *("tie_word_embeddings", "attention_bias", "mlp_bias", "bos_token_id", "eos_token_id", "hidden_act"),
)


def decoder_config(values: Mapping[str, Any], tied: bool = False) -> dict[str, Any]:
    """The Llama part of a config.json that says other things beside; `tied` where no head is in the file."""
    text = llama_config({key: values[key] for key in _LLAMA_KEYS if key in values})
    text["tie_word_embeddings"] = bool(text["tie_word_embeddings"] or tied)
    return text


# Width -> heads of the released towers: shapes do not tell them (giant-opt has heads of 96, so400m of 72).
_HEADS = {768: 12, 1024: 16, 1152: 16, 1536: 16}


def tower_config(source: Source, given: Mapping[str, Any] | None = None) -> VisionConfig:
    """The tower's configuration as `given` (what that leaves out is transformers' default), else from the tensors.

    Shapes tell all but the heads, which follow from the width as in the released towers. Raises CheckpointError for
    shapes that make no tower.
    """
    head = source.has(r"vision.*\bhead\.probe$")
    if given is not None:
        return replace(VisionConfig(), **known(VisionConfig, {**given, "vision_use_head": head}))
    width, _, patch, _ = source.shape(r"embeddings\.patch_embedding\.weight$")
    grid = isqrt(source.shape(r"(?<!text_model\.)embeddings\.position_embedding\.weight$")[0])
    layers = {found[1] for name in source.tensors if (found := re.search(r"encoder\.layers\.(\d+)\.", name))}
    named = re.search(r"patch\d+-(\d+)$", str(source.config.get("mm_vision_tower", "")))
    side = int(named[1]) if named else {27: 384}.get(grid, grid * patch)
    if side // patch != grid:
        raise CheckpointError(f"{source.directory}: the tower has {grid} x {grid} positions, not {side} px / {patch}.")
    return VisionConfig(
        hidden_size=width,
        intermediate_size=source.shape(r"encoder\.layers\.0\.mlp\.fc1\.weight$")[0],
        num_hidden_layers=len(layers),
        num_attention_heads=_HEADS.get(width) or max(1, width // 64),
        image_size=side,
        patch_size=patch,
        vision_use_head=head,
    )


def mlp_projector(vision: VisionConfig, text: Mapping[str, Any], *, scales: int = 1, skip: int = 0) -> ProjectorConfig:
    """LLaVA-1.5's projector between two models."""
    return ProjectorConfig(
        kind="mlp",
        in_dim=scales * vision.hidden_size,
        out_dim=text["hidden_size"],
        hidden_dim=text["hidden_size"],
        num_heads=vision.num_attention_heads,
        pool=1,
        skip=skip,
    )


def image_config(source: Source, fallback: bool = False) -> ImageConfig:
    """Pixel preprocessing as the checkpoint's processor says; SigLIP 1's where `fallback` and none is there."""
    for directory in (source.directory, source.directory / "vision_tower"):
        files = [directory / name for name in ("processor_config.json", "preprocessor_config.json")]
        if any(file.is_file() for file in files) and (directory / "config.json").is_file():
            return read_siglip_config(directory)[2]
    return ImageConfig() if fallback else read_siglip_config(source.directory)[2]


SQUASH = TilingConfig("squash", 0)
