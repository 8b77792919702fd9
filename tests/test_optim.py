"""Schedule, clipping and AdamW: known values, and torch's own."""

from __future__ import annotations

import math
from itertools import pairwise

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mlx.utils import tree_flatten

from mlx_llama3v.train.optim import adamw, learning_rate, mean_and_clip, mean_norm


def test_the_schedule_rises_and_falls() -> None:
    rates = [learning_rate(step, 100, 1e-3, warmup=0.1, floor=0.2) for step in range(101)]
    np.testing.assert_allclose(rates[:10], [1e-4 * n for n in range(1, 11)])
    assert rates[10] == 1e-3
    assert all(a > b for a, b in pairwise(rates[10:]))
    assert rates[55] == pytest.approx(1e-3 * (0.2 + 0.8 * 0.5))
    assert rates[100] == pytest.approx(2e-4)


@given(st.integers(1, 500), st.floats(0, 1), st.floats(0, 1))
def test_the_schedule_never_leaves_its_range(steps: int, warmup: float, floor: float) -> None:
    rates = [learning_rate(step, steps, 2.0, warmup, floor) for step in range(steps)]
    assert all(0 < rate <= 2 for rate in rates)
    assert max(rates) == 2.0


@pytest.mark.parametrize(("limit", "shrinks"), [(0.0, False), (100.0, False), (1.0, True)])
def test_clipping_keeps_the_direction(limit: float, shrinks: bool) -> None:
    summed = {"a": mx.array([10.0, 5.0]), "b": [mx.array([[3.0], [2.0]])]}
    norm = mean_norm(summed, mx.array(4.0))
    mean = mean_and_clip(summed, mx.array(4.0), norm, limit)
    assert float(norm) == pytest.approx(math.sqrt(138) / 4)
    values = np.concatenate([np.array(value).reshape(-1) for _, value in tree_flatten(mean)])
    expected = np.array([10.0, 5.0, 3.0, 2.0]) / (math.sqrt(138) if shrinks else 4.0)
    np.testing.assert_allclose(values, expected, rtol=1e-5)


def test_adamw_is_torchs() -> None:
    import torch

    start = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    theirs = torch.nn.Parameter(torch.from_numpy(start.copy()))
    torch_optimizer = torch.optim.AdamW([theirs], lr=1.0, weight_decay=0.1)
    ours = nn.Linear(4, 3, bias=False)
    ours.weight = mx.array(start)
    optimizer = adamw(0.1)
    optimizer.init(ours.trainable_parameters())
    for step in range(5):
        rate = learning_rate(step, 5, 1e-2, 0.2)
        gradient = np.random.default_rng(step + 1).standard_normal((3, 4)).astype(np.float32)
        theirs.grad = torch.from_numpy(gradient)
        torch_optimizer.param_groups[0]["lr"] = rate
        torch_optimizer.step()
        optimizer.learning_rate = rate
        optimizer.update(ours, {"weight": mx.array(gradient)})
    np.testing.assert_allclose(np.array(ours.weight), theirs.detach().numpy(), atol=1e-6)
    assert np.abs(np.array(ours.weight) - start).max() > 0.01
    assert optimizer.state["weight"]["v"].dtype == mx.float32
