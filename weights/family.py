"""What a source family is: how its checkpoints are told from others, and how their tensors are named here.

A family is data (detection, rename rules, what it leaves out) and one function that reads its configuration; the work
is done in vlm.py.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v.checkpoint import read_siglip_config
from mlx_llama3v.config import ImageConfig, ModelConfig, TilingConfig, VisionConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import read_json, read_tensors


@dataclass(frozen=True)
class Source:
    """A checkpoint as it lies on disk: its config.json and lazy tensors under their own names."""

    directory: Path
    config: dict[str, Any]
    tensors: dict[str, mx.array] = field(repr=False)
    text_directory: Path  # where tokenizer and generation settings are

    @classmethod
    def open(cls, directory: Path) -> Source:
        """Read lazily. Sub-folders that hold weights of their own (VILA) put their name before their tensors'."""
        config = read_json(directory / "config.json")
        parts = [part for part in ("llm", "vision_tower", "mm_projector") if (directory / part / "config.json").is_file()]
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
    """CLIP's tower has a class token and a norm before its blocks; SigLIP's has neither."""
    kinds = {str(source.config.get("vision_config", {}).get("model_type", "")), str(source.config.get("mm_vision_tower"))}
    return source.has(r"class_embedding|pre_layrnorm") or any("clip" in k.lower() and "siglip" not in k.lower() for k in kinds)


SO400M = VisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14, vision_use_head=False)


def tower_config(source: Source, given: Mapping[str, Any] | None = None) -> VisionConfig:
    """The tower's configuration: what the file says, else so400m's; shapes decide what a file leaves out."""
    from dataclasses import replace

    from mlx_llama3v.config import known

    base = SO400M if given is None else VisionConfig()
    config = replace(base, **known(VisionConfig, given or {}))
    return replace(config, vision_use_head=source.has(r"vision.*\bhead\.probe$"))


def image_config(source: Source, fallback: bool = False) -> ImageConfig:
    """Pixel preprocessing as the checkpoint's processor says; SigLIP 1's where `fallback` and none is there."""
    files = [source.directory / name for name in ("processor_config.json", "preprocessor_config.json")]
    if fallback and not any(file.is_file() for file in files):
        return ImageConfig()
    return read_siglip_config(source.directory)[2]


SQUASH = TilingConfig("squash", 0)
