"""`convert --hf-path`: what is recognised, what is refused in one sentence, and what a dry run says."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.config import ModelConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.weights.quantize import QuantConfig
from mlx_llama3v.weights.storage import Storage
from mlx_llama3v.weights.vlm import convert_vlm, open_vlm, plan_vlm
from tests.hf_edit import copy, edit, edit_json
from tests.hf_llava import make_llava

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("hf") / "a-misleading-clip-name")


def sentence(directory: Path, target: Path) -> str:
    """The refusal; nothing may have been written."""
    with pytest.raises(CheckpointError) as caught:
        convert_vlm(directory, target)
    assert not target.exists() and not list(target.parent.glob(".*"))
    return str(caught.value)


def test_clip_is_refused_by_its_config(llava: Path, tmp_path: Path) -> None:
    clip = copy(llava, tmp_path / "siglip-llama")
    vision = json.loads((clip / "config.json").read_text())["vision_config"]
    edit_json(clip / "config.json", vision_config=vision | {"model_type": "clip_vision_model"})
    assert "CLIP" in sentence(clip, tmp_path / "m") and "SigLIP" in sentence(clip, tmp_path / "m")


@pytest.mark.parametrize("kind", ["siglip2_vision_model", "dinov2"])
def test_other_towers_are_refused_by_their_config(kind: str, llava: Path, tmp_path: Path) -> None:
    other = copy(llava, tmp_path / "siglip-llama")
    vision = json.loads((other / "config.json").read_text())["vision_config"]
    edit_json(other / "config.json", vision_config=vision | {"model_type": kind})
    said = sentence(other, tmp_path / "m")
    assert kind in said and "fixed resolution" in said and "--vision and --llm" in said


def test_clip_is_refused_by_its_keys(llava: Path, tmp_path: Path) -> None:
    clip = edit(
        copy(llava, tmp_path / "x"), lambda w: w.update({"vision_tower.embeddings.class_embedding": mx.zeros(32)})
    )
    assert "CLIP" in sentence(clip, tmp_path / "m")


@pytest.mark.parametrize("kind", ["qwen2_vl", "llama", "minicpmv"])
def test_unknown_kinds_are_refused_with_what_would_work(kind: str, llava: Path, tmp_path: Path) -> None:
    other = copy(llava, tmp_path / "x")
    edit_json(other / "config.json", model_type=kind)
    text = sentence(other, tmp_path / "m")
    assert kind in text and "--vision and --llm" in text


def test_a_decoder_that_is_not_llama_is_refused(llava: Path, tmp_path: Path) -> None:
    other = copy(llava, tmp_path / "x")
    text = json.loads((other / "config.json").read_text())["text_config"]
    edit_json(other / "config.json", text_config=text | {"model_type": "qwen2"})
    assert "qwen2" in sentence(other, tmp_path / "m")


def test_missing_left_over_and_misshapen_tensors_are_named_at_once(llava: Path, tmp_path: Path) -> None:
    def spoil(weights: dict[str, mx.array]) -> None:
        weights.pop("multi_modal_projector.linear_1.weight".replace("multi", "multi"))
        weights["stray.weight"] = mx.zeros(3)
        name = next(name for name in weights if name.endswith("embed_tokens.weight"))
        weights[name] = weights[name][:-1]

    # linear_1.bias keeps the family recognisable
    text = sentence(edit(copy(llava, tmp_path / "x"), spoil), tmp_path / "m")
    assert "missing projector.body.linear_1.weight" in text
    assert "left over stray.weight" in text and "embed_tokens.weight is" in text


def test_dry_run_names_every_tensor_and_writes_nothing(llava: Path, tmp_path: Path) -> None:
    before = sorted(llava.iterdir())
    plan = plan_vlm(open_vlm(llava, Storage(dtype="float16")))
    names = set(mx.load(str(llava / "model.safetensors")))
    assert set(plan.renamed.names) | set(plan.renamed.skipped) == names
    assert plan.name == "hf-llava" and not plan.renamed.unknown and not plan.problems
    assert plan.bytes_after < plan.bytes_before
    assert sorted(llava.iterdir()) == before


def test_quantized_conversion_keeps_tower_and_projector(llava: Path, tmp_path: Path) -> None:
    report = convert_vlm(llava, tmp_path / "m", quantize=QuantConfig(4, 32))
    assert report.quantized and all(layer.name.startswith("language_model.") for layer in report.quantized)
    config = load_config(tmp_path / "m")
    assert config.quantization == {"bits": 4, "group_size": 32, "mode": "affine"}


def test_the_layout_is_a_value_in_config_json(llava: Path, tmp_path: Path) -> None:
    convert_vlm(llava, tmp_path / "m")
    written = json.loads((tmp_path / "m" / "config.json").read_text())
    assert written["prompt_layout"]["user"] == "<|start_header_id|>user<|end_header_id|>\n\n{images}{text}<|eot_id|>"
    assert ModelConfig.from_dict(written) == load_config(tmp_path / "m")
    convert_vlm(llava, tmp_path / "v", prompt_layout="vicuna")
    assert load_config(tmp_path / "v").prompt_layout.assistant == "ASSISTANT:"
    other = copy(llava, tmp_path / "unreadable")
    (other / "chat_template.jinja").write_text("{{ messages | length }}")
    assert "choose one with --prompt-layout" in sentence(other, tmp_path / "u")
    assert open_vlm(other, Storage(), prompt_layout="vicuna").config.prompt_layout == LAYOUTS["vicuna"]
    with pytest.raises(CheckpointError, match="prompt layout is 'nonsense'"):
        open_vlm(llava, Storage(), prompt_layout="nonsense")
