"""The embedding store: what goes in comes out, and nothing that happens to a run or a disk breaks that."""

from __future__ import annotations

import hashlib
import json
import os
import random
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.tools import verify
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import StoreError

FINGERPRINT: dict[str, Any] = {
    "weights": "aa11",
    "layer": -2,
    "vision": {"image_size": 384},
    "tiling": {"mode": "uhd", "max_slices": 6},
    "image": {"image_mean": (0.5, 0.5, 0.5)},
}
WIDTH = 8
COUNT = 40  # pictures of the larger stores


def sha(seed: int) -> str:
    return hashlib.sha256(str(seed).encode()).hexdigest()


def picture(seed: int) -> Encoded:
    """Another layout and other values for every seed, fit for float16."""
    rows, cols = seed % 3, 2
    layout = SliceLayout((2, 3 + seed % 4), rows, cols if rows else 0, (2, 2) if rows else (0, 0))
    values = np.random.default_rng(seed).standard_normal((layout.patches, WIDTH))
    return Encoded(layout, values.astype(np.float16).astype(np.float32))


def fill(path: Path, seeds: Iterable[int], shard_bytes: int = 600) -> None:
    with StoreWriter(path, FINGERPRINT, shard_bytes=shard_bytes) as writer:
        for seed in seeds:
            if not writer.has(f"{seed}.jpg"):
                writer.add(f"{seed}.jpg", sha(seed), picture(seed))


def contents(path: Path) -> dict[str, tuple[SliceLayout, bytes]]:
    store = Store(path, FINGERPRINT)
    assert not verify(path)
    return {name: (store.layout(name), store.read(name).patches.tobytes()) for name in store.names}


def expected(seeds: range) -> dict[str, tuple[SliceLayout, bytes]]:
    pictures = {f"{seed}.jpg": picture(seed) for seed in seeds}
    return {name: (e.layout, e.patches.astype(np.float16).tobytes()) for name, e in pictures.items()}


def files(path: Path) -> set[str]:
    return {item.name for item in path.iterdir()} - {".lock"}


def test_what_goes_in_comes_out(tmp_path: Path) -> None:
    fill(tmp_path, range(12))
    assert contents(tmp_path) == expected(range(12))
    store = Store(tmp_path)
    assert len(store.shards) > 2 and "3.jpg" in store and "x" not in store
    assert store.read("3.jpg").patches.dtype == np.float16


def test_float16_is_within_its_stated_error_and_saturates(tmp_path: Path) -> None:
    values = np.random.default_rng(0).standard_normal((6, WIDTH)).astype(np.float32)
    values[0, :2] = 1e6, -1e6  # massive activations
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        writer.add("a", sha(0), Encoded(SliceLayout((2, 3)), values))
    read = Store(tmp_path).read("a").patches.astype(np.float32)
    np.testing.assert_allclose(read[1:], values[1:], rtol=2**-11, atol=1e-7)
    assert read[0, :2].tolist() == [65504, -65504]


def test_shards_are_plain_safetensors(tmp_path: Path) -> None:
    fill(tmp_path, range(3), shard_bytes=1 << 20)
    with safe_open(tmp_path / "shard-00000.safetensors", "np") as file:
        stored = file.get_tensor("patches")
    np.testing.assert_array_equal(stored, np.concatenate([picture(seed).patches for seed in range(3)]))


def test_reading_a_picture_reads_only_that_picture(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(20), shard_bytes=1 << 20)
    store, counts, preadv = Store(tmp_path), [], os.preadv

    def counting(*args: Any) -> int:
        counts.append(preadv(*args))
        return counts[-1]

    monkeypatch.setattr(os, "preadv", counting)
    assert store.layout("7.jpg") == picture(7).layout and not counts
    store.read("7.jpg")
    assert counts == [picture(7).layout.patches * WIDTH * 2]


def test_an_empty_store_works(tmp_path: Path) -> None:
    fill(tmp_path, range(0))
    store = Store(tmp_path, FINGERPRINT)
    assert (len(store), store.width, store.info()["images"]) == (0, 0, 0)
    fill(tmp_path, range(2))
    assert contents(tmp_path) == expected(range(2))


def test_names_may_be_anything(tmp_path: Path) -> None:
    names = [
        "ein Bürger.jpg",
        "two\nlines.png",
        "图片/1.webp",
        "\u2028",
        "'\"\\",
        "",
        os.fsdecode(b"\xff.jpg"),
    ]
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        for seed, name in enumerate(names):
            writer.add(name, sha(seed), picture(seed))
            writer.fail(name + "!", name)
    store = Store(tmp_path)
    assert store.names == tuple(names)
    assert store.failures == {name + "!": name for name in names}
    for seed, name in enumerate(names):
        np.testing.assert_array_equal(store.read(name).patches, picture(seed).patches)


def test_equal_bytes_are_stored_once_also_across_runs(tmp_path: Path) -> None:
    fill(tmp_path, range(3))
    before = Store(tmp_path).info()
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        assert writer.has_hash(sha(1)) and not writer.has("copy.jpg")
        assert writer.add("copy.jpg", sha(1), picture(1)) == 0
        assert writer.add("new.jpg", sha(99), picture(7)) > 0
        writer.alias("copy2.jpg", sha(99))
        with pytest.raises(KeyError):
            writer.alias("copy3.jpg", sha(77))
    store = Store(tmp_path)
    assert store.info()["images"] == before["images"] + 1 and len(store) == 6
    np.testing.assert_array_equal(store.read("copy.jpg").patches, picture(1).patches)
    np.testing.assert_array_equal(store.read("copy2.jpg").patches, picture(7).patches)


def test_info_counts(tmp_path: Path) -> None:
    fill(tmp_path, range(5))
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        writer.alias("again", sha(2))
        writer.fail("bad", "why")
    info = Store(tmp_path).info()
    layouts = [picture(seed).layout for seed in range(5)]
    assert info["slices"] == sum(len(layout.grids) for layout in layouts)
    assert info["tokens"] == sum(layout.patches for layout in layouts)
    assert (info["names"], info["images"], info["failures"], info["width"]) == (6, 5, 1, WIDTH)
    assert info["bytes"] == sum(file.stat().st_size for file in tmp_path.glob("shard-*"))
    assert json.loads(json.dumps(info)) == info


@pytest.mark.parametrize(
    ("change", "key", "there", "here"),
    [
        ({"weights": "bb22"}, "weights", "'aa11'", "'bb22'"),
        ({"layer": -1}, "layer", "-2", "-1"),
        ({"tiling": {"mode": "squash", "max_slices": 6}}, "tiling.mode", "'uhd'", "'squash'"),
        (
            {"image": {"image_mean": (0.5, 0.5, 0.4)}},
            "image.image_mean",
            "[0.5, 0.5, 0.5]",
            "[0.5, 0.5, 0.4]",
        ),
        ({"extra": 1}, "extra", "None", "1"),
    ],
)
def test_another_encoder_is_refused_with_both_values(
    tmp_path: Path, change: dict[str, Any], key: str, there: str, here: str
) -> None:
    fill(tmp_path, range(2))
    for open_store in (Store, StoreWriter):
        with pytest.raises(StoreError) as caught:
            open_store(tmp_path, FINGERPRINT | change)
        assert f"{key} is {there} there and {here} here" in str(caught.value)
        assert str(caught.value).count(" there and ") == 1  # and no other key
    fill(tmp_path, range(3))  # the refused writer holds no lock


def test_another_codec_is_refused_with_both_values(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(2))
    with pytest.raises(StoreError, match="codec 'int3' is not known"):
        StoreWriter(tmp_path, FINGERPRINT, "int3")

    class Other:
        name = "int8"

    monkeypatch.setitem(sys.modules["mlx_llama3v.embeddings.codec"].CODECS, "int8", Other())
    with pytest.raises(StoreError, match="codec is 'float16' there and 'int8' here"):
        StoreWriter(tmp_path, FINGERPRINT, "int8")


def test_what_is_no_store_is_refused(tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"not an embedding store: it has no manifest\.json"):
        Store(tmp_path / "nowhere")
    fill(tmp_path, range(2))
    manifest = tmp_path / "manifest.json"
    values = json.loads(manifest.read_text())
    manifest.write_text(json.dumps(values | {"schema": 99}))
    with pytest.raises(StoreError, match="schema version 99"):
        Store(tmp_path)
    manifest.write_text("{")
    with pytest.raises(StoreError, match=r"manifest\.json is damaged"):
        Store(tmp_path)
    manifest.unlink()
    with pytest.raises(StoreError, match=r"no manifest\.json"):
        StoreWriter(tmp_path, FINGERPRINT)  # shards without a manifest: nobody knows what made them


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(2))
    with StoreWriter(tmp_path / "b", FINGERPRINT | {"layer": -1}) as writer:
        writer.add("x", sha(0), picture(0))
    os.replace(tmp_path / "b" / "shard-00000.safetensors", tmp_path / "a" / "shard-00009.safetensors")
    with pytest.raises(StoreError, match=r"shard-00009\.safetensors was made with another encoder"):
        Store(tmp_path / "a")


def test_a_shard_cut_anywhere_is_an_error_that_names_it(tmp_path: Path) -> None:
    fill(tmp_path, range(3), shard_bytes=1 << 20)
    file = tmp_path / "shard-00000.safetensors"
    whole = file.read_bytes()
    for size in [0, 3, 8, 9, 50, *range(100, len(whole), 37), len(whole) - 1]:
        file.write_bytes(whole[:size])
        with pytest.raises(StoreError, match=r"shard-00000\.safetensors is damaged"):
            Store(tmp_path)
    file.write_bytes(whole + b"x")
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors is damaged"):
        Store(tmp_path)


def test_a_shard_cut_while_open_is_an_error(tmp_path: Path) -> None:
    fill(tmp_path, range(3), shard_bytes=1 << 20)
    store, file = Store(tmp_path), tmp_path / "shard-00000.safetensors"
    os.truncate(file, file.stat().st_size - 4)
    store.read("0.jpg")
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors is damaged: it ends 4 bytes into"):
        store.read("2.jpg")
    file.unlink()
    with pytest.raises(StoreError, match=r"shard-00000\.safetensors cannot be read"):
        store.read("0.jpg")


def test_any_flipped_byte_is_found(tmp_path: Path) -> None:
    fill(tmp_path, range(2), shard_bytes=1 << 20)
    file = tmp_path / "shard-00000.safetensors"
    whole = file.read_bytes()
    for at in random.Random(0).sample(range(len(whole)), 300):
        file.write_bytes(whole[:at] + bytes([whole[at] ^ 4]) + whole[at + 1 :])
        with pytest.raises(StoreError, match=r"shard-00000\.safetensors"):
            raise StoreError(*verify(tmp_path).values())


def test_a_shard_that_is_gone_is_made_anew(tmp_path: Path) -> None:
    fill(tmp_path, range(12))
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        writer.alias("copy.jpg", sha(4))
    names = [{name for name, _ in each.index.names()} for each in Store(tmp_path).shards]
    assert "4.jpg" in names[1] and "copy.jpg" in names[-1]
    (tmp_path / "shard-00001.safetensors").unlink()
    store = Store(tmp_path)
    assert set(store.names) == {f"{seed}.jpg" for seed in range(12)} - names[1]
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        assert not writer.has("copy.jpg") and not writer.has_hash(sha(4))
    fill(tmp_path, range(12))
    assert {name for name in contents(tmp_path) if name != "copy.jpg"} == set(expected(range(12)))
    assert contents(tmp_path)["copy.jpg"] == expected(range(12))["4.jpg"]


def test_bad_embeddings_are_refused(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        writer.add("a", sha(0), picture(0))
        layout, values = picture(1)
        with pytest.raises(StoreError, match=r"shape .* expected"):
            writer.add("b", sha(1), Encoded(layout, values[1:]))
        with pytest.raises(StoreError, match="width 7, those of the store 8"):
            writer.add("b", sha(1), Encoded(layout, values[:, 1:]))
        values[0, 0] = np.nan
        with pytest.raises(StoreError, match="not finite"):
            writer.add("b", sha(1), Encoded(layout, values))
        assert not writer.has("b") and not writer.has_hash(sha(1))


def test_failures_are_listed_tried_again_and_dropped_on_success(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        writer.fail("a.jpg", "truncated")
        writer.fail("b.jpg", "not a picture")
    assert Store(tmp_path).failures == {"a.jpg": "truncated", "b.jpg": "not a picture"}
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        assert not writer.has("a.jpg")
        writer.add("a.jpg", sha(0), picture(0))
    lines = (tmp_path / "failures.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [{"name": "b.jpg", "reason": "not a picture"}]
    with pytest.raises(StoreError, match=r"no embedding of 'b\.jpg' \(not a picture\)"):
        Store(tmp_path).read("b.jpg")


def test_leftovers_of_a_killed_writer_are_ignored_and_removed(tmp_path: Path) -> None:
    fill(tmp_path, range(2))
    (tmp_path / ".shard-00001.safetensors.123.tmp").write_bytes(b"half")
    assert len(Store(tmp_path)) == 2
    fill(tmp_path, range(3))
    assert not [name for name in files(tmp_path) if name.endswith(".tmp")]


def test_two_writers_do_not_meet(tmp_path: Path) -> None:
    with (
        StoreWriter(tmp_path, FINGERPRINT),
        pytest.raises(StoreError, match=rf"being written by process {os.getpid()} on .* since "),
    ):
        StoreWriter(tmp_path, FINGERPRINT)
    StoreWriter(tmp_path, FINGERPRINT).close()
