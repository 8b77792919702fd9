"""Pixels of a scene: small Pillow drawings, identical on every run for the same scene."""

from __future__ import annotations

from functools import lru_cache
from math import cos, pi, sin
from random import Random

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
Box = tuple[float, float, float, float]


@lru_cache(maxsize=64)
def _font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    return ImageFont.load_default(size)  # Pillow's own embedded face: the same on every machine


def render(scene: Scene) -> Image.Image:
    """The scene as an RGB picture of `scene.width` x `scene.height`."""
    rng = Random(scene.seed)
    level = rng.randint(222, 255)
    ground = tuple(min(255, level + rng.randint(-8, 8)) for _ in range(3))
    image = Image.new("RGB", (scene.width, scene.height), ground)
    pen = ImageDraw.Draw(image)
    for thing in scene.things:
        _draw_thing(pen, thing, scene, rng)
    for text in scene.prints:
        if text.small:
            _draw_sign(pen, sign_box(scene), text)
        else:
            _draw_print(pen, text, scene, rng)
    if scene.bars:
        _draw_bars(pen, scene, rng)
    return image


def _draw_thing(pen: ImageDraw.ImageDraw, thing: Thing, scene: Scene, rng: Random) -> None:
    """A shape inside its quarter of the picture; a large one fills it, a small one takes half of that."""
    w, h = scene.width / 2, scene.height / 2
    radius = min(w, h) * (rng.uniform(0.38, 0.46) if thing.size == "large" else rng.uniform(0.18, 0.24))
    row, column = divmod(thing.place, 2)
    x = column * w + w / 2 + rng.uniform(-1, 1) * max(0.0, w / 2 - radius - 1)
    y = row * h + h / 2 + rng.uniform(-1, 1) * max(0.0, h / 2 - radius - 1)
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


def _draw_print(pen: ImageDraw.ImageDraw, text: Print, scene: Scene, rng: Random) -> None:
    """Large print, centred in the half that holds its place, as large as fits (with some play)."""
    room_w, room_h = scene.width * 0.94, scene.height * 0.48
    size = int(room_h * 0.95)
    while size > 6 and pen.textlength(text.text, _font(size)) > room_w:
        size -= 1
    size = max(6, round(size * rng.uniform(0.8, 1.0)))
    slack = max(0.0, room_w - pen.textlength(text.text, _font(size))) / 2
    x = scene.width / 2 + rng.uniform(-1, 1) * slack
    y = scene.height * (0.25 if text.place < 2 else 0.75) + rng.uniform(-0.03, 0.03) * scene.height
    pen.text((x, y), text.text, RGB[text.colour], _font(size), anchor="mm")


def sign_box(scene: Scene) -> Box:
    """Where a scene's small sign stands: near the picture's own corner, so that a tile's border misses it."""
    text = scene.prints[0]
    rng = Random(scene.seed ^ 0x51)
    size = rng.randint(15, 16)
    left, _, right, _ = _font(size).getbbox(text.text)
    w, h = right - left + 7, size + 3
    x, y = rng.uniform(2, 4), rng.uniform(2, 4)
    row, column = divmod(text.place, 2)
    x, y = round(scene.width - x - w if column else x), round(scene.height - y - h if row else y)
    return (x, y, x + w, y + h)


def _draw_sign(pen: ImageDraw.ImageDraw, box: Box, text: Print) -> None:
    size = int(box[3] - box[1] - 3)
    pen.rectangle(box, (255, 255, 255), (120, 120, 120))
    pen.text(((box[0] + box[2]) / 2, (box[1] + box[3]) / 2), text.text, (15, 15, 15), _font(size), anchor="mm")


def _draw_bars(pen: ImageDraw.ImageDraw, scene: Scene, rng: Random) -> None:
    """Bars on a base line, left to right."""
    left, base = scene.width * 0.08, scene.height * 0.94
    step = scene.width * 0.88 / len(scene.bars)
    pen.line((left * 0.6, base, scene.width * 0.97, base), (60, 60, 60), 1)
    for index, bar in enumerate(scene.bars):
        x = left + index * step
        top = base - bar.height * scene.height * 0.9
        pen.rectangle((x + step * 0.12, top, x + step * rng.uniform(0.7, 0.85), base - 1), RGB[bar.colour])
