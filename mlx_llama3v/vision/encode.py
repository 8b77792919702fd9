"""From a picture to SigLIP patch embeddings: the one path that `embed`, `chat` and `generate` share.

`prepare` is Pillow and NumPy only and may run in worker threads; `encode` runs the tower on batches of slices
from any number of pictures. Slices are sorted by size, so that a batch pads little: never more than a tenth.
"""

from __future__ import annotations

import hashlib
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from dataclasses import asdict
from functools import cached_property, partial
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import Encoded, Grid, ImageConfig, SliceLayout, TilingConfig, VisionConfig
from mlx_llama3v.lanes import default_lanes, lanes
from mlx_llama3v.tensors import MARKS, marks, parameters
from mlx_llama3v.vision.image import PROCESSING, Source, cut, normalisation, open_image
from mlx_llama3v.vision.pool import pool_picture
from mlx_llama3v.vision.siglip import VisionTower, position_table
from mlx_llama3v.vision.tiling import Plan, Size, plan

Slice = tuple[Grid, np.ndarray]  # patch grid (rows, columns) and patches [rows*columns, p*p*3], values 0..255

Form = Callable[[mx.array], dict[str, mx.array]]  # embeddings [S, P, D] -> what leaves the device: parts [S, P, x]

_PADDING = 0.1  # of the rows of a batch, at most


def as_values(values: mx.array) -> dict[str, mx.array]:
    """The form of embeddings that are wanted as they are."""
    return {"values": values}


def patchify(pixels: np.ndarray, patch: int) -> np.ndarray:
    """[H, W, C] -> [h*w, patch*patch*C] in reading order, each patch as (y, x, channel).

    Pixels beyond the last whole patch are cut off, as a convolution without padding does (384 px / 14 -> 27).
    """
    h, w, channels = pixels.shape[0] // patch, pixels.shape[1] // patch, pixels.shape[2]
    whole = pixels[: h * patch, : w * patch].reshape(h, patch, w, patch, channels)
    return whole.transpose(0, 2, 1, 3, 4).reshape(h * w, patch * patch * channels)


def normalised(patches: mx.array, image: ImageConfig) -> mx.array:
    """Patches [..., n*3] of values 0..255 -> float32, as the checkpoint's processor says (image.normalisation).

    On the device: that gets a quarter of the bytes, and the threads that prepare pictures are spared the work.
    """
    factor, shift = normalisation(image, patches.shape[-1] // 3)
    return patches.astype(mx.float32) * mx.array(factor) - mx.array(shift)


def bucket(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Numbers of slices of those lengths in batches: at most `size` each, of like length, at most a tenth padding."""
    batches: list[list[int]] = []
    filled = 0  # rows of the last batch that are no padding
    for i in sorted(range(len(lengths)), key=lambda i: lengths[i]):
        filled += lengths[i]
        if not batches or len(batches[-1]) == size or filled < (1 - _PADDING) * lengths[i] * (len(batches[-1]) + 1):
            batches.append([])
            filled = lengths[i]
        batches[-1].append(i)
    return batches


class Encoder:
    """A frozen tower and all that decides what it sees: pixel preprocessing, tiling, the layer to read.

    Attributes:
        rows: patches of layouts that the tower ran over so far, padding included.
    """

    def __init__(
        self,
        tower: VisionTower,
        vision: VisionConfig,
        image: ImageConfig,
        tiling: TilingConfig,
        layer: int = -1,
        pool: int = 1,
    ):
        """`pool`: the mean over pool x pool patches is taken in `embed` (and by a store's writer), not in `encode`."""
        self.tower, self.vision, self.image, self.tiling = tower, vision, image, tiling
        self.layer, self.pool = layer, pool
        self.rows = 0

    def prepare(self, source: Source) -> tuple[SliceLayout, list[np.ndarray]]:
        """Open, split and cut a picture: its layout and the patches [P_i, p*p*3] of each slice, uint8, in
        `layout.grids` order. Touches no MLX array: safe in threads. Raises ImageError."""
        plans: list[Plan] = []

        def need(size: Size) -> Size:
            plans.append(plan(*size, self.vision, self.tiling))
            return plans[0].largest_px

        picture = open_image(source, self.image.max_pixels, need)
        slices = plans[0]
        pixels = cut(picture, slices, self.image, quick=True)
        return slices.layout, [patchify(piece, self.vision.patch_size) for piece in pixels]

    def encode(self, slices: Sequence[Slice], batch_size: int = 8) -> list[np.ndarray]:
        """Patch embeddings, float32 [P_i, D], of slices of any pictures and shapes, in the order given.

        Takes (grid, patches) pairs, as in `zip(layout.grids, patches)`. The tower runs on `batch_size` slices
        at a time; padding never changes a result beyond float rounding.
        """
        return [made["values"] for made in self.encode_as(as_values, slices, batch_size)]

    def encode_as(self, form: Form, slices: Sequence[Slice], batch_size: int = 8) -> list[dict[str, np.ndarray]]:
        """As `encode`, but of each slice the parts [P_i, x] that `form` makes of its embeddings, on the device."""
        count = default_lanes(min(batch_size, len(slices)))
        size = -(-batch_size // count)  # the lanes together hold one batch
        found: dict[int, dict[str, np.ndarray]] = {}
        waiting: deque[tuple[list[int], Future[dict[str, mx.array]]]] = deque()

        def take() -> None:
            chosen, work = waiting.popleft()
            made = {name: np.array(part) for name, part in work.result().items()}
            for at, i in enumerate(chosen):
                h, w = slices[i][0]
                # Copies, so that one slice does not keep its whole batch in memory.
                found[i] = {name: part[at, : h * w].copy() for name, part in made.items()}

        mx.eval(self.tower.parameters())  # lanes take no work of another thread over
        with lanes(count) as side:
            for chosen in self._batches(slices, size):
                self.rows += len(chosen) * max(len(slices[i][1]) for i in chosen)
                waiting.append((chosen, side.start(partial(self._formed, form, [slices[i] for i in chosen]))))
                if len(waiting) > count:
                    take()
            while waiting:
                take()
        return [found[i] for i in range(len(slices))]

    def _batches(self, slices: Sequence[Slice], size: int) -> list[list[int]]:
        """Numbers of the slices that `_forward` takes together."""
        return bucket([len(patches) for _, patches in slices], size)

    def _formed(self, form: Form, batch: Sequence[Slice]) -> dict[str, mx.array]:
        return form(self._forward(batch))

    def _forward(self, batch: Sequence[Slice]) -> mx.array:
        """float32 [S, P, D], padded to the longest slice of the batch."""
        lengths = [len(rows) for _, rows in batch]
        longest = max(lengths)
        tables = {grid: position_table(self.tower, grid) for grid, _ in batch}
        margins = [[(0, longest - length), (0, 0)] for length in lengths]
        positions = mx.stack([mx.pad(tables[g], m) for (g, _), m in zip(batch, margins, strict=True)])
        mask = None
        if min(lengths) < longest:
            mask = mx.arange(longest)[None] < mx.array(lengths)[:, None]
        return self.tower(self._patches(batch), positions, mask, self.layer).astype(mx.float32)

    def _patches(self, batch: Sequence[Slice]) -> mx.array:
        """Normalised float32 [S, P, p*p*3], padded to the longest; zeros in every row beyond a slice's grid."""
        lengths = [h * w for (h, w), _ in batch]
        longest = max(len(rows) for _, rows in batch)
        values = np.zeros(
            (len(batch), longest, batch[0][1].shape[1]), np.result_type(*{rows.dtype for _, rows in batch})
        )
        for into, (_, rows) in zip(values, batch, strict=True):
            into[: len(rows)] = rows
        patches = normalised(mx.array(values), self.image)
        if min(lengths) == longest:
            return patches
        return mx.where(mx.arange(longest)[None, :, None] < mx.array(lengths)[:, None, None], patches, 0)

    def embed(self, source: Source, batch_size: int = 8) -> Encoded:
        """One picture's embeddings, fresh and pooled: float32 [layout.patches, D]. Raises ImageError."""
        layout, patches = self.prepare(source)
        slices = [*zip(layout.grids, patches, strict=True)]
        return pool_picture(Encoded(layout, np.concatenate(self.encode(slices, batch_size))), self.pool)

    def fingerprint(self) -> dict[str, Any]:
        """JSON-ready identity of what `embed` computes; encoders with equal ones may share a store."""
        return {
            "weights": self._weights_sha256,
            MARKS: marks(parameters(self.tower)),
            "layer": self.layer,
            "processing": PROCESSING,
            "vision": asdict(self.vision),
            "image": {key: list(v) if isinstance(v, tuple) else v for key, v in asdict(self.image).items()},
            "tiling": asdict(self.tiling),
        }

    @cached_property
    def _weights_sha256(self) -> str:
        digest = hashlib.sha256()
        for name, array in sorted(parameters(self.tower).items()):
            digest.update(f"{name} {list(array.shape)}\n".encode())
            digest.update(np.array(array.astype(mx.float32)).data)
        return digest.hexdigest()
