"""Filling a store: the sample that a codec is fitted to, and the codes of the device and of numpy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_llama3v.config import Grid, ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.embeddings.codec import CODECS, fidelity
from mlx_llama3v.embeddings.embed import embed_images
from mlx_llama3v.embeddings.form import Made
from mlx_llama3v.embeddings.sample import evenly
from mlx_llama3v.embeddings.store import Coded, Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import StoreError
from mlx_llama3v.platform import device_name
from mlx_llama3v.vision.encode import Encoder
from mlx_llama3v.vision.siglip import VisionTower
from tests.fake_encoder import FakeEncoder, write


def first_shard(store: Path) -> dict[str, Any]:
    return {**Store(store).shards[0].channels}


def test_the_codec_is_fitted_to_pictures_from_all_over(tmp_path: Path, folder: Path) -> None:
    """Not to the first ones, which here are blank pages; and the fidelity is that of the others."""

    class Varied(FakeEncoder):
        @staticmethod
        def made(grid: Grid, patches: np.ndarray) -> np.ndarray:
            rng = np.random.default_rng(int(8 * patches[0, 0]))
            blank = patches[0, 0] < 60
            return (rng.normal(size=(len(patches), 64)) * (1 if blank else [20, *[1] * 63])).astype(np.float32)

    images = write(folder, {f"{n:03}": str(n) for n in range(600)})
    encoder = Varied()
    with StoreWriter(tmp_path / "s", {"weights": "fake"}, "int4", 40_000) as writer:
        embed_images(images, encoder, writer, batch_size=2)
    assert 17 < first_shard(tmp_path / "s")["channel.scale"][0, 0] < 22
    store, values = Store(tmp_path / "s"), []
    for name in store.names[::7]:
        values.append((encoder.fresh(int(name)).patches, store.read(name).patches.astype(np.float32)))
    found = fidelity(*map(np.concatenate, zip(*values, strict=True)))["relative_error"]
    assert found < 0.1 and found == pytest.approx(store.info()["fidelity"]["relative_error"], rel=0.1)


@pytest.mark.parametrize(("count", "sampled"), [(1, 1), (5, 5), (100, 8), (300, 15), (900, 32)])
def test_a_sample_is_small(tmp_path: Path, folder: Path, count: int, sampled: int) -> None:
    """Two slices of a picture that is split; and none where a store goes on or nothing is fitted."""
    images = write(folder, {f"{n}": str(3 * n + 1) for n in range(count + 1)})
    for codec, some, expected in (("int8", images[1:], sampled), ("int8", images, 0), ("float16", images, 0)):
        encoder = FakeEncoder()
        with StoreWriter(tmp_path / codec, {"weights": "fake"}, codec) as writer:
            summary = embed_images(some, encoder, writer, batch_size=64)
        assert encoder.calls[:expected] == [2] * expected and summary.slices == sum(encoder.calls[expected:])


def test_what_cannot_be_read_is_no_part_of_the_sample(tmp_path: Path, folder: Path) -> None:
    texts = {f"{n}": "bad" if n % 2 else str(n) for n in range(8)}
    images = [*write(folder, texts), ("gone", folder / "gone")]
    for some in (images, images[1:4:2], [("gone", folder / "gone")], images[1:3]):
        store = tmp_path / f"{len(some)}"
        with StoreWriter(store, {"weights": "fake"}, "int8") as writer:
            summary = embed_images(some, FakeEncoder(), writer)
        good = {name: int(texts[name]) for name, _ in some if texts.get(name, "bad") != "bad"}
        assert summary.new == len(good) == len(Store(store)) and summary.failed == len(some) - len(good)
    # All that the sample had was broken: then the codec is fitted to what waits.
    with StoreWriter(tmp_path / "late", {"weights": "fake"}, "int8") as writer:
        embed_images(images[:1], FakeEncoder(), writer, whole=[folder / "gone"])
    assert Store(tmp_path / "late").names == ("0",)


def test_a_sample_depends_on_the_list_alone(tmp_path: Path, folder: Path) -> None:
    """So a run that is killed before its first shard, or on two ranks, has the same channels; one that goes on, too."""
    images = write(folder, {f"{n}": str(n * n % 97) for n in range(60)})

    def embed(name: str, some: Sequence[tuple[str, Path]], **keys: Any) -> dict[str, Any]:
        with StoreWriter(tmp_path / name, {"weights": "fake"}, "int4", 2000) as writer:
            embed_images(some, FakeEncoder(), writer, **keys)
        return first_shard(tmp_path / name)

    once = embed("once", images)
    whole = [path for _, path in images]
    for other in (
        embed("again", images, workers=1, batch_size=1),
        embed("half", images[::2], whole=whole),
        embed("half", images),
    ):
        assert once.keys() == other.keys()
        assert all(np.array_equal(once[key], other[key]) for key in once)
    assert not np.array_equal(once["channel.scale"], embed("other", images[::2])["channel.scale"])


@given(st.integers(0, 300), st.integers(1, 40))
def test_evenly(count: int, most: int) -> None:
    found = evenly(range(count), most)
    assert len(found) == len(set(found)) == min(count, most) and found == sorted(found)
    gaps = np.diff([-1, *found, count]) if found else np.zeros(1)
    assert gaps.max() <= 2 * -(-count // most) and (not found or abs(found[0] - (count - 1 - found[-1])) <= 1)


def same(one: Path, other: Path, shards: int) -> None:
    """So many shards, of the same bytes."""
    files = [{file.name: file.read_bytes() for file in store.glob("shard-*")} for store in (one, other)]
    assert files[0] == files[1] and len(files[0]) == shards


@pytest.mark.skipif(device_name() != "cpu", reason="a GPU may round otherwise: test_codec.py says how much")
@pytest.mark.parametrize("codec", CODECS)
def test_codes_of_the_device_are_stored_as_those_of_numpy(tmp_path: Path, folder: Path, codec: str) -> None:
    """From the second window on: the first picture tells the width."""
    images = write(folder, {f"{n}": str(n) for n in range(150)})
    coded = 0

    class Counting(StoreWriter):
        def put(self, name: str, sha: str, made: Made) -> int:
            nonlocal coded
            coded += isinstance(made, Coded)
            return super().put(name, sha, made)

    for store, on_device in (("numpy", False), ("device", True)):
        for some in (images[:100], images):
            with Counting(tmp_path / store, {"weights": "fake"}, codec, 2000, on_device=on_device) as writer:
                embed_images(some, FakeEncoder(), writer, batch_size=2)
        assert coded > 140 if on_device and codec != "float16" else coded > 49 if on_device else coded == 0
    same(tmp_path / "numpy", tmp_path / "device", len(Store(tmp_path / "numpy").shards))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_is_refused_as_codes_too(tmp_path: Path, folder: Path, codec: str, value: float) -> None:
    class Broken(FakeEncoder):
        def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
            found = super().encode(slices, batch_size)
            if len(self.calls) == 2:  # the first gave values
                found[-1][1, 2] = value
            return found

    images = write(folder, {f"{n}": str(n) for n in range(40)})
    for some, encoder in ((images[:30], FakeEncoder()), (images, Broken())):
        with StoreWriter(tmp_path / "s", {"weights": "fake"}, codec, on_device=True) as writer:
            if isinstance(encoder, Broken):
                with pytest.raises(StoreError, match=r"'3\d': the encoder gave values that are not finite"):
                    embed_images(some, encoder, writer)
            else:
                embed_images(some, encoder, writer)
    assert len(Store(tmp_path / "s")) == 31


def small(folder: Path) -> tuple[Encoder, list[tuple[str, Path]]]:
    """A real tower, and pictures of other shapes that share batches."""
    vision = VisionConfig(16, 32, 2, 2, image_size=24, patch_size=4)
    encoder = Encoder(VisionTower(vision), vision, ImageConfig(), TilingConfig(max_slices=4), layer=-2)
    images = []
    for number, size in enumerate([(24, 24), (60, 20), (17, 50), (5, 5), (48, 48)]):
        pixels = np.random.default_rng(number).integers(0, 256, (size[1], size[0], 3), np.uint8)
        Image.fromarray(pixels).save(folder / f"{number}.png")
        images.append((f"{number}.png", folder / f"{number}.png"))
    return encoder, images


def test_stored_equals_fresh(tmp_path: Path, folder: Path) -> None:
    """Within float16's rounding."""
    encoder, images = small(folder)
    with StoreWriter(tmp_path / "s", encoder.fingerprint()) as writer:
        assert embed_images(images, encoder, writer, batch_size=3).new == 5
    store = Store(tmp_path / "s", encoder.fingerprint())
    for name, path in images:
        fresh, stored = encoder.embed(path), store.read(name)
        assert stored.layout == fresh.layout
        np.testing.assert_allclose(stored.patches.astype(np.float32), fresh.patches, rtol=2**-10, atol=1e-5)


@pytest.mark.skipif(device_name() != "cpu", reason="a GPU may round otherwise: test_codec.py says how much")
def test_codes_of_the_tower_s_lanes_are_those_of_numpy(tmp_path: Path, folder: Path) -> None:
    encoder, images = small(folder)
    for store, on_device in (("numpy", False), ("device", True)):
        for some in (images[:1], images):  # the first shard tells the channels
            with StoreWriter(tmp_path / store, encoder.fingerprint(), "int4", on_device=on_device) as writer:
                embed_images(some, encoder, writer, batch_size=3)
    same(tmp_path / "numpy", tmp_path / "device", 2)
