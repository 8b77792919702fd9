"""A real `embed` killed at thirty random moments ends with the store of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_llama3v.demo.dataset import DataSet, draw
from mlx_llama3v.embeddings.codec import get_codec
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.tools import verify
from mlx_llama3v.errors import StoreError
from mlx_llama3v.storing import embed_data
from mlx_llama3v.vision.encode import Encoder, Form, as_values
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from tests.forked import start

KILLS = 30
SHARD_BYTES = 300_000
BATCH = 8


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return draw(tmp_path_factory.mktemp("data"), 90, 9, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("model") / "model").path


def fill(model: Path, data: DataSet, output: Path, told: Path) -> None:
    """What is killed. `told`: how many slices and patches this run has given to the encoder."""
    given, encode = np.zeros(2, np.int64), Encoder.encode_as

    with open(told, "wb", buffering=0) as file:

        def telling(self: Encoder, form: Form, slices: Any, batch_size: int = 8) -> list[dict[str, np.ndarray]]:
            given[:] += len(slices), sum(len(patches) for _, patches in slices)
            os.pwrite(file.fileno(), given.tobytes(), 0)
            return encode(self, form, slices, batch_size)

        def sample(self: Encoder, slices: Any, batch_size: int = 8) -> list[np.ndarray]:
            """Of what the codec is fitted to, which goes into no store."""
            return [part["values"] for part in encode(self, as_values, slices, batch_size)]

        Encoder.encode_as = telling  # type: ignore[method-assign]
        Encoder.encode = sample  # type: ignore[method-assign]
        settings: dict[str, Any] = {"codec": "int8", "shard_bytes": SHARD_BYTES, "batch_size": BATCH}
        embed_data(model, data.captions, output, image_folder=data.images, **settings)


def made(told: Path) -> np.ndarray:
    """Slices and patches that a run has given to the encoder."""
    return np.frombuffer((told.read_bytes() if told.exists() else b"") or bytes(16), np.int64)


def kept(store: Path) -> np.ndarray:
    """Slices and patches of a store."""
    info = Store(store).info()
    return np.array([info["slices"], info["tokens"]])


@pytest.mark.slow
def test_killed_thirty_times(model: Path, data: DataSet, tmp_path: Path) -> None:
    for output in ("warm", "whole"):  # the first compiles kernels, which no later process has to
        whole = embed_data(
            model, data.captions, tmp_path / output, image_folder=data.images, codec="int8", shard_bytes=SHARD_BYTES
        )
    everything, row_bytes = kept(tmp_path / "whole"), get_codec("int8").row_bytes(whole.info["width"])
    chance, seconds, before, stores = random.Random(0), whole.summary.seconds, np.zeros(2, np.int64), 0
    store, told = tmp_path / "store-0", tmp_path / "told"
    lost = []  # slices, bytes
    for _ in range(KILLS):
        told.unlink(missing_ok=True)
        process = start(fill, model, data, store, told)
        time.sleep(chance.uniform(0, 0.5 * seconds))
        process.kill()
        process.join(60)
        if (store / "manifest.json").exists():
            assert not verify(store)
            have = kept(store)
            assert (have >= before).all()
            lost.append((before + made(told) - have) * (1, row_bytes))
            assert lost[-1][1] <= SHARD_BYTES
            before = have
        if (before == everything).all():  # nothing more to be killed at
            stores, before = stores + 1, np.zeros(2, np.int64)
            store = tmp_path / f"store-{stores}"
    assert np.max(lost) > 0  # some were killed at work
    last = start(fill, model, data, store, told)
    last.join(120)
    assert last.exitcode == 0
    assert not verify(store)
    ours, theirs = Store(store), Store(tmp_path / "whole")
    assert set(ours.names) == set(theirs.names) and ours.info()["images"] == theirs.info()["images"]
    assert sum(shard.index.pictures for shard in ours.shards) == ours.info()["images"]  # nothing is there twice
    for name in theirs.names:
        mine, other = ours.read(name), theirs.read(name)
        assert mine.layout == other.layout
        # Batches differ with where a run begins, and so does float rounding: never more than one code.
        np.testing.assert_allclose(mine.patches, other.patches, atol=0.05)
    assert not [path for path in store.iterdir() if path.suffix == ".tmp"]


_PEAK = """
import sys, time
import tests.without_torch
from pathlib import Path
from mlx_llama3v import storing
from mlx_llama3v.config import ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.platform import peak_memory
from mlx_llama3v.vision.encode import Encoder
from mlx_llama3v.vision.siglip import VisionTower

model, photos, output = sys.argv[1:]
vision = VisionConfig(32, 64, 1, 2, image_size=384, patch_size=32)
encoder = Encoder(VisionTower(vision), vision, ImageConfig(), TilingConfig())
storing.load_encoder = lambda *_, **__: encoder
encode, waits = encoder.encode_as, iter([*[0] * 10, 2])  # the codec's sample comes first

def late(*given):
    time.sleep(next(waits, 0))  # once: what is prepared meanwhile lies in memory
    return encode(*given)

encoder.encode_as = late
storing.embed_data(model, Path(photos), Path(output), codec="int8", batch_size=4)
print(peak_memory())
"""


def test_memory_does_not_grow_with_the_number_of_pictures(model: Path, tmp_path: Path) -> None:
    """Real processes: 48 more, of 6 MB each when decoded and 3 MB when cut (for a tower of large slices that does next
    to nothing), take less than 48 MB."""
    peaks = []
    for count in (16, 64):
        photos = tmp_path / f"photos-{count}"
        photos.mkdir()
        for n in range(count):
            Image.new("RGB", (2000, 1000), (n, 2 * n, 255 - n)).save(photos / f"{n}.png", compress_level=1)
        code = [sys.executable, "-c", _PEAK, str(model), str(photos), str(tmp_path / f"store-{count}")]
        done = subprocess.run(code, capture_output=True, text=True, check=True, cwd=Path(__file__).parents[1])
        peaks.append(int(done.stdout))
        assert len(Store(tmp_path / f"store-{count}")) == count
    assert peaks[1] - peaks[0] < 48e6, peaks


@pytest.mark.skipif(sys.platform != "linux" or os.geteuid() != 0, reason="mounts a small disk: Linux, root")
def test_a_disk_that_fills_up_keeps_what_is_complete(model: Path, data: DataSet, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(disk)], capture_output=True).returncode:
        pytest.skip("no mount allowed here")
    settings: dict[str, Any] = {
        "image_folder": data.images,
        "shard_bytes": SHARD_BYTES,
        "codec": "float16",
        "check_disk": False,
    }
    try:
        with pytest.raises(StoreError) as caught:
            embed_data(model, data.captions, disk / "store", **settings)
        assert "No space left on device" in str(caught.value) and "\n" not in str(caught.value)
        have = Store(disk / "store")
        assert not verify(disk / "store") and len(have) > 0
        subprocess.run(["mount", "-o", "remount,size=64m", str(disk)], check=True)
        report = embed_data(model, data.captions, disk / "store", **settings)
        assert report.summary.reused == len(have) and len(Store(disk / "store")) == 90
    finally:
        subprocess.run(["umount", str(disk)], check=True)


def moved(store: Path) -> Callable[[], object]:
    aside = store.with_name("elsewhere")
    store.rename(aside)
    return lambda: aside.rename(store)


def read_only(store: Path) -> Callable[[], object]:
    if os.geteuid():
        store.chmod(0o555)
        return lambda: store.chmod(0o755)
    # root may write to anything but what is immutable
    if shutil.which("chattr") is None or subprocess.run(["chattr", "+i", store], capture_output=True).returncode:
        pytest.skip("root needs a file system with chattr")
    return lambda: subprocess.run(["chattr", "-i", store], check=True)


@pytest.mark.parametrize("spoil", [moved, read_only])
def test_a_store_that_is_spoiled_under_way_keeps_what_is_complete(
    model: Path, data: DataSet, tmp_path: Path, spoil: Callable[[Path], Callable[[], object]]
) -> None:
    store = tmp_path / "store"
    settings: dict[str, Any] = {"image_folder": data.images, "shard_bytes": SHARD_BYTES, "batch_size": BATCH}
    mend: list[Callable[[], object]] = []

    def progress(_: object) -> None:
        if not mend and [*store.glob("shard-*")]:
            mend.append(spoil(store))

    try:
        with pytest.raises(StoreError, match=r"cannot be written \((No such file|Permission|Operation not)") as caught:
            embed_data(model, data.captions, store, progress=progress, **settings)
    finally:
        for action in mend:
            action()
    assert str(store) in str(caught.value) and "\n" not in str(caught.value)
    have = len(Store(store))
    assert 0 < have < 90 and not verify(store)
    report = embed_data(model, data.captions, store, **settings)
    assert report.summary.reused == have and len(Store(store)) == 90 and not verify(store)
    assert not [*store.glob(".*.tmp")]


def test_a_store_that_is_removed_under_way_is_one_sentence(model: Path, data: DataSet, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def vanish(_: object) -> None:
        shutil.rmtree(store, ignore_errors=True)

    with pytest.raises(StoreError, match=r"store/.* cannot be written \(No such file or directory\)"):
        embed_data(model, data.captions, store, image_folder=data.images, shard_bytes=SHARD_BYTES, progress=vanish)
