"""Pixels of a scene: small Pillow drawings, identical on every run for the same scene."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache
from itertools import pairwise
from math import cos, pi, sin
from random import Random
from typing import NamedTuple

from PIL import Image, ImageDraw, ImageFont

from mlx_llama3v.demo.scenes import Print, Scene, Thing

RGB = {
    "red": (215, 38, 38),
    "green": (30, 150, 60),
    "blue": (40, 80, 220),
    "yellow": (240, 205, 30),
    "purple": (140, 50, 170),
    "orange": (245, 130, 25),
}
INK = (15, 15, 15)  # of small signs
Box = tuple[float, float, float, float]


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont:
    return ImageFont.load_default(size)  # type: ignore[return-value]  # Pillow's own embedded face: the same on every machine


class Layout(NamedTuple):
    """Where things are, in pixels: what the scene's seed decides."""

    ground: tuple[int, ...]
    things: tuple[tuple[float, float, float], ...]  # x, y, radius
    prints: tuple[tuple[float, float, int], ...]  # x, y of the middle, font size
    bars: tuple[Box, ...]


@lru_cache(maxsize=64)
def layout(scene: Scene) -> Layout:
    """Place everything in the picture; a pure function of the scene."""
    rng = Random(scene.seed)
    level = rng.randint(222, 255)
    ground = tuple(min(255, level + rng.randint(-8, 8)) for _ in range(3))
    things = tuple(_place_thing(thing, scene, rng) for thing in scene.things)
    prints = tuple(_place_sign(text, scene) if text.small else _place_print(text, scene, rng) for text in scene.prints)
    return Layout(ground, things, prints, tuple(_place_bars(scene, rng)))


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `scene.width` x `scene.height`."""
    placed = layout(scene)
    image = Image.new("RGB", (scene.width, scene.height), placed.ground)
    pen = ImageDraw.Draw(image)
    for thing, (x, y, radius) in zip(scene.things, placed.things, strict=True):
        _draw_thing(pen, thing, x, y, radius)
    for text, (x, y, size) in zip(scene.prints, placed.prints, strict=True):
        if text.small:
            pen.rectangle(sign_box(scene), (255, 255, 255), (120, 120, 120))
        fill = INK if text.small else RGB[text.colour]
        pen.text((x, y), text.text, fill, _font(size), anchor="mm")
    if scene.bars:
        base = scene.height * 0.94
        pen.line((scene.width * 0.048, base, scene.width * 0.97, base), (60, 60, 60), 1)
    for bar, box in zip(scene.bars, placed.bars, strict=True):
        pen.rectangle(box, RGB[bar.colour])
    return image


def thing_box(scene: Scene, index: int) -> Box:
    """What shape `index` covers."""
    x, y, radius = layout(scene).things[index]
    return (x - radius, y - radius, x + radius, y + radius)


def letter_boxes(scene: Scene, index: int) -> list[Box]:
    """What each letter of text `index` covers, in order."""
    text = scene.prints[index].text
    x, y, size = layout(scene).prints[index]
    font = _font(size)
    ends = [x - font.getlength(text) / 2 + font.getlength(text[:end]) for end in range(len(text) + 1)]
    return [(a, y - 0.4 * size, b, y + 0.4 * size) for a, b in pairwise(ends)]


def sign_box(scene: Scene) -> Box:
    """The white sign around a scene's small text."""
    x, y, size = layout(scene).prints[0]
    w, h = _sign_size(scene.prints[0], size)
    return (x - w / 2, y - h / 2, x + w / 2, y + h / 2)


def _place_thing(thing: Thing, scene: Scene, rng: Random) -> tuple[float, float, float]:
    """Inside its quarter of the picture; a large one fills it, a small one takes half of that."""
    w, h = scene.width / 2, scene.height / 2
    radius = min(w, h) * (rng.uniform(0.38, 0.46) if thing.size == "large" else rng.uniform(0.18, 0.24))
    row, column = divmod(thing.place, 2)
    x = column * w + w / 2 + rng.uniform(-1, 1) * max(0.0, w / 2 - radius - 1)
    y = row * h + h / 2 + rng.uniform(-1, 1) * max(0.0, h / 2 - radius - 1)
    return x, y, radius


def _place_print(text: Print, scene: Scene, rng: Random) -> tuple[float, float, int]:
    """Large print, in the middle of the half that holds its place, about as large as fits."""
    room_w, room_h = scene.width * 0.94, scene.height * 0.48
    size = int(room_h * 0.95)
    while size > 6 and _font(size).getlength(text.text) > room_w:
        size -= 1
    size = max(6, round(size * rng.uniform(0.85, 1.0)))
    slack = max(0.0, room_w - _font(size).getlength(text.text)) / 2
    x = scene.width / 2 + rng.uniform(-0.4, 0.4) * slack
    y = scene.height * (0.25 if text.place < 2 else 0.75) + rng.uniform(-0.02, 0.02) * scene.height
    return x, y, size


def _place_sign(text: Print, scene: Scene) -> tuple[float, float, int]:
    """Near the picture's own corner, so that a tile's border misses it."""
    rng = Random(scene.seed ^ 0x51)
    size = rng.randint(16, 17)
    w, h = _sign_size(text, size)
    x, y = rng.uniform(2, 4) + w / 2, rng.uniform(2, 4) + h / 2
    row, column = divmod(text.place, 2)
    return round(scene.width - x if column else x), round(scene.height - y if row else y), size


def _sign_size(text: Print, size: int) -> tuple[float, float]:
    return round(_font(size).getlength(text.text)) + 7, size + 3


def _place_bars(scene: Scene, rng: Random) -> Iterator[Box]:
    """Bars on a base line, left to right."""
    left, base = scene.width * 0.08, scene.height * 0.94
    step = scene.width * 0.88 / max(1, len(scene.bars))
    for index, bar in enumerate(scene.bars):
        x = left + index * step
        top = base - bar.height * scene.height * 0.9
        yield (x + step * 0.12, top, x + step * rng.uniform(0.7, 0.85), base - 1)


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, x: float, y: float, radius: float) -> None:
    fill = RGB[thing.colour]
    box: Box = (x - radius, y - radius, x + radius, y + radius)
    if thing.shape == "circle":
        pen.ellipse(box, fill)
    elif thing.shape == "square":
        side = radius * 0.88
        pen.rectangle((x - side, y - side, x + side, y + side), fill)
    elif thing.shape == "triangle":
        pen.polygon([(x, y - radius), (x - radius, y + radius * 0.8), (x + radius, y + radius * 0.8)], fill)
    elif thing.shape == "star":
        spikes = [(radius if k % 2 == 0 else radius * 0.42, pi * k / 5 - pi / 2) for k in range(10)]
        pen.polygon([(x + r * cos(a), y + r * sin(a)) for r, a in spikes], fill)
    else:  # cross
        arm = radius * 0.32
        pen.rectangle((x - arm, y - radius, x + arm, y + radius), fill)
        pen.rectangle((x - radius, y - arm, x + radius, y + arm), fill)
