"""Pictures and statements for the tiny SigLIP, drawn as training goes.

A step sees whole small pictures and either overviews or tiles of large ones, at the very shapes that
`vision.tiling` will cut later. A caption is a short statement; which statements hold is known, so a pair is positive
wherever the statement is true of the picture. Parts of a picture (a shape, a letter, a bar) are captioned too: they
are looked at through the same pooling head with the other patches masked, so that a patch learns to say what it
shows. A statement that a part or a tile cannot decide takes no part in the loss.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import replace
from functools import lru_cache
from math import ceil, floor
from random import Random
from typing import NamedTuple

import numpy as np

from mlx_llama3v.config import ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.draw import Box, letter_boxes, render, sign_box, thing_box
from mlx_llama3v.demo.draw import layout as placing
from mlx_llama3v.demo.scenes import SIDE, Scene
from mlx_llama3v.vision.image import cut, normalisation
from mlx_llama3v.vision.tiling import Plan, plan

PATCH = 8
VISION = VisionConfig(image_size=SIDE, patch_size=PATCH)
TILING = TilingConfig()
COUNTS, THINGS, PRINTS, LETTERS, BARS = FAMILIES = ("counts", "things", "prints", "letters", "bars")
EVERYTHING = frozenset(FAMILIES)


class View(NamedTuple):
    """A picture or a part of it: the patches seen [P] bool, what is true of it, which families it decides."""

    seen: np.ndarray
    facts: frozenset[str]
    families: frozenset[str]


class Seen(NamedTuple):
    """One training picture: pixels [H, W, 3] and its views, the whole first."""

    pixels: np.ndarray
    views: list[View]


Part = tuple[Box, frozenset[str], frozenset[str]]  # where (in the slice, 0 to 1), facts, families


@lru_cache(maxsize=1)
def statements() -> dict[str, str]:
    """Every statement there is -> its family. Found by drawing lots of scenes: the sampler is the one source."""
    rng = Random(0)
    found: dict[str, str] = {}
    for _ in range(40_000):
        scene = scenes.sample(rng)
        found.update((fact, family) for family in FAMILIES for fact in facts_of(scene, family))
    return dict(sorted(found.items()))


def facts_of(scene: Scene, *families: str) -> frozenset[str]:
    """What is true of a scene, of these families."""
    found: set[str] = set()
    if COUNTS in families:
        found |= scenes.count_facts(scene)
    if THINGS in families:
        found |= set().union(*map(scenes.thing_facts, scene.things))
    if PRINTS in families:
        found |= set().union(*map(scenes.print_facts, scene.prints))
    if LETTERS in families:
        found |= {scenes.letter_fact(letter) for text in scene.prints for letter in text.text}
    if BARS in families:
        found |= set().union(*(scenes.bar_facts(scene, index) for index in range(len(scene.bars))))
    return frozenset(found)


def batch(seed: int, step: int, small: int, large: int) -> list[list[Seen]]:
    """Two groups of pictures, each of one shape; a pure function of its arguments."""
    rng = Random(f"{seed}-{step}")
    return [_small(rng, small), _large(rng, large)]


def _small(rng: Random, count: int) -> list[Seen]:
    """Whole pictures of one common shape, area at most the tower's own or a little above."""
    area, aspect = SIDE**2 * rng.choice((rng.uniform(0.5, 1), 1, 1, 1.7)), 2 ** rng.uniform(-0.55, 0.55)
    size = {"width": round((area * aspect) ** 0.5), "height": round((area / aspect) ** 0.5)}
    kinds = rng.choices(("shapes", "print", "chart"), weights=(4, 5, 2), k=count)
    found = [replace(scenes.sample(rng, kind), **size) for kind in kinds]
    return [_whole(scene, _plan(scene), EVERYTHING) for scene in found]


def _large(rng: Random, count: int) -> list[Seen]:
    """Overviews, or tiles, of large pictures of one common shape."""
    first = scenes.sample(rng, "sign")
    found = [replace(scenes.sample(rng, "sign"), width=first.width, height=first.height) for _ in range(count)]
    split = _plan(first)
    if rng.random() < 0.3:  # too small to read there: say nothing about print
        return [_whole(scene, split, frozenset({COUNTS, THINGS, BARS})) for scene in found]
    return [_tile(scene, split, rng) for scene in found]


def _plan(scene: Scene) -> Plan:
    return plan(scene.width, scene.height, VISION, TILING)


def _whole(scene: Scene, split: Plan, families: frozenset[str]) -> Seen:
    parts = list(_parts(scene)) if families == EVERYTHING else list(_things(scene))
    scale = (1 / scene.width, 1 / scene.height)
    pixels = cut(render(scene), split, ImageConfig())[0]
    return _seen(pixels, facts_of(scene, *families), families, _scaled(parts, scale, (0, 0)))


def _tile(scene: Scene, split: Plan, rng: Random) -> Seen:
    """The tile with the sign, mostly; else any tile, of which it is known that nothing is printed on it."""
    rows, cols = split.layout.rows, split.layout.cols
    x0, y0, x1, y1 = sign_box(scene)
    row, col = int(y0 * rows / scene.height), int(x0 * cols / scene.width)
    whole = (row, col) == (int(y1 * rows / scene.height), int(x1 * cols / scene.width))
    index = row * cols + col if whole and rng.random() < 0.8 else rng.randrange(rows * cols)
    families = frozenset({PRINTS, LETTERS, BARS})
    pixels = cut(render(scene), split, ImageConfig())[index + 1]
    if index != row * cols + col:
        return _seen(pixels, frozenset(), families, [])
    if not whole:  # the sign is cut in two: say nothing about print
        return _seen(pixels, frozenset(), frozenset({BARS}), [])
    parts = _scaled(_prints(scene), (cols / scene.width, rows / scene.height), (col, row))
    return _seen(pixels, facts_of(scene, *families), families, parts)


def _seen(pixels: np.ndarray, facts: frozenset[str], families: frozenset[str], parts: Iterable[Part]) -> Seen:
    grid = (pixels.shape[0] // PATCH, pixels.shape[1] // PATCH)
    whole = View(np.ones(grid[0] * grid[1], bool), facts, families)
    factor, shift = normalisation(ImageConfig(), pixels.shape[1])
    normal = (pixels.reshape(len(pixels), -1) * factor - shift).reshape(pixels.shape)
    return Seen(normal, [whole, *(View(_patches(box, grid), *rest) for box, *rest in parts)])


def _scaled(parts: Iterable[Part], scale: tuple[float, float], corner: tuple[int, int]) -> list[Part]:
    """Boxes in pixels of the picture -> in slices of it, from `corner` on."""
    (sx, sy), (x, y) = scale, corner
    return [((a * sx - x, b * sy - y, c * sx - x, d * sy - y), *rest) for (a, b, c, d), *rest in parts]  # type: ignore[misc]


def _patches(box: Box, grid: tuple[int, int]) -> np.ndarray:
    """The patches that a box (0 to 1) touches by more than a quarter of their side, at least one: [P] bool."""
    seen = np.zeros(grid, bool)
    spans = []
    for low, high, count in ((box[1], box[3], grid[0]), (box[0], box[2], grid[1])):
        first = min(max(floor(low * count + 0.25), 0), count - 1)
        spans.append(slice(first, max(ceil(high * count - 0.25), first + 1)))
    seen[spans[0], spans[1]] = True
    return seen.ravel()


def _parts(scene: Scene) -> Iterator[Part]:
    yield from _things(scene)
    yield from _prints(scene)
    for index, box in enumerate(placing(scene).bars):
        yield box, frozenset(scenes.bar_facts(scene, index)), frozenset({BARS})


def _things(scene: Scene) -> Iterator[Part]:
    for index, thing in enumerate(scene.things):
        yield thing_box(scene, index), frozenset(scenes.thing_facts(thing)), frozenset({THINGS, PRINTS, LETTERS})


def _prints(scene: Scene) -> Iterator[Part]:
    for index, text in enumerate(scene.prints):
        boxes = letter_boxes(scene, index)
        letters = frozenset(map(scenes.letter_fact, text.text))
        box = (boxes[0][0], boxes[0][1], boxes[-1][2], boxes[-1][3])
        yield box, frozenset(scenes.print_facts(text)) | letters, frozenset({THINGS, PRINTS, LETTERS})
        for letter, box in zip(text.text, boxes, strict=True):
            yield box, frozenset({scenes.letter_fact(letter)}), frozenset({THINGS, LETTERS})


def choose_texts(rng: Random, views: list[View], limit: int) -> list[tuple[str, ...]]:
    """Statements to score: some true ones of every view, pairs of true ones of whole pictures, and random others."""
    texts: dict[tuple[str, ...], None] = {}
    for view in views:
        true = sorted(view.facts)
        for fact in rng.sample(true, min(2, len(true))):
            texts[(fact,)] = None
        if view.seen.all() and len(true) > 1 and rng.random() < 0.3:
            texts[tuple(rng.sample(true, 2))] = None
    chosen = list(texts)
    rng.shuffle(chosen)
    others = [(fact,) for fact in rng.sample(list(statements()), limit // 4)]
    return list(dict.fromkeys([*chosen[: limit - len(others)], *others]))


def truth_matrix(texts: list[tuple[str, ...]], views: list[View]) -> np.ndarray:
    """float32 [T, V] of 1 (true), -1 (false), 0 (the view does not decide it)."""
    family = statements()
    truth = np.zeros((len(texts), len(views)), np.float32)
    needs = [{family[part] for part in text} for text in texts]
    for column, view in enumerate(views):
        for row, text in enumerate(texts):
            if needs[row] <= view.families:
                truth[row, column] = 1 if view.facts.issuperset(text) else -1
    return truth
