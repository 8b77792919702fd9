"""Damaged shards: found, named, set aside with a word of what is lost, and repaired; whole ones are left alone."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path

import pytest

from mlx_llama3v.embeddings import tools
from mlx_llama3v.embeddings.damage import Losses
from mlx_llama3v.embeddings.ranks import Ranks
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import StoreError
from tests.test_store import FINGERPRINT, contents, expected, fill, picture, sha


def damage(file: Path, at: int = -5) -> None:
    data = bytearray(file.read_bytes())
    data[at] ^= 16
    file.write_bytes(data)


def shards(path: Path) -> list[Path]:
    """Of a store of twelve pictures that was made there."""
    fill(path, range(12))
    files = sorted(path.glob("shard-*"))
    assert len(files) > 3
    return files


def names(file: Path) -> set[str]:
    return {name for shard in Store(file.parent).shards if shard.path == file for name, _ in shard.index.names()}


def losses(path: Path) -> Losses:
    """What the next writer finds."""
    found = Losses()
    StoreWriter(path, FINGERPRINT, losses=found).close()
    return found


def test_verify_names_every_damaged_shard_and_a_rerun_repairs(tmp_path: Path) -> None:
    files = shards(tmp_path)
    held = [names(file) for file in files]
    damage(files[1])
    damage(files[3])
    assert len(Store(tmp_path)) == 12  # flipped bits of data are only seen by reading everything
    assert [*tools.verify(tmp_path)] == [files[1].name, files[3].name]
    told: list[str] = []
    found = Losses(told.append)
    with StoreWriter(tmp_path, FINGERPRINT, shard_bytes=600, losses=found) as writer:
        assert told == found.sentences and len(told) == 2 and str(files[1]) in told[0] and "\n" not in told[0]
        assert "checksum" in told[0] and f"shard-00001.safetensors.damaged with {len(held[1])} names" in told[0]
        assert found.names == held[1] | held[3] and not any(map(writer.has, found.names))
    assert found.left(Store(tmp_path)) == len(found.names)
    assert not (tmp_path / "damage.json").exists()
    fill(tmp_path, range(12))
    assert contents(tmp_path) == expected(range(12)) and not found.left(Store(tmp_path))
    assert len([*tmp_path.glob("*.damaged")]) == 2


@pytest.mark.parametrize("left", [100, -4])
def test_a_cut_shard_is_repaired_without_verify(tmp_path: Path, left: int) -> None:
    file = shards(tmp_path)[2]
    held = names(file)
    os.truncate(file, left % file.stat().st_size)
    with pytest.raises(StoreError, match=r"shard-00002\.safetensors is damaged.*run the same `embed` again"):
        Store(tmp_path)
    found = losses(tmp_path)
    assert found.names == (set() if left > 0 else held)  # its index comes first
    assert ("with names that cannot be read" in found.sentences[0]) == (left > 0) and len(found.sentences) == 1
    fill(tmp_path, range(12))
    assert contents(tmp_path) == expected(range(12))


@pytest.mark.parametrize("word", [b'"fingerprint":"', b'"codec":"'])
def test_a_flipped_bit_in_what_names_the_encoder_is_damage(tmp_path: Path, word: bytes) -> None:
    """Not a shard of another encoder, which is refused."""
    file = shards(tmp_path)[1]
    held, whole = names(file), file.read_bytes()
    at = whole.index(word) + len(word)
    file.write_bytes(whole[:at] + bytes([whole[at] ^ 1]) + whole[at + 1 :])
    assert losses(tmp_path).names == held and file.with_name(f"{file.name}.damaged").exists()
    fill(tmp_path, range(12))
    assert contents(tmp_path) == expected(range(12))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"codec": "int8"}, r"all 4 whole shards have the codec 'float16', it says 'int8'"),
        ({"fingerprint": {"weights": "b"}}, r"shards have another fingerprint or post \(\w{12}\), it says others \("),
        ({"post": {"pool": 2}}, r"shards have another fingerprint or post \(\w{12}\), it says others \("),
    ],
)
def test_a_manifest_that_all_shards_contradict_is_what_is_wrong(
    change: dict[str, object], words: str, tmp_path: Path
) -> None:
    files = shards(tmp_path)
    manifest = tmp_path / "manifest.json"
    whole = manifest.read_text()
    manifest.write_text(json.dumps(json.loads(whole) | change))
    for file in files[4:]:
        file.unlink()
    (why,) = (found := tools.verify(tmp_path)).values()
    assert [*found] == ["manifest.json"] and re.search(words, why) and "run again, writes it anew" in why
    assert not (tmp_path / "damage.json").exists()
    damage(files[1])
    assert [*tools.verify(tmp_path)] == ["manifest.json", files[1].name]
    assert [*json.loads((tmp_path / "damage.json").read_text())] == [files[1].name]
    damage(files[1])
    other = {key: value for key, value in json.loads(whole).items() if key in ("fingerprint", "codec", "post")}
    Ranks(tmp_path).share({}, **other)  # what `embed` begins with
    assert not tools.verify(tmp_path) and manifest.read_text() != whole  # its fidelity is gone
    fill(tmp_path / "b", range(12))
    (tmp_path / "b" / "manifest.json").write_text(json.dumps(json.loads(whole) | {"fingerprint": {"weights": "b"}}))
    with StoreWriter(tmp_path / "c", {"weights": "b"}) as writer:
        writer.add("a", sha(0), picture(0))
    (tmp_path / "b" / "shard-00000.safetensors").write_bytes((tmp_path / "c" / files[0].name).read_bytes())
    assert set(tools.verify(tmp_path / "b")) == {file.name for file in (tmp_path / "b").glob("shard-*")} - {
        files[0].name
    }, "one shard is the manifest's: the others came from elsewhere"


def test_names_elsewhere_of_lost_pictures_are_lost_too(tmp_path: Path) -> None:
    file = shards(tmp_path)[1]
    held = names(file)
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        for name in held:
            writer.alias(f"copy-{name}", sha(int(name[:-4])))
    os.truncate(file, file.stat().st_size - 4)
    assert losses(tmp_path).names == held | {f"copy-{name}" for name in held}


@pytest.mark.parametrize("verified", [False, True])
def test_a_shard_that_was_restored_is_no_longer_damaged(tmp_path: Path, verified: bool) -> None:
    file = shards(tmp_path)[1]
    for _ in range(2):  # back and forth
        damage(file)
        assert tools.verify(tmp_path) and (tmp_path / "damage.json").exists()
        damage(file)
        assert not verified or not tools.verify(tmp_path)
        assert (tmp_path / "damage.json").exists() != verified
        assert not losses(tmp_path).sentences and not (tmp_path / "damage.json").exists()
    assert contents(tmp_path) == expected(range(12))


def test_a_shard_that_cannot_be_read_is_not_damaged(tmp_path: Path) -> None:
    store, away = tmp_path / "store", tmp_path / "away"
    files = shards(store)
    files[2].rename(away)
    files[2].symlink_to(away)
    damage(files[1])
    away.rename(tmp_path / "unplugged")
    assert ["cannot be read" in why for why in tools.verify(store).values()] == [False, True]
    assert [*json.loads((store / "damage.json").read_text())] == [files[1].name]
    with pytest.raises(StoreError, match=r"shard-00002.* cannot be read: No such file"):
        losses(store)
    assert (store / "shard-00002.safetensors").is_symlink()
    (tmp_path / "unplugged").rename(away)
    assert not losses(store).sentences  # the first run had set the damaged one aside
    fill(store, range(12))
    assert contents(store) == expected(range(12))


def test_damage_is_named_where_it_cannot_be_noted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path: Path, chunks: object) -> None:
        raise StoreError(f"{path} cannot be written (Read-only file system).")

    file = shards(tmp_path)[1]
    damage(file)
    monkeypatch.setattr("mlx_llama3v.embeddings.damage.write_atomic", refuse)
    found: Mapping[str, str] = tools.verify(tmp_path)
    assert [*found] == [file.name] and "checksum" in found[file.name]


def test_a_merge_tells_what_the_output_lost(tmp_path: Path) -> None:
    file = shards(tmp_path / "c")[1]
    held = names(file)
    os.truncate(file, file.stat().st_size - 4)
    fill(tmp_path / "a", range(20, 24))
    with StoreWriter(tmp_path / "a", FINGERPRINT) as writer:
        writer.alias(min(held), sha(20))
    found = Losses()
    assert tools.merge([tmp_path / "a"], tmp_path / "c", losses=found)["images"] == 4
    assert len(found.sentences) == 1 and found.left(Store(tmp_path / "c")) == len(held) - 1


@pytest.mark.parametrize("how", ["cut", "gone", "another encoder", "another codec"])
def test_a_manifest_is_written_anew_from_what_the_shards_say(tmp_path: Path, how: str) -> None:
    """By the `embed` that made them alone: for another one the store is as it was."""
    shards(tmp_path)
    file = tmp_path / "manifest.json"
    before = file.read_text()
    values = json.loads(before)
    wanted = {key: values[key] for key in ("fingerprint", "codec", "post")}
    changed = {"another encoder": {"fingerprint": {"weights": "b"}}, "another codec": {"codec": "int8"}}
    file.write_text(before[:40] if how == "cut" else json.dumps(values | changed.get(how, {})))
    if how == "gone":
        file.unlink()
    damaged, found = file.read_bytes() if file.exists() else None, Losses()
    if how in ("cut", "another codec"):
        with pytest.raises(StoreError):
            Ranks(tmp_path, found).share({}, **wanted | {"fingerprint": {"weights": "c"}})
        assert file.read_bytes() == damaged
    Ranks(tmp_path, found).share({}, **wanted)
    assert (
        contents(tmp_path) == expected(range(12))
        and json.loads(file.read_text())["fingerprint"] == values["fingerprint"]
    )
    assert len(found.sentences) == 1 and str(file) in found.sentences[0]
    Ranks(tmp_path, found).share({}, **wanted)
    assert len(found.sentences) == 1
