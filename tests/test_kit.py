"""The commands on real data: odd and broken pictures, and LLaVA-format records with their photos."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from mlx_llama3v.data.folder import folder_images
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from tests.kit import KIT

pytestmark = pytest.mark.skipif(not KIT.is_dir(), reason=f"{KIT} is absent")
RECORDS = [
    ("LLaMA-Factory/mllm_demo.json", "LLaMA-Factory"),
    ("lmms-finetune/single_image_has_text_only.json", "lmms-finetune/images"),
    ("lmms-finetune/multi_images.json", "lmms-finetune/images"),
    ("xtuner/resource/mllm_sft_multi_image_example_data.jsonl", "xtuner"),
    ("xtuner/resource/mllm_pretrain_image_example_data.jsonl", "xtuner"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("kit") / "model").path


def test_every_picture_is_stored_or_listed_with_its_reason(model: Path, tmp_path: Path) -> None:
    report = embed_data(model, KIT / "images", tmp_path / "store")
    names = set(folder_images(KIT / "images")[0])
    store = Store(tmp_path / "store")
    assert len(names) > 40
    assert names == set(store.names) | set(store.failures)
    assert not set(store.names) & set(store.failures)
    assert all(reason.strip() and "\n" not in reason for reason in store.failures.values())
    broken = {name for name in names if "pillow_corrupt" in name}
    assert len(broken & set(store.failures)) >= 8
    assert len(store.names) > 40 and report.summary.failed == len(store.failures)


@pytest.mark.parametrize(("data", "folder"), RECORDS)
def test_both_stages_run_on_llava_records(model: Path, tmp_path: Path, data: str, folder: str) -> None:
    file = KIT / "llava" / data
    embed_data(model, file, tmp_path / "store", image_folder=KIT / "llava" / folder)
    settings = {"iters": 2, "batch_size": 2, "save_every": 0, "compile": False}
    for stage, projector in (("pretrain", None), ("sft", tmp_path / "pretrain")):
        result = train_stage(
            model, file, tmp_path / "store", tmp_path / stage, TrainConfig(stage=stage, **settings), projector=projector
        )
        assert result.steps == 2 and result.rows >= 1
    lines = (tmp_path / "sft" / "metrics.jsonl").read_text().splitlines()
    assert all(json.loads(line)["loss"] > 0 for line in lines if "loss" in json.loads(line))
