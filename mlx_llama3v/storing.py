"""From a data set to its store, one call each: what `embed`, its estimate, `store prune` and the demo share."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from mlx_llama3v import estimate
from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.config import ModelConfig
from mlx_llama3v.data.dataset import DataSet, read_data
from mlx_llama3v.data.records import Problem
from mlx_llama3v.embeddings.codec import DEFAULT as DEFAULT_CODEC
from mlx_llama3v.embeddings.damage import Losses
from mlx_llama3v.embeddings.embed import EmbedProgress, EmbedSummary, embed_images
from mlx_llama3v.embeddings.ranks import Ranks
from mlx_llama3v.embeddings.sample import evenly
from mlx_llama3v.embeddings.shard import write_atomic
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.encoder import load_encoder, load_post, stored_pool
from mlx_llama3v.errors import DamagedError, DataError, StoreError
from mlx_llama3v.estimate import Estimate, Form
from mlx_llama3v.hub import resolve
from mlx_llama3v.platform import machine, peak_memory
from mlx_llama3v.source import Source

SUMMARY = "summary.json"  # in a store: what the last `embed` did


@dataclass(frozen=True)
class EmbedReport:
    """What `embed_data` did; `info` describes the store as it is now, `problems` what is not in it."""

    store: Path
    summary: EmbedSummary
    info: dict[str, Any]
    problems: tuple[Problem, ...]
    damage: tuple[str, ...]  # a sentence a shard that was set aside
    lost: int  # names that these shards held and the store has no more

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready: what was done, at which rates, with how much memory, on which machine."""
        summary = self.summary
        seconds = max(summary.seconds, 1e-9)
        rates = {
            "slices_per_second": summary.slices / seconds,
            "images_per_second": (summary.new + summary.duplicates + summary.failed) / seconds,
            "waiting_share": summary.waiting_seconds / seconds,
            "padding_share": 1 - summary.patches / max(summary.rows, 1) if summary.patches else 0.0,
        }
        known = {"peak_memory": peak_memory(), "store": self.info, "problems": len(self.problems)}
        known |= {"damage": [*self.damage], "lost": self.lost}
        return {**asdict(summary), **rates, **known, "machine": machine()}


def estimate_data(
    model: str | Path,
    data: Path,
    output: Path,
    *,
    image_folder: Path | None = None,
    allow_outside: bool = False,
    codec: str = DEFAULT_CODEC,
    pool: int | None = None,
    after_projector: Path | None = None,
    batch_size: int = 16,
    workers: int = 2,
    max_slices: int | None = None,
    offline: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> Estimate:
    """What `embed_data` with these settings would cost. Reads headers, and encodes a few batches. Raises UserError."""
    read, pictures = _pictures(data, output, image_folder, allow_outside)
    encoder = load_encoder(model, max_slices=max_slices, offline=offline)
    config = load_config(resolve(model, offline=offline))
    post = load_post(model, pool, after_projector, offline=offline)
    damage: list[DamagedError] = []
    left = estimate.missing(pictures, output, encoder, codec, post, damage)
    form = _form(config, max_slices, pool, after_projector)
    found = estimate.scan(left, config.image, progress=progress)
    volume = estimate.volume(found.sizes, form)
    readable = [source for name, source in left.items() if name not in found.unreadable]
    speed = estimate.measure(evenly(readable, 4 * batch_size), encoder, batch_size, post=post)
    free = estimate.free_bytes(output)
    fits = volume.bytes[codec] <= free
    return Estimate(
        reused=len(pictures) - len(left),
        unreadable=found.unreadable,
        problems=(*read.problems, *(Problem(name, why) for name, why in found.unreadable.items())),
        damage=tuple(error.finding for error in damage),
        volume=volume,
        speed=speed,
        seconds=estimate.duration(volume, speed, workers),
        free=free,
        codec=codec,
        max_slices=form.tiling.max_slices,
        advice="" if fits else estimate.advice(found.sizes, form, codec, free),
        scan_seconds=found.seconds,
    )


def _form(config: ModelConfig, max_slices: int | None, pool: int | None, after_projector: Path | None) -> Form:
    """How embeddings will be made and held."""
    tiling = config.tiling if max_slices is None else replace(config.tiling, max_slices=max_slices)
    projector = config.projector_config if after_projector is not None else None
    pool = pool or stored_pool(config, after_projector)
    return Form(config.vision_config, tiling, pool, projector, config.projector_config.in_dim)


def embed_data(
    model: str | Path,
    data: Path,
    output: Path,
    *,
    image_folder: Path | None = None,
    allow_outside: bool = False,
    check_disk: bool = True,
    codec: str = DEFAULT_CODEC,
    pool: int | None = None,
    after_projector: Path | None = None,
    shard_bytes: int = 512 << 20,
    batch_size: int = 16,
    workers: int = 2,
    max_slices: int | None = None,
    offline: bool = False,
    progress: Callable[[EmbedProgress], None] | None = None,
    losses: Losses | None = None,
) -> EmbedReport:
    """Encode every picture of `data` (see data.dataset.read_data) into the store `output`.

    `summary.json` in the store then says what this run did (of several processes: the first one's part).

    A store that exists goes on. Raises UserError: no such data, none that can be read, a store of another encoder, a
    model or a run in its place, a full disk.

    Args:
        allow_outside: read pictures that lie outside `image_folder`, too (data.llava.search_folders).
        check_disk: refuse to start what the disk cannot hold.
        pool: store the mean over pool x pool patches; default: the model's own (`patch_pool`).
        shard_bytes: of a shard at most, what is under way included: a kill costs that much (embeddings.embed).
        after_projector: a run (or its projector.safetensors): store that projector's output, for stage sft.
        losses: takes what the store lost to damaged shards, as soon as they are found.
    """
    read, images = _pictures(data, output, image_folder, allow_outside)
    encoder = load_encoder(model, max_slices=max_slices, offline=offline)
    config = load_config(resolve(model, offline=offline))
    post = load_post(model, pool, after_projector, offline=offline)
    losses = losses or Losses()
    ranks, made = Ranks(output, losses), encoder.fingerprint()
    mine = ranks.share(images, fingerprint=made, codec=codec, post=post.describe() if post else {})
    with StoreWriter(ranks.target, made, codec, shard_bytes, post, losses=losses, beside=ranks.common) as writer:
        if check_disk:
            todo = {name: source for name, source in mine.items() if not writer.has(name)}
            form = _form(config, max_slices, pool, after_projector)
            scanned = None if progress is None else partial(_tell_scan, progress)
            estimate.require_room(todo, config.image, form, codec, output, ranks.size, scanned)
        if not writer.fitted and (fit := ranks.fit()):
            writer.fit(fit)
        whole = [*images.values()]
        summary = embed_images(
            mine.items(), encoder, writer, batch_size=batch_size, workers=workers, progress=progress, whole=whole
        )
    ranks.collect()
    report = _report(output, summary, read, images, losses)
    if ranks.rank == 0:
        write_atomic(output / SUMMARY, [(json.dumps(report.to_dict(), indent=2) + "\n").encode()])
    return report


def _pictures(
    data: Path, output: Path, image_folder: Path | None, allow_outside: bool
) -> tuple[DataSet, Mapping[str, Source]]:
    """What is to be embedded. Raises DataError where there is nothing, StoreError where it must not go there."""
    if (output / "config.json").exists():
        raise StoreError(f"{output} holds a model or a run; choose another directory for the store.")
    if output.exists() and not output.is_dir():
        raise StoreError(f"{output} is a file; expected a directory for the store.")
    read = read_data(data, allow_outside=allow_outside)
    images = read.pictures(image_folder, allow_outside=allow_outside)
    if not images:
        why = f"; the first problem: {read.problems[0]}" if read.problems else ""
        raise DataError(f"{data} names no picture, so there is nothing to embed{why}.")
    return read, images


def _report(
    output: Path, summary: EmbedSummary, read: DataSet, images: Mapping[str, Source], losses: Losses
) -> EmbedReport:
    """What was done, and what is there now."""
    store = Store(output)
    failed = [Problem(name, reason) for name, reason in store.failures.items() if name in images]
    problems = (*read.problems, *failed)
    return EmbedReport(output, summary, store.info(), problems, tuple(losses.sentences), losses.left(store))


def _tell_scan(progress: Callable[[EmbedProgress], None], done: int, total: int) -> None:
    progress(EmbedProgress(done, total, 0, 0, 0.0, 0.0, "reading headers: all this may not fit on the disk"))


def picture_names(data: Path, *, partly: bool = False) -> list[str]:
    """Names of all pictures of a data set, as a store knows them.

    Raises DataError: nothing usable there; StoreError: only a part could be read, unless `partly`.
    """
    read = read_data(data, allow_outside=True)  # of names there are rather too many
    if read.problems and not partly:
        some = "; ".join(str(problem).rstrip(".") for problem in read.problems[:3])
        raise StoreError(
            f"{data} cannot be read in full, so pictures that it needs might be dropped: {len(read.problems):,} "
            f"{'problem' if len(read.problems) == 1 else 'problems, the first'}: {some}; mend the data, or give "
            "--force to keep only what can be read."
        )
    return [*read.names]
