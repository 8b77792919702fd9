"""Hugging Face LLaVA with SigLIP and Llama: picture file in, logits out, against transformers' own class."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from PIL import Image

from mlx_llama3v.checkpoint import load_config, load_tower
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.inference import load
from mlx_llama3v.vision.families import make_encoder
from mlx_llama3v.weights.family import SQUASH
from mlx_llama3v.weights.vlm import convert_vlm
from tests.family_parity import Answered, agree, answer, gap, greedy, prompt_logits
from tests.hf_edit import copy, edit, edit_json
from tests.hf_llava import make_llava, picture, reference

pytestmark = pytest.mark.usefixtures("quick_disk")

QUESTION = "What does the sign say?"
TOLERANCE = 1e-4
CASES: dict[str, dict[str, Any]] = {
    "layer -2, all patches": {},
    "strategy default, plain rope": {"strategy": "default", "scaled": False},
    "last layer, tied, with a head": {"layer": -1, "tie": True, "head": True},
    "counted from the front": {"layer": 1},
}


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return picture(tmp_path_factory.mktemp("picture") / "a.png")


@pytest.fixture(scope="module")
def theirs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("llava"))


@pytest.fixture(scope="module")
def model(theirs: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert_vlm(theirs, tmp_path_factory.mktemp("converted") / "model").path


@pytest.fixture(scope="module")
def expected(theirs: Path, image: Path) -> Answered:
    return reference(theirs, image, QUESTION)


@pytest.mark.parametrize("case", CASES)
def test_logits_and_greedy_answer(case: str, image: Path, tmp_path: Path) -> None:
    source = make_llava(tmp_path / "hf", **CASES[case])
    convert_vlm(source, tmp_path / "model")
    agree(answer(tmp_path / "model", image, QUESTION), reference(source, image, QUESTION))


LAYOUTS = {
    "classic": {"vision_tower.": "vision_tower.vision_model."},
    "4.52": {
        "vision_tower.": "model.vision_tower.vision_model.",
        "multi_modal_projector.": "model.multi_modal_projector.",
        "language_model.model.": "model.language_model.",
        "language_model.lm_head.": "lm_head.",
    },
    "fresh": {},
}


def canonical(name: str) -> str:
    """A name of any of the three layouts -> that of a fresh save of transformers 5."""
    name = name.replace("model.vision_tower.", "vision_tower.").replace("vision_tower.vision_model.", "vision_tower.")
    name = name.replace("model.multi_modal_projector.", "multi_modal_projector.")
    name = name.replace("model.language_model.", "language_model.model.")
    return "language_model." + name if name.startswith("lm_head.") else name


@pytest.mark.parametrize("layout", LAYOUTS)
def test_three_key_layouts(layout: str, theirs: Path, expected: Answered, image: Path, tmp_path: Path) -> None:
    def change(weights: dict[str, mx.array]) -> None:
        for name in list(weights):
            new = canonical(name)
            for a, b in LAYOUTS[layout].items():
                if new.startswith(a):
                    new = b + new.removeprefix(a)
                    break
            weights[new] = weights.pop(name)

    moved = edit(copy(theirs, tmp_path / "moved"), change)
    convert_vlm(moved, tmp_path / "model")
    agree(answer(tmp_path / "model", image, QUESTION), expected)


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.encoder.layers.1.mlp.fc1.bias",
        "projector.body.linear_1.weight",
        "language_model.lm_head.weight",
    ],
)
def test_a_perturbed_weight_shows(name: str, model: Path, expected: Answered, image: Path, tmp_path: Path) -> None:
    spoilt = edit(copy(model, tmp_path / "model"), lambda weights: weights.update({name: weights[name] + 0.05}))
    assert gap(prompt_logits(load(spoilt), image, QUESTION), expected.logits) > 10 * TOLERANCE


def test_the_unused_last_block_does_not_matter(model: Path, image: Path, tmp_path: Path) -> None:
    """vision_feature_layer -2: nothing of the last block and of post_layernorm reaches the decoder (trap 5)."""
    before = prompt_logits(load(model), image, QUESTION)

    def change(weights: dict[str, mx.array]) -> None:
        for name in weights:
            if "vision_tower.encoder.layers.2" in name or "post_layernorm" in name:
                weights[name] = weights[name] + 1

    edit(copy(model, tmp_path / "model"), change)
    assert np.array_equal(prompt_logits(load(tmp_path / "model"), image, QUESTION), before)


def test_a_second_turn_follows_the_same_layout(model: Path, image: Path) -> None:
    """A chat's cached turns and the whole conversation laid out at once are the same ids."""
    from mlx_llama3v.text.prompt import Message, render

    session = load(model)
    first = greedy(session, image, QUESTION, 4)
    assert session.encoder is not None
    encoded = session.encoder.embed(image)
    held = list(session.ids)
    config = load_config(model).projector_config
    opening = render([Message("user", QUESTION, (0,))], [encoded.layout], session.tokens, config, generate=True)
    assert held == [*opening.ids.tolist(), *first]
    follow = render([Message("user", "Sure?")], [], session.tokens, config, generate=True, start=False)
    text = session.tokens.decode(follow.ids, special=True)
    assert text == "<|eot_id|><|start_header_id|>user<|end_header_id|>\n\nSure?<|eot_id|>" + (
        "<|start_header_id|>assistant<|end_header_id|>\n\n"
    )


PADDED = {
    "image_processor_type": "LlavaImageProcessor",
    "do_pad": True,
    "size": {"shortest_edge": 32},
    "crop_size": {"height": 32, "width": 32},
    "do_center_crop": True,
}


def test_a_processor_that_pads(theirs: Path, image: Path, tmp_path: Path) -> None:
    from transformers import LlavaImageProcessorPil

    source = copy(theirs, tmp_path / "hf")
    (source / "processor_config.json").unlink(missing_ok=True)
    edit_json(source / "preprocessor_config.json", **PADDED)
    model = convert_vlm(source, tmp_path / "model").path
    pixels = LlavaImageProcessorPil.from_pretrained(source)(Image.open(image), return_tensors="np")["pixel_values"]
    _, (patches,) = make_encoder(load_tower(model), load_config(model)).prepare(image)
    side = pixels.shape[-1]
    found = patches.reshape(side // 8, side // 8, 8, 8, 3).transpose(0, 2, 1, 3, 4).reshape(side, side, 3)
    assert np.abs(found / 127.5 - 1 - pixels[0].transpose(1, 2, 0)).max() < 1e-6
    _, (squashed,) = make_encoder(load_tower(model), load_config(model), SQUASH).prepare(image)
    assert not np.array_equal(squashed, patches)


@pytest.mark.parametrize(
    ("changed", "words"), [({"do_pad": None}, "crops pictures"), ({"size": {"height": 48, "width": 48}}, "takes 32")]
)
def test_processors_that_see_otherwise(changed: dict[str, Any], words: str, theirs: Path, tmp_path: Path) -> None:
    source = copy(theirs, tmp_path / "hf")
    (source / "processor_config.json").unlink(missing_ok=True)
    edit_json(source / "preprocessor_config.json", **{**PADDED, **changed})
    with pytest.raises(CheckpointError, match=words):
        convert_vlm(source, tmp_path / "model")
