"""The bundled tiny bases: transformers loads them, and agrees with our modules on them."""

from __future__ import annotations

from pathlib import Path
from random import Random

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama3v.checkpoint import load_model, load_siglip
from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.draw import render
from mlx_llama3v.score import probabilities
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("bases") / "model").path


@pytest.fixture(scope="module")
def pictures() -> list[scenes.Scene]:
    rng = Random(11)
    return [scenes.sample(rng) for _ in range(6)]


TEXTS = ["a red circle", "the word cat", "A chart!", "something blue at the top left"]


def _theirs(images: list) -> np.ndarray:
    """transformers' own probabilities [I, T]."""
    model = transformers.SiglipModel.from_pretrained(TINY / "siglip", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "siglip")
    processor = transformers.AutoImageProcessor.from_pretrained(TINY / "siglip", backend="pil")
    ids = tokenizer(TEXTS, padding="max_length", truncation=True, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        pixels = processor(images=images, return_tensors="pt")["pixel_values"]
        return torch.sigmoid(model(input_ids=ids, pixel_values=pixels).logits_per_image).numpy()


@pytest.mark.parametrize("kept", [False, True])
def test_siglip_agrees_with_transformers(
    pictures: list[scenes.Scene], model_dir: Path, tmp_path: Path, kept: bool
) -> None:
    paths = []
    for index, scene in enumerate(pictures):
        paths.append(tmp_path / f"{index}.png")
        render(scene).save(paths[-1])
    siglip = load_siglip(model_dir if kept else TINY / "siglip", "float32")
    theirs = _theirs([render(scene) for scene in pictures])
    # A statement that is false has a probability of 1e-10 and less: its logarithm, the logit, is what can differ.
    np.testing.assert_allclose(np.log(probabilities(siglip, paths, TEXTS)), np.log(theirs), rtol=1e-4, atol=1e-4)
    siglip.model.logit_bias = siglip.model.logit_bias + 0.05
    assert np.abs(np.log(probabilities(siglip, paths, TEXTS)) - np.log(theirs)).max() > 1e-2


def test_a_tower_of_16_bit_still_tells_false_statements_apart(pictures: list[scenes.Scene], tmp_path: Path) -> None:
    """No probability is rounded to 0: their order is what a user sorts by."""
    render(pictures[0]).save(tmp_path / "0.png")
    exact, short = (
        np.log(probabilities(load_siglip(TINY / "siglip", dtype), [tmp_path / "0.png"], TEXTS))
        for dtype in ("float32", "float16")
    )
    assert exact.min() < -17  # where a float16 sigmoid ends
    np.testing.assert_allclose(short, exact, atol=0.5)


def test_siglip_knows_the_tiny_world(tmp_path: Path) -> None:
    """The statement that is true scores above the mean of the false ones, on average over unseen pictures."""
    rng = Random(12)
    chart, shapes = scenes.sample(rng, "chart"), scenes.sample(rng, "shapes")
    for name, scene in (("chart.png", chart), ("shapes.png", shapes)):
        render(scene).save(tmp_path / name)
    scores = probabilities(
        load_siglip(TINY / "siglip"), [tmp_path / "chart.png", tmp_path / "shapes.png"], ["a chart", "one shape"]
    )
    assert scores[0, 0] > 0.9 > 0.1 > scores[1, 0]


def test_llama_agrees_with_transformers(model_dir: Path) -> None:
    reference = transformers.LlamaForCausalLM.from_pretrained(TINY / "llama", dtype=torch.float32).eval()
    tokenizer = transformers.AutoTokenizer.from_pretrained(TINY / "llama")
    model = load_model(model_dir, "float32")
    text = "Two shapes: a large red circle at the top left, a small blue star at the bottom right. What shape is red?"
    ids = Tokens.load(model_dir).encode(text)
    assert ids == tokenizer.encode(text, add_special_tokens=False)
    with torch.no_grad():
        theirs = reference(torch.tensor([ids])).logits.numpy()
    ours = np.array(model(mx.array([ids])))
    np.testing.assert_allclose(ours, theirs, atol=1e-4)
    model.language_model.model.norm.weight = model.language_model.model.norm.weight * 1.01
    assert np.abs(np.array(model(mx.array([ids]))) - theirs).max() > 1e-4


def test_together_they_are_small() -> None:
    total = sum(path.stat().st_size for path in TINY.rglob("*") if path.is_file())
    assert total <= 8_000_000
