"""Attention in its CPU form equals the fused one, also where scores are far apart, masked or many; its parts."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama3v import kernels
from mlx_llama3v.kernels import attend

HEADS, WIDTH = 6, 8


def states(length: int, scale: float = 1.0, batch: int = 2, seed: int = 0) -> list[mx.array]:
    keys = mx.random.split(mx.random.key(seed), 3)
    return [scale * mx.random.normal((batch, length, HEADS * WIDTH), key=key) for key in keys]


def fused(q: mx.array, k: mx.array, v: mx.array, mask: mx.array | None = None) -> mx.array:
    B, L, D = q.shape
    q, k, v = (x.reshape(B, -1, HEADS, WIDTH).transpose(0, 2, 1, 3) for x in (q, k, v))
    keys = None if mask is None else mask[:, None, None]
    x = mx.fast.scaled_dot_product_attention(q, k, v, scale=WIDTH**-0.5, mask=keys)
    return x.transpose(0, 2, 1, 3).reshape(B, L, D)


@pytest.mark.parametrize(("length", "scale"), [(1, 1.0), (7, 1.0), (64, 1.0), (64, 8.0), (64, 60.0)])
def test_it_equals_the_fused_form(length: int, scale: float) -> None:
    q, k, v = states(length, scale)
    np.testing.assert_allclose(np.array(attend(q, k, v, HEADS)), np.array(fused(q, k, v)), atol=1e-5 * scale)


def test_masked_keys_weigh_nothing() -> None:
    q, k, v = states(20)
    mask = mx.arange(20) < mx.array([[13], [20]])
    want = np.array(fused(q, k, v, mask))
    np.testing.assert_allclose(np.array(attend(q, k, v, HEADS, mask)), want, atol=1e-5)
    # A key that would win by far, were it not masked, must neither win nor drown the others.
    far = mx.where(mask[..., None], k, 1e4 * q)
    np.testing.assert_allclose(np.array(attend(q, far, v, HEADS, mask)), want, atol=1e-5)
    nothing = mx.zeros((2, 20), mx.bool_)
    assert np.isfinite(np.array(attend(q, k, v, HEADS, nothing))).all()


@pytest.mark.parametrize("scores", [1, 2 * 2 * 30 * 30, 1 << 20])
def test_heads_may_be_taken_in_parts(scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = states(30)
    monkeypatch.setattr(kernels, "_SCORES", scores)
    np.testing.assert_allclose(np.array(attend(q, k, v, HEADS)), np.array(fused(q, k, v)), atol=1e-5)


def test_the_device_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = states(9)
    seen: list[tuple[int, ...]] = []
    fused_form = mx.fast.scaled_dot_product_attention

    def watch(*arrays: mx.array, **settings: object) -> mx.array:
        seen.append(arrays[0].shape)
        return fused_form(*arrays, **settings)

    monkeypatch.setattr(mx.fast, "scaled_dot_product_attention", watch)
    attend(q, k, v, HEADS)
    assert not seen or kernels.device_name() != "cpu"
    monkeypatch.setattr(kernels, "device_name", lambda: "metal")
    attend(q, k, v, HEADS)
    assert seen[-1] == (2, HEADS, 9, WIDTH)


@pytest.mark.parametrize("scores", [1, 2 * 2 * 12 * 12, 1 << 20])  # a head at a time, a few, all
@pytest.mark.parametrize("scale", [1.0, 60.0])  # scores thousands apart, where e^x overflows
def test_its_gradient_is_that_of_the_fused_form(scale: float, scores: int, monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = states(12, scale)
    mask = mx.arange(12) < mx.array([[9], [12]])
    monkeypatch.setattr(kernels, "_SCORES", scores)

    def total(form: object) -> list[mx.array]:
        return mx.grad(lambda q, k, v: (form(q, k, v) ** 2).sum(), (0, 1, 2))(q, k, v)  # type: ignore[operator]

    found, wanted = total(lambda *x: attend(*x, HEADS, mask)), total(lambda *x: fused(*x, mask))
    for ours, theirs in zip(found, wanted, strict=True):
        want = np.array(theirs)
        np.testing.assert_allclose(np.array(ours), want, rtol=1e-3, atol=1e-4 * max(1.0, np.abs(want).max()))


def test_the_decay_of_weights() -> None:
    t = mx.concatenate([mx.linspace(0, 20, 5001), mx.array([50.0, 90.0, 700.0, 1e4, 1e9])])
    made, slope = mx.vjp(kernels._decay, [t], [mx.ones_like(t)])
    want = np.exp(-np.array(t, dtype=np.float64))
    np.testing.assert_allclose(np.array(made[0]), want, rtol=0, atol=1.5e-6)
    np.testing.assert_allclose(np.array(slope[0]), -want, rtol=0, atol=1.5e-6)


def test_a_bias_is_added_to_each_row() -> None:
    x, weight, bias = mx.random.normal((2, 5, 7)), mx.random.normal((3, 7)), mx.random.normal((3,))
    want = np.array(x) @ np.array(weight).T + np.array(bias)
    for dtype, within in ((mx.float32, 1e-5), (mx.bfloat16, 0.2)):
        made = kernels.affine(x.astype(dtype), weight.astype(dtype), bias.astype(dtype))
        assert made.dtype == dtype
        np.testing.assert_allclose(np.array(made.astype(mx.float32)), want, atol=within)
