"""The estimate for a store whose manifest `embed` writes anew first: it takes that as done."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

from mlx_llama3v.errors import StoreError
from mlx_llama3v.storing import embed_data, estimate_data
from tests.test_estimate import model, photos  # noqa: F401  (fixtures)


@pytest.mark.parametrize("how", ["lost", "torn", "changed"])
def test_a_manifest_that_embed_mends_is_mended_for_the_estimate(
    model: Path,  # noqa: F811
    photos: Path,  # noqa: F811
    tmp_path: Path,
    how: str,
) -> None:
    """Nothing is written for that."""
    store, manifest = tmp_path / "store", tmp_path / "store" / "manifest.json"
    embed_data(model, photos, store, codec="int8", shard_bytes=100_000)
    if how == "lost":
        manifest.unlink()
    else:
        values = json.loads(manifest.read_text())
        manifest.write_text("{" if how == "torn" else json.dumps(values | {"fingerprint": {"weights": "b"}}))
    before = {file.name: file.read_bytes() for file in store.iterdir()}
    said = estimate_data(model, photos, store, codec="int8")
    assert {file.name: file.read_bytes() for file in store.iterdir()} == before
    refusals = []
    for ask in (estimate_data, embed_data):
        with pytest.raises(StoreError) as caught:
            ask(model, photos, store, codec="float16")
        refusals.append(str(caught.value))
    assert refusals[0] == refusals[1]
    summary = embed_data(model, photos, store, codec="int8").summary
    assert (said.reused, said.volume.pictures) == (summary.reused, summary.new) == (6, 0)


def test_parts_that_killed_ranks_left_are_there_for_the_estimate(
    model: Path,  # noqa: F811
    photos: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    """As `embed` takes them up, but for one of other settings, which it sets aside."""
    files, store = sorted(path for path in photos.iterdir() if path.is_file()), tmp_path / "store"
    for part, some, codec in ((0, files[:2], "int8"), (1, files[2:3], "int8"), (2, files[3:], "float16")):
        folder = tmp_path / f"photos-{part}"
        folder.mkdir()
        for file in some:
            shutil.copy(file, folder)
        embed_data(model, folder, store / f"rank-{part}-of-3", codec=codec)
    said = estimate_data(model, photos, store, codec="int8")
    summary = embed_data(model, photos, store, codec="int8").summary
    assert (said.reused, said.volume.pictures) == (summary.reused, summary.new) == (3, 3), "one cannot be read"
    assert len([*store.glob("damaged-*")]) == 1
