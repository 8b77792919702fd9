"""What embedding will cost: counted from headers, equal to what is then stored, refused where the disk is too small."""

from __future__ import annotations

import io
import json
import shutil
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from mlx_llama3v import errors, estimate
from mlx_llama3v.ahead import Ahead, AheadConfig
from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.config import Encoded, ImageConfig, ProjectorConfig, TilingConfig, VisionConfig
from mlx_llama3v.data.dataset import read_data
from mlx_llama3v.data.hf import TableCell
from mlx_llama3v.data.sources import FilePart, Refused
from mlx_llama3v.embeddings.codec import CODECS
from mlx_llama3v.embeddings.embed import EmbedProgress
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import ImageError, StoreError, UserError
from mlx_llama3v.estimate import Form
from mlx_llama3v.storing import _form, embed_data, estimate_data
from mlx_llama3v.vision.pool import Pool
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.vlm import convert_vlm
from tests.parity.test_bunny import Reference
from tests.test_webdataset import shard

SO400M = VisionConfig(1152, 4304, num_hidden_layers=27, num_attention_heads=16, image_size=384, patch_size=14)


def saved(size: tuple[int, int], seed: int = 0, kind: str = "JPEG", **options: Any) -> bytes:
    made = io.BytesIO()
    noise = np.random.default_rng(seed).integers(0, 255, (*size[::-1], 3), np.uint8)
    Image.fromarray(noise).save(made, kind, **options)
    return made.getvalue()


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("model") / "model").path


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    for n, size in enumerate([(64, 64), (300, 120), (90, 400), (500, 380), (31, 33), (256, 256)]):
        (folder / f"{n}.jpg").write_bytes(saved(size, n))
    (folder / "broken.jpg").write_bytes(b"nothing")
    return folder


def disk(monkeypatch: pytest.MonkeyPatch, free: int) -> None:
    """A disk with `free` bytes that may be used."""
    usage = SimpleNamespace(free=free + estimate._SPARE_BYTES)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)


def test_headers_alone_are_read(tmp_path: Path) -> None:
    turned = Image.Exif()
    turned[274] = 6
    big = saved((200, 100), exif=turned.tobytes())
    path = shard(
        tmp_path / "s.tar", {"a.jpg": big, "b.png": saved((30, 40), 1, "PNG"), "c.webp": saved((20, 10), 2, "WEBP")}
    )
    (tmp_path / "cut.jpg").write_bytes(big[: len(big) // 2])  # its header is whole: only decoding would tell
    pictures = {
        **read_data(path).pictures(),
        "cut.jpg": tmp_path / "cut.jpg",
        "gone.jpg": tmp_path / "gone.jpg",
        "far.jpg": Refused("far.jpg", "it lies outside"),
        "short.png": FilePart(path, 10**9, 10, "short.png"),
    }
    told: list[tuple[int, int]] = []
    found = estimate.scan(pictures, ImageConfig(), progress=lambda *at: told.append(at))
    assert found.sizes == {(100, 200): 2, (30, 40): 1, (20, 10): 1} and found.pictures == 4
    assert set(found.unreadable) == {"gone.jpg", "far.jpg", "short.png"}
    assert "no such file" in found.unreadable["gone.jpg"] and found.unreadable["far.jpg"] == "it lies outside"
    assert told[-1] == (7, 7)


def test_a_scan_of_a_shard_reads_little_of_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = shard(tmp_path / "s.tar", {f"{n}.jpg": saved((700, 500), n, quality=95) for n in range(4)})
    monkeypatch.setattr(FilePart, "read", lambda self: pytest.fail("read whole"))
    assert estimate.scan(read_data(path).pictures(), ImageConfig()).sizes == {(700, 500): 4}


def test_a_picture_with_a_long_header_is_read_whole(tmp_path: Path) -> None:
    profile = saved((60, 50), icc_profile=bytes(200_000))
    path = shard(tmp_path / "s.tar", {"a.jpg": profile})
    assert len(profile) > 200_000
    assert estimate.scan(read_data(path).pictures(), ImageConfig()).sizes == {(60, 50): 1}


def test_known_numbers() -> None:
    """600,000 squashed pictures of so400m/14-384: the terabyte of the issue."""
    form = Form(SO400M, TilingConfig("squash"))
    found = estimate.volume({(640, 480): 600_000}, form)
    assert (found.slices, found.patches, found.rows) == (600_000, 600_000 * 729, 600_000 * 729)
    index = 600_000 * estimate._INDEX_BYTES
    assert found.bytes["float16"] - index == 600_000 * 729 * 1152 * 2
    assert found.bytes["int8"] - index == 600_000 * 729 * 1154
    assert found.bytes["int4"] - index == 600_000 * 729 * (72 * 9 + 2)
    pooled = estimate.volume({(640, 480): 10}, Form(SO400M, TilingConfig("squash"), pool=2))
    assert (pooled.patches, pooled.rows) == (7290, 10 * 14 * 14)
    projector = ProjectorConfig(in_dim=1152, out_dim=4096)
    after = estimate.volume({(640, 480): 10}, Form(SO400M, TilingConfig("squash"), projector=projector))
    assert after.rows == 10 * 81 and after.bytes["float16"] == 10 * (81 * 8192 + estimate._INDEX_BYTES)


@pytest.mark.parametrize(
    "options",
    [{"codec": "float16"}, {"codec": "int4"}, {"codec": "int8", "pool": 2}, {"codec": "int4", "max_slices": 0}],
)
def test_the_estimate_equals_the_store(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    pool, pooled = Pool.__call__, list[Encoded]()
    monkeypatch.setattr(Pool, "__call__", lambda self, encoded: pooled.append(encoded) or pool(self, encoded))
    said = estimate_data(model, photos, tmp_path / "store", **options)
    assert bool(pooled) is ("pool" in options)  # its time counts
    assert not (tmp_path / "store").exists()
    assert set(said.unreadable) == {"broken.jpg"} and said.speed.encode_seconds > 0 and said.seconds > 0
    assert said.volume.pictures == 6 and said.reused == 0
    summary = embed_data(model, photos, tmp_path / "store", **options).summary
    info = Store(tmp_path / "store").info()
    assert (said.volume.slices, said.volume.patches, said.volume.rows) == (
        info["slices"],
        summary.patches,
        info["tokens"],
    )
    codec = options["codec"]
    assert summary.bytes == said.volume.bytes[codec] - 6 * estimate._INDEX_BYTES
    again = estimate_data(model, photos, tmp_path / "store", **options)
    assert again.reused == 6 and again.volume.pictures == 0 and again.seconds == 0


def test_what_embed_refuses_the_estimate_refuses(model: Path, photos: Path, tmp_path: Path) -> None:
    embed_data(model, photos, tmp_path / "store", codec="int8")
    for n in range(6):
        (tmp_path / "others").mkdir(exist_ok=True)
        (tmp_path / "others" / f"{n}.jpg").write_bytes(saved((64, 64), n + 90))
    changes: list[dict[str, Any]] = [{"codec": "int4"}, {"max_slices": 0}, {"pool": 2}, {"data": tmp_path / "others"}]
    for change in changes:
        options = {"model": model, "data": photos, "output": tmp_path / "store", "codec": "int8", **change}
        said = []
        for ask in (embed_data, estimate_data):
            with pytest.raises(StoreError) as caught:
                ask(**options)
            said.append(str(caught.value))
        assert said[0] == said[1], change


def test_a_place_or_data_that_embed_refuses_the_estimate_refuses(model: Path, photos: Path, tmp_path: Path) -> None:
    (tmp_path / "text.json").write_text(
        json.dumps([{"id": "a", "conversations": [{"from": "human", "value": "x"}, {"from": "gpt", "value": "y"}]}])
    )
    for data, output, words in (
        (photos, model, "holds a model or a run"),
        (tmp_path / "text.json", tmp_path / "store", "names no picture"),
    ):
        said = []
        for ask in (embed_data, estimate_data):
            with pytest.raises(UserError, match=words) as caught:
                ask(model, data, output)
            said.append(str(caught.value))
        assert said[0] == said[1]


def test_a_cpu_does_both_with_its_cores(monkeypatch: pytest.MonkeyPatch) -> None:
    volume = estimate.Volume(pictures=10, slices=20, patches=1000, rows=1000, bytes={})
    speed = estimate.Speed(encode_seconds=0.01, prepare_seconds=0.6)
    for device, seconds in (("cpu", 16.0), ("gpu", 10.0)):
        monkeypatch.setattr(estimate, "device_name", lambda device=device: device)
        assert estimate.duration(volume, speed, workers=1) == pytest.approx(seconds)


def test_the_index_takes_no_more_than_is_said(tmp_path: Path) -> None:
    from mlx_llama3v.config import SliceLayout
    from mlx_llama3v.embeddings.writer import StoreWriter

    layout = SliceLayout((1, 1))
    with StoreWriter(tmp_path / "store", {"test": 1}) as writer:
        for n in range(200):
            writer.add(f"a/longer/name/of/a/folder/{n:012d}.jpg", f"{n:064x}", Encoded(layout, np.zeros((1, 8))))
    per_picture = Store(tmp_path / "store").info()["bytes"] / 200 - 16
    assert estimate._INDEX_BYTES / 3 < per_picture < estimate._INDEX_BYTES


SIZES = st.dictionaries(
    st.tuples(st.integers(1, 5000), st.integers(1, 5000)), st.integers(1, 1000), min_size=1, max_size=3
)


@settings(max_examples=60, deadline=None)
@given(SIZES, st.sampled_from(["uhd", "minicpm", "pad"]), st.integers(0, 8), st.integers(1, 3), st.booleans())
def test_nothing_exceeds_the_bound(
    sizes: dict[tuple[int, int], int], mode: str, cap: int, pool: int, projects: bool
) -> None:
    projector = ProjectorConfig(in_dim=1152, out_dim=2048) if projects else None
    form = Form(SO400M, TilingConfig(mode, cap), pool, projector)
    found = estimate.volume(sizes, form)
    for codec in CODECS:
        assert found.bytes[codec] <= estimate.most_bytes(found.pictures, form, codec)


@settings(max_examples=40, deadline=None)
@given(SIZES, st.sampled_from(sorted(CODECS)), st.floats(0.001, 1.2))
def test_what_is_advised_fits(sizes: dict[tuple[int, int], int], codec: str, share: float) -> None:
    form = Form(SO400M, TilingConfig("uhd", 6))
    free = int(estimate.volume(sizes, form).bytes[codec] * share)
    words = estimate.advice(sizes, form, codec, free).split()
    given_options = dict(zip(words[::2], words[1::2], strict=True))
    cap = int(given_options.get("--max-slices", 6))
    least = estimate.volume(sizes, Form(SO400M, TilingConfig("uhd", 0))).bytes[
        min(CODECS, key=lambda name: CODECS[name].row_bytes(1152))
    ]
    if words:
        chosen = given_options.get("--codec", codec)
        assert estimate.volume(sizes, Form(SO400M, TilingConfig("uhd", cap))).bytes[chosen] <= free
    elif codec != min(CODECS, key=lambda name: CODECS[name].row_bytes(1152)):
        assert least > free


def test_three_scales_are_three_times_as_wide(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Bunny 1.1: 14 tiles make one slice, which the estimate's time and `embed`'s share of padding take as one."""
    bunny = Reference(tmp_path / "bunny", (1, 2, 3)).directory
    model = convert_vlm(bunny, tmp_path / "model").path
    said = estimate_data(model, photos, tmp_path / "store", codec="int8", batch_size=2)
    assert said.volume.patches * said.speed.encode_seconds == pytest.approx(6 * said.speed.slice_seconds)
    report = embed_data(model, photos, tmp_path / "store", codec="int8")
    assert report.info["width"] == 3 * 64 and report.to_dict()["padding_share"] == 0
    assert report.summary.bytes == said.volume.bytes["int8"] - 6 * estimate._INDEX_BYTES
    paths = {f"{n}.jpg": photos / f"{n}.jpg" for n in range(6)}
    with Ahead(tmp_path / "ahead", AheadConfig(str(model), 10**6, "int8"), paths) as ahead:
        assert ahead.store.width == 3 * 64
        ahead.store.expect([(0, [*paths])])
        ahead.store.begin(0)
        for name in paths:
            assert ahead.store.read(name).patches.shape == Store(tmp_path / "store").read(name).patches.shape


def test_headers_that_are_read_before_the_work_are_told(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    most = estimate.most_bytes(7, _form(load_config(model), None, None, None), "int4")
    for free, told in ((most, False), (most - 1, True)):
        disk(monkeypatch, free)
        seen: list[EmbedProgress] = []
        embed_data(model, photos, tmp_path / f"{free}", progress=seen.append)
        headers = [(p.done, p.total) for p in seen if p.before.startswith("reading headers")]
        assert headers == [(7, 7)] * told and seen[-1].before == ""


def test_of_a_table_a_sample_is_looked_at(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its headers lie between its pictures: all of it would be read."""
    read = []

    def content(self: TableCell) -> bytes:
        read.append(self.row)
        return small if self.row % 2 else large

    small, large = saved((64, 64)), saved((640, 480))
    monkeypatch.setattr(TableCell, "read", content)
    form, where = Form(SO400M, TilingConfig("uhd", 6)), tmp_path / "store"
    pictures: dict[str, Any] = {f"{n}": TableCell(tmp_path / "t.parquet", "image", n, 0) for n in range(5000)}
    needed = estimate.volume({(64, 64): 2500, (640, 480): 2500}, form).bytes
    disk(monkeypatch, needed["int4"])
    estimate.require_room(pictures, ImageConfig(), form, "int4", where)
    assert len(read) == 512 and read[-1] > 4700
    with pytest.raises(StoreError, match=rf"need {errors.size(needed['int8'])} for 5,000 pictures, .*int4"):
        estimate.require_room(pictures, ImageConfig(), form, "int8", where)
    few = dict([*pictures.items()][:40])
    disk(monkeypatch, estimate.volume({(64, 64): 20, (640, 480): 20}, form).bytes["int4"])
    estimate.require_room(few, ImageConfig(), form, "int4", where)


def test_a_disk_that_is_too_small_is_refused(
    model: Path, photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    needed = estimate_data(model, photos, tmp_path / "store").volume.bytes
    disk(monkeypatch, needed["float16"])
    embed_data(model, photos, tmp_path / "exactly", codec="float16")
    disk(monkeypatch, needed["float16"] - 1)
    with pytest.raises(StoreError, match=r"would need .* for 6 pictures, its disk has .* free; --codec int8 would fit"):
        embed_data(model, photos, tmp_path / "store", codec="float16")
    embed_data(model, photos, tmp_path / "smaller", codec="int8")
    disk(monkeypatch, needed["int4"] - 1)
    with pytest.raises(StoreError, match=r"; --max-slices \d would fit \(--no-check-disk starts all the same\)\.$"):
        embed_data(model, photos, tmp_path / "store", codec="float16")
    said = estimate_data(model, photos, tmp_path / "store", codec="float16")
    assert said.advice.startswith("--max-slices") and said.to_dict()["fits"] == dict.fromkeys(CODECS, False)
    disk(monkeypatch, 10)
    with pytest.raises(StoreError, match="; no codec or cap on slices would fit: free some space"):
        embed_data(model, photos, tmp_path / "store", codec="float16")
    assert embed_data(model, photos, tmp_path / "store", codec="float16", check_disk=False).summary.new == 6
    # What is there already needs no room.
    assert embed_data(model, photos, tmp_path / "store", codec="float16").summary.reused == 6


def test_ranks_share_the_disk(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "a.jpg").write_bytes(saved((64, 64)))
    pictures = {"a.jpg": tmp_path / "a.jpg"}
    form = Form(SO400M, TilingConfig("squash"))
    disk(monkeypatch, 2_000_000)
    estimate.require_room(pictures, ImageConfig(), form, "float16", tmp_path / "store")
    with pytest.raises(StoreError, match="--codec int8 would fit"):
        estimate.require_room(pictures, ImageConfig(), form, "float16", tmp_path / "store", ranks=2)


class _Encoder:
    """Counts what it is asked for."""

    def __init__(self) -> None:
        self.batches: list[int] = []

    def prepare(self, source: Any) -> Any:
        if source.read() == b"bad":
            raise ImageError("bad")
        return SimpleNamespace(grids=((2, 2), (1, 2))), [np.zeros((4, 3)), np.zeros((2, 3))]

    def encode(self, slices: list[Any], batch_size: int) -> list[Any]:
        self.batches.append(len(slices))
        return [np.zeros((len(patches), 8)) for _, patches in slices]


def test_the_measurement_warms_up_and_passes_over_what_is_broken(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"badgood")
    bad, good = FilePart(tmp_path / "f", 0, 3, "bad"), FilePart(tmp_path / "f", 3, 4, "good")
    encoder: Any = _Encoder()
    speed = estimate.measure([bad, *[good] * 20, FilePart(tmp_path / "f", 5, 9, "short")], encoder, 4)
    assert encoder.batches == [4, 12] and speed.slices == 12 and speed.prepare_seconds > 0
    encoder = _Encoder()
    assert estimate.measure([good], encoder, 8).slices == 2 and encoder.batches == [2, 2]
    assert estimate.measure([bad], encoder, 8) == estimate.Speed()
    slow: Any = lambda encoded: time.sleep(0.001)  # noqa: E731
    speed = estimate.measure([good], encoder, 8, post=slow)
    assert speed.slice_seconds > 0.001 and speed.encode_seconds == pytest.approx(speed.slice_seconds / 3)
    encoder = _Encoder()
    assert estimate.measure([good] * 9, encoder, 2, limit_seconds=0.0).slices == 2 and encoder.batches == [2]


def test_the_models_own_pooling_and_projector_count(model: Path) -> None:
    config = load_config(model)
    form = Form(config.vision_config, config.tiling, projector=config.projector_config)
    assert form.width == config.hidden_size
