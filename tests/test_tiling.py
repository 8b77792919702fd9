"""Splitting holds its promises for every picture shape: caps, coverage, order, exactness."""

from __future__ import annotations

import math
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_llama3v.config import ImageConfig, SliceLayout, TilingConfig, VisionConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.vision.image import cut
from mlx_llama3v.vision.tiling import Plan, plan

BASE = VisionConfig()  # 224 / 16 -> 14 x 14
SO400M = VisionConfig(image_size=384, patch_size=14)  # 27 x 27, not integral
TOWERS = [BASE, SO400M, replace(BASE, image_size=512), replace(BASE, image_size=256, patch_size=32)]
UHD = TilingConfig()
ODD = [
    *[(1, 1), (2, 1), (5, 3), (1, 20000), (20000, 1), (300000, 1), (1, 300000), (20000, 100), (10000, 10)],
    *[(224, 224), (225, 224), (224, 225), (449, 448), (448, 449), (640, 480), (1920, 1080), (4032, 3024)],
    *[(10973, 3570), (1755, 14047), (3582, 240), (2**31, 2**31), (2**40, 1)],
]

sides = st.one_of(st.integers(1, 700), st.integers(1, 20_000), st.integers(1, 2**33))


def check(width: int, height: int, vision: VisionConfig, tiling: TilingConfig) -> Plan:
    """Everything that must hold for a uhd plan."""
    found = plan(width, height, vision, tiling)
    layout, p, cap = found.layout, vision.patch_size, vision.grid**2
    assert all(h >= 1 and w >= 1 and h * w <= cap for h, w in layout.grids)
    assert len(layout.grids) == 1 + layout.rows * layout.cols <= 1 + max(tiling.max_slices, 0)
    assert layout.rows * layout.cols != 1
    assert found.overview_px == (layout.overview[1] * p, layout.overview[0] * p)
    assert found.tile_px == (layout.tile[1] * p, layout.tile[0] * p)
    assert (layout.rows == 0) == (layout.cols == 0) == (layout.tile == (0, 0))
    split = width * height > vision.image_size**2 and tiling.max_slices > 1
    assert (layout.rows > 0) == split
    assert plan(width, height, vision, tiling) == found
    return found


@pytest.mark.parametrize("vision", TOWERS, ids=lambda v: f"{v.image_size}-{v.patch_size}")
@pytest.mark.parametrize("size", ODD, ids=str)
def test_odd_shapes(size: tuple[int, int], vision: VisionConfig) -> None:
    for slices in (-1, 0, 1, 2, 6, 9, 50):
        check(*size, vision, TilingConfig(max_slices=slices))


@settings(max_examples=1500, deadline=None)
@given(sides, sides, st.sampled_from(TOWERS), st.integers(0, 12))
def test_any_shape(width: int, height: int, vision: VisionConfig, slices: int) -> None:
    check(width, height, vision, TilingConfig(max_slices=slices))


def distortion(width: int, height: int, grid: tuple[int, int]) -> float:
    return abs(math.log(width * grid[0] / (height * grid[1])))


@settings(max_examples=700, deadline=None)
@given(sides, sides, st.sampled_from(TOWERS))
def test_a_turned_picture_has_the_turned_slices(width: int, height: int, vision: VisionConfig) -> None:
    """Unless two splits are equally good, as both are for a square."""
    found, turned = plan(width, height, vision, UHD).layout, plan(height, width, vision, UHD).layout
    assert found.overview == turned.overview[::-1]
    if (found.rows, found.cols) == (turned.cols, turned.rows):
        assert found.tile == turned.tile[::-1]
    else:
        splits = (found.rows, found.cols), (turned.cols, turned.rows)
        first, second = (distortion(width, height, split) for split in splits)
        assert first == pytest.approx(second, abs=1e-9)


@settings(max_examples=500, deadline=None)
@given(st.integers(1, 5000), st.integers(1, 5000), st.integers(0, 9))
def test_no_better_slices_exist(width: int, height: int, most: int) -> None:
    """By brute force: no grid below the cap is as large and nearer in shape, and no split is nearer."""
    layout, cap = plan(width, height, BASE, TilingConfig(max_slices=most)).layout, BASE.grid**2
    shapes = [(width, height, layout.overview)]
    if layout.rows:
        shapes.append((width * layout.rows, height * layout.cols, layout.tile))
        count = min(-(-width * height // 224**2), most)
        counts = [n for n in (count - 1, count, count + 1) if 2 <= n <= most]
        splits = [(n // c, c) for n in counts for c in range(1, n + 1) if n % c == 0]
        best = min(distortion(width, height, split) for split in splits)
        assert distortion(width, height, (layout.rows, layout.cols)) <= best + 1e-9
    for w, h, grid in shapes:
        ours = distortion(w, h, grid)
        area = grid[0] * grid[1]
        larger = [(a, b) for a in range(1, cap + 1) for b in range(-(-area // a), cap // a + 1)]
        assert all(distortion(w, h, other) >= ours - 1e-9 for other in larger)
        assert area >= 0.6 * cap


# size -> overview grid, (rows, cols), tile grid; worked out by hand for base/16-224.
KNOWN = {
    (1, 1): SliceLayout((14, 14)),
    (224, 224): SliceLayout((14, 14)),
    (225, 224): SliceLayout((14, 14), 1, 2, (19, 10)),
    (224, 225): SliceLayout((14, 14), 2, 1, (10, 19)),
    (448, 448): SliceLayout((14, 14), 2, 2, (14, 14)),
    (640, 480): SliceLayout((12, 16), 2, 3, (15, 13)),
    (672, 448): SliceLayout((11, 17), 2, 3, (14, 14)),
    (1, 20000): SliceLayout((196, 1)),
    (300000, 1): SliceLayout((1, 196), 1, 6, (1, 196)),
}


@pytest.mark.parametrize("size", KNOWN, ids=str)
def test_known_layouts(size: tuple[int, int]) -> None:
    assert plan(*size, BASE, UHD).layout == KNOWN[size]


def test_of_equally_distorted_grids_the_larger_one_is_taken() -> None:
    """1 : 6 lies between 2 x 8 and 1 x 9 patches, by the same factor."""
    small = VisionConfig(image_size=32, patch_size=8)
    assert plan(1, 6, small, UHD).layout.overview == (8, 2)
    assert plan(6, 1, small, UHD).layout.overview == (2, 8)


def test_more_slices_are_used_where_allowed() -> None:
    layouts = [plan(4032, 3024, BASE, TilingConfig(max_slices=n)).layout for n in range(13)]
    assert [layout.rows * layout.cols for layout in layouts] == [0, 0, 2, 2, 4, 4, 6, 6, 8, 9, 9, 10, 12]


@given(sides, sides)
def test_squash_is_one_native_square(width: int, height: int) -> None:
    assert plan(width, height, SO400M, TilingConfig("squash")) == Plan(SliceLayout((27, 27)), (384, 384))


def test_unknown_mode_is_refused() -> None:
    with pytest.raises(CheckpointError, match="'anyres'"):
        plan(10, 10, BASE, TilingConfig("anyres"))


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 900), st.integers(1, 900))
def test_tiles_cover_the_picture_in_reading_order(width: int, height: int) -> None:
    """Put back together, the tiles are the resized picture: nothing is lost, doubled or out of place."""
    y, x = np.mgrid[:height, :width]
    picture = Image.fromarray(np.stack([x * 255 // width, y * 255 // height, x ^ y], -1).astype(np.uint8))
    found = plan(width, height, BASE, UHD)
    overview, *tiles = cut(picture, found, ImageConfig())
    assert overview.shape == (*found.overview_px[::-1], 3)
    rows, cols, (w, h) = found.layout.rows, found.layout.cols, found.tile_px
    assert len(tiles) == rows * cols
    if tiles:
        lines = [np.concatenate(tiles[r * cols : (r + 1) * cols], axis=1) for r in range(rows)]
        whole = np.concatenate(lines, axis=0)
        want = np.asarray(picture.resize((cols * w, rows * h), Image.Resampling.BICUBIC))
        assert np.array_equal(whole, want)
