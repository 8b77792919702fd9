"""Fewer patch embeddings a slice: the mean over N x N patches, before the codec.

A pooled store is nothing special to whoever reads it: layouts give the pooled grids. A model that was trained on
one must see pooled embeddings when it answers, too: `Encoder.pool`.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mlx_llama3v.config import Encoded, Grid, SliceLayout


def pooled_grid(grid: Grid, n: int) -> Grid:
    """Patch grid of one slice after pooling: rounded up, the last row and column hold what is left."""
    return -(-grid[0] // n), -(-grid[1] // n)


def pooled_layout(layout: SliceLayout, n: int) -> SliceLayout:
    """Slice shapes of a picture after pooling."""
    return replace(layout, overview=pooled_grid(layout.overview, n), tile=pooled_grid(layout.tile, n))


def pool_slice(values: np.ndarray, grid: Grid, n: int) -> np.ndarray:
    """Mean over n x n patches of one slice: [h*w, D] -> [ceil(h/n) * ceil(w/n), D], float32.

    A block at the border that is not whole takes the mean of the patches that it has.
    """
    if n == 1:
        return values
    blocks: Any = values.astype(np.float32).reshape(*grid, -1)
    for axis in (0, 1):
        starts = np.arange(0, grid[axis], n)
        sums = np.add.reduceat(blocks, starts, axis)
        counts = np.minimum(n, grid[axis] - starts).reshape(-1, *(1,) * (2 - axis))
        blocks = sums / counts.astype(np.float32)
    return blocks.reshape(-1, values.shape[-1])


def pool_picture(encoded: Encoded, n: int) -> Encoded:
    """A picture as a store with `pool` n holds it; itself for 1."""
    if n == 1:
        return encoded
    ends = np.cumsum([h * w for h, w in encoded.layout.grids])
    slices = zip(np.split(encoded.patches, ends[:-1]), encoded.layout.grids, strict=True)
    return Encoded(
        pooled_layout(encoded.layout, n), np.concatenate([pool_slice(rows, grid, n) for rows, grid in slices])
    )


@dataclass(frozen=True)
class Pool:
    """`post` of a StoreWriter: the mean over n x n patches."""

    n: int

    def describe(self) -> dict[str, Any]:
        """See Post."""
        return {"pool": self.n}

    def layout(self, layout: SliceLayout) -> SliceLayout:
        """See Post."""
        return pooled_layout(layout, self.n)

    def __call__(self, encoded: Encoded) -> Encoded:
        """See Post."""
        return pool_picture(encoded, self.n)
