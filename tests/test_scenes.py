"""The tiny world: seeded, consistent with itself, and small text where only a tile can show it."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from random import Random

import numpy as np
import pytest

from mlx_llama3v.config import TilingConfig, VisionConfig
from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.dataset import EXAM_KINDS, draw
from mlx_llama3v.demo.draw import render, sign_box
from mlx_llama3v.demo.passages import notes, passage
from mlx_llama3v.vision.tiling import plan

VISION = VisionConfig(image_size=scenes.SIDE, patch_size=8)


def _sample(count: int, kind: str | None = None) -> list[scenes.Scene]:
    rng = Random(3)
    return [scenes.sample(rng, kind) for _ in range(count)]


def test_same_seed_same_pictures() -> None:
    first, second = _sample(20), _sample(20)
    assert first == second
    assert all(np.array_equal(render(a), render(b)) for a, b in zip(first, second, strict=True))
    assert first[0] != scenes.sample(Random(4))


def test_sizes_and_shapes_vary() -> None:
    found = _sample(300)
    aspects = {round(scene.width / scene.height, 1) for scene in found}
    assert len(aspects) > 8
    assert {scene.kind for scene in found} == set(scenes.KINDS)


def test_every_answer_is_in_the_caption() -> None:
    for scene in _sample(300):
        said = scenes.caption(scene).lower()
        for qa in scenes.questions(scene):
            assert qa.answer.lower() in said, (qa, said)


def test_every_answer_is_in_the_notes() -> None:
    rng = Random(0)
    for scene in _sample(200):
        said = notes(scene, rng)
        answers = [qa.answer for qa in scenes.questions(scene) if qa.kind != "count"]
        assert all(answer in said for answer in answers)


def test_questions_have_one_right_answer() -> None:
    for scene in _sample(300):
        asked = [qa.question for qa in scenes.questions(scene)]
        assert len(asked) == len(set(asked))
        for qa in scenes.questions(scene):
            if qa.kind == "shape":
                colour = qa.question.split()[-1].rstrip("?")
                assert [t.shape for t in scene.things if t.colour == colour] == [qa.answer]


def test_bars_differ_visibly() -> None:
    for scene in _sample(100, "chart"):
        heights = sorted(bar.height for bar in scene.bars)
        assert all(b - a > 0.08 for a, b in pairwise(heights))


def test_a_sign_lies_in_one_tile_and_is_small_in_the_overview() -> None:
    whole = 0
    for scene in _sample(300, "sign"):
        layout = plan(scene.width, scene.height, VISION, TilingConfig(max_slices=6))
        rows, cols = layout.layout.rows, layout.layout.cols
        assert rows * cols >= 4
        x0, y0, x1, y1 = sign_box(scene)
        assert 0 <= x0 < x1 <= scene.width and 0 <= y0 < y1 <= scene.height
        whole += int(x0 * cols // scene.width) == int(x1 * cols / scene.width) and int(
            y0 * rows // scene.height
        ) == int(y1 * rows / scene.height)
        overview = layout.overview_px[0] / scene.width
        assert overview < 0.45  # the sign's letters are under five pixels high there
        assert layout.tile_px[0] * cols / scene.width > 2 * overview
    assert whole > 285


def test_facts_are_true_of_their_scene_only() -> None:
    red_circle = [scene for scene in _sample(400, "shapes") if "a red circle" in scenes.facts(scene)]
    assert red_circle
    for scene in red_circle:
        assert any(thing.colour == "red" and thing.shape == "circle" for thing in scene.things)


def test_passages_hold_descriptions_and_questions() -> None:
    found = [passage(Random(seed)) for seed in range(200)]
    assert any(item.turns for item in found) and any(not item.turns for item in found)
    assert not any(piece.learnt for item in found for piece in item.description if item.turns)


def test_data_set_files(tmp_path: Path) -> None:
    data = draw(tmp_path, 12, 18, seed=5)
    captions = json.loads(data.captions.read_text())
    chats = json.loads(data.conversations.read_text())
    assert len(captions) == len(chats) == 12 and len(data.exam) == 18
    assert {question.kind for question in data.exam} == set(EXAM_KINDS)
    trained = {record["image"] for record in captions + chats}
    assert not trained & {question.image for question in data.exam}
    assert all((data.images / name).is_file() for name in trained)
    assert {Path(name).suffix for name in trained} == {".png", ".jpg"}
    assert chats[0]["conversations"][0]["value"].startswith("<image>\n")
    assert all("<image>" not in turn["value"] for record in chats for turn in record["conversations"][1:])


def test_another_seed_draws_other_pictures(tmp_path: Path) -> None:
    one, two = draw(tmp_path / "a", 3, 9, seed=0), draw(tmp_path / "b", 3, 9, seed=1)
    assert one.captions.read_text() != two.captions.read_text()


def test_the_torch_loss_of_the_bases_is_the_mlx_loss() -> None:
    torch = pytest.importorskip("torch")
    import mlx.core as mx

    from mlx_llama3v.demo.bases_siglip import loss_terms
    from mlx_llama3v.vision.siglip import sigmoid_loss

    rng = np.random.default_rng(0)
    logits = rng.normal(size=(7, 5)).astype(np.float32) * 4
    truth = rng.integers(-1, 2, size=(7, 5)).astype(np.float32)
    theirs = loss_terms(torch.from_numpy(logits), torch.from_numpy(truth)).item()
    ours = sigmoid_loss(mx.array(logits), mx.array(truth)).item()
    assert ours == pytest.approx(theirs, rel=1e-6)
    assert sigmoid_loss(mx.array(logits), mx.array(-truth)).item() != pytest.approx(theirs, rel=1e-3)
