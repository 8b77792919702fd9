"""How finished models run their tower, where that is not one batch of slices with one grid of positions each.

`s2` (Bunny 1.1): a picture at one, two and three times the native side, in native tiles; the features of each scale
are averaged back to the native grid and put side by side. `strip` (MiniCPM-V 2.5): a picture's slices are laid out as
one row of patches each, padded to the longest and the padding read like patches, as its published code does and its
weights know it; `strip-2d` gives the slices their true positions and masks the padding instead.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np
from PIL import Image

from mlx_llama3v.config import Grid, ModelConfig, SliceLayout, TilingConfig
from mlx_llama3v.errors import CheckpointError, ImageError
from mlx_llama3v.vision.encode import Encoder, Form, Slice, as_values, patchify
from mlx_llama3v.vision.image import Source, cut, named, open_image
from mlx_llama3v.vision.siglip import VisionTower, _bicubic
from mlx_llama3v.vision.tiling import MOST_PATCHES, plan

SCALES = (1, 2, 3)  # of s2
_MOST_SIDE = 8192  # of a padded square; the square of a long picture can have gigabytes, so that is made smaller before
MODES = ("native", "s2", "strip", "strip-2d")


def make_encoder(tower: VisionTower, config: ModelConfig, tiling: TilingConfig | None = None) -> Encoder:
    """The encoder that `config` asks for; `tiling` in place of its own. Raises CheckpointError for an unknown mode."""
    if config.vision_mode not in MODES:
        raise CheckpointError(f"vision_mode is {config.vision_mode!r}; expected one of {', '.join(MODES)}.")
    tiling = tiling or config.tiling
    parts = (tower, config.vision_config, config.image, tiling, config.vision_feature_layer, config.patch_pool)
    if config.vision_mode == "s2":
        return ScalesEncoder(*parts)
    if config.vision_mode.startswith("strip"):
        encoder = StripEncoder(*parts)
        encoder.flat, encoder.norm = config.vision_mode == "strip", config.vision_feature_norm
        return encoder
    return PaddingEncoder(*parts) if tiling.mode == "pad" else Encoder(*parts)


class PaddingEncoder(Encoder):
    """Pads a picture to a square of the mean colour first (tiling mode "pad")."""

    def opened(self, source: Source) -> Image.Image:
        """The picture, made square where the tiling says so. Raises ImageError."""
        picture = open_image(source, self.image.max_pixels)
        if self.tiling.mode != "pad" or picture.width == picture.height:
            return picture
        side = max(picture.size)
        if side > _MOST_SIDE:
            width, height = (max(1, round(length * _MOST_SIDE / side)) for length in picture.size)
            picture, side = picture.resize((width, height), Image.Resampling(self.image.resample)), _MOST_SIDE
        colour = tuple(int(255 * mean) for mean in self.image.image_mean)
        square = Image.new("RGB", (side, side), colour)
        square.paste(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
        return square

    def prepare(self, source: Source) -> tuple[SliceLayout, list[np.ndarray]]:
        """See Encoder."""
        picture = self.opened(source)
        slices = plan(*picture.size, self.vision, self.tiling)
        pixels = cut(picture, slices, self.image)
        return slices.layout, [patchify(piece, self.vision.patch_size) for piece in pixels]

    def fingerprint(self) -> dict[str, Any]:
        """See Encoder; the mode is part of it."""
        return {**super().fingerprint(), "mode": type(self).__name__}


class ScalesEncoder(PaddingEncoder):
    """S2: [P, 3 * D] a slice, from 1 + 4 + 9 native tiles of one square picture."""

    def prepare(self, source: Source) -> tuple[SliceLayout, list[np.ndarray]]:
        """One slice of the native grid, whose patches are those of all tiles, scale after scale: float32."""
        picture = self.opened(source)
        side = self.vision.image_size
        slices = plan(*picture.size, self.vision, self.tiling)
        largest = replace(slices, overview_px=(SCALES[-1] * side,) * 2)
        pixels = cut(picture, largest, self.image)[0].astype(np.float32)
        tiles = []
        for scale in SCALES:
            scaled = _resized(pixels, scale * side)
            corners = [(row * side, col * side) for row in range(scale) for col in range(scale)]
            tiles += [scaled[y : y + side, x : x + side] for y, x in corners]
        return slices.layout, [np.concatenate([patchify(tile, self.vision.patch_size) for tile in tiles])]

    def encode_as(self, form: Form, slices: Sequence[Slice], batch_size: int = 8) -> list[dict[str, np.ndarray]]:
        """See Encoder; of [P, 3 * D]."""
        count = sum(scale**2 for scale in SCALES)
        tiles = [(grid, part) for grid, patches in slices for part in np.split(patches, count)]
        before = self.rows
        hidden = [made["values"] for made in super().encode_as(as_values, tiles, batch_size)]
        self.rows = before + (self.rows - before) // count  # all tiles of a patch are one
        found = []
        for number, (grid, _) in enumerate(slices):
            joined = mx.array(self._joined(hidden[number * count : (number + 1) * count], grid))
            found.append({name: np.array(part[0]) for name, part in form(joined[None]).items()})
        return found

    @staticmethod
    def _joined(tiles: Sequence[np.ndarray], grid: Grid) -> np.ndarray:
        """Features of all tiles -> every scale averaged to `grid`, side by side."""
        (h, w), found, first = grid, [], 0
        for scale in SCALES:
            parts = np.stack(tiles[first : first + scale**2]).reshape(scale, scale, h, w, -1)
            first += scale**2
            whole = parts.transpose(0, 2, 1, 3, 4).reshape(scale * h, scale * w, -1)
            found.append(whole.reshape(h, scale, w, scale, -1).mean((1, 3)).reshape(h * w, -1))
        return np.concatenate(found, axis=1)


def _resized(pixels: np.ndarray, side: int) -> np.ndarray:
    """Bicubic without antialiasing, as torch's interpolate: [H, W, 3] -> [side, side, 3]."""
    if pixels.shape[:2] == (side, side):
        return pixels
    rows = np.tensordot(_bicubic(side, pixels.shape[0]), pixels, 1)
    return np.tensordot(_bicubic(side, pixels.shape[1]), rows, ((1,), (1,))).transpose(1, 0, 2).astype(np.float32)


class StripEncoder(PaddingEncoder):
    """MiniCPM-V 2.5's tower: positions by Idefics 2's buckets, never resampled; `flat`: as one row (see the module).

    A picture's slices leave `prepare` padded to its longest, since what is padding decides the result.
    """

    flat = True
    norm = True

    def prepare(self, source: Source) -> tuple[SliceLayout, list[np.ndarray]]:
        """See Encoder; with `flat` every slice has as many rows as the longest of the picture."""
        layout, patches = super().prepare(source)
        longest = max(map(len, patches))
        if longest > MOST_PATCHES:
            raise ImageError(
                f"{named(source)} is too long: a slice of it has {longest:,} patches, more than {MOST_PATCHES:,}."
            )
        if not self.flat:
            return layout, patches
        return layout, [np.pad(rows, ((0, longest - len(rows)), (0, 0))) for rows in patches]

    def _batches(self, slices: Sequence[Slice], size: int) -> list[list[int]]:
        """Slices of one padded length and, without `flat`, of one grid share a batch."""
        groups: dict[tuple[int, Grid | None], list[int]] = {}
        for i, (grid, patches) in enumerate(slices):
            groups.setdefault((len(patches), None if self.flat else grid), []).append(i)
        return [members[at : at + size] for members in groups.values() for at in range(0, len(members), size)]

    def _forward(self, batch: Sequence[Slice]) -> mx.array:
        """See Encoder; here padding beyond the grid is read, as zeros."""
        grid, first = batch[0]
        positions = self._positions((1, len(first)) if self.flat else grid)
        run = self.tower.last_hidden_state if self.norm else self.tower
        positions = mx.broadcast_to(positions, (len(batch), *positions.shape))
        return run(self._patches(batch), positions, layer=self.layer).astype(mx.float32)

    def _positions(self, grid: Grid) -> mx.array:
        """Rows of the tower's table for a slice of `grid`, [h*w, D]."""
        side = self.vision.grid
        ids = buckets(grid[0], side)[:, None] * side + buckets(grid[1], side)[None]
        return self.tower.embeddings.position_embedding.weight[mx.array(ids.reshape(-1))]

    def fingerprint(self) -> dict[str, Any]:
        """See Encoder."""
        return {**super().fingerprint(), "flat": self.flat, "norm": self.norm}


@lru_cache(maxsize=512)
def buckets(count: int, side: int) -> np.ndarray:
    """Idefics 2's position of each of `count` patches in a table of `side`, in float32: int32 [count]."""
    edges = (1 / side + np.arange(side - 1) * (1 / side)).astype(np.float32)
    at = np.arange(count, dtype=np.float32) * (np.float32(1) / np.float32(count))
    return np.searchsorted(edges, np.minimum(at, np.float32(1 - 1e-6)), side="right").astype(np.int32)
