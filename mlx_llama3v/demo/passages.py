"""The tiny Llama's reading matter: text alone, never a picture.

A decoder that is to take a picture's tokens as if they were a description must first be able to use a
description. So besides captions it reads passages in which a description stands before questions about it, and
"notes": the same content as loose words in any order, with gaps. Nearest to what a projector will say are
"glimpses": loose words on a grid, where one position says several words at once (the sum of their embeddings)
and leaves some out. It never sees a picture; a projector that learns to say such words is understood.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from mlx_llama3v.config import Grid
from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.draw import Box, layout, letter_boxes, thing_box
from mlx_llama3v.demo.pairs import TILING, VISION
from mlx_llama3v.demo.scenes import PLACES, QA, Scene, Thing
from mlx_llama3v.vision.tiling import plan

Cells = tuple[tuple[str, ...], ...]

POOL = 2  # patches along a side of a visual token, as convert chooses for so small a tower
FILLER = (".", ",", "and", "-")


class Piece(NamedTuple):
    """Text of a passage, and whether the model is to learn to write it (notes are only read)."""

    text: str
    learnt: bool


class Glimpse(NamedTuple):
    """Words on grids: slices -> visual tokens -> the words that one token says at once; and tiles a row."""

    slices: tuple[Cells, ...]
    cols: int


class Passage(NamedTuple):
    """A description and the turns about it; without turns it is a plain text. A glimpse stands before it all."""

    description: tuple[Piece, ...]
    turns: tuple[QA, ...]
    glimpse: Glimpse | None = None


def notes(scene: Scene, rng: Random) -> str:
    """The scene as loose words: every item's words together, but in any order, repeated or padded at random."""
    items: list[list[str]] = [[thing.size, thing.colour, thing.shape, PLACES[thing.place]] for thing in scene.things]
    items += [[text.kind, text.text] + (["sign", "small"] if text.small else [text.colour]) for text in scene.prints]
    if scene.bars:
        items.append(["bars", *(bar.colour for bar in scene.bars)])
        items += [["tallest", scenes.tallest(scene)], ["shortest", scenes.shortest(scene)]]
    said: list[str] = []
    for item in rng.sample(items, len(items)):
        for _ in range(rng.choice((1, 1, 1, 2))):
            words = item if item[0] == "bars" else rng.sample(item, len(item))
            said += [*words, *rng.choices(FILLER, k=rng.choice((0, 1, 2, 4)))]
    return " ".join(said)


def statements(scene: Scene, rng: Random) -> str:
    """True sentences about the scene in any order: who reads the description can say how each goes on."""
    facts = sorted(scenes.facts(scene))
    chosen = rng.sample(facts, min(len(facts), 8))
    return " " + " ".join(f"{fact.capitalize()}." for fact in chosen)


def glimpse(scene: Scene, rng: Random) -> Glimpse:
    """The scene as loose words on the grids of a picture's visual tokens: what a good projector would say there."""
    split = plan(scene.width, scene.height, VISION, TILING).layout
    boxes = [(thing_box(scene, i), _words(thing), 0.85) for i, thing in enumerate(scene.things)]
    bars = [(box, _bar_words(scene, i), 0.85) for i, box in enumerate(layout(scene).bars)]
    overview, tiles = [*boxes, *bars], [(box, words[:3], 0.4) for box, words, _ in boxes]
    for index, text in enumerate(scene.prints):
        letters = letter_boxes(scene, index)
        box = (letters[0][0], letters[0][1], letters[-1][2], letters[-1][3])
        if text.small:
            overview.append((box, ("sign",), 0.5))
            tiles.append((box, (text.text, text.kind, "sign"), 0.85))
        else:
            overview.append((box, (text.text, text.kind, text.colour), 0.85))
    scale = (1 / scene.width, 1 / scene.height)
    slices = [_cells(overview, split.overview, scale, (0, 0), rng)]
    for row, col in ((row, col) for row in range(split.rows) for col in range(split.cols)):
        slices.append(_cells(tiles, split.tile, (split.cols * scale[0], split.rows * scale[1]), (col, row), rng))
    return Glimpse(tuple(slices), split.cols)


def _words(thing: Thing) -> tuple[str, ...]:
    return (thing.colour, thing.shape, thing.size, *PLACES[thing.place].split())


def _bar_words(scene: Scene, index: int) -> tuple[str, ...]:
    colour = scene.bars[index].colour
    ends = {"tallest": scenes.tallest(scene), "shortest": scenes.shortest(scene)}
    return (colour, "bar", *(word for word, of in ends.items() if of == colour))


def _cells(
    items: list[tuple[Box, tuple[str, ...], float]],
    grid: Grid,
    scale: tuple[float, float],
    corner: tuple[int, int],
    rng: Random,
) -> Cells:
    """Words a visual token: each cell that an item's box meets has each of its words with the item's probability,
    and the cell in its middle has all."""
    rows, cols = -(-grid[0] // POOL), -(-grid[1] // POOL)
    cells: list[list[str]] = [[] for _ in range(rows * cols)]
    for (x0, y0, x1, y1), words, keep in items:
        left, right = ((x * scale[0] - corner[0]) * grid[1] / POOL for x in (x0, x1))
        top, bottom = ((y * scale[1] - corner[1]) * grid[0] / POOL for y in (y0, y1))
        middle = (int((top + bottom) // 2), int((left + right) // 2))
        for row in range(max(0, int(top + 0.2)), min(rows, int(bottom + 0.8))):
            for col in range(max(0, int(left + 0.2)), min(cols, int(right + 0.8))):
                cell = cells[row * cols + col]
                cell += [word for word in words if (row, col) == middle or rng.random() < keep]
    return tuple(map(tuple, cells))


def passage(rng: Random) -> Passage:
    """A random passage: a caption alone, a description said again, or a description followed by questions."""
    scene = scenes.sample(rng)
    caption = Piece(scenes.caption(scene), True)
    roll = rng.random()
    if roll < 0.03:
        return Passage((caption,), ())
    seen = glimpse(scene, rng) if rng.random() < 0.7 else None
    description = Piece(notes(scene, rng) if rng.random() < 0.5 else caption.text, False)
    if roll < 0.35:
        return Passage((caption,), (), seen) if seen else Passage((Piece(notes(scene, rng), False), caption), ())
    if roll < 0.45:
        return Passage((*(() if seen else (description,)), Piece(statements(scene, rng), True)), (), seen)
    asked = scenes.questions(scene)
    turns = tuple(rng.sample(asked, min(len(asked), rng.randint(3, 9))))
    return Passage((), turns, seen) if seen else Passage((description,), turns)
