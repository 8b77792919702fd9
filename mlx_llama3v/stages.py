"""A stage of training in one call, from paths to a run: what `train` and the demo share."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path

import mlx.core as mx

from mlx_llama3v.ahead import Ahead, AheadConfig
from mlx_llama3v.checkpoint import check_run, load_config, load_model, load_projector, load_run, tower_marks
from mlx_llama3v.config import ModelConfig
from mlx_llama3v.data.dataset import DataSet, read_data
from mlx_llama3v.data.sources import Refused
from mlx_llama3v.embeddings.rolling import NoPictures
from mlx_llama3v.embeddings.store import MANIFEST, Reader, Store
from mlx_llama3v.encoder import stored_pool
from mlx_llama3v.errors import DataError, RunError, StoreError
from mlx_llama3v.hub import resolve
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import wire_memory
from mlx_llama3v.projected import projector_digest, stored_config
from mlx_llama3v.tensors import MARKS, same_marks
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks
from mlx_llama3v.train.trainer import TrainResult, train


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
    for as `embed` does (`image_folder`). Records that cannot be read are among the problems that are told before
    step 1. `dry_run`: see trainer.train. Raises UserError.
    """
    wire_memory()
    path = resolve(model, offline=offline)
    if config.stage == "sft" and projector is None and load_config(path).untrained:
        raise RunError("stage sft keeps the projector frozen; give a trained one with --projector RUN.")
    records = read_data(data)
    if not records.records:
        why = f"; the first problem: {records.problems[0]}" if records.problems else ""
        if records.held and not why:
            why = (
                ": its pictures have no captions (a.txt beside a.jpg, or file_name and text in metadata.jsonl or .csv)"
            )
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
                    f"{embeddings} is no embedding store; make it with `llama3v-mlx embed`, give another one with "
                    "--embeddings, or encode while training: --embed-ahead."
                )
            store = Store(embeddings)
        else:
            if mx.distributed.init().size() > 1:
                raise RunError("--embed-ahead trains in one process; run `llama3v-mlx embed` first for several.")
            ahead = replace(ahead, pool=ahead.pool or stored_pool(load_config(path), projector))
            images = _files(records, image_folder)
            store = stack.enter_context(Ahead(embeddings, ahead, images, resume=resume)).store
        return _train(path, store, records, output, config, projector, resume, callbacks, dry_run)


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
    records: DataSet,
    output: Path,
    config: TrainConfig,
    projector: Path | None,
    resume: bool,
    callbacks: Callbacks | None,
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
        check_run(path, projector)
        _take_projector(llama3v, projector)
    if "projector" in store.manifest.post:
        _use_stored_tokens(llama3v, store, config)
    tokens = Tokens.load(path, model_config.marker_ids, model_config.eos_token_ids, model_config.prompt_layout)
    notes = {
        "model_path": str(path.resolve()),
        "data_file": str(records.path.resolve()),
        "projector": str(projector.resolve()) if projector else "",
    }
    return train(
        config,
        llama3v,
        tokens,
        store,
        records.records,
        output,
        problems=records.problems,
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

    Of the tower's weights some are compared (tensors.marks): to read and hash them all takes its time, which `embed`
    takes. Nor is the version of image processing: what an older one stored is within a few grey levels of what chat
    will see.
    """
    if len(store) == 0:
        raise StoreError(f"{path} is an empty store; run `llama3v-mlx embed` first.")
    expected = {
        "layer": config.vision_feature_layer,
        "vision": asdict(config.vision_config),
        "image": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(config.image).items()},
    }
    made = replace(store.manifest, fingerprint={key: store.manifest.fingerprint.get(key) for key in expected})
    if what := made.differences({"fingerprint": expected}):
        raise StoreError(f"{path} was made for another model than {model}: {what}; embed with this one.")
    if not same_marks(store.manifest.fingerprint.get(MARKS), tower_marks(model)):
        raise StoreError(
            f"{path} was made with another vision tower than that of {model}, though one of the same sizes; embed with "
            "this one, or train the model that it was made with."
        )
    mode = store.manifest.fingerprint.get("tiling", {}).get("mode", config.tiling.mode)
    if mode != config.tiling.mode:
        raise StoreError(
            f"{path} holds pictures as {mode}, but {model} takes them as {config.tiling.mode}; embed again."
        )
