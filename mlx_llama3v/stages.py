"""The recipe's steps as one call each, from paths to results: what the commands and the demo share."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v import estimate
from mlx_llama3v.ahead import Ahead, AheadConfig
from mlx_llama3v.checkpoint import load_config, load_model, load_projector, load_run
from mlx_llama3v.config import ModelConfig
from mlx_llama3v.data.dataset import DataSet, read_data
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.data.sources import Refused
from mlx_llama3v.embeddings.codec import DEFAULT as DEFAULT_CODEC
from mlx_llama3v.embeddings.damage import Losses
from mlx_llama3v.embeddings.embed import EmbedProgress, EmbedSummary, embed_images
from mlx_llama3v.embeddings.ranks import Ranks
from mlx_llama3v.embeddings.rolling import NoPictures
from mlx_llama3v.embeddings.sample import evenly
from mlx_llama3v.embeddings.shard import write_atomic
from mlx_llama3v.embeddings.store import MANIFEST, Reader, Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.encoder import load_encoder, load_post, stored_pool
from mlx_llama3v.errors import DataError, RunError, StoreError
from mlx_llama3v.estimate import Estimate, Form
from mlx_llama3v.hub import resolve
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import machine, peak_memory, wire_memory
from mlx_llama3v.projected import projector_digest, stored_config
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks
from mlx_llama3v.train.trainer import TrainResult, train

# Names among a model's sources that tell of a trained projector: a fused run, a finished model, a projector given.
TRAINED = frozenset({"run", "model", "projector"})
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
    read = read_data(data, allow_outside=allow_outside)
    pictures = read.pictures(image_folder, allow_outside=allow_outside)
    encoder = load_encoder(model, max_slices=max_slices, offline=offline)
    config = load_config(resolve(model, offline=offline))
    post = load_post(config, pool, after_projector)
    left = estimate.missing(pictures, output, encoder, codec, post)
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
    if (output / "config.json").exists():
        raise StoreError(f"{output} holds a model or a run; choose another directory for the store.")
    read = read_data(data, allow_outside=allow_outside)
    images = read.pictures(image_folder, allow_outside=allow_outside)
    if not images:
        why = f"; the first problem: {read.problems[0]}" if read.problems else ""
        raise DataError(f"{data} names no picture, so there is nothing to embed{why}.")
    encoder = load_encoder(model, max_slices=max_slices, offline=offline)
    config = load_config(resolve(model, offline=offline))
    post = load_post(config, pool, after_projector)
    losses = losses or Losses()
    ranks = Ranks(output, losses)
    mine = ranks.share(images)
    with StoreWriter(ranks.target, encoder.fingerprint(), codec, shard_bytes, post, losses=losses) as writer:
        if check_disk:
            todo = {name: source for name, source in mine.items() if not writer.has(name)}
            form = _form(config, max_slices, pool, after_projector)
            scanned = None if progress is None else partial(_tell_scan, progress)
            estimate.require_room(todo, config.image, form, codec, output, ranks.size, scanned)
        if not writer.fitted and (fit := ranks.fit()):
            writer.fit(fit)
        summary = embed_images(
            mine.items(),
            encoder,
            writer,
            batch_size=batch_size,
            workers=workers,
            progress=progress,
            whole=[*images.values()],
        )
    ranks.collect()
    store = Store(output)
    failed = [Problem(name, reason) for name, reason in store.failures.items() if name in images]
    problems = (*read.problems, *failed)
    report = EmbedReport(output, summary, store.info(), problems, tuple(losses.sentences), losses.left(store))
    if ranks.rank == 0:
        write_atomic(output / SUMMARY, [(json.dumps(report.to_dict(), indent=2) + "\n").encode()])
    return report


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


def train_stage(
    model: str | Path,
    data: Path,
    embeddings: Path | None,
    output: Path,
    config: TrainConfig,
    *,
    projector: Path | None = None,
    ahead: AheadConfig | None = None,
    image_folder: Path | None = None,
    resume: bool = False,
    offline: bool = False,
    callbacks: Callbacks | None = None,
    dry_run: bool = False,
) -> TrainResult:
    """Run one stage on the records of `data`, whose pictures are in the store `embeddings`; text alone needs none.

    `projector`: the run (or its projector.safetensors) whose projector to start from; stage sft needs one where the
    model's is fresh.
    `ahead`: `embeddings` is not there yet; a second process fills it as training reads, from pictures that are looked
    for as `embed` does (`image_folder`). Records that cannot be read are among the result's problems. `dry_run`: see
    trainer.train. Raises UserError.
    """
    wire_memory()
    path = resolve(model, offline=offline)
    if config.stage == "sft" and projector is None and not TRAINED & load_config(path).sources.keys():
        raise RunError("stage sft keeps the projector frozen; give a trained one with --projector RUN.")
    records = read_data(data)
    if not records.records:
        why = f"; the first problem: {records.problems[0]}" if records.problems else ""
        raise DataError(f"{data} has no record to train on{why}.")
    if config.stage == "pretrain" and not any(record.images for record in records.records):
        raise DataError(
            f"no record of {data} has a picture, from which stage pretrain learns; expected them under image or images."
        )
    with ExitStack() as stack:
        store: Reader
        if not any(record.images for record in records.records):
            store = NoPictures(output)
        elif embeddings is None:
            raise RunError(f"{data} has pictures; give --embeddings STORE, or --embed-ahead to embed while training.")
        elif ahead is None:
            if not (embeddings / MANIFEST).exists():  # moved since, or filled by --embed-ahead for another run alone
                raise StoreError(
                    f"{embeddings} is no embedding store; make it with `llama3v-mlx embed`, or give another one with "
                    "--embeddings."
                )
            store = Store(embeddings)
        else:
            if mx.distributed.init().size() > 1:
                raise RunError("--embed-ahead trains in one process; run `llama3v-mlx embed` first for several.")
            ahead = replace(ahead, pool=ahead.pool or stored_pool(load_config(path), projector))
            images = _files(records, image_folder)
            store = stack.enter_context(Ahead(embeddings, ahead, images, resume=resume)).store
        result = _train(path, store, records.records, output, config, projector, resume, callbacks, str(data), dry_run)
    unseen = tuple(Problem(name, why) for name, why in getattr(store, "blank", {}).items())  # of a RollingStore
    return replace(result, problems=(*records.problems, *result.problems), unseen=unseen)


def _files(data: DataSet, image_folder: Path | None) -> dict[str, Path]:
    """Where the pictures lie, each in a file of its own, as the process ahead needs them. Raises RunError."""
    found: dict[str, Path] = {}
    for name, source in data.pictures(image_folder).items():
        if isinstance(source, Refused):
            raise RunError(f"{data.path}: {name!r} cannot be embedded ahead: {source.reason}.")
        if not isinstance(source, Path):
            raise RunError(f"{data.path} holds its pictures itself ({source}); run `llama3v-mlx embed` on it first.")
        found[name] = source
    return found


def _train(
    path: Path,
    store: Reader,
    records: Sequence[Record],
    output: Path,
    config: TrainConfig,
    projector: Path | None,
    resume: bool,
    callbacks: Callbacks | None,
    data: str,
    dry_run: bool,
) -> TrainResult:
    """Load the model, and train it on a store that fits it."""
    model_config = load_config(path)
    if not isinstance(store, NoPictures):
        _check_store(store, store.path, model_config, path)
        if config.stage == "sft" and not config.tune_projector:
            _check_pool(store, stored_pool(model_config, projector))
    llama3v = load_model(path)
    if projector is not None:
        _take_projector(llama3v, projector)
    if "projector" in store.manifest.post:
        _use_stored_tokens(llama3v, store, config)
    tokens = Tokens.load(path, model_config.marker_ids, model_config.eos_token_ids, model_config.prompt_layout)
    notes = {"model_path": str(path.resolve()), "data_file": data, "projector": str(projector or "")}
    return train(
        config,
        llama3v,
        tokens,
        store,
        records,
        output,
        resume=resume,
        callbacks=callbacks,
        notes=notes,
        dry_run=dry_run,
    )


def _check_pool(store: Reader, made_for: int) -> None:
    """Refuse embeddings of another pooling than a frozen projector learned from. Raises StoreError."""
    held = store.manifest.post.get("pool", 1)
    if held != made_for:
        raise StoreError(
            f"{store.path} holds means over {held} x {held} patches, but the projector was trained on {made_for} x "
            f"{made_for}; embed with --pool {made_for}, or let it learn on: --tune-projector."
        )


def _take_projector(model: Llama3V, projector: Path) -> None:
    """Start from the projector of a run, or from a file of one. Raises UserError."""
    if projector.is_file():
        model.projector = load_projector(model.config, projector)
        return
    if (projector / "adapters.safetensors").is_file():  # a new run would hold its own changes to the decoder alone
        raise RunError(
            f"{projector} trained the decoder, too; merge it (`llama3v-mlx fuse`) and train the result, without "
            f"--projector, or take the projector alone: --projector {projector / 'projector.safetensors'}."
        )
    load_run(model, projector)


def _use_stored_tokens(model: Llama3V, store: Reader, config: TrainConfig) -> None:
    """Let the model take the projector's output from the store. Raises RunError where that is another projector's."""
    if config.stage != "sft" or config.tune_projector:
        what = "--tune-projector" if config.tune_projector else f"stage {config.stage}"
        raise RunError(f"{store.path} holds the output of a projector; {what} trains one and needs its input.")
    theirs, ours = store.manifest.post["projector"], projector_digest(model.projector)
    if theirs != ours:
        raise RunError(
            f"{store.path} holds the output of projector {theirs[:12]}, but --projector gives {ours[:12]}; "
            "use the run that it was embedded with, or embed again."
        )
    model.config = replace(model.config, projector_config=stored_config(model.config.projector_config))


def _check_store(store: Reader, path: Path, config: ModelConfig, model: Path) -> None:
    """Refuse embeddings of another tower, layer or pixel preprocessing, without loading the tower.

    The tower's weights are not compared: that would mean to read and hash them, which `embed` did. Nor is the version
    of image processing: what an older one stored is within a few grey levels of what chat will see.
    """
    if len(store) == 0:
        raise StoreError(f"{path} is an empty store; run `llama3v-mlx embed` first.")
    expected = {
        "layer": config.vision_feature_layer,
        "vision": asdict(config.vision_config),
        "image": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config.image).items()},
    }
    for key, value in expected.items():
        found = store.manifest.fingerprint.get(key)
        if found != value:
            raise StoreError(f"{path} was made with {key} {found}, but {model} has {value}; embed with that model.")
    mode = store.manifest.fingerprint.get("tiling", {}).get("mode", config.tiling.mode)
    if mode != config.tiling.mode:
        raise StoreError(
            f"{path} holds pictures as {mode}, but {model} takes them as {config.tiling.mode}; embed again."
        )
