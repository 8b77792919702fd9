"""The tiny Llama's reading matter: text alone, never a picture.

A decoder that is to take a picture's tokens as if they were a description must first be able to use a
description. So besides captions it reads passages in which a description stands before questions about it, and
"notes": the same content as loose words in any order, with gaps, which is as near as text comes to what a
projector will say.
"""

from __future__ import annotations

from random import Random
from typing import NamedTuple

from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.scenes import PLACES, QA, Scene

FILLER = (".", ",", "and", "-")


class Piece(NamedTuple):
    """Text of a passage, and whether the model is to learn to write it (notes are only read)."""

    text: str
    learnt: bool


class Passage(NamedTuple):
    """A description and the turns about it; without turns it is a plain text."""

    description: tuple[Piece, ...]
    turns: tuple[QA, ...]


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
    facts = scenes.thing_facts(scene) | scenes.print_facts(scene) | scenes.bar_facts(scene)
    chosen = rng.sample(sorted(facts), min(len(facts), 8))
    return " " + " ".join(f"{fact.capitalize()}." for fact in chosen)


def passage(rng: Random) -> Passage:
    """A random passage: a caption alone, a description said again, or a description followed by questions."""
    scene = scenes.sample(rng)
    caption = Piece(scenes.caption(scene), True)
    note = Piece(notes(scene, rng), False)
    roll = rng.random()
    if roll < 0.05:
        return Passage((caption,), ())
    if roll < 0.25:
        return Passage((note, caption), ())
    description = note if rng.random() < 0.5 else Piece(caption.text, False)
    if roll < 0.4:
        return Passage((description, Piece(statements(scene, rng), True)), ())
    asked = scenes.questions(scene)
    return Passage((description,), tuple(rng.sample(asked, min(len(asked), rng.randint(3, 9)))))
