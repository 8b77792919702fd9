"""Projectors: padding and neighbours change nothing; grids of any shape; gradients stay finite."""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.config import ProjectorConfig, SliceLayout
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.projector import Projector, average, pack, patch_positions, sincos_positions
from mlx_llama3v.text.prompt import FIRST_VISUAL
from tests.tiny_model import PLAIN, SPLIT, awake, picture

KINDS = ("attention", "linear", "mlp")

GRIDS = [(5, 7), (3, 3), (1, 4), (7, 2), (1, 1)]


def make(kind: str = "attention", pool: int = 3, seed: int = 0) -> Projector:
    mx.random.seed(seed)
    return awake(Projector(ProjectorConfig(kind, 12, 20, hidden_dim=16, num_heads=2, pool=pool)))


def run(projector: Projector, kind: str, grids, slices, pad: int = 0, pool: int = 3) -> list[np.ndarray]:
    """Each slice's own tokens; `pad` further patches of garbage behind every slice."""
    config = ProjectorConfig(kind, 12, 20, pool=pool)
    length = max(h * w for h, w in grids) + pad
    patches = np.full((len(grids), length, 12), 1e3, np.float32)
    for row, values in zip(patches, slices, strict=True):
        row[: len(values)] = values
    counts = [config.num_tokens(grid) for grid in grids]
    out = projector(mx.array(patches), mx.array(np.array(grids, np.int32)), max(counts))
    assert out.shape == (len(grids), max(counts), 20)
    return [np.array(row)[:count] for row, count in zip(out, counts, strict=True)]


def random_slices(grids, seed: int = 0) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    return [rng.normal(size=(h * w, 12)).astype(np.float32) for h, w in grids]


@pytest.mark.parametrize("pool", [2, 3])
@pytest.mark.parametrize("kind", KINDS)
def test_padding_and_neighbours_change_nothing(kind: str, pool: int) -> None:
    projector, slices = make(kind, pool), random_slices(GRIDS)
    together = run(projector, kind, GRIDS, slices, pad=6, pool=pool)
    for grid, patches, expected in zip(GRIDS, slices, together, strict=True):
        (alone,) = run(projector, kind, [grid], [patches], pool=pool)
        np.testing.assert_allclose(expected, alone, atol=2e-5)
        (other,) = run(projector, kind, [grid], [patches + 0.1], pool=pool)
        assert np.abs(other - alone).max() > 1e-3


@pytest.mark.parametrize(("grid", "pool"), [((5, 7), 3), ((4, 4), 2), ((1, 5), 3), ((6, 3), 3), ((2, 2), 5)])
def test_pooling_is_the_mean_of_each_window(grid: tuple[int, int], pool: int) -> None:
    h, w = grid
    (x,) = random_slices([grid])
    rows, cols, valid = patch_positions(mx.array([grid]), h * w + 3)
    padded = np.concatenate([x, np.full((3, 12), 7.0, np.float32)])[None]
    tokens = ProjectorConfig(pool=pool).num_tokens(grid)
    window = rows // pool * -(-w // pool) + cols // pool
    found = np.array(average(mx.array(padded), window, valid, tokens))[0]
    image = x.reshape(h, w, 12)
    expected = [image[i : i + pool, j : j + pool].mean((0, 1)) for i in range(0, h, pool) for j in range(0, w, pool)]
    assert len(expected) == tokens
    np.testing.assert_allclose(found, expected, atol=1e-6)


def test_positions_are_2d_sin_cos() -> None:
    rows, cols, valid = patch_positions(mx.array([[2, 3], [0, 0]]), 8)
    assert rows[0, :6].tolist() == [0, 0, 0, 1, 1, 1] and cols[0, :6].tolist() == [0, 1, 2] * 2
    assert valid.tolist() == [[True] * 6 + [False] * 2, [True] + [False] * 7]  # nothing counts as one patch
    found = np.array(sincos_positions(rows, cols, 16))[0]
    for patch, (row, col) in enumerate([(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (1, 2)]):
        angles = [np.array([row, col])[:, None] / 10000 ** (np.arange(4) / 4)]
        expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=-1).reshape(16)
        np.testing.assert_allclose(found[patch], expected, atol=1e-6)


def test_attention_knows_where_patches_are() -> None:
    projector, (x,) = make(), random_slices([(5, 7)])
    (upright,) = run(projector, "attention", [(5, 7)], [x])
    swapped = x.copy()
    swapped[[0, 1]] = x[[1, 0]]  # both in the first window: only positions tell them apart
    (other,) = run(projector, "attention", [(5, 7)], [swapped])
    assert np.abs(upright - other).max() > 1e-3
    (turned,) = run(projector, "attention", [(7, 5)], [x])
    assert np.abs(upright - turned).max() > 1e-3
    for block in projector.body.blocks:
        block.update({name: {"weight": mx.zeros((16, 16))} for name in ("q_proj", "v_proj", "out_proj")})
    # Twin: without attention, the far corner is not felt.
    (blind,) = run(projector, "attention", [(5, 7)], [x])
    x[-1] += 5
    (moved,) = run(projector, "attention", [(5, 7)], [x])
    np.testing.assert_allclose(blind[0], moved[0], atol=1e-6)


def test_attention_reaches_the_whole_slice() -> None:
    projector, (x,) = make(), random_slices([(5, 7)])
    (before,) = run(projector, "attention", [(5, 7)], [x])
    x[-1] += 5
    (after,) = run(projector, "attention", [(5, 7)], [x])
    assert np.abs(before[0] - after[0]).max() > 1e-3


def test_mlp_uses_exact_gelu() -> None:
    projector, (x,) = make("mlp"), random_slices([(2, 3)])
    (found,) = run(projector, "mlp", [(2, 3)], [x * 3])
    first, second = projector.body.linear_1, projector.body.linear_2
    hidden = x * 3 @ np.array(first.weight).T + np.array(first.bias)
    exact = hidden * 0.5 * (1 + np.vectorize(math.erf)(hidden / math.sqrt(2)))
    tanh = np.array(nn.gelu_approx(mx.array(hidden)))
    weight, bias = np.array(second.weight).T, np.array(second.bias)
    np.testing.assert_allclose(found, exact @ weight + bias, atol=2e-6)
    assert np.abs(found - (tanh @ weight + bias)).max() > 2e-5


@pytest.mark.parametrize("kind", KINDS)
def test_a_slice_of_nothing_keeps_gradients_finite(kind: str) -> None:
    """A batch may be padded with slices of grid 0 x 0, so that few shapes are compiled."""
    projector = make(kind)
    (x,) = random_slices([(3, 4)])

    def loss(parameters, patches, grid):
        projector.update(parameters)
        return (projector(patches, grid, 2)[0] ** 2).sum()

    parameters = projector.parameters()
    alone = mx.grad(loss)(parameters, mx.array(x)[None], mx.array([[3, 4]]))
    padded = mx.array(np.stack([x, np.zeros_like(x)]))
    grads = mx.grad(loss)(parameters, padded, mx.array([[3, 4], [0, 0]]))
    for (name, found), (_, expected) in zip(tree_flatten(grads), tree_flatten(alone), strict=True):
        np.testing.assert_allclose(np.array(found), np.array(expected), atol=1e-4, err_msg=name)


@pytest.mark.parametrize("kind", KINDS)
def test_parameters_stay_float32_while_compute_follows_the_input(kind: str) -> None:
    projector, (x,) = make(kind), random_slices([(3, 3)])
    assert all(value.dtype == mx.float32 for _, value in tree_flatten(projector.parameters()))
    full = projector(mx.array(x)[None], mx.array([[3, 3]]), 1)
    half = projector(mx.array(x)[None].astype(mx.bfloat16), mx.array([[3, 3]]), 1)
    assert (full.dtype, half.dtype) == (mx.float32, mx.bfloat16)
    largest = float(mx.abs(full).max())
    np.testing.assert_allclose(np.array(half.astype(mx.float32)), np.array(full), atol=0.03 * largest)


def test_a_fresh_one_speaks_as_loudly_as_llavas() -> None:
    """Behind a norm of gain 1 the attention projector did not, and its last layer learned as much more slowly."""
    patches = 12 * mx.array(np.random.default_rng(0).normal(size=(1, 36, 12)).astype(np.float32))
    loudness = {kind: float(mx.sqrt(mx.square(make(kind)(patches, mx.array([[6, 6]]), 4)).mean())) for kind in KINDS}
    assert loudness["linear"] / 3 < loudness["attention"] < 3 * loudness["linear"], loudness


def test_markers_are_small_at_first() -> None:
    markers = Projector(ProjectorConfig("linear", 12, 4096)).markers
    assert markers.shape == (8, 4096) and 0.018 < mx.std(markers).item() < 0.022


def test_bad_settings_are_named() -> None:
    with pytest.raises(CheckpointError, match="kind is 'magic'"):
        Projector(ProjectorConfig("magic"))
    with pytest.raises(CheckpointError, match="hidden_dim is 18"):
        Projector(ProjectorConfig(hidden_dim=18, num_heads=2))


def test_pack_keeps_every_token_findable() -> None:
    rows = [[picture(SPLIT, 1)], [], [picture(PLAIN, 2), picture(SliceLayout((1, 1)), 3)]]
    config = ProjectorConfig("linear", 12, 12)
    slices = pack(rows, config)
    assert slices is not None and slices.patches.shape == (7, 8, 12) and slices.num_tokens == 8
    flat = slices.patches[:, : slices.num_tokens].reshape(-1, 12)  # what an identity projector gives
    for row, pictures in enumerate(rows):
        expected = np.concatenate([np.zeros((0, 12)), *(p.patches for p in pictures)])
        np.testing.assert_array_equal(flat[slices.tables[row]], expected)
    local = np.array([0, 3, FIRST_VISUAL, FIRST_VISUAL + 6], np.int32)
    assert slices.place(2, local).tolist() == [0, 3, FIRST_VISUAL + 40, FIRST_VISUAL + 48]
    assert pack([[], []], config) is None


def test_a_fresh_block_is_the_identity() -> None:
    """So that the projector starts as a linear one; awake, it is not."""
    patches = mx.array(np.random.default_rng(0).normal(size=(1, 9, 12)).astype(np.float32))
    grid = mx.array([[3, 3]])
    fresh = Projector(ProjectorConfig("attention", 12, 20, hidden_dim=16, num_heads=2, pool=3))
    block = fresh.body.blocks[0]
    hidden = mx.random.normal((1, 9, 16))
    assert mx.array_equal(block(hidden, mx.ones((1, 9), mx.bool_)), hidden)
    before = fresh(patches, grid, 1)
    assert not mx.allclose(awake(fresh)(patches, grid, 1), before)
