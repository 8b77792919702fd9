"""Two processes fill one store: the union equals the store of one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from mlx_llama3v.demo.dataset import draw
from mlx_llama3v.embeddings.damage import Losses
from mlx_llama3v.embeddings.ranks import Ranks
from mlx_llama3v.embeddings.shard import read_shard
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.tools import merge, verify
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import StoreError
from mlx_llama3v.source import Source
from mlx_llama3v.storing import embed_data
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from tests.ranks import LAUNCH, ROOT, launch, launching
from tests.test_store import FINGERPRINT, contents, expected, fill, picture, sha

CLI = Path(sys.executable).with_name("llama3v-mlx")


@pytest.mark.skipif(not LAUNCH.exists() or not CLI.exists(), reason="not installed")
def test_two_ranks_fill_one_store(tmp_path: Path) -> None:
    data = draw(tmp_path / "data", 30, 9, 4)
    rows = json.loads(data.captions.read_text())
    twin = "twin.png"  # the same bytes under a second name, for the other rank
    (data.images / twin).write_bytes((data.images / rows[0]["image"]).read_bytes())
    rows.insert(1, {**rows[1], "id": "twin", "image": twin})
    rows.append({**rows[1], "id": "gone", "image": "gone.png"})
    data.captions.write_text(json.dumps(rows))
    model = convert(TINY / "siglip", TINY / "llama", tmp_path / "model").path
    embed_data(model, data.captions, tmp_path / "one", image_folder=data.images, codec="int8")
    command = [
        str(CLI),
        "embed",
        "--model",
        str(model),
        "--data",
        str(data.captions),
        "--output",
        str(tmp_path / "two"),
    ]
    command += ["--image-folder", str(data.images), "--codec"]
    done = launch(*command, "int8")
    assert done.returncode == 0, done.stdout + done.stderr
    before = {file: file.read_bytes() for file in (tmp_path / "two").iterdir()}
    refused = " ".join(launch(*command, "int4").stderr.split())
    assert refused.count("codec is 'int8' there and 'int4' here") == 2, refused  # by both ranks
    assert {file: file.read_bytes() for file in (tmp_path / "two").iterdir()} == before
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert set(one.names) == set(two.names) and len(two) == 31 and not verify(tmp_path / "two")
    assert one.info()["images"] == two.info()["images"] == 30
    assert [*two.failures] == [*one.failures] == ["gone.png"]
    assert not [*(tmp_path / "two").glob("rank-*")] and len(two.shards) > 1
    for name in one.names:
        np.testing.assert_allclose(two.read(name).patches, one.read(name).patches, rtol=0.03, atol=0.05)  # a code
    for shard in (*one.shards, *two.shards):  # each rank looked at the same sample
        np.testing.assert_array_equal(shard.channels["channel.scale"], one.shards[0].channels["channel.scale"])
    assert one.info()["fidelity"] == two.info()["fidelity"]


_SLOWLY = """
import sys, time
import tests.without_torch
from pathlib import Path
from mlx_llama3v.storing import embed_data
from mlx_llama3v.vision.encode import Encoder

model, data, folder, output, pause, codec = sys.argv[1:]
encode = Encoder.encode_as

def slowly(*given, **settings):
    time.sleep(float(pause))
    return encode(*given, **settings)

Encoder.encode_as = slowly
embed_data(model, Path(data), Path(output), image_folder=Path(folder), codec=codec, shard_bytes=40_000, batch_size=4)
"""


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
def test_a_killed_rank_costs_no_more_than_its_shard(tmp_path: Path) -> None:
    """Real processes: one is killed with some shards done, and the other ends; the run that follows makes the rest."""
    data = draw(tmp_path / "data", 40, 9, 4)
    model = convert(TINY / "siglip", TINY / "llama", tmp_path / "model").path
    embed_data(model, data.captions, tmp_path / "one", image_folder=data.images, codec="int8")
    command = [sys.executable, "-c", _SLOWLY, str(model), str(data.captions), str(data.images), str(tmp_path / "two")]
    running = subprocess.Popen(
        launching(*command, "0.3", "int8"), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
    )
    part, until = tmp_path / "two" / "rank-1-of-2", time.monotonic() + 60
    while not len([*part.glob("shard-*")]) > 1:
        assert running.poll() is None and time.monotonic() < until, "it was not seen at work"
        time.sleep(0.02)
    os.kill(json.loads((part / ".lock").read_text())["pid"], signal.SIGKILL)
    running.communicate(timeout=60)
    assert not verify(part), "what is complete is whole"
    made = {sha for shard in Store(part).shards for _, sha in shard.index.names()}
    assert 0 < len(made) < 20
    refused = launch(*command, "0", "int4")
    assert "codec is 'int8' there and 'int4' here" in refused.stderr, refused
    assert made <= {Store(tmp_path / "two").sha_of(name) for name in Store(tmp_path / "two").names}
    done = launch(*command, "0", "int8")
    assert done.returncode == 0, done.stdout + done.stderr
    one, two = Store(tmp_path / "one"), Store(tmp_path / "two")
    assert set(one.names) == set(two.names) and len(two) == 40 and not verify(tmp_path / "two")
    assert sum(shard.index.pictures for shard in two.shards) == two.info()["images"] == 40, "one is there twice"
    assert not [*(tmp_path / "two").glob("rank-*")]
    for name in one.names:
        np.testing.assert_allclose(two.read(name).patches, one.read(name).patches, rtol=0.03, atol=0.05)  # a code


def test_moved_shards_leave_their_store(tmp_path: Path) -> None:
    fill(tmp_path / "a", range(8))
    fill(tmp_path / "b", range(6, 14))
    before = len([*(tmp_path / "b").glob("shard-*")])
    counts = merge([tmp_path / "b"], tmp_path / "a", move=True)
    assert counts["images"] == 6 and counts["duplicates"] == 2 and before > 2
    assert contents(tmp_path / "a") == expected(range(14))
    assert len(Store(tmp_path / "b")) == 0


@pytest.mark.parametrize("cut", [False, True])
def test_one_process_takes_up_the_parts_that_a_killed_run_left(tmp_path: Path, cut: bool) -> None:
    fill(tmp_path, range(4))
    fill(tmp_path / "rank-0-of-2", range(4, 12))
    fill(tmp_path / "rank-1-of-2", range(12, 16))
    shard = tmp_path / "rank-0-of-2" / "shard-00001.safetensors"
    held = {name for name, _ in read_shard(shard).index.names()}
    if cut:
        os.truncate(shard, shard.stat().st_size - 4)
    losses = Losses()
    images: dict[str, Source] = {"0.jpg": Path("0.jpg"), "20.jpg": Path("20.jpg")}
    assert Ranks(tmp_path, losses).share(images) == images
    have = {name: one for name, one in expected(range(16)).items() if name not in held or not cut}
    assert contents(tmp_path) == have and not [*tmp_path.glob("rank-*-of-?")]
    assert losses.names == (held if cut else set()) and len(losses.sentences) == cut
    assert [file.name for file in tmp_path.glob("*.damaged")] == [f"{shard.parent.name}-{shard.name}.damaged"] * cut


@pytest.mark.parametrize("how", ["cut", "gone", "other"])
def test_a_part_whose_manifest_is_damaged_is_set_aside_and_told(tmp_path: Path, how: str) -> None:
    """Its shards wait there for a manifest; the other part arrives, and the next run makes what is missing."""
    fill(tmp_path / "rank-0-of-2", range(4))
    fill(tmp_path / "rank-1-of-2", range(4, 8))
    manifest = tmp_path / "rank-1-of-2" / "manifest.json"
    values = json.loads(manifest.read_bytes())
    if how == "gone":
        manifest.unlink()
    else:
        values["fingerprint"]["layer"] = 7
        manifest.write_text(json.dumps(values) if how == "other" else "{")
    losses = Losses()
    Ranks(tmp_path, losses).collect()
    aside = tmp_path / "damaged-1-rank-1-of-2"
    assert contents(tmp_path) == expected(range(4)) and losses.left(Store(tmp_path)) == 4
    assert len(losses.sentences) == 1 and f"{aside} with 4 names" in losses.sentences[0] and not manifest.exists()
    (aside / "manifest.json").write_bytes((tmp_path / "manifest.json").read_bytes())
    merge([aside], tmp_path)
    assert contents(tmp_path) == expected(range(8)) and losses.left(Store(tmp_path)) == 0


def test_a_damaged_common_store_stops_no_rank(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    fill(tmp_path, range(12))
    shard = tmp_path / "shard-00001.safetensors"
    held = [name for name, _ in read_shard(shard).index.names()]
    os.truncate(shard, 100)
    monkeypatch.setattr(Ranks, "_wait", lambda ranks: None)
    ranks = Ranks(tmp_path)
    ranks.size = 2  # the first of two
    mine = ranks.share({f"{n}.jpg": Path("gone") for n in range(12)})
    there = [f"{n}.jpg" for n in range(12) if f"{n}.jpg" not in held]
    assert len(held) > 1 and [*mine] == there[::2] + held[::2]  # what is there is counted, by a rank its part
    rows = {"twin.jpg": sha(int(there[0].split(".")[0]))}  # known bytes under another name are not encoded again
    with StoreWriter(tmp_path / "rank-0-of-2", FINGERPRINT, beside=ranks.common) as writer:
        assert writer.has(there[0]) and not writer.has(held[0]) and writer.has_hash(rows["twin.jpg"])
        writer.alias("twin.jpg", rows["twin.jpg"])
    ranks.collect()
    store = Store(tmp_path)
    assert store.sha_of("twin.jpg") == rows["twin.jpg"] and store.info()["images"] == len(there)


def test_other_settings_than_the_store_s_are_refused_and_block_nothing(tmp_path: Path) -> None:
    fill(tmp_path, range(4))
    other = {**FINGERPRINT, "layer": -1}
    with pytest.raises(StoreError, match="layer is -2 there and -1 here"):
        Ranks(tmp_path).share({}, fingerprint=other, codec="float16", post={})
    with StoreWriter(tmp_path / "rank-0-of-2", other) as writer:
        writer.add("9.jpg", sha(9), picture(9))
    losses = Losses()
    Ranks(tmp_path, losses).collect()
    assert contents(tmp_path) == expected(range(4)) and losses.names == {"9.jpg"}
    assert "rank-0-of-2 was made with other settings" in losses.sentences[0]
    assert "layer is -1 there and -2 here" in losses.sentences[0]


def test_a_rank_whose_peer_has_ended_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def lost(*_: object, **__: object) -> None:
        raise RuntimeError("[ring] connection to a peer was lost")

    monkeypatch.setattr("mlx.core.distributed.all_sum", lost)
    ranks = Ranks(tmp_path)
    ranks.size = 2
    with pytest.raises(StoreError, match="another process of this run has ended"):
        ranks.collect()


def test_a_killed_rank_s_lock_is_cleared_by_its_own_host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    part = tmp_path / "rank-1-of-2"
    fill(part, range(4))
    (part / ".lock").write_text(json.dumps({"pid": 7, "host": "node-b", "machine": "b", "since": "then"}))
    with pytest.raises(StoreError, match="process 7 on node-b"):
        Ranks(tmp_path).collect()
    monkeypatch.setattr(Ranks, "_wait", lambda ranks: None)
    with monkeypatch.context() as there:
        there.setattr("platform.node", lambda: "node-b")
        ranks = Ranks(tmp_path)
        ranks.rank, ranks.size, ranks.target = 1, 2, part
        ranks.share({})
    Ranks(tmp_path).collect()
    assert contents(tmp_path) == expected(range(4))


def test_a_part_that_is_being_written_is_not_moved(tmp_path: Path) -> None:
    with StoreWriter(tmp_path / "rank-1-of-2", FINGERPRINT) as writer:
        writer.fail(sha(0), "x")
        with pytest.raises(StoreError, match="is being written by process"):
            Ranks(tmp_path).collect()
