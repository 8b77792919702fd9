"""What is in a picture of the tiny world: a seeded sampler, captions, questions with answers, and facts.

A scene is data; `draw.py` makes pixels of it. Four kinds: `shapes` (up to four coloured shapes), `print` (a word
or number, large), `sign` (a large picture with a word or number too small for its overview) and `chart` (bars).
"""

from __future__ import annotations

from dataclasses import dataclass, field
from random import Random
from typing import NamedTuple

SHAPES = ("circle", "square", "triangle", "star", "cross")
COLOURS = ("red", "green", "blue", "yellow", "purple", "orange")
SIZES = ("small", "large")
PLACES = ("top left", "top right", "bottom left", "bottom right")  # index = 2 * row + column
COUNTS = ("no", "one", "two", "three", "four")
# fmt: off
WORDS = (
    "BUS", "CAT", "DOG", "EGG", "FOX", "HAT", "INK", "JAM", "KEY",
    "MAP", "NUT", "OWL", "PEN", "RUG", "SUN", "TEA", "VAN", "ZIP",
)
# fmt: on
NUMBERS = tuple(str(number) for number in range(10, 30))
KINDS = ("shapes", "print", "sign", "chart")
SIDE = 64  # the tiny tower's native square; scene sizes are chosen against its area


class Thing(NamedTuple):
    """One shape; `place` indexes PLACES."""

    shape: str
    colour: str
    size: str
    place: int

    def __str__(self) -> str:
        return f"{self.size} {self.colour} {self.shape}"


class Print(NamedTuple):
    """Text on the picture. A small one stands on a white sign in a corner; a large one fills a half."""

    text: str
    colour: str
    place: int
    small: bool

    @property
    def kind(self) -> str:
        return "number" if self.text.isdigit() else "word"


class Bar(NamedTuple):
    colour: str
    height: float  # share of the picture's height


class QA(NamedTuple):
    """One question; `kind` is the row of the demo's table."""

    kind: str
    question: str
    answer: str


@dataclass(frozen=True)
class Scene:
    """One picture's content. `seed` fixes what the content leaves open (jitter, background)."""

    kind: str
    width: int
    height: int
    seed: int
    things: tuple[Thing, ...] = ()
    prints: tuple[Print, ...] = ()
    bars: tuple[Bar, ...] = field(default=())


def sample(rng: Random, kind: str | None = None) -> Scene:
    """A random scene (of `kind`, if given); the same generator state gives the same scene."""
    kind = kind or rng.choices(KINDS, weights=(4, 3, 3, 2))[0]
    # A sign's picture is seven to eight times the tower's area: its text is a third as large in the overview.
    area = SIDE**2 * (rng.uniform(6.6, 8.0) if kind == "sign" else rng.choice((rng.uniform(0.5, 1), 1, 1, 1.7)))
    aspect = 2 ** rng.uniform(-0.55, 0.55)
    width, height = max(round((area * aspect) ** 0.5), 24), max(round((area / aspect) ** 0.5), 24)
    if kind == "chart":
        return Scene(kind, width, height, rng.getrandbits(32), bars=_bars(rng))
    places = rng.sample(range(4), 4)
    if kind == "shapes":
        return Scene(kind, width, height, rng.getrandbits(32), _things(rng, places, rng.randint(1, 4)))
    text = rng.choice(NUMBERS if rng.random() < 0.5 else WORDS)
    written = Print(text, rng.choice(COLOURS), places[0], small=kind == "sign")
    # Large print takes the whole half (both places of its row), a sign only its own corner.
    free = [p for p in places[1:] if kind == "sign" or p // 2 != written.place // 2]
    count = rng.randint(1, 3) if kind == "sign" else rng.randint(0, 1)
    return Scene(kind, width, height, rng.getrandbits(32), _things(rng, free, count), (written,))


def _things(rng: Random, places: list[int], count: int) -> tuple[Thing, ...]:
    """`count` things in reading order, no two of the same colour and shape."""
    pairs = rng.sample([(s, c) for s in SHAPES for c in COLOURS], count)
    things = [Thing(s, c, rng.choice(SIZES), p) for (s, c), p in zip(pairs, places, strict=False)]
    return tuple(sorted(things, key=lambda thing: thing.place))


def _bars(rng: Random) -> tuple[Bar, ...]:
    """Two to four bars of different colours whose heights differ visibly."""
    count = rng.randint(2, 4)
    levels = [0.2 + 0.7 * level / count + rng.uniform(0, 0.06) for level in range(1, count + 1)]
    rng.shuffle(levels)
    return tuple(Bar(c, h) for c, h in zip(rng.sample(COLOURS, count), levels, strict=True))


def tallest(scene: Scene) -> str:
    return max(scene.bars, key=lambda bar: bar.height).colour


def shortest(scene: Scene) -> str:
    return min(scene.bars, key=lambda bar: bar.height).colour


def caption(scene: Scene) -> str:
    """One deterministic description that holds every answer."""
    parts = []
    if scene.things:
        listed = ", ".join(f"a {thing} at the {PLACES[thing.place]}" for thing in scene.things)
        noun = "shape" if len(scene.things) == 1 else "shapes"
        parts.append(f"{COUNTS[len(scene.things)].capitalize()} {noun}: {listed}.")
    for text in scene.prints:
        if text.small:
            parts.append(f"A small sign says {text.text}.")
        else:
            parts.append(f"The {text.kind} {text.text} is printed in {text.colour}.")
    if scene.bars:
        listed = ", ".join(bar.colour for bar in scene.bars)
        parts.append(
            f"A chart with {COUNTS[len(scene.bars)]} bars: {listed}. "
            f"The tallest bar is {tallest(scene)}, the shortest is {shortest(scene)}."
        )
    return " ".join(parts)


def questions(scene: Scene) -> list[QA]:
    """Every question that has exactly one right answer in this scene."""
    found: list[QA] = []
    for thing in scene.things:
        if sum(other.shape == thing.shape for other in scene.things) == 1:
            found.append(QA("colour", f"What color is the {thing.shape}?", thing.colour))
        if sum(other.colour == thing.colour for other in scene.things) == 1:
            found.append(QA("shape", f"What shape is {thing.colour}?", thing.shape))
        name = f"{thing.colour} {thing.shape}"
        found.append(QA("place", f"Where is the {name}?", PLACES[thing.place]))
        found.append(QA("size", f"Is the {name} small or large?", thing.size))
    if scene.kind == "shapes":
        found.append(QA("count", "How many shapes are there?", COUNTS[len(scene.things)]))
    for text in scene.prints:
        if text.small:
            found.append(QA("small text", "What does the small sign say?", text.text))
        else:
            found.append(QA(text.kind, f"What {text.kind} is printed?", text.text))
            found.append(QA("colour", f"What color is the {text.kind}?", text.colour))
    if scene.bars:
        found.append(QA("chart", "Which bar is the tallest?", tallest(scene)))
        found.append(QA("chart", "Which bar is the shortest?", shortest(scene)))
        found.append(QA("count", "How many bars are there?", COUNTS[len(scene.bars)]))
    return found


def facts(scene: Scene) -> set[str]:
    """Every short true statement, in SigLIP's canonical form (lower case, no punctuation)."""
    found = count_facts(scene)
    for thing in scene.things:
        found |= thing_facts(thing)
    for text in scene.prints:
        found |= print_facts(text) | {letter_fact(letter) for letter in text.text}
    for index in range(len(scene.bars)):
        found |= bar_facts(scene, index)
    return found


def count_facts(scene: Scene) -> set[str]:
    """How many there are: what no part of the picture decides."""
    if scene.bars:
        return {"a chart", f"{COUNTS[len(scene.bars)]} bars", "no shapes"}
    return {f"{COUNTS[len(scene.things)]} shape{'' if len(scene.things) == 1 else 's'}"}


def thing_facts(thing: Thing) -> set[str]:
    shape, colour, size, place = thing
    return {
        f"a {shape}",
        f"a {colour} {shape}",
        f"a {size} {shape}",
        f"a {size} {colour} {shape}",
        f"a {shape} at the {PLACES[place]}",
        f"something {colour} at the {PLACES[place]}",
    }


def print_facts(text: Print) -> set[str]:
    found = {
        f"the {text.kind} {text.text.lower()}",
        f"a sign with a {text.kind}" if text.small else f"a {text.kind} in {text.colour}",
    }
    if text.kind == "number":
        found |= {f"a number that starts with {text.text[0]}", f"a number that ends with {text.text[-1]}"}
    return found


def letter_fact(letter: str) -> str:
    return f"the {'digit' if letter.isdigit() else 'letter'} {letter.lower()}"


def bar_facts(scene: Scene, index: int) -> set[str]:
    """Of one bar of a chart."""
    colour = scene.bars[index].colour
    found = {f"a {colour} bar", f"bar {COUNTS[index + 1]} is {colour}"}
    if colour == tallest(scene):
        found.add(f"the tallest bar is {colour}")
    if colour == shortest(scene):
        found.add(f"the shortest bar is {colour}")
    return found
