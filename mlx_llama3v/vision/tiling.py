"""How a picture of W x H pixels becomes slices: LLaVA-UHD's adaptive splitting, in integers only.

An encoder trained on one square sees small print in a large photo as a smear. So a large picture is cut
into tiles of about the encoder's own area and near its shape, beside one overview of the whole (Xu et al.
2024, with MiniCPM-V's upscaling of small pictures). All comparisons are exact: a picture has the same layout
on every machine, and the store, the trainer and the chat agree on it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from fractions import Fraction
from functools import lru_cache
from math import ceil, isqrt, log, sqrt

from mlx_llama3v.config import Grid, SliceLayout, TilingConfig, VisionConfig
from mlx_llama3v.errors import CheckpointError

Size = tuple[int, int]  # (width, height) in pixels, as Pillow has it; grids are (rows, columns)


@dataclass(frozen=True)
class Plan:
    """What to resize a picture to. Tiles are cut from the original resized once to cols x rows tiles."""

    layout: SliceLayout
    overview_px: Size
    tile_px: Size = (0, 0)

    @property
    def largest_px(self) -> Size:
        """What holds everything that the picture is resized to."""
        (w, h), (tile_w, tile_h) = self.overview_px, self.tile_px
        return max(w, self.layout.cols * tile_w), max(h, self.layout.rows * tile_h)


@lru_cache(maxsize=4096)  # photos of a data set come in few sizes
def plan(width: int, height: int, vision: VisionConfig, tiling: TilingConfig) -> Plan:
    """The slices of a picture of `width` x `height` pixels, both at least 1; it never fails on a shape.

    No slice has more than `vision.grid ** 2` patches and there are at most `max_slices` tiles. Raises
    CheckpointError for an unknown mode.
    """
    if tiling.mode in ("squash", "pad"):  # "pad": of a picture that was made square before (families.py)
        side = (vision.grid, vision.grid)
        return Plan(SliceLayout(side), (vision.image_size, vision.image_size))
    if tiling.mode == "minicpm":
        return minicpm(width, height, vision.patch_size, tiling.max_slices)
    if tiling.mode != "uhd":
        raise CheckpointError(f"tiling mode is {tiling.mode!r}, expected 'uhd', 'squash', 'pad' or 'minicpm'.")
    cap, patch = vision.grid**2, vision.patch_size
    overview = _fit(width, height, cap)
    count = min(-(-width * height // vision.image_size**2), tiling.max_slices)
    if count <= 1:
        return Plan(SliceLayout(overview), _pixels(overview, patch))
    rows, cols = min(_splits(count, tiling.max_slices), key=lambda grid: _mismatch(width, height, grid[1], grid[0]))
    tile = _fit(width * rows, height * cols, cap)  # the shape of (width / cols) x (height / rows)
    layout = SliceLayout(overview, rows, cols, tile)
    return Plan(layout, _pixels(overview, patch), _pixels(tile, patch))


def _pixels(grid: Grid, patch: int) -> Size:
    return grid[1] * patch, grid[0] * patch


def _splits(count: int, most: int) -> Iterator[Grid]:
    """(rows, columns) of every way to cut into about `count` tiles; of equals the first one wins."""
    for tiles in (count - 1, count, count + 1):
        if 2 <= tiles <= most:
            yield from ((tiles // cols, cols) for cols in range(1, tiles + 1) if tiles % cols == 0)


def _mismatch(width: int, height: int, cols: int, rows: int) -> Fraction:
    """How far cols : rows is from width : height: |log| of their ratio, kept exact by leaving out the log."""
    a, b = width * rows, height * cols
    return Fraction(max(a, b), min(a, b))


def _fit(width: int, height: int, cap: int) -> Grid:
    """The patch grid of at most `cap` patches that is nearest to the shape width : height and about fills it.

    The exact sides are sqrt(cap * width / height) and its inverse. Each is rounded down and up and the other
    one cut where the cap asks for it; the least distorted of these wins, the larger one of equals.
    """
    cols, rows = isqrt(cap * width // height), isqrt(cap * height // width)
    sides = [(max(h, 1), max(w, 1)) for h in (rows, rows + 1) for w in (cols, cols + 1)]
    allowed = [(min(h, cap), min(w, cap // min(h, cap))) for h, w in sides]
    allowed += [(min(h, cap // min(w, cap)), min(w, cap)) for h, w in sides]
    return min(allowed, key=lambda grid: (_mismatch(width, height, grid[1], grid[0]), -grid[0] * grid[1]))


_SIDE = 448  # pixels of the square whose area a slice of MiniCPM-V has
MOST_PATCHES = 70**2  # of a slice of it that is still encoded: its tower's own square


def minicpm(width: int, height: int, patch: int, max_slices: int) -> Plan:
    """MiniCPM-V 2.5's own splitting, floats and rounding included: its weights know these grids.

    Slices have about 1,070 patches at most, of pictures that are very long far more.
    """
    count = min(ceil(width * height / _SIDE**2), max_slices)
    whole = _near(width, height, patch, upscale=count <= 1)
    if count <= 1:
        return Plan(SliceLayout(_grid(whole, patch)), whole)
    ways = [
        (cols, tiles // cols)
        for tiles in (count - 1, count, count + 1)
        if tiles != 1 and tiles <= max_slices
        for cols in range(1, tiles + 1)
        if tiles % cols == 0
    ]
    shape = log(width / height)
    cols, rows = min(ways, key=lambda way: abs(shape - log(way[0] / way[1])))
    wide, high = _multiple(width, cols), _multiple(height, rows)
    tile = _near(wide / cols, high / rows, patch, upscale=True)
    return Plan(SliceLayout(_grid(whole, patch), rows, cols, _grid(tile, patch)), whole, tile)


def _grid(size: Size, patch: int) -> Grid:
    return size[1] // patch, size[0] // patch


def _multiple(length: float, of: int) -> int:
    return max(round(length / of) * of, of)


def _near(width: float, height: float, patch: int, *, upscale: bool) -> Size:
    """A size of the same shape: of _SIDE's area if larger (or `upscale`), sides multiples of the patch."""
    if width * height > _SIDE**2 or upscale:
        ratio = width / height
        height = int(_SIDE / sqrt(ratio))
        width = int(height * ratio)
    return _multiple(width, patch), _multiple(height, patch)
