"""The CPU's own functions against MLX's, values and gradients."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu

from mlx_llama3v import fast

X = mx.concatenate([mx.linspace(-30, 30, 4001), mx.array([-1e4, -87.5, -0.0, 1e4])])


def gradients(function: Callable[..., mx.array], *values: mx.array) -> list[np.ndarray]:
    """Of a weighted sum, with respect to every argument."""

    def total(*values: mx.array) -> mx.array:
        out = function(*values)
        return (out * mx.sin(mx.arange(out.size)).reshape(out.shape)).sum()

    found = mx.grad(total, argnums=tuple(range(len(values))))(*values)
    return [np.array(value) for value in found]


def assert_same(ours: Callable[..., Any], theirs: Callable[..., Any], *values: mx.array, atol: float) -> None:
    np.testing.assert_allclose(np.array(ours(*values)), np.array(theirs(*values)), atol=atol, rtol=2e-6)
    for one, other in zip(gradients(ours, *values), gradients(theirs, *values), strict=True):
        np.testing.assert_allclose(one, other, atol=atol, rtol=5e-6)


def test_exp() -> None:
    x = -mx.abs(X)
    found, expected = np.array(fast.exp_negative(x)), np.exp(np.array(x, np.float64))
    np.testing.assert_allclose(found, expected, rtol=4e-6, atol=1e-37)
    near = np.array(x) > -8
    np.testing.assert_allclose(found[near], expected[near], rtol=5e-7)
    assert float(fast.exp_negative(mx.array(0.0))) == 1


def test_gelu() -> None:
    assert_same(fast.gelu, nn.gelu, X[:-1], atol=4e-6)


def test_swiglu() -> None:
    other = mx.cos(mx.arange(X.size))
    assert_same(fast.swiglu, swiglu, X, other, atol=4e-6)


def test_softmax() -> None:
    x = mx.random.normal((3, 5, 40), key=mx.random.key(0)) * 8
    assert_same(fast.softmax, lambda x: mx.softmax(x, axis=-1), x, atol=2e-6)
    masked = mx.where(mx.arange(40) < 7, x, -float("inf"))
    np.testing.assert_allclose(np.array(fast.softmax(masked)), np.array(mx.softmax(masked, -1)), atol=1e-6)


def keys(kind: str) -> Any:
    seen = mx.random.uniform(shape=(2, 1, 1, 9), key=mx.random.key(3)) > 0.3
    added = mx.random.normal((2, 4, 6, 9), key=mx.random.key(4))
    return {"none": None, "causal": "causal", "bool": seen, "added": added, "square": seen[0, 0]}[kind]


@pytest.mark.parametrize("kind", ["none", "causal", "bool", "added", "square"])
def test_attention(kind: str) -> None:
    q = mx.random.normal((2, 4, 6, 8), key=mx.random.key(0))
    k, v = (mx.random.normal((2, 2, 9, 8), key=mx.random.key(n)) for n in (1, 2))

    def ours(*qkv: mx.array) -> mx.array:
        return fast.attention(*qkv, scale=0.4, mask=keys(kind))

    def theirs(*qkv: mx.array) -> mx.array:
        return mx.fast.scaled_dot_product_attention(*qkv, scale=0.4, mask=keys(kind))

    assert_same(ours, theirs, q, k, v, atol=5e-6)


def test_they_are_for_float32_on_a_cpu_alone() -> None:
    assert fast.on_cpu(mx.zeros(1)) == (mx.default_device().type == mx.DeviceType.cpu)
    assert not fast.on_cpu(mx.zeros(1, mx.bfloat16))


def test_they_work_within_a_compiled_gradient() -> None:
    x = mx.linspace(-3, 3, 24).reshape(2, 12)
    step = mx.compile(mx.value_and_grad(lambda x: (fast.softmax(fast.gelu(fast.swiglu(x, x))) * x).sum()))
    value, slope = step(x)
    expected, expected_slope = mx.value_and_grad(lambda x: (mx.softmax(nn.gelu(swiglu(x, x)), axis=-1) * x).sum())(x)
    assert float(value) == pytest.approx(float(expected), rel=1e-5)
    np.testing.assert_allclose(np.array(slope), np.array(expected_slope), atol=1e-5)
