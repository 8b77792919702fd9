"""The recipe's steps as one call each, from paths to results: what the commands and the demo share."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_llama3v.checkpoint import load_config, load_tower, resolve
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.data.llava import folder_images, image_paths, read_records
from mlx_llama3v.data.records import Problem
from mlx_llama3v.embeddings.embed import EmbedProgress, EmbedSummary, embed_images
from mlx_llama3v.embeddings.store import Store, StoreWriter
from mlx_llama3v.vision.encode import Encoder


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_data` did; `info` describes the store as it is now, `problems` what is not in it."""

    store: Path
    summary: EmbedSummary
    info: dict[str, Any]
    problems: tuple[Problem, ...]


def load_encoder(model: str | Path, *, max_slices: int | None = None, offline: bool = False) -> Encoder:
    """The frozen tower of a model directory with its own preprocessing and tiling; `max_slices` overrides the cap."""
    path = resolve(model, offline=offline)
    config = load_config(path)
    tiling = config.tiling if max_slices is None else TilingConfig(config.tiling.mode, max_slices)
    return Encoder(load_tower(path), config.vision_config, config.image, tiling, config.vision_feature_layer)


def embed_data(
    model: str | Path,
    data: Path,
    output: Path,
    *,
    image_folder: Path | None = None,
    codec: str = "float16",
    batch_size: int = 16,
    workers: int = 2,
    max_slices: int | None = None,
    offline: bool = False,
    progress: Callable[[EmbedProgress], None] | None = None,
) -> EmbedReport:
    """Encode every picture of `data` (LLaVA JSON or JSONL, or a folder) into the store `output`.

    A store that exists goes on. Raises UserError: no such data, a store of another encoder, a full disk.
    """
    problems: list[Problem] = []
    if data.is_dir():
        images = folder_images(data)
    else:
        records = read_records(data)
        problems += records.problems
        images = image_paths(records, image_folder)
    encoder = load_encoder(model, max_slices=max_slices, offline=offline)
    with StoreWriter(output, encoder.fingerprint(), codec) as writer:
        summary = embed_images(
            images.items(), encoder, writer, batch_size=batch_size, workers=workers, progress=progress
        )
    store = Store(output)
    failed = [Problem(name, reason) for name, reason in store.failures.items() if name in images]
    return EmbedReport(output, summary, store.info(), (*problems, *failed))
