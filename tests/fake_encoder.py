"""An encoder whose embeddings follow from numbers, and a store that is filled with it and compared."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import Encoded, Grid, SliceLayout
from mlx_llama3v.embeddings.embed import EmbedSummary, embed_images
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import ImageError
from mlx_llama3v.source import Loaded
from mlx_llama3v.vision.encode import Form

WIDTH, CHANNELS = 4, 3
SHARD_BYTES = 4000  # 83 pictures of one slice
LAYOUTS = (SliceLayout((2, 3)), SliceLayout((3, 2), 1, 2, (2, 2)), SliceLayout((2, 2), 2, 2, (1, 3)))


class FakeEncoder:
    """A picture is a file with a number in it; embeddings follow from the number and the place alone."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.calls: list[int] = []
        self.numbers: list[float] = []
        self.rows = 0
        self.lock = threading.Lock()

    def prepare(self, source: Loaded) -> tuple[SliceLayout, list[np.ndarray]]:
        assert threading.current_thread() is not threading.main_thread()
        with self.lock:
            self.prepared.append(Path(source.name).name)
        text = source.content.decode()
        if not text.isdecimal():
            raise ImageError(f"{source} cannot be read as a picture: it says {text!r}.")
        return self.split(int(text))

    @staticmethod
    def split(number: int) -> tuple[SliceLayout, list[np.ndarray]]:
        layout = LAYOUTS[number % 3]
        slices = [np.full((h * w, CHANNELS), number + i / 8, np.float32) for i, (h, w) in enumerate(layout.grids)]
        return layout, slices

    def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
        assert threading.current_thread() is threading.main_thread()
        assert all(len(patches) == h * w for (h, w), patches in slices)
        self.calls.append(len(slices))
        self.rows += 2 * sum(len(patches) for _, patches in slices)  # a half of it padding
        self.numbers += [float(patches[0, 0]) for _, patches in slices]
        return [self.made(grid, patches) for grid, patches in slices]

    def encode_as(
        self, form: Form, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8
    ) -> list[dict[str, np.ndarray]]:
        made = [form(mx.array(rows[None])) for rows in self.encode(slices, batch_size)]
        return [{name: np.array(part[0]) for name, part in one.items()} for one in made]

    @staticmethod
    def made(grid: Grid, patches: np.ndarray) -> np.ndarray:
        places = np.arange(grid[0] * grid[1], dtype=np.float32)[:, None]
        return patches[:, :1] + np.concatenate([places] * WIDTH, 1) / 32 + np.float32(grid[1] / 4)

    def fingerprint(self) -> dict[str, Any]:
        return {"weights": "fake"}

    def fresh(self, number: int) -> Encoded:
        layout, slices = self.split(number)
        return Encoded(layout, np.concatenate([self.made(g, p) for g, p in zip(layout.grids, slices, strict=True)]))


def write(folder: Path, texts: dict[str, str]) -> list[tuple[str, Path]]:
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [(name, folder / name) for name in texts]


def run(store: Path, images: Sequence[tuple[str, str | Path]], encoder: FakeEncoder, **keys: Any) -> EmbedSummary:
    with StoreWriter(store, encoder.fingerprint(), shard_bytes=keys.pop("shard_bytes", SHARD_BYTES)) as writer:
        return embed_images(images, encoder, writer, **{"batch_size": 2, **keys})


def check(store: Path, numbers: dict[str, int]) -> None:
    found = Store(store)
    assert set(found.names) == set(numbers)
    for name, number in numbers.items():
        layout, patches = found.read(name)
        assert layout == FakeEncoder.split(number)[0]
        np.testing.assert_array_equal(patches, FakeEncoder().fresh(number).patches)
