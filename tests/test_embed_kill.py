"""A real `embed` killed at thirty random moments ends with the store of an undisturbed one."""

from __future__ import annotations

import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mlx_llama3v.demo.dataset import DataSet, draw
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.tools import verify
from mlx_llama3v.errors import StoreError
from mlx_llama3v.stages import embed_data
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert

KILLS = 30
SHARD_BYTES = 200_000
CHILD = """
import sys
from pathlib import Path
from mlx_llama3v.stages import embed_data
model, data, folder, output, shard = sys.argv[1:]
print("go", flush=True)
for turn in range(int(1e9)):
    settings = {"image_folder": Path(folder), "codec": "int8", "shard_bytes": int(shard)}
    report = embed_data(model, Path(data), Path(output), **settings)
    if not report.summary.new:
        break
"""


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return draw(tmp_path_factory.mktemp("data"), 90, 9, 3)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("model") / "model").path


def start(model: Path, data: DataSet, output: Path) -> subprocess.Popen[str]:
    arguments = [str(model), str(data.captions), str(data.images), str(output), str(SHARD_BYTES)]
    root = Path(__file__).resolve().parents[1]
    process = subprocess.Popen([sys.executable, "-c", CHILD, *arguments], cwd=root, stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None and process.stdout.readline() == "go\n"
    return process


@pytest.mark.slow
def test_killed_thirty_times(model: Path, data: DataSet, tmp_path: Path) -> None:
    whole = embed_data(
        model, data.captions, tmp_path / "whole", image_folder=data.images, codec="int8", shard_bytes=SHARD_BYTES
    )
    chance, seconds, longest, kills = random.Random(0), whole.summary.seconds, 0, 0
    while kills < KILLS:
        process = start(model, data, tmp_path / "store")
        # A kill costs at most the shard in the making, so runs get somewhere however early they are killed.
        time.sleep(chance.uniform(0, 0.4 * seconds))
        process.kill()
        process.communicate(timeout=60)
        kills += 1
        if (tmp_path / "store" / "manifest.json").exists():
            assert not verify(tmp_path / "store")
            have = len(Store(tmp_path / "store"))
            assert have >= longest
            longest = have
    assert start(model, data, tmp_path / "store").wait(timeout=120) == 0
    assert not verify(tmp_path / "store")
    ours, theirs = Store(tmp_path / "store"), Store(tmp_path / "whole")
    assert set(ours.names) == set(theirs.names) and ours.info()["images"] == theirs.info()["images"]
    assert sum(shard.index.pictures for shard in ours.shards) == ours.info()["images"]  # nothing is there twice
    for name in theirs.names:
        mine, other = ours.read(name), theirs.read(name)
        assert mine.layout == other.layout
        # Batches differ with where a run begins, and so does float rounding: never more than one code.
        np.testing.assert_allclose(mine.patches, other.patches, atol=0.05)
    assert not [path for path in (tmp_path / "store").iterdir() if path.suffix == ".tmp"]


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


def test_a_store_that_vanishes_is_one_sentence(model: Path, data: DataSet, tmp_path: Path) -> None:
    store = tmp_path / "store"

    def vanish(_: object) -> None:
        shutil.rmtree(store, ignore_errors=True)

    with pytest.raises(StoreError, match=r"store/.* cannot be written \(No such file or directory\)"):
        embed_data(model, data.captions, store, image_folder=data.images, shard_bytes=SHARD_BYTES, progress=vanish)
