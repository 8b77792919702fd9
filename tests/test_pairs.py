"""Training pairs of the tiny SigLIP: views show what their statements say, and go through the tower's own head."""

from __future__ import annotations

from random import Random

import numpy as np
import pytest

from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.pairs import FAMILIES, batch, choose_texts, facts_of, statements, truth_matrix
from mlx_llama3v.demo.passages import glimpse


def test_a_batch_is_a_function_of_seed_and_step() -> None:
    one, two, other = batch(0, 3, 4, 4), batch(0, 3, 4, 4), batch(0, 4, 4, 4)
    for first, second in zip(one, two, strict=True):
        assert all(np.array_equal(a.pixels, b.pixels) for a, b in zip(first, second, strict=True))
        assert [[v.facts for v in a.views] for a in first] == [[v.facts for v in b.views] for b in second]
    assert not np.array_equal(one[0][0].pixels, other[0][0].pixels[: one[0][0].pixels.shape[0]])


def test_every_fact_has_one_family() -> None:
    family = statements()
    for seed in range(200):
        scene = scenes.sample(Random(seed))
        found = {name: facts_of(scene, name) for name in FAMILIES}
        assert frozenset().union(*found.values()) == scenes.facts(scene)
        assert all(family[fact] == name for name, facts in found.items() for fact in facts)


def test_the_patches_of_a_shape_have_its_colour() -> None:
    near = {"red": (215, 38, 38), "blue": (40, 80, 220), "green": (30, 150, 60)}
    checked = 0
    for step in range(30):
        for seen in batch(5, step, 8, 1)[0]:
            rows, cols = seen.pixels.shape[0] // 8, seen.pixels.shape[1] // 8
            for view in seen.views[1:]:
                assert view.seen.shape == (rows * cols,) and 0 < view.seen.sum() < rows * cols
                colours = {fact.split()[1] for fact in view.facts if fact.startswith("something")} & set(near)
                for colour in colours:
                    mask = np.kron(view.seen.reshape(rows, cols), np.ones((8, 8), bool))
                    pixels = (seen.pixels[mask] + 1) * 127.5
                    close = np.abs(pixels - near[colour]).max(-1) < 40
                    assert close.any(), (colour, sorted(view.facts))
                    checked += 1
    assert checked > 50


def test_truth_knows_what_a_view_does_not_decide() -> None:
    whole, *parts = next(seen for seen in batch(0, 0, 16, 1)[0] if "one shape" in seen.views[0].facts).views
    thing = next(view for view in parts if any(fact.startswith("something") for fact in view.facts))
    texts = [("one shape",), ("two shapes",), ("a chart",), tuple(sorted(thing.facts)[:2])]
    truth = truth_matrix(texts, [whole, thing])
    assert truth[:, 0].tolist() == [1, -1, -1, 1]
    assert truth[:, 1].tolist() == [0, 0, 0, 1]


def test_statements_to_score_are_distinct_and_limited() -> None:
    views = [view for seen in batch(0, 1, 8, 4)[0] for view in seen.views]
    texts = choose_texts(Random(0), views, 40)
    assert len(texts) == len(set(texts)) <= 40
    assert any(len(text) == 2 for text in texts)


def test_views_go_through_the_tower_s_own_head() -> None:
    torch = pytest.importorskip("torch")
    from transformers import SiglipModel

    from mlx_llama3v.demo import bases_siglip

    torch.manual_seed(0)
    config = bases_siglip.config()
    config.text_config.vocab_size = 200  # type: ignore[union-attr]
    model = SiglipModel._from_config(config).eval()
    pictures = batch(0, 2, 4, 1)[0]
    pixels = torch.from_numpy(np.stack([seen.pixels for seen in pictures])).permute(0, 3, 1, 2)
    with torch.no_grad():
        expected = model.vision_model(pixels, interpolate_pos_encoding=True).pooler_output
        views = bases_siglip.look(model, pictures)
    first = np.cumsum([0, *(len(seen.views) for seen in pictures)])
    assert len(views) == first[-1]
    assert torch.allclose(views[first[:-1]], expected, atol=1e-5)
    assert not torch.allclose(views[first[:-1] + 1], expected, atol=1e-2)


def test_a_glimpse_says_every_answer_where_it_stands() -> None:
    rng = Random(0)
    for seed in range(150):
        scene = scenes.sample(Random(seed))
        seen = glimpse(scene, rng)
        overview, tiles = seen.slices[0], seen.slices[1:]
        for thing in scene.things:
            assert any({thing.colour, thing.shape, thing.size} <= set(cell) for cell in overview)
        for text in scene.prints:
            assert any(text.text in cell for cell in overview) != text.small
            if text.small and tiles:
                assert any(text.text in cell for cells in tiles for cell in cells)
