"""Stored in any form, a picture trains and answers: codecs, pooling, and the projector's output."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_llama3v import inference, stages
from mlx_llama3v.checkpoint import load_config, load_model, load_run, trained_on
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.demo.dataset import DataSet, draw
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import DataError, RunError, StoreError
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data
from mlx_llama3v.tensors import load_file
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.fuse import fuse


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return draw(tmp_path_factory.mktemp("data"), 12, 9, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("model") / "model").path


def embed(model: Path, data: DataSet, output: Path, **settings: Any) -> Store:
    settings.setdefault("codec", "float16")
    embed_data(model, data.captions, output, image_folder=data.images, **settings)
    return Store(output)


def train(model: Path, data: DataSet, store: Path, output: Path, stage: str, projector: Path | None = None) -> float:
    records = data.captions if stage == "pretrain" else data.conversations
    config = TrainConfig(stage=stage, iters=3, batch_size=4, learning_rate=1e-3, val_split=0.0)
    result = train_stage(model, records, store, output, config, projector=projector)
    assert result.last is not None
    return result.last.loss


@pytest.fixture(scope="module")
def pretrained(model: Path, data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pretrained")
    embed(model, data, folder / "store")
    train(model, data, folder / "store", folder / "pretrain", "pretrain")
    return folder


@pytest.mark.parametrize(("codec", "near"), [("int8", 0.01), ("int4", 0.1)])
def test_a_smaller_store_trains_as_well(
    model: Path, data: DataSet, pretrained: Path, tmp_path: Path, codec: str, near: float
) -> None:
    store = embed(model, data, tmp_path / "store", codec=codec)
    whole = Store(pretrained / "store")
    name = store.names[0]
    difference = store.read(name).patches.astype(np.float32) - whole.read(name).patches
    assert 0 < np.sqrt((difference**2).mean() / (whole.read(name).patches.astype(np.float32) ** 2).mean()) < near
    assert store.info()["tokens"] == whole.info()["tokens"]
    loss = train(model, data, tmp_path / "store", tmp_path / "run", "pretrain")
    assert loss == pytest.approx(train(model, data, pretrained / "store", tmp_path / "whole", "pretrain"), rel=0.02)


def test_a_pooled_store_trains_and_answers_pooled(model: Path, data: DataSet, pretrained: Path, tmp_path: Path) -> None:
    store = embed(model, data, tmp_path / "store", pool=2)
    whole = Store(pretrained / "store")
    assert store.info()["tokens"] < whole.info()["tokens"] / 3 and store.info()["post"] == {"pool": 2}
    train(model, data, tmp_path / "store", tmp_path / "run", "pretrain")
    assert json.loads((tmp_path / "run" / "config.json").read_text())["store"]["post"] == {"pool": 2}
    session = inference.load(model, tmp_path / "run")
    assert session.encoder is not None and session.encoder.pool == 2
    name = store.names[0]
    fresh = session.encoder.embed(data.images / name)
    assert fresh.layout == store.layout(name)
    np.testing.assert_allclose(fresh.patches, store.read(name).patches, rtol=2**-10, atol=2e-3)
    assert inference.load(model, pretrained / "pretrain").encoder.pool == 1  # type: ignore[union-attr]
    # What was made of its means is not fed with single patches, nor the other way round.
    assert embed(model, data, tmp_path / "after", after_projector=tmp_path / "run").manifest.post["pool"] == 2
    train(model, data, tmp_path / "after", tmp_path / "sft", "sft", tmp_path / "run")
    with pytest.raises(StoreError, match=r"means over 2 x 2 patches, but the projector was trained on 1 x 1"):
        train(model, data, tmp_path / "store", tmp_path / "a", "sft", pretrained / "pretrain")
    file = tmp_path / "run" / "projector.safetensors"
    with pytest.raises(StoreError, match=r"means over 1 x 1 patches, but the projector was trained on 2 x 2"):
        train(model, data, pretrained / "store", tmp_path / "a", "sft", file)


def test_a_run_sees_as_many_slices_as_its_store(model: Path, data: DataSet, pretrained: Path, tmp_path: Path) -> None:
    """`embed --max-slices`, train, chat: what was trained on whole pictures is not asked about split ones."""
    embed(model, data, tmp_path / "store", max_slices=0)
    store, whole = Store(tmp_path / "store"), Store(pretrained / "store")
    name = next(name for name in whole.names if whole.layout(name).rows)
    train(model, data, tmp_path / "store", tmp_path / "run", "pretrain")
    encoder = inference.load(model, tmp_path / "run").encoder
    assert encoder is not None and encoder.embed(data.images / name).layout == store.layout(name)
    assert encoder.embed(data.images / name).layout != whole.layout(name)
    assert load_model(fuse(model, tmp_path / "run", tmp_path / "fused")).config.tiling.max_slices == 0


def test_a_store_of_another_tiling_is_refused(model: Path, data: DataSet, pretrained: Path, tmp_path: Path) -> None:
    square = convert(TINY / "siglip", TINY / "llama", tmp_path / "m", tiling=TilingConfig("squash", 0)).path
    with pytest.raises(StoreError, match=r"holds pictures as uhd, but .* takes them as squash"):
        train(square, data, pretrained / "store", tmp_path / "run", "pretrain")


def test_the_projectors_output_trains_stage_sft_alike(
    model: Path, data: DataSet, pretrained: Path, tmp_path: Path
) -> None:
    run = pretrained / "pretrain"
    store = embed(model, data, tmp_path / "store", after_projector=run)
    config = load_model(model).config
    name = store.names[0]
    layout = Store(pretrained / "store").layout(name)
    assert store.width == config.hidden_size
    assert store.layout(name).patches == sum(config.projector_config.num_tokens(grid) for grid in layout.grids)
    mine = train(model, data, tmp_path / "store", tmp_path / "sft", "sft", run)
    theirs = train(model, data, pretrained / "store", tmp_path / "plain", "sft", run)
    assert mine == pytest.approx(theirs, rel=1e-3)
    # The run is as usable as any: it holds the projector that it was made with.
    ours, given = (load_file(folder / "projector.safetensors") for folder in (tmp_path / "sft", run))
    assert ours.keys() == given.keys() and all((ours[key] == given[key]).all().item() for key in ours)
    load_run(load_model(model), tmp_path / "sft")


def test_a_run_on_a_tuned_model(model: Path, data: DataSet, pretrained: Path, tmp_path: Path) -> None:
    """What a run changed in the decoder is fused first: a run on top of it would hold its own changes alone."""
    store, tuned = pretrained / "store", tmp_path / "sft"
    with pytest.raises(RunError, match="give a trained one with --projector RUN"):
        train(model, data, store, tmp_path / "a", "sft")
    train(model, data, store, tuned, "sft", pretrained / "pretrain")
    with pytest.raises(RunError, match="trained the decoder, too; merge it"):
        train(model, data, store, tmp_path / "a", "sft", tuned)
    train(model, data, store, tmp_path / "alone", "sft", tuned / "projector.safetensors")
    fused = fuse(model, tuned, tmp_path / "fused")
    train(fused, data, store, tmp_path / "more", "sft")
    ours, given = (load_file(folder / "projector.safetensors") for folder in (tmp_path / "more", tuned))
    assert all((ours[key] == given[key]).all().item() for key in given)
    load_run(load_model(fused), tmp_path / "more")


def test_the_projectors_output_serves_that_projector_alone(
    model: Path, data: DataSet, pretrained: Path, tmp_path: Path
) -> None:
    run = pretrained / "pretrain"
    embed(model, data, tmp_path / "store", after_projector=run)
    with pytest.raises(RunError, match="holds the output of a projector; stage pretrain trains one"):
        train(model, data, tmp_path / "store", tmp_path / "a", "pretrain")
    learning = TrainConfig(stage="sft", iters=1, tune_projector=True)
    with pytest.raises(RunError, match="holds the output of a projector; --tune-projector trains one"):
        train_stage(model, data.conversations, tmp_path / "store", tmp_path / "a", learning, projector=run)
    train(model, data, pretrained / "store", tmp_path / "other", "pretrain", run)
    with pytest.raises(RunError, match=r"holds the output of projector .*, but --projector gives"):
        train(model, data, tmp_path / "store", tmp_path / "b", "sft", tmp_path / "other")
    with pytest.raises(StoreError, match="projector is None there and '"):
        embed(model, data, pretrained / "store", after_projector=run)


def test_text_alone_needs_no_store(model: Path, data: DataSet, pretrained: Path, tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "How are you?"}, {"from": "gpt", "value": "Well."}]
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"id": f"t{n}", "conversations": turns} for n in range(12)]))
    config = TrainConfig(stage="sft", iters=2, batch_size=2, val_split=0.5, steps_per_eval=1)
    result = train_stage(model, text, None, tmp_path / "run", config, projector=pretrained / "pretrain")
    assert result.last is not None and result.evaluation is not None
    assert json.loads((tmp_path / "run" / "config.json").read_text())["store"] == {}
    assert trained_on(load_config(model), tmp_path / "run") == load_config(model)
    load_run(load_model(model), tmp_path / "run")
    with pytest.raises(RunError, match="has pictures; give --embeddings"):
        train_stage(model, data.conversations, None, tmp_path / "b", config, projector=pretrained / "pretrain")


def test_no_row_is_longer_than_the_decoder_takes(model: Path, pretrained: Path, tmp_path: Path) -> None:
    turns = [
        {"from": "human", "value": "Say it."},
        {"from": "gpt", "value": "seven words are in this long sentence " * 200},
    ]
    text = tmp_path / "text.json"
    text.write_text(json.dumps([{"id": "long", "conversations": turns}]))
    config = TrainConfig(stage="sft", iters=1, batch_size=1, val_split=0.0, max_seq_length=100_000)
    with pytest.raises(DataError, match=r"more than the longest allowed \(1024\)"):
        train_stage(model, text, None, tmp_path / "run", config, projector=pretrained / "pretrain")


def test_a_store_of_another_model_is_refused_with_what_differs(model: Path, pretrained: Path) -> None:
    store, config = Store(pretrained / "store"), load_config(model)
    stages._check_store(store, store.path, config, model)
    for other, words in (
        (replace(config, vision_feature_layer=-2), "layer is -1 there and -2 here; embed"),
        (
            replace(config, vision_config=replace(config.vision_config, layer_norm_eps=0.5)),
            "vision.layer_norm_eps is .* and 0.5 here",
        ),
        (replace(config, image=replace(config.image, rescale_factor=1.0)), "image.rescale_factor is .* and 1.0 here"),
        (replace(config, tiling=replace(config.tiling, mode="squash")), r"takes them as squash"),
    ):
        with pytest.raises(StoreError, match=words):
            stages._check_store(store, store.path, other, model)
