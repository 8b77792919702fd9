"""Codecs: how small, how faithful, also where a tower has outlier channels; the same in NumPy and on the device."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from mlx_llama3v.embeddings.codec import _GROUP_SCALES, CODECS, Codec, Parts, fidelity, get_codec, misfit, width
from mlx_llama3v.errors import StoreError
from mlx_llama3v.platform import device_name

D = 1152  # so400m


def normal(rows: int = 256, columns: int = D, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)


def with_outliers(seed: int = 0) -> np.ndarray:
    """As trained towers give them: a few channels with 20 to 60 times the spread, and one far from zero."""
    values = normal(seed=seed)
    values[:, [3, 77, 500, 1100]] *= np.array([20, 30, 40, 60], np.float32)
    values[:, 9] += 50
    return values


def through(codec: Codec, values: np.ndarray, fitted_to: np.ndarray | None = None) -> np.ndarray:
    channels = codec.fit(values if fitted_to is None else fitted_to)
    return codec.decode({**codec.encode(values, channels), **channels}).astype(np.float32)


def error(values: np.ndarray, decoded: np.ndarray, columns: np.ndarray | None = None) -> float:
    columns = np.arange(values.shape[1]) if columns is None else columns
    return fidelity(values[:, columns], decoded[:, columns])["relative_error"]


PLAIN = np.setdiff1d(np.arange(D), [3, 9, 77, 500, 1100])


@pytest.mark.parametrize(("name", "share"), [("float16", 1.0), ("int8", 0.502), ("int4", 0.29)])
@pytest.mark.parametrize("columns", [128, 768, 1024, D])
def test_size_with_everything_that_a_row_takes(name: str, share: float, columns: int) -> None:
    codec = get_codec(name)
    values = normal(64, columns)
    parts = codec.encode(values, codec.fit(values))
    assert sum(part.nbytes for part in parts.values()) == 64 * codec.row_bytes(columns)
    assert codec.row_bytes(columns) <= (share + (0.006 if columns == 128 else 0)) * 2 * columns


@pytest.mark.parametrize(("name", "most"), [("float16", 0.0004), ("int8", 0.009), ("int4", 0.08)])
def test_error_is_what_is_said(name: str, most: float) -> None:
    values = normal()
    assert error(values, through(get_codec(name), values)) < most
    # fitted to other pictures of the same tower
    assert error(values, through(get_codec(name), values, normal(seed=1))) < most


@pytest.mark.parametrize(("name", "most"), [("int8", 0.01), ("int4", 0.085)])
def test_outlier_channels_do_not_cost_the_others_their_precision(name: str, most: float) -> None:
    values = with_outliers()
    codec = get_codec(name)
    assert error(values, through(codec, values, with_outliers(1)), PLAIN) < most
    # The test can fail: without channels of its own the codec loses what the outliers take.
    one = {"channel.offset": np.zeros((1, D), np.float32), "channel.scale": np.ones((1, D), np.float32)}
    flat = codec.decode({**codec.encode(values, one), **one})
    assert error(values, flat, PLAIN) > 1.25 * most


@pytest.mark.parametrize("name", CODECS)
def test_the_device_decodes_as_numpy_does(name: str) -> None:
    codec, values = get_codec(name), with_outliers()
    channels = codec.fit(values)
    parts = {**codec.encode(values, channels), **channels}
    ours = np.array(codec.decode({key: mx.array(part) for key, part in parts.items()}, mx).astype(mx.float32))
    np.testing.assert_allclose(ours, codec.decode(parts).astype(np.float32), rtol=1e-6, atol=1e-6)
    # several slices at once, each with the channels of its own shard
    stacked = {key: mx.array(np.stack([part, part])) for key, part in parts.items()}
    both = np.array(codec.decode(stacked, mx).astype(mx.float32))
    np.testing.assert_allclose(both[1], ours, rtol=1e-6, atol=1e-6)


def agree(codec: Codec, values: np.ndarray, channels: Parts) -> None:
    """The device's codes of [S, N, D] are NumPy's: on a CPU the same bytes, on a GPU at most one step beside them."""
    own = {key: mx.array(part) for key, part in channels.items()}
    made = {key: np.array(part) for key, part in codec.encode(mx.array(values), own, mx).items()}
    for one, theirs in enumerate(values):
        parts = codec.encode(theirs, channels)
        ours = {key: part[one] for key, part in made.items()}
        assert misfit(codec, ours, channels) == ""
        if device_name() == "cpu":
            assert all(np.array_equal(ours[key], parts[key], equal_nan=True) for key in parts)
        else:
            step: Any = (
                0.0 if codec.name == "float16" else parts["scales"].astype(np.float32) * channels["channel.scale"]
            )
            if codec.name == "int4":
                groups = np.abs(_GROUP_SCALES[np.minimum(parts["groups"] & 127, 126) + 1])
                step = step * np.repeat(groups, 16, -1)[:, : values.shape[-1]]
            apart = codec.decode({**ours, **channels}) - codec.decode({**parts, **channels})
            assert (np.abs(apart) <= step).all()


@pytest.mark.parametrize("name", CODECS)
@pytest.mark.parametrize("columns", [20, 128, D])
def test_the_device_encodes_as_numpy_does(name: str, columns: int) -> None:
    codec = get_codec(name)
    values = np.stack([normal(64, D, seed) + with_outliers(seed)[:64] for seed in range(4)])[..., -columns:]
    values[0, :3] = 0  # a dead token and massive activations
    values[1, 0, :2] = 1e6, -1e6
    agree(codec, values, codec.fit(values[0]))


def test_int4_takes_the_largest_scale_that_is_not_too_large() -> None:
    """By the table, also where log2 may fall to either side of a step: no matter whose log2 it is."""
    codec, table = get_codec("int4"), _GROUP_SCALES[: 127 - 3 * 16 + 1]  # up to 1/8: the largest value is 1
    near = np.concatenate([np.nextafter(table, np.float32(0)), table, np.nextafter(table, np.float32(1))])
    values = np.zeros((1, len(near), 32), np.float32)
    values[0, :, 0], values[0, :, 16] = 1 - 2**-11, np.minimum(8 * near, 1 - 2**-11)  # a scale of 1 for the token
    one = {"channel.offset": np.zeros((1, 32), np.float32), "channel.scale": np.ones((1, 32), np.float32)}
    agree(codec, values, one)
    parts = codec.encode(values[0], one)
    assert (parts["scales"] == 1).all() and (parts["groups"] >= 128).all()
    largest = np.searchsorted(table, values[0, :, 16] / 8, side="right") - 1
    assert np.array_equal(parts["groups"][:, 1] - 128, np.maximum(largest, 0))


@pytest.mark.parametrize("name", CODECS)
@example(values=np.array([[1e-45, 0, 0, 0]], np.float32))  # a scale that float32 does not have
@settings(max_examples=60, deadline=None)
@given(
    values=arrays(
        np.float32,
        st.tuples(st.integers(0, 5), st.integers(1, 40)),
        elements=st.floats(width=32, allow_nan=False, allow_infinity=False),
    )
)
def test_anything_finite_comes_back_finite_and_near(name: str, values: np.ndarray) -> None:
    codec = get_codec(name)
    channels = codec.fit(values) if len(values) else codec.fit(np.ones((1, values.shape[1]), np.float32))
    assert all(np.isfinite(part).all() for part in channels.values())
    parts = codec.encode(values, channels)
    agree(codec, values[None], channels)
    assert all(len(part) == len(values) for part in parts.values())
    assert misfit(codec, parts, channels) == "" and width(parts, channels) == values.shape[1]
    decoded = codec.decode({**parts, **channels})
    assert decoded.shape == values.shape and np.isfinite(decoded).all()
    clipped = np.clip(values, -65504, 65504)
    scale = channels["channel.scale"] if channels else 1
    offset = channels["channel.offset"] if channels else 0
    token = np.abs((clipped - offset) / scale).max(-1, keepdims=True, initial=0)
    step = {"float16": 0.0, "int8": 1 / 250, "int4": 0.18}[name]  # -8..7: the opposite of the largest saturates
    room = token * scale * step + np.abs(clipped) * 2**-10 + np.abs(offset) * 2**-20 + 1e-6 * scale + 1e-7
    assert (np.abs(decoded - clipped) <= room).all()


def test_constant_and_dead_channels_come_back() -> None:
    values = normal(64, 32)
    values[:, 5] = 7
    values[:, 6] = 0
    for name in CODECS:
        decoded = through(get_codec(name), values)
        np.testing.assert_allclose(decoded[:, 5], 7, rtol=1e-3)
        assert np.abs(decoded[:, 6]).max() <= 0.02
    zeros = np.zeros((4, 32), np.float32)
    for name in CODECS:
        np.testing.assert_array_equal(through(get_codec(name), zeros), zeros)


def test_an_unknown_codec_names_the_known_ones() -> None:
    with pytest.raises(StoreError, match="'int3' is not known; this version has float16, int8, int4"):
        get_codec("int3")
