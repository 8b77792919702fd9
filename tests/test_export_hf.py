"""`export --format hf`: transformers loads it whole, answers as we do, and converting back gives the same bytes."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.inference import load
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.export import export_hf
from mlx_llama3v.weights.quantize import QuantConfig
from mlx_llama3v.weights.vlm import convert_vlm
from tests.family_parity import answer, gap, without_stop
from tests.hf_edit import edit
from tests.hf_llama import LLAMA3_SCALING, make_llama
from tests.hf_llava import make_llava, picture
from tests.hf_siglip import make_siglip

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does the sign say?"
SQUASH = TilingConfig("squash", 0)


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("picture") / "a.png")


def own_model(directory: Path, kind: str = "mlp", tiling: TilingConfig = SQUASH, **llama: Any) -> Path:
    """A model as the recipe makes it, with a projector and markers large enough to matter."""
    vision = make_siglip(directory / "siglip")
    llm = make_llama(directory / "llama", rope_scaling=LLAMA3_SCALING, **llama)
    convert(vision, llm, directory / "model", projector=kind, tiling=tiling)

    def enlarge(weights: dict[str, mx.array]) -> None:
        for name in weights:
            if name.startswith("projector."):
                weights[name] = weights[name] * 8

    return edit(directory / "model", enlarge)


def theirs(directory: Path, image: Path) -> tuple[np.ndarray, list[int], Any]:
    """AutoProcessor and generate: logits of the prompt, the answer, and the report of loading."""
    import torch
    from transformers import AutoProcessor, LlavaForConditionalGeneration

    model, report = LlavaForConditionalGeneration.from_pretrained(
        directory, dtype=torch.float32, output_loading_info=True
    )
    processor = AutoProcessor.from_pretrained(directory, backend="pil")
    messages = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": QUESTION}]}]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    inputs = processor(text=text, images=Image.open(image), return_tensors="pt", add_special_tokens=False)
    with torch.no_grad():
        logits = model.eval()(**inputs).logits[0].numpy()
        out = model.generate(**inputs, max_new_tokens=8, pad_token_id=0)
    return logits, out[0, inputs["input_ids"].shape[1] :].tolist(), report


def check_equal(ours: Path, exported: Path, image: Path) -> None:
    logits, tokens, report = theirs(exported, image)
    assert not report["missing_keys"] and not report["unexpected_keys"] and not report["mismatched_keys"]
    expected, answered, _ = answer(ours, image, QUESTION)
    assert logits.shape == expected.shape
    assert gap(expected, logits) <= 1e-4
    assert answered == without_stop(tokens, load(ours).tokens.stop)


@pytest.mark.parametrize("kind", ["mlp", "linear"])
@pytest.mark.parametrize("tie", [False, True])
def test_our_own_model_in_transformers_and_back(kind: str, tie: bool, image: Path, tmp_path: Path) -> None:
    model = own_model(tmp_path, kind, tie=tie)
    exported = export_hf(model, tmp_path / "hf")
    check_equal(model, exported, image)
    convert_vlm(exported, tmp_path / "back")
    assert load_config(tmp_path / "back") == load_config(model)
    same_tensors(model, tmp_path / "back")


def same_tensors(one: Path, other: Path) -> None:
    a, b = read_tensors(one), read_tensors(other)
    assert a.keys() == b.keys()
    for name, value in a.items():
        assert value.dtype == b[name].dtype and mx.array_equal(value, b[name]).item(), name


@pytest.mark.parametrize("strategy", ["full", "default"])
def test_a_converted_llava_in_transformers_and_back(strategy: str, image: Path, tmp_path: Path) -> None:
    convert_vlm(make_llava(tmp_path / "source", strategy=strategy), tmp_path / "model")
    exported = export_hf(tmp_path / "model", tmp_path / "hf")
    check_equal(tmp_path / "model", exported, image)
    convert_vlm(exported, tmp_path / "back")
    same_tensors(tmp_path / "model", tmp_path / "back")
    # what another program wrote comes back as tensors, too
    for name, value in read_tensors(tmp_path / "source").items():
        if "vision_tower" not in name:
            assert mx.array_equal(value, read_tensors(exported)[name]).item(), name


def test_what_other_readers_need_is_in_the_config(tmp_path: Path) -> None:
    """Traps 1, 2, 6, 9 and 10 of the way out: both rope spellings, no head, "full", the classic names."""
    exported = export_hf(own_model(tmp_path, layers=3), tmp_path / "hf")
    config = json.loads((exported / "config.json").read_text())
    text = config["text_config"]
    assert text["rope_theta"] == text["rope_parameters"]["rope_theta"] == 500000.0
    assert text["rope_scaling"]["factor"] == text["rope_parameters"]["factor"] == 8.0
    assert text["tie_word_embeddings"] is False and config["tie_word_embeddings"] is False
    assert config["vision_feature_select_strategy"] == "full"
    generation = json.loads((exported / "generation_config.json").read_text())
    assert set(load_config(tmp_path / "model").marker_ids) <= set(generation["suppress_tokens"])
    assert config["vision_config"]["vision_use_head"] is False
    names = set(read_tensors(exported))
    assert not [name for name in names if ".head." in name]
    assert {name.split(".")[0] for name in names} == {"vision_tower", "multi_modal_projector", "language_model"}
    assert all(n.startswith("vision_tower.vision_model.") for n in names if n.startswith("vision_tower"))


def test_the_exported_prompt_has_one_bos_and_our_markers(image: Path, tmp_path: Path) -> None:
    """Trap 13, and that a turn without a picture has no <text>."""
    from transformers import AutoProcessor

    model = own_model(tmp_path)
    processor = AutoProcessor.from_pretrained(export_hf(model, tmp_path / "hf"), backend="pil")
    shown = {"type": "image", "image": Image.open(image)}
    asked = [{"role": "user", "content": [shown, {"type": "text", "text": " hi "}]}]
    plain = [{"role": "user", "content": "hi"}]
    markers = load_config(model).marker_ids
    turns = [*asked, {"role": "assistant", "content": "ho"}, *plain]
    found = processor.apply_chat_template(turns, tokenize=True, return_dict=True)
    ids = np.array(found["input_ids"]).reshape(-1).tolist()
    bos = load(model).tokens.bos
    assert ids.count(bos) == 1
    assert [i for i in ids if i in markers] == [*markers[:2], *markers[2:4]]


def test_what_the_format_cannot_hold_is_refused(tmp_path: Path) -> None:
    def sentence(model: Path) -> str:
        with pytest.raises(CheckpointError) as caught:
            export_hf(model, tmp_path / "hf")
        assert not (tmp_path / "hf").exists()
        return str(caught.value)

    assert "linear and mlp" in sentence(own_model(tmp_path / "a", "attention"))
    uhd = own_model(tmp_path / "b", tiling=TilingConfig())
    assert "--squash" in sentence(uhd)
    assert load_config(uhd).tiling.mode == "uhd"
    assert export_hf(uhd, tmp_path / "squashed", squash=True).is_dir()
    convert(
        tmp_path / "a/siglip",
        tmp_path / "a/llama",
        tmp_path / "q",
        projector="mlp",
        tiling=SQUASH,
        quantize=QuantConfig(4, 32),
    )
    assert "quantized" in sentence(tmp_path / "q")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").touch()
    with pytest.raises(CheckpointError, match="new or empty"):
        export_hf(uhd, tmp_path / "full", squash=True)


def test_markers_trained_elsewhere_are_read_back(tmp_path: Path) -> None:
    """Whoever trains the exported model further changes rows of the embedding; these are the markers then."""
    model = own_model(tmp_path)
    exported = export_hf(model, tmp_path / "hf")
    at = load_config(model).marker_ids[3]

    def train(weights: dict[str, mx.array]) -> None:
        table = weights["language_model.model.embed_tokens.weight"]
        weights["language_model.model.embed_tokens.weight"] = table.at[at].add(1.0)

    convert_vlm(edit(exported, train), tmp_path / "back")
    before, after = (read_tensors(path)["projector.markers"] for path in (model, tmp_path / "back"))
    np.testing.assert_allclose(np.array(after - before)[3], 1.0, rtol=1e-5)
    assert mx.array_equal(before[:3], after[:3]).item()


def test_a_pooled_model_is_refused(tmp_path: Path) -> None:
    from mlx_llama3v.weights.export import check_llava

    config = replace(load_config(own_model(tmp_path)), patch_pool=2)
    with pytest.raises(CheckpointError, match="2 x 2"):
        check_llava(config, tmp_path)


def test_an_export_holds_one_shard_at_a_time(tmp_path: Path) -> None:
    model = own_model(tmp_path, hidden=256, layers=8)
    total = sum(value.nbytes for value in read_tensors(model).values())
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    export_hf(model, tmp_path / "hf", shard_bytes=1 << 20)
    assert mx.get_peak_memory() - held < total / 4
