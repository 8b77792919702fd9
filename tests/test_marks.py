"""Stores and runs of another vision tower, or another decoder, of the same sizes: what no shape tells apart."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_llama3v import inference
from mlx_llama3v.checkpoint import check_run, same_decoder, tower_marks
from mlx_llama3v.demo.dataset import DataSet, draw
from mlx_llama3v.embeddings import tools
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.encoder import load_encoder
from mlx_llama3v.errors import CheckpointError, StoreError
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data
from mlx_llama3v.tensors import marks, read_tensors, same_marks
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.export import export_hf
from mlx_llama3v.weights.fuse import fuse
from mlx_llama3v.weights.quantize import QuantConfig
from tests.command_line import Cli


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return draw(tmp_path_factory.mktemp("data"), 6, 3, 0)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("model") / "model").path


@pytest.fixture(scope="module")
def store(model: Path, data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("store") / "store"
    embed_data(model, data.captions, path, image_folder=data.images)
    return path


@pytest.fixture(scope="module")
def run(model: Path, data: DataSet, store: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("runs") / "pretrain"
    pretrain(model, data, store, path)
    return path


def pretrain(model: Path, data: DataSet, store: Path, run: Path, projector: Path | None = None) -> None:
    config = TrainConfig(iters=2, batch_size=4, val_split=0.0)
    train_stage(model, data.captions, store, run, config, projector=projector)


def changed(model: Path, prefix: str, to: Path, factor: float = 1.05) -> Path:
    """A model of the same shapes, as if this part of it had been trained on."""
    shutil.copytree(model, to)
    tensors = {
        name: value * factor if name.startswith(prefix) and value.ndim == 1 else value
        for name, value in read_tensors(to).items()
    }
    mx.eval(tensors)
    mx.save_safetensors(str(to / "model.safetensors"), tensors)
    return to


def test_weights_are_known_again_in_any_type(model: Path, tmp_path: Path) -> None:
    def decoder(path: Path) -> str:
        return marks(read_tensors(path, ("language_model.",)))

    own = tower_marks(model)
    assert 20 < len(own.split()) <= 64 and own == load_encoder(model).fingerprint()["marks"]
    assert decoder(model).split() and not same_marks(own, decoder(model))
    forms: dict[str, dict[str, Any]] = {
        "float16": {"dtype": "float16"},
        "bfloat16": {"dtype": "bfloat16"},
        "packed": {"quantize": QuantConfig(4, 32)},
    }
    for name, options in forms.items():
        other = convert(TINY / "siglip", TINY / "llama", tmp_path / name, **options).path
        assert same_marks(own, tower_marks(other)) and same_marks(own, load_encoder(other).fingerprint()["marks"])
        assert same_marks(decoder(model), decoder(other))
    for unknown in ("", None, "no numbers", {"of": "another kind"}):
        assert same_marks(unknown, own)
    assert not same_marks(own, tower_marks(changed(model, "vision_tower.", tmp_path / "other", 1.02)))


def test_another_tower_is_refused(model: Path, data: DataSet, store: Path, run: Path, tmp_path: Path) -> None:
    other = changed(model, "vision_tower.", tmp_path / "other")
    with pytest.raises(StoreError, match=r"was made with another vision tower than that of .*other, though one of the"):
        pretrain(other, data, store, tmp_path / "run")
    words = rf"learned from pictures as another vision tower.*give the model that it was trained with: {model}"
    with pytest.raises(CheckpointError, match=words):
        inference.load(other, run)
    with pytest.raises(CheckpointError, match=words):
        fuse(other, run, tmp_path / "fused")
    with pytest.raises(CheckpointError, match=words):
        export_hf(other, tmp_path / "hf", run=run, squash=True)
    embed_data(other, data.captions, tmp_path / "its", image_folder=data.images)
    with pytest.raises(CheckpointError, match=words):
        pretrain(other, data, tmp_path / "its", tmp_path / "run", projector=run)
    with pytest.raises(CheckpointError, match=words):
        embed_data(
            other,
            data.captions,
            tmp_path / "after",
            image_folder=data.images,
            after_projector=run / "projector.safetensors",
        )
    assert {path.name for path in tmp_path.iterdir()} == {"other", "its"}  # nothing else was made
    check_run(fuse(model, run, tmp_path / "fused"), run)  # has that tower


def test_another_decoder_is_told(cli: Cli, model: Path, run: Path, data: DataSet, store: Path, tmp_path: Path) -> None:
    """Its projector may serve all the same: LLaVA's recipe begins with a base model, and goes on with a chat model."""
    other = changed(model, "language_model.", tmp_path / "other")
    assert same_decoder(model, run) and not same_decoder(other, run)
    note = f"note: {run} was trained with another decoder than that of {other}"
    ask = ("generate", "--prompt", "Hello", "--max-tokens", "1", "--run", run, "--model")
    assert note in " ".join(cli(*ask, other).err.split())
    assert "note" not in cli(*ask, model).err
    fused = cli("fuse", "--model", other, "--run", run, "--output", tmp_path / "fused")
    assert fused.status == 0 and note in " ".join(fused.err.split())
    sft = ("train", "--model", other, "--stage", "sft", "--data", data.conversations, "--embeddings", store)
    trained = cli(*sft, "--projector", run, "--output", tmp_path / "sft", "--dry-run")
    assert trained.status == 0 and note in " ".join(trained.err.split())


def test_what_says_nothing_of_its_tower_is_taken(
    model: Path, data: DataSet, store: Path, run: Path, tmp_path: Path
) -> None:
    """Stores and runs of earlier versions; a store goes on, too."""
    old = shutil.copytree(store, tmp_path / "old")
    manifest = json.loads((old / "manifest.json").read_text())
    assert manifest["fingerprint"].pop("marks")
    (old / "manifest.json").write_text(json.dumps(manifest))
    pretrain(changed(model, "vision_tower.", tmp_path / "other"), data, old, tmp_path / "run")
    more = embed_data(model, data.images, old)
    assert more.summary.new and not more.damage and not tools.verify(old) and len(Store(old)) > len(Store(store))
    again = shutil.copytree(run, tmp_path / "again")
    facts = json.loads((again / "config.json").read_text())
    assert facts["store"].pop("marks") and facts.pop("decoder")
    (again / "config.json").write_text(json.dumps(facts))
    check_run(tmp_path / "other", again)
    assert same_decoder(tmp_path / "other", again)
