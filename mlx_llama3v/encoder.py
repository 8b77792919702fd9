"""From a model directory to what makes its embeddings: the frozen tower, and what is done to them before the store."""

from __future__ import annotations

from pathlib import Path

from mlx_llama3v.checkpoint import check_run, load_config, load_projector, load_tower, trained_on
from mlx_llama3v.config import ModelConfig, TilingConfig
from mlx_llama3v.embeddings.writer import Post
from mlx_llama3v.hub import resolve
from mlx_llama3v.projected import Projected
from mlx_llama3v.vision.encode import Encoder
from mlx_llama3v.vision.families import make_encoder
from mlx_llama3v.vision.pool import Pool


def load_encoder(model: str | Path, *, max_slices: int | None = None, offline: bool = False) -> Encoder:
    """The frozen tower of a model directory with its own preprocessing and tiling; `max_slices` overrides the cap."""
    path = resolve(model, offline=offline)
    config = load_config(path)
    tiling = config.tiling if max_slices is None else TilingConfig(config.tiling.mode, max_slices)
    return make_encoder(load_tower(path), config, tiling)


def load_post(
    model: str | Path, pool: int | None, after_projector: Path | None, *, offline: bool = False
) -> Post | None:
    """What is done to embeddings before they are stored: the mean over pool x pool patches (default: see
    `stored_pool`), the projector of a run. Raises CheckpointError where that run does not fit."""
    path = resolve(model, offline=offline)
    config = load_config(path)
    pool = pool or stored_pool(config, after_projector)
    if after_projector is not None:
        check_run(path, after_projector)
        return Projected(load_projector(config, after_projector), config.projector_config, pool)
    return Pool(pool) if pool > 1 else None


def stored_pool(config: ModelConfig, projector: Path | None) -> int:
    """N of the N x N patches whose means a projector is made for: those of the run that it comes from, else the
    model's."""
    return trained_on(config, projector).patch_pool
