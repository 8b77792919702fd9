"""Attention in its CPU form equals the fused one, also where scores are far apart, masked or many."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama3v import kernels
from mlx_llama3v.kernels import attend

HEADS, WIDTH = 6, 8


def heads(length: int, scale: float = 1.0, batch: int = 2, seed: int = 0) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(seed), 3)
    return [scale * mx.random.normal((batch, HEADS, length, WIDTH), key=key) for key in keys]


def fused(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    return mx.fast.scaled_dot_product_attention(q, k, v, scale=0.3, mask=mask)


@pytest.mark.parametrize(("length", "scale"), [(1, 1.0), (7, 1.0), (64, 1.0), (64, 8.0), (64, 60.0)])
def test_it_equals_the_fused_form(length: int, scale: float) -> None:
    q, k, v = heads(length, scale)
    np.testing.assert_allclose(np.array(attend(q, k, v, 0.3)), np.array(fused(q, k, v)), atol=1e-5 * scale)


def test_masked_keys_weigh_nothing() -> None:
    q, k, v = heads(20)
    mask = (mx.arange(20) < mx.array([[13], [20]]))[:, None, None, :]
    want = np.array(fused(q, k, v, mask))
    np.testing.assert_allclose(np.array(attend(q, k, v, 0.3, mask)), want, atol=1e-5)
    # A key that would win by far, were it not masked, must neither win nor drown the others.
    far = mx.where(mask.swapaxes(-1, -2), k, 1e4 * q)
    np.testing.assert_allclose(np.array(attend(q, far, v, 0.3, mask)), want, atol=1e-5)
    nothing = mx.zeros((2, 1, 1, 20), mx.bool_)
    assert np.isfinite(np.array(attend(q, k, v, 0.3, nothing))).all()


@pytest.mark.parametrize("scores", [1, 2 * 2 * 30 * 30, 1 << 20])
def test_heads_may_be_taken_in_parts(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(30)
    monkeypatch.setattr(kernels, "_SCORES", scores)
    np.testing.assert_allclose(np.array(attend(q, k, v, 0.3)), np.array(fused(q, k, v)), atol=1e-5)


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = heads(9)
    seen: list[tuple[int, ...]] = []
    fused_form = mx.fast.scaled_dot_product_attention

    def watch(*arrays: mx.array, **settings: object) -> mx.array:
        seen.append(arrays[0].shape)
        return fused_form(*arrays, **settings)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watch)
    attend(q, k, v, 0.3)
    assert not seen or kernels.device_name() != "cpu"
    monkeypatch.setattr(kernels, "device_name", lambda: "metal")
    attend(q, k, v, 0.3)
    assert seen[-1] == q.shape


def test_its_gradient_is_that_of_the_fused_form() -> None:
    q, k, v = heads(12)

    def total(form: object) -> list[mx.array]:
        return mx.grad(lambda q, k, v: (form(q, k, v) ** 2).sum(), (0, 1, 2))(q, k, v)  # type: ignore[operator]

    for ours, theirs in zip(total(lambda q, k, v: attend(q, k, v, 0.3)), total(fused), strict=True):
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=1e-4)
