"""`export --format hub`: the card says what the model is made of, and an upload is one call; no network here."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import huggingface_hub
import mlx.core as mx
import pytest
from huggingface_hub import ModelCard
from typer.testing import CliRunner

from mlx_llama3v.checkpoint import load_config, load_model
from mlx_llama3v.cli.app import build
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import parameters, read_tensors
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.hub import export_hub
from mlx_llama3v.weights.licences import licence_of
from tests.hf_edit import contents, edit_json
from tests.hf_llama import make_llama
from tests.hf_siglip import make_siglip
from tests.test_export_peft import make_run

pytestmark = pytest.mark.usefixtures("quick_disk")


class FakeApi:
    """What HfApi would have been told."""

    calls: list[tuple[str, dict[str, Any]]]

    def __init__(self, **kwargs: Any) -> None:
        pass

    def create_repo(self, repo: str, **kwargs: Any) -> None:
        self.calls.append((repo, kwargs))

    def upload_folder(self, *, repo_id: str, folder_path: Path, **kwargs: Any) -> None:
        self.calls.append((repo_id, contents(folder_path)))


@pytest.fixture
def api(monkeypatch: pytest.MonkeyPatch) -> type[FakeApi]:
    FakeApi.calls = []
    monkeypatch.setattr(huggingface_hub, "HfApi", FakeApi)
    return FakeApi


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    vision, llm = make_siglip(folder / "siglip"), make_llama(folder / "llama")
    (llm / "README.md").write_text("---\nlanguage: en\nlicense: llama3.1\n---\n# A Llama\n")
    path = convert(vision, llm, folder / "model", projector="mlp").path
    names = {**load_config(path).sources, "vision": "google/siglip-base-patch16-224", "llm": "meta-llama/Llama-3.1-8B"}
    edit_json(path / "config.json", sources={**names, "vision_licence": "apache-2.0"})
    return path


def trained(folder: Path, model: Path) -> Path:
    """A run with metrics, as `train` leaves it."""
    run = make_run(folder / "sft-1", model)
    mx.save_safetensors(str(run / "projector.safetensors"), parameters(load_model(model).projector))
    config = {"train": {"stage": "sft", "learning_rate": 1e-4, "lora_rank": 3}, "steps": 40, "data": {"rows": 90}}
    (run / "config.json").write_text(json.dumps(config))
    lines = [{"step": 20, "loss": 2.0}, {"step": 40, "loss": 1.5}, {"step": 40, "eval_loss": 1.6, "eval_blind": 2.5}]
    (run / "metrics.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return run


def test_the_card_tells_bases_recipe_metrics_and_licences(model: Path, api: type[FakeApi], tmp_path: Path) -> None:
    out = export_hub(model, tmp_path / "out", repo="me/llama-sees", run=trained(tmp_path, model))
    card = ModelCard.load(out / "README.md")
    assert card.data.base_model == ["google/siglip-base-patch16-224", "meta-llama/Llama-3.1-8B"]
    assert card.data.license == "llama3.1" and card.data.library_name == "mlx"
    assert card.data.pipeline_tag == "image-text-to-text"
    text = card.text
    for expected in (
        *("# llama-sees", "--model me/llama-sees", "`sft-1`", "| stage | sft |", "| learning rate | 0.0001 |"),
        *("| steps | 40 |", "| rows | 90 |", "| training loss | 1.5000 |", "| held out | 1.6000 |"),
        *("| held out, without pictures | 2.5000 |", "`apache-2.0`", "`llama3.1`", "Built with Llama"),
    ):
        assert expected in text, expected
    assert load_model(out)  # the run is merged: a whole model


def test_upload_is_what_was_written(model: Path, api: type[FakeApi], tmp_path: Path) -> None:
    before = contents(model)
    out = export_hub(model, tmp_path / "out", repo="me/m", private=True)
    (created, options), (uploaded, files) = api.calls
    assert created == uploaded == "me/m" and options == {"private": True, "exist_ok": True}
    assert files == contents(out) and {n: v for n, v in files.items() if n != "README.md"} == {
        n: v for n, v in before.items() if n != "README.md"
    }
    assert contents(model) == before  # hard links: the source keeps its own card


def test_dry_run_uploads_nothing(model: Path, api: type[FakeApi], tmp_path: Path) -> None:
    arguments = ["export", "--model", str(model), "-o", str(tmp_path / "out"), "--format", "hub", "--repo", "me/m"]
    result = CliRunner().invoke(build(["export"]), [*arguments, "--dry-run"])
    assert result.exit_code == 0 and "nothing was uploaded" in result.output.replace("\n", " ")
    assert not api.calls and load_model(tmp_path / "out")
    assert "random" in (tmp_path / "out" / "README.md").read_text()  # nothing was trained, and the card says so


def test_what_cannot_be_uploaded_is_one_sentence(
    model: Path, api: type[FakeApi], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub.errors import LocalTokenNotFoundError

    with pytest.raises(CheckpointError, match="owner/name"):
        export_hub(model, tmp_path / "out", repo="no-owner")

    def refuse(*args: Any, **kwargs: Any) -> None:
        raise LocalTokenNotFoundError("Token is required, but no token found.\nTo login, ...")

    monkeypatch.setattr(FakeApi, "create_repo", refuse)
    with pytest.raises(CheckpointError, match=r"Token is required.*so `hf upload me/m \S+/out \.` goes on"):
        export_hub(model, tmp_path / "out", repo="me/m")
    with pytest.raises(CheckpointError, match="new or empty"):
        export_hub(model, tmp_path / "out", repo="me/m")


def test_a_model_in_the_hubs_cache_is_links(model: Path, tmp_path: Path) -> None:
    """The cache keeps blobs, and a snapshot of relative links to them: those end where they are moved."""
    blobs, snapshot = tmp_path / "blobs", tmp_path / "snapshots" / "sha"
    shutil.copytree(model, blobs)
    snapshot.mkdir(parents=True)
    for path in blobs.iterdir():
        (snapshot / path.name).symlink_to(Path("../..") / "blobs" / path.name)
    out = export_hub(snapshot, tmp_path / "out", repo="me/m", dry_run=True)
    assert not any(path.is_symlink() for path in out.rglob("*"))
    assert read_tensors(out).keys() == read_tensors(model).keys()


def test_licences_are_read_and_known(tmp_path: Path) -> None:
    assert licence_of("google/siglip2-base-patch16-224") == "apache-2.0"
    assert licence_of("meta-llama/Meta-Llama-3-8B-Instruct") == "llama3"
    assert licence_of("meta-llama/Llama-3.2-1B") == "llama3.2"
    assert licence_of("someone/llama") == "unknown"
    (tmp_path / "README.md").write_text("---\nlicense: other\nlicense_name: llama3\n---\n")
    assert licence_of("someone/llama", tmp_path) == "llama3"
    (tmp_path / "README.md").write_text("no front matter\nlicense: mit\n")
    assert licence_of("someone/llama", tmp_path) == "unknown"
