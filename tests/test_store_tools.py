"""Pooling, codecs in a store, damage and its repair, prune, merge, and readers that nothing crashes."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings import tools
from mlx_llama3v.embeddings.codec import CODECS
from mlx_llama3v.embeddings.index import ShardIndex, distinct_layouts, name_keys
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import DamagedError, StoreError, UserError
from mlx_llama3v.vision.pool import Pool, pool_picture, pooled_layout
from tests.test_store import COUNT, FINGERPRINT, WIDTH, contents, expected, fill, picture, sha

LAYOUTS = st.builds(
    lambda overview, rows, cols, tile: SliceLayout(overview, rows, cols if rows else 0, tile if rows else (0, 0)),
    st.tuples(st.integers(1, 7), st.integers(1, 7)),
    st.integers(0, 3),
    st.integers(1, 3),
    st.tuples(st.integers(1, 6), st.integers(1, 6)),
)


def values(layout: SliceLayout, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((layout.patches, WIDTH)).astype(np.float32)


@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    pictures=st.dictionaries(st.text(max_size=8), LAYOUTS, max_size=6),
    codec=st.sampled_from([*CODECS]),
    pool=st.integers(1, 4),
    shard_bytes=st.sampled_from([1, 700, 1 << 20]),
)
def test_a_store_gives_back_what_it_was_given(
    tmp_path: Path, pictures: dict[str, SliceLayout], codec: str, pool: int, shard_bytes: int
) -> None:
    path = tmp_path / "store"
    shutil.rmtree(path, ignore_errors=True)
    given = {name: Encoded(layout, values(layout, i)) for i, (name, layout) in enumerate(pictures.items())}
    with StoreWriter(path, FINGERPRINT, codec, shard_bytes, Pool(pool) if pool > 1 else None) as writer:
        sizes = [writer.add(name, sha(i), encoded) for i, (name, encoded) in enumerate(given.items())]
    store = Store(path, FINGERPRINT)
    assert store.names == tuple(given) and not tools.verify(path)
    store.announce(given)
    for name, coded in zip(given, store.read_batch([*given]), strict=True):
        alone = store.read_coded(name)
        assert coded.layout == alone.layout and coded.parts.keys() == alone.parts.keys()
        assert all((part == alone.parts[key]).all() for key, part in coded.parts.items())
    assert store.info()["slices"] == sum(len(layout.grids) for layout in pictures.values())
    for (name, encoded), size in zip(given.items(), sizes, strict=True):
        wanted = pool_picture(encoded, pool)
        read = store.read(name)
        assert read.layout == wanted.layout == store.layout(name) == pooled_layout(encoded.layout, pool)
        assert size == store.codec.row_bytes(WIDTH) * wanted.layout.patches
        most = {"float16": 0.002, "int8": 0.05, "int4": 1.0}[codec]
        np.testing.assert_allclose(read.patches.astype(np.float32), wanted.patches, atol=most)


def test_pooling_is_the_mean_of_whole_and_broken_blocks() -> None:
    layout = SliceLayout((3, 5))
    patches = np.arange(15, dtype=np.float32)[:, None] * np.ones((1, WIDTH), np.float32)
    pooled = pool_picture(Encoded(layout, patches), 2)
    assert pooled.layout == SliceLayout((2, 3))
    np.testing.assert_array_equal(pooled.patches[:, 0], [3, 5, 6.5, 10.5, 12.5, 14])


def test_another_pool_or_codec_is_refused_with_both_values(tmp_path: Path) -> None:
    with StoreWriter(tmp_path, FINGERPRINT, "int8", post=Pool(2)) as writer:
        writer.add("a", sha(0), picture(0))
    with pytest.raises(StoreError, match="pool is 2 there and 3 here"):
        StoreWriter(tmp_path, FINGERPRINT, "int8", post=Pool(3))
    with pytest.raises(StoreError, match="codec is 'int8' there and 'int4' here; pool is 2 there and None here"):
        StoreWriter(tmp_path, FINGERPRINT, "int4")


def test_fidelity_is_in_the_manifest(tmp_path: Path) -> None:
    found = {}
    for codec in CODECS:
        with StoreWriter(tmp_path / codec, FINGERPRINT, codec) as writer:
            for seed in range(9):
                writer.add(f"{seed}", sha(seed), picture(seed))
        found[codec] = json.loads((tmp_path / codec / "manifest.json").read_text())["fidelity"]
        assert found[codec] == Store(tmp_path / codec).info()["fidelity"]
    assert [values["relative_error"] < most for values, most in zip(found.values(), (1e-3, 0.01, 0.1), strict=True)]
    assert found["float16"]["cosine"] > found["int8"]["cosine"] > found["int4"]["cosine"] > 0.99


def test_channels_are_those_of_the_first_shard_also_after_a_kill(tmp_path: Path) -> None:
    def write(path: Path, seeds: range) -> None:
        with StoreWriter(path, FINGERPRINT, "int8", shard_bytes=300) as writer:
            for seed in seeds:
                if not writer.has(f"{seed}"):
                    writer.add(f"{seed}", sha(seed), picture(seed))

    write(tmp_path / "once", range(10))
    for end in (3, 7, 10):
        write(tmp_path / "often", range(end))
    once, often = Store(tmp_path / "once"), Store(tmp_path / "often")
    assert len(once.shards) > 3
    for shard in (*once.shards, *often.shards):
        np.testing.assert_array_equal(shard.channels["channel.scale"], once.shards[0].channels["channel.scale"])
    for name in once.names[:3]:
        np.testing.assert_array_equal(once.read(name).patches, often.read(name).patches)


def test_prune_keeps_what_is_named(tmp_path: Path) -> None:
    fill(tmp_path, range(12))
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        writer.alias("copy.jpg", sha(5))
        writer.fail("gone.jpg", "broken")
    keep = {"1.jpg", "2.jpg", "copy.jpg", "9.jpg", "unknown.jpg"}
    dropped, freed = tools.prune(tmp_path, keep)
    store = Store(tmp_path, FINGERPRINT)
    assert dropped == 8 and freed > 0 and set(store.names) == keep - {"unknown.jpg"} and not store.failures
    assert not tools.verify(tmp_path)
    assert store.info()["images"] == 4
    np.testing.assert_array_equal(store.read("copy.jpg").patches, picture(5).patches)
    assert tools.prune(tmp_path, keep) == (0, 0)
    with pytest.raises(StoreError, match=r"none of the \d+ pictures of .* is named .*nothing was dropped"):
        tools.prune(tmp_path, {"images/1.jpg"})  # names of another folder: the store would be lost
    assert Store(tmp_path).info()["images"] == 4


def test_merge_holds_each_picture_once(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(8))
    fill(tmp_path / "b", range(5, 14))
    with StoreWriter(tmp_path / "b", FINGERPRINT) as writer:
        writer.add("0.jpg", sha(50), picture(50))  # another picture under a name of a
        writer.add("2.jpg", sha(52), picture(52))  # and one that has a name of its own, too
        writer.flush()
        writer.alias("two.jpg", sha(52))
        writer.fail("bad.jpg", "why")
        writer.fail("1.jpg", "not there")
    counts = tools.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    assert counts == {"images": 15, "duplicates": 3, "conflicts": 2}
    two = expected(range(52, 53))["52.jpg"]
    assert contents(tmp_path / "c") == expected(range(14)) | {"two.jpg": two}
    assert Store(tmp_path / "c").info()["images"] == 15  # what only "0.jpg" stood for is not among them
    assert Store(tmp_path / "c").failures == {"bad.jpg": "why"}
    assert tools.merge([tmp_path / "b"], tmp_path / "c")["images"] == 0
    with pytest.raises(StoreError, match="is one of the stores to merge"):
        tools.merge([tmp_path / "a"], tmp_path / "a")


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_merge_keeps_the_channels_of_each_shard(tmp_path: Path, codec: str) -> None:
    for part, scale in (("a", 1), ("b", 30)):
        with StoreWriter(tmp_path / part, FINGERPRINT, codec) as writer:
            for seed in range(3):
                layout, patches = picture(seed)
                writer.add(f"{part}{seed}", sha(seed + scale), Encoded(layout, patches * scale))
    tools.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")
    for part in "ab":
        mine, theirs = Store(tmp_path / part), Store(tmp_path / "c")
        for name in mine.names:
            np.testing.assert_array_equal(mine.read(name).patches, theirs.read(name).patches)


def test_damage_is_not_copied(tmp_path: Path) -> None:
    """A flipped bit would have a right checksum in the new shard."""
    fill(tmp_path / "a", range(8))
    file = tmp_path / "a" / "shard-00000.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[:-9] + bytes([whole[-9] ^ 4]) + whole[-8:])
    for copies in (
        lambda: tools.merge([tmp_path / "a"], tmp_path / "c"),
        lambda: tools.prune(tmp_path / "a", {f"{seed}.jpg" for seed in range(1, 8)}),
    ):
        with pytest.raises(DamagedError, match=r"shard-00000\.safetensors is damaged"):
            copies()
    file.write_bytes(whole)
    tools.merge([tmp_path / "a"], tmp_path / "c")
    assert contents(tmp_path / "c") == contents(tmp_path / "a") == expected(range(8))


def test_stores_of_another_encoder_do_not_merge(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(2))
    with StoreWriter(tmp_path / "b", FINGERPRINT | {"layer": -1}) as writer:
        writer.add("x", sha(0), picture(0))
    with pytest.raises(StoreError, match="layer is -1 there and -2 here"):
        tools.merge([tmp_path / "a", tmp_path / "b"], tmp_path / "c")


KILLED = """
import os, signal, sys
from pathlib import Path
from typing import Any
from mlx_llama3v.embeddings import shard, tools
path, at = Path(sys.argv[1]), int(sys.argv[2])
real, count = os.replace, iter(range(10**9))
def dying(*args):
    if next(count) == at: os.kill(os.getpid(), signal.SIGKILL)
    return real(*args)
os.replace = dying
if sys.argv[3] == "prune":
    tools.prune(path / "a", {f"{n}.jpg" for n in range(0, 40, 3)})
else:
    tools.merge([path / "a", path / "b"], path / "c")
"""


@pytest.mark.parametrize("job", ["prune", "merge"])
@pytest.mark.parametrize("at", [0, 1, 3])
def test_killed_and_run_again(tmp_path: Path, job: str, at: int) -> None:
    fill(tmp_path / "a", range(COUNT))
    fill(tmp_path / "b", range(COUNT - 9, COUNT + 9))
    root = Path(__file__).resolve().parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), str(at), job], cwd=root)
    assert killed.returncode == -9
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), "-1", job], cwd=root, check=True)
    if job == "prune":
        assert contents(tmp_path / "a") == {k: v for k, v in expected(range(COUNT)).items() if int(k[:-4]) % 3 == 0}
    else:
        assert contents(tmp_path / "c") == expected(range(COUNT + 9))


def test_names_with_equal_keys_are_told_apart(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_llama3v.embeddings.index.name_keys", lambda names: name_keys(names) % 3)
    fill(tmp_path, range(12))
    assert contents(tmp_path) == expected(range(12)) and "12.jpg" not in Store(tmp_path)
    assert list(Store(tmp_path).layouts(["1.jpg", "12.jpg", "4.jpg"])) == ["1.jpg", "4.jpg"]


@pytest.fixture(scope="module")
def stored(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("stored") / "int8"
    with StoreWriter(path, FINGERPRINT, "int8") as writer:
        for seed in range(3):
            writer.add(f"{seed}.jpg", sha(seed), picture(seed))
        writer.fail("bad", "why")
    return path


def read_all(path: Path) -> None:
    tools.verify(path)
    store = Store(path)
    for name in store.names:
        store.read(name)
    store.info()


def changed(data: bytes, how: int, at: float, junk: bytes) -> bytes:
    place = int(at * len(data))
    if how == 0:
        return data[:place]
    if how == 1:
        return data[:place] + junk + data[place:]
    return data[:place] + junk + data[place + len(junk) :]


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    file=st.sampled_from(["shard-00000.safetensors", "manifest.json", "failures.jsonl", "damage.json"]),
    how=st.integers(0, 2),
    at=st.floats(0, 1, exclude_max=True),
    junk=st.one_of(
        st.binary(min_size=1, max_size=9),
        st.sampled_from([b"[", b"{", b'"', b"-1", b"1e999", b"null", b"[[[]]]", b"99999999999999999999"]),
    ),
)
def test_no_bytes_crash_the_readers(stored: Path, tmp_path: Path, file: str, how: int, at: float, junk: bytes) -> None:
    path = tmp_path / "fuzzed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(stored, path)
    source = stored / file
    (path / file).write_bytes(changed(source.read_bytes() if source.exists() else b"{}", how, at, junk))
    for use in (read_all, lambda p: StoreWriter(p, FINGERPRINT, "int8").close()):
        try:
            use(path)
        except UserError as error:
            assert "\n" not in str(error)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_header_crashes_the_reader(stored: Path, tmp_path: Path, data: st.DataObject) -> None:
    """The header is rewritten as JSON, so that what is wrong gets past the parser."""
    path = tmp_path / "fuzzed"
    shutil.rmtree(path, ignore_errors=True)
    shutil.copytree(stored, path)
    file = path / "shard-00000.safetensors"
    whole = file.read_bytes()
    length = int.from_bytes(whole[:8], "little")
    header = json.loads(whole[8 : 8 + length])
    tensor = data.draw(st.sampled_from([*header]))
    key = data.draw(st.sampled_from([*header[tensor]]))
    odd = st.one_of(st.none(), st.integers(-(2**70), 2**70), st.text(max_size=3), st.floats(), st.booleans())
    header[tensor][key] = data.draw(
        st.one_of(odd, st.lists(odd, max_size=3), st.lists(st.integers(0, 300), max_size=3), st.sampled_from(["F16"]))
    )
    text = json.dumps(header).encode()
    file.write_bytes(len(text).to_bytes(8, "little") + text + whole[8 + length :])
    try:
        read_all(path)
    except StoreError as error:
        assert "\n" not in str(error)


@pytest.mark.parametrize(
    ("tensor", "value", "why"),
    [
        ("index.layouts", [[2, 3, 0, 0, 0, 0], [2, -4, 1, 2, 2, 2]], "index"),
        ("index.layouts", [[2, 3, 0, 0, 0, 0], [2, 1 << 20, 1, 2, 2, 2]], "index"),
        ("index.layouts", [[2, 3, 0, 0, 0, 0], [2, 5, 1, 2, 2, 2]], "rows"),
        ("index.layouts", [[2, 3, 0, 0, 0, 0]], "index"),
        ("index.name_ends", [9, 5], "index"),
        ("index.name_ends", [5, 99], "index"),
        ("index.name_keys", [1], "index"),
    ],
)
def test_an_index_that_contradicts_itself_is_damage(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, tensor: str, value: list[int], why: str
) -> None:
    make = ShardIndex.make

    def tampered(*args: Any) -> ShardIndex:
        index = make(*args)
        dtype = index.tensors[tensor].dtype
        return ShardIndex({**index.tensors, tensor: np.array(value, dtype)})

    monkeypatch.setattr(ShardIndex, "make", tampered)
    with StoreWriter(tmp_path, FINGERPRINT) as writer:
        for seed in range(2):
            writer.add(f"{seed}.jpg", sha(seed), picture(seed))
    with pytest.raises(DamagedError, match=rf"shard-00000\.safetensors is damaged: .*{why}"):
        Store(tmp_path)


@pytest.mark.parametrize("rows", [0, 1, 500])
def test_distinct_layouts_are_those_of_numpy(rows: int) -> None:
    table = np.random.default_rng(0).choice([0, 1, 2, 1 << 15], (rows, 6)).astype(np.int32)
    table = np.concatenate([table, table[::2]])
    kinds, which = distinct_layouts(table)
    np.testing.assert_array_equal(kinds[which], table)
    assert len(kinds) == len(np.unique(table, axis=0))
