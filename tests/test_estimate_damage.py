"""The estimate for a damaged store: what `embed` mends or makes anew first is taken as done."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mlx_llama3v.embeddings import tools
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import StoreError
from mlx_llama3v.storing import embed_data, estimate_data
from tests.command_line import Cli
from tests.test_damage import damage
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


@pytest.mark.parametrize("how", ["cut", "flipped"])
def test_pictures_of_a_damaged_shard_are_to_be_made_anew(
    cli: Cli,
    model: Path,  # noqa: F811
    photos: Path,  # noqa: F811
    tmp_path: Path,
    how: str,
) -> None:
    store = tmp_path / "store"
    embed_data(model, photos, store, codec="int8", shard_bytes=100_000)
    first = sorted(store.glob("shard-*"))[0]
    held = sum(shard.index.name_count for shard in Store(store).shards if shard.path == first)
    if how == "cut":
        os.truncate(first, first.stat().st_size - 4)
    else:  # only a checksum tells, and only `verify` compares it
        damage(first)
        assert [*tools.verify(store)] == [first.name]
    found = estimate_data(model, photos, store, codec="int8")
    assert (found.reused, found.volume.pictures) == (6 - held, held) and 0 < held < 6
    assert len(found.damage) == 1 and str(first) in found.damage[0] and first.exists()
    said = cli("embed", "--model", model, "--data", photos, "--output", store, "--codec", "int8", "--estimate")
    assert said.status == 0 and f"{first} is damaged" in said.err and "its pictures count as not stored." in said.err
    assert embed_data(model, photos, store, codec="int8").summary.new == held
