"""Filling a store: every picture once, the unreadable ones listed, the encoder kept busy."""

from __future__ import annotations

import os
import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_llama3v.config import Encoded, Grid, ImageConfig, SliceLayout, TilingConfig, VisionConfig
from mlx_llama3v.data.sources import FilePart
from mlx_llama3v.embeddings.codec import CODECS, fidelity, get_codec
from mlx_llama3v.embeddings.embed import EmbedProgress, EmbedSummary, embed_images
from mlx_llama3v.embeddings.form import Made
from mlx_llama3v.embeddings.ranks import Ranks
from mlx_llama3v.embeddings.sample import evenly
from mlx_llama3v.embeddings.store import Coded, Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import ImageError, StoreError
from mlx_llama3v.platform import device_name
from mlx_llama3v.source import Loaded
from mlx_llama3v.vision.encode import Encoder, Form
from mlx_llama3v.vision.pool import Pool
from mlx_llama3v.vision.siglip import VisionTower

WIDTH, CHANNELS = 4, 3
SHARD_BYTES = 4000  # 83 pictures of one slice
LAYOUTS = (SliceLayout((2, 3)), SliceLayout((3, 2), 1, 2, (2, 2)), SliceLayout((2, 2), 2, 2, (1, 3)))


class FakeEncoder:
    """A picture is a file with a number in it; embeddings follow from the number and the place alone."""

    def __init__(self) -> None:
        self.prepared: list[str] = []
        self.calls: list[int] = []
        self.numbers: list[float] = []
        self.rows = 0
        self.lock = threading.Lock()

    def prepare(self, source: Loaded) -> tuple[SliceLayout, list[np.ndarray]]:
        assert threading.current_thread() is not threading.main_thread()
        with self.lock:
            self.prepared.append(Path(source.name).name)
        text = source.content.decode()
        if not text.isdecimal():
            raise ImageError(f"{source} cannot be read as a picture: it says {text!r}.")
        return self.split(int(text))

    @staticmethod
    def split(number: int) -> tuple[SliceLayout, list[np.ndarray]]:
        layout = LAYOUTS[number % 3]
        slices = [np.full((h * w, CHANNELS), number + i / 8, np.float32) for i, (h, w) in enumerate(layout.grids)]
        return layout, slices

    def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
        assert threading.current_thread() is threading.main_thread()
        assert all(len(patches) == h * w for (h, w), patches in slices)
        self.calls.append(len(slices))
        self.rows += 2 * sum(len(patches) for _, patches in slices)  # a half of it padding
        self.numbers += [float(patches[0, 0]) for _, patches in slices]
        return [self.made(grid, patches) for grid, patches in slices]

    def encode_as(
        self, form: Form, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8
    ) -> list[dict[str, np.ndarray]]:
        made = [form(mx.array(rows[None])) for rows in self.encode(slices, batch_size)]
        return [{name: np.array(part[0]) for name, part in one.items()} for one in made]

    @staticmethod
    def made(grid: Grid, patches: np.ndarray) -> np.ndarray:
        places = np.arange(grid[0] * grid[1], dtype=np.float32)[:, None]
        return patches[:, :1] + np.concatenate([places] * WIDTH, 1) / 32 + np.float32(grid[1] / 4)

    def fingerprint(self) -> dict[str, Any]:
        return {"weights": "fake"}

    def fresh(self, number: int) -> Encoded:
        layout, slices = self.split(number)
        return Encoded(layout, np.concatenate([self.made(g, p) for g, p in zip(layout.grids, slices, strict=True)]))


def write(folder: Path, texts: dict[str, str]) -> list[tuple[str, Path]]:
    for name, text in texts.items():
        (folder / name).write_text(text)
    return [(name, folder / name) for name in texts]


def run(store: Path, images: Sequence[tuple[str, str | Path]], encoder: FakeEncoder, **keys: Any) -> EmbedSummary:
    with StoreWriter(store, encoder.fingerprint(), shard_bytes=keys.pop("shard_bytes", SHARD_BYTES)) as writer:
        return embed_images(images, encoder, writer, **{"batch_size": 2, **keys})


def check(store: Path, numbers: dict[str, int]) -> None:
    found = Store(store)
    assert set(found.names) == set(numbers)
    for name, number in numbers.items():
        layout, patches = found.read(name)
        assert layout == FakeEncoder.split(number)[0]
        np.testing.assert_array_equal(patches, FakeEncoder().fresh(number).patches)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "pictures").mkdir()
    return tmp_path / "pictures"


@pytest.mark.parametrize("workers", [1, 3])
def test_every_picture_is_stored_in_order(tmp_path: Path, folder: Path, workers: int) -> None:
    numbers = {f"{n}.png": n for n in range(30)}
    encoder = FakeEncoder()
    summary = run(tmp_path / "s", write(folder, {k: str(n) for k, n in numbers.items()}), encoder, workers=workers)
    check(tmp_path / "s", numbers)
    assert Store(tmp_path / "s").names == tuple(numbers)
    layouts = [FakeEncoder.split(n)[0] for n in range(30)]
    assert (summary.new, summary.failed, summary.reused, summary.duplicates) == (30, 0, 0, 0)
    assert summary.slices == sum(len(layout.grids) for layout in layouts) == sum(encoder.calls)
    assert summary.patches == sum(layout.patches for layout in layouts) == Store(tmp_path / "s").info()["tokens"]
    assert summary.rows == 2 * summary.patches
    assert summary.bytes == summary.patches * WIDTH * 2
    assert summary.seconds >= summary.waiting_seconds > 0


def test_slices_of_several_pictures_are_encoded_together(tmp_path: Path, folder: Path) -> None:
    encoder = FakeEncoder()
    run(tmp_path / "s", write(folder, {f"{n}.png": str(3 * n) for n in range(20)}), encoder, batch_size=2)
    assert encoder.calls == [1, 8, 8, 3]  # one picture to know its size, then windows of four batches


def test_stored_names_cost_nothing(tmp_path: Path, folder: Path) -> None:
    images = write(folder, {f"{n}.png": str(n) for n in range(6)})
    run(tmp_path / "s", images[:4], FakeEncoder())
    encoder = FakeEncoder()
    summary = run(tmp_path / "s", images, encoder)
    assert (summary.reused, summary.new) == (4, 2) and sorted(encoder.prepared) == ["4.png", "5.png"]
    encoder = FakeEncoder()
    summary = run(tmp_path / "s", images, encoder)
    assert (summary.reused, summary.new, summary.slices) == (6, 0, 0) and not encoder.prepared + encoder.calls


def test_names_that_stand_for_other_pictures_are_refused(tmp_path: Path, folder: Path) -> None:
    """As of two data sets that are both train-00000-of-00001.parquet; what is gone since is no such sign."""
    run(tmp_path / "s", write(folder, {f"{n}": str(n) for n in range(40)}), FakeEncoder())
    (tmp_path / "other").mkdir()
    others = write(tmp_path / "other", {f"{n}": str(n if n % 2 else n + 100) for n in range(40)})
    for rank in (False, True):
        with pytest.raises(
            StoreError, match=r"s holds another picture under the name '\d+' than .*other/\d+ is: .*prune"
        ):
            if rank:
                ranks = Ranks(tmp_path / "s")
                ranks.size = 2
                ranks.share(dict(others))
            else:
                run(tmp_path / "s", others, FakeEncoder())
    (folder / "9").unlink()
    summary = run(
        tmp_path / "s", [*write(folder, {"new": "77"}), *[(f"{n}", folder / f"{n}") for n in range(40)]], FakeEncoder()
    )
    assert (summary.new, summary.reused) == (1, 40)


def test_equal_bytes_are_encoded_once(tmp_path: Path, folder: Path) -> None:
    texts = {
        "a": "1",
        "b": "1",
        "c": "2",
        "d": "1",
        **{f"{n}": str(n) for n in range(10, 20)},
        "e": "2",
        "f": "1",
    }
    encoder = FakeEncoder()
    summary = run(tmp_path / "s", write(folder, texts), encoder)
    assert summary.new == 12 and summary.duplicates == 4
    assert len(encoder.numbers) == len(set(encoder.numbers))
    check(tmp_path / "s", {name: int(text) for name, text in texts.items()})
    encoder = FakeEncoder()
    summary = run(tmp_path / "s", write(folder, {"g": "2", "h": "17"}), encoder)  # also in a later run
    assert summary.duplicates == 2 and not encoder.prepared + encoder.calls
    check(tmp_path / "s", {**{name: int(text) for name, text in texts.items()}, "g": 2, "h": 17})


def test_unreadable_pictures_are_listed_and_tried_again(tmp_path: Path, folder: Path) -> None:
    images: list[tuple[str, Path]] = [*write(folder, {"a": "1", "bad": "not a number", "b": "4", "bad2": ""})]
    images += [("gone", folder / "gone"), ("nul", folder / "x\0y"), ("folder", folder)]
    encoder = FakeEncoder()
    summary = run(tmp_path / "s", images, encoder)
    assert (summary.new, summary.failed) == (2, 5)
    check(tmp_path / "s", {"a": 1, "b": 4})
    failures = Store(tmp_path / "s").failures
    assert set(failures) == {"bad", "bad2", "gone", "nul", "folder"}
    assert failures["bad"] == f"{folder / 'bad'} cannot be read as a picture: it says 'not a number'."
    assert failures["gone"] == f"{folder / 'gone'} does not exist."
    assert "null byte" in failures["nul"] and "Is a directory" in failures["folder"]

    (folder / "bad").write_text("7")
    (folder / "gone").write_text("1")
    summary = run(tmp_path / "s", images, FakeEncoder())
    assert (summary.new, summary.duplicates, summary.reused, summary.failed) == (1, 1, 2, 3)
    check(tmp_path / "s", {"a": 1, "b": 4, "bad": 7, "gone": 1})
    assert set(Store(tmp_path / "s").failures) == {"bad2", "nul", "folder"}


def test_a_picture_that_takes_too_much_memory_is_listed(tmp_path: Path, folder: Path) -> None:
    class Small(FakeEncoder):
        def prepare(self, source: Loaded) -> tuple[SliceLayout, list[np.ndarray]]:
            if source.content == b"2":
                raise MemoryError
            return super().prepare(source)

    images = write(folder, {"a": "1", "large": "2", "b": "4"})
    with open(folder / "huge", "wb") as file:
        file.truncate(3 << 30)  # a hole: takes no room
    os.mkfifo(folder / "pipe")  # would be waited for
    images += [("huge", folder / "huge"), ("pipe", folder / "pipe")]
    images += [("part", FilePart(folder / "huge", 5, 2 << 30, "p"))]
    assert run(tmp_path / "s", images, Small()).failed == 4
    failures = Store(tmp_path / "s").failures
    assert failures["large"] == f"{folder / 'large'} takes more memory than there is."
    assert failures["huge"].endswith("cannot be read: it has 3.2 GB, more than the 1.0 GB that a picture may have.")
    assert failures["pipe"].endswith("pipe cannot be read: it is no file.") and "it has 2.1 GB" in failures["part"]
    check(tmp_path / "s", {"a": 1, "b": 4})


def test_threads_prepare_while_the_encoder_works(tmp_path: Path, folder: Path) -> None:
    class Waiting(FakeEncoder):
        """Its second encode, of the first whole window, ends only when a picture of the next has been prepared."""

        def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
            before = sum(self.calls) + len(slices)
            for _ in range(500):
                if len(self.calls) != 1 or len(self.prepared) > before:
                    return super().encode(slices, batch_size)
                threading.Event().wait(0.01)
            raise AssertionError("nothing was prepared meanwhile")

    encoder = Waiting()
    run(tmp_path / "s", write(folder, {f"{n}": str(3 * n) for n in range(24)}), encoder, workers=1)
    assert encoder.calls == [1, 8, 8, 7]


def test_writing_goes_on_while_the_encoder_works(tmp_path: Path, folder: Path) -> None:
    """The first window is written only when the encoder has begun with the second."""
    second = threading.Event()

    class Telling(FakeEncoder):
        def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
            if self.calls:
                second.set()
            return super().encode(slices, batch_size)

    class Waiting(StoreWriter):
        def put(self, name: str, sha: str, made: Made) -> int:
            assert second.wait(5)
            return super().put(name, sha, made)

    numbers = {f"{n}": 3 * n for n in range(20)}
    images = write(folder, {name: str(number) for name, number in numbers.items()})
    with Waiting(tmp_path / "s", {"weights": "fake"}, shard_bytes=300) as writer:
        assert embed_images(images, Telling(), writer, batch_size=2).new == 20
    check(tmp_path / "s", numbers)


@pytest.mark.parametrize("shard_bytes", [1, 300, 1000, 4000])
@pytest.mark.parametrize("post", [None, Pool(2)])
def test_a_kill_costs_a_shard_at_most(tmp_path: Path, folder: Path, shard_bytes: int, post: Pool | None) -> None:
    """Whenever the encoder begins: what it was given so far and is on no disk fits into a shard, or is one picture."""
    given, unsafe = 0, []

    class Asking(FakeEncoder):
        def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
            nonlocal given
            given += sum(stored(SliceLayout(grid)) for grid, _ in slices)
            unsafe.append(given - sum(shard.index.starts[-1] * row for shard in Store(tmp_path / "s").shards))
            return super().encode(slices, batch_size)

    class Slow(StoreWriter):
        def put(self, name: str, sha: str, made: Made) -> int:
            threading.Event().wait(0.001)
            return super().put(name, sha, made)

    def stored(layout: SliceLayout) -> int:
        return row * (layout if post is None else post.layout(layout)).patches

    row = get_codec("float16").row_bytes(WIDTH)
    images = write(folder, {f"{n}": str(n) for n in range(150)})
    with Slow(tmp_path / "s", {"weights": "fake"}, shard_bytes=shard_bytes, post=post) as writer:
        assert embed_images(images, Asking(), writer, batch_size=2).new == 150
    largest = max(map(stored, LAYOUTS))
    assert max(unsafe) <= max(shard_bytes, largest)
    sizes = [shard.index.starts[-1] * row for shard in Store(tmp_path / "s").shards]
    # Room is kept for two windows, of an eighth or one picture.
    assert min(sizes[:-1]) > 3 / 4 * shard_bytes - 2 * largest and max(sizes) <= max(shard_bytes, largest)


def test_the_encoder_does_not_wait_for_a_shard_to_be_written(tmp_path: Path, folder: Path) -> None:
    """A shard is written only when the encoder has begun with what comes after it."""
    encoder, put, shards = FakeEncoder(), 0, 0

    class Waiting(StoreWriter):
        def put(self, name: str, sha: str, made: Made) -> int:
            nonlocal put
            put += 1
            return super().put(name, sha, made)

        def flush(self) -> None:
            nonlocal shards
            shards += self.pending_bytes > 0
            for _ in range(500):
                if put == 300 or sum(encoder.calls) > put or not put:
                    return super().flush()
                threading.Event().wait(0.01)
            raise AssertionError("nothing was encoded meanwhile")

    images = write(folder, {f"{n}": str(3 * n) for n in range(300)})
    with Waiting(tmp_path / "s", {"weights": "fake"}, shard_bytes=SHARD_BYTES) as writer:
        embed_images(images, encoder, writer, batch_size=2)
    assert len(Store(tmp_path / "s").shards) == shards > 3


def test_a_copy_of_what_is_being_written_is_found(tmp_path: Path, folder: Path) -> None:
    texts = {f"{n}": str(3 * n) for n in range(8)} | {f"copy{n}": str(3 * n) for n in range(8)} | {"last": "30"}
    encoder = FakeEncoder()
    summary = run(tmp_path / "s", write(folder, texts), encoder)
    assert (summary.new, summary.duplicates) == (9, 8) and sum(encoder.calls) == 9
    check(tmp_path / "s", {name: int(text) for name, text in texts.items()})


def test_an_error_of_the_writer_ends_the_run(tmp_path: Path, folder: Path) -> None:
    """It comes while the next window is encoded, and no third one is."""
    store = tmp_path / "s"

    class Removing(FakeEncoder):
        def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
            if not self.calls:
                store.rename(tmp_path / "elsewhere")
            return super().encode(slices, batch_size)

    encoder = Removing()
    with pytest.raises(StoreError, match="cannot be written"):
        run(store, write(folder, {f"{n}": str(3 * n) for n in range(60)}), encoder, shard_bytes=1)
    assert 1 <= len(encoder.calls) <= 2
    assert not [thread for thread in threading.enumerate() if thread.name.startswith(("write", "prepare"))]


def test_the_look_ahead_is_bounded(tmp_path: Path, folder: Path) -> None:
    most = 0

    class Counting(FakeEncoder):
        def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
            nonlocal most
            threading.Event().wait(0.005)  # threads run ahead as far as they may
            most = max(most, len(self.prepared) - len(set(map(int, self.numbers))))
            return super().encode(slices, batch_size)

    run(tmp_path / "s", write(folder, {f"{n}": str(3 * n) for n in range(200)}), Counting(), workers=2)
    assert 8 < most <= 8 + 8 + 2  # the window that is encoded, the next one, one a thread


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


def test_progress_is_told(tmp_path: Path, folder: Path) -> None:
    images = write(folder, {**{f"{n}": str(n) for n in range(9)}, "bad": "x", "copy": "3"})
    run(tmp_path / "s", images[:2], FakeEncoder())
    told: list[EmbedProgress] = []
    summary = run(tmp_path / "s", images, FakeEncoder(), progress=told.append)
    assert [p.done for p in told] == sorted(p.done for p in told) and told[0].done >= 2
    assert not any(p.before for p in told)
    last = told[-1]
    assert (last.done, last.total) == (11, 11)
    assert (last.slices, last.bytes, last.waiting_seconds) == (
        summary.slices,
        summary.bytes,
        summary.waiting_seconds,
    )
    told.clear()
    with StoreWriter(tmp_path / "fitted", {"weights": "fake"}, "int8") as writer:
        embed_images(images, FakeEncoder(), writer, progress=told.append)
    assert [bool(p.before) for p in told] == [True, *[False] * (len(told) - 1)] and told[0].done == told[0].slices == 0


def test_an_interrupted_run_goes_on(tmp_path: Path, folder: Path) -> None:
    class Stopping(FakeEncoder):
        def encode(self, slices: Sequence[tuple[Grid, np.ndarray]], batch_size: int = 8) -> list[np.ndarray]:
            if len(self.calls) == 2:
                raise KeyboardInterrupt
            return super().encode(slices, batch_size)

    numbers = {f"{n}": n for n in range(40)}
    images = write(folder, {name: str(n) for name, n in numbers.items()})
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", images, Stopping())
    kept = len(Store(tmp_path / "s"))
    assert 0 < kept < 40
    encoder = FakeEncoder()
    assert run(tmp_path / "s", images, encoder).reused == kept
    check(tmp_path / "s", numbers)
    run(tmp_path / "whole", images, FakeEncoder())
    assert Store(tmp_path / "whole").names == Store(tmp_path / "s").names


class Stop:
    """Ctrl-C after so many names."""

    def __init__(self, at: int) -> None:
        self.at = at

    def __call__(self, progress: EmbedProgress) -> None:
        if progress.done == self.at:
            raise KeyboardInterrupt


def test_an_interrupted_run_keeps_names_that_need_no_encoder(tmp_path: Path, folder: Path) -> None:
    images = write(folder, {f"{n}": str(n) for n in range(20)})
    run(tmp_path / "s", images, FakeEncoder())
    renamed = [(f"new{name}", path) for name, path in images]
    mixed = [*renamed, *((f"gone{n}", folder / f"gone{n}") for n in range(10)), *write(folder, {"x": "99", "y": "100"})]
    with pytest.raises(KeyboardInterrupt):
        run(tmp_path / "s", mixed, FakeEncoder(), progress=Stop(30))
    store = Store(tmp_path / "s")
    assert set(store.names) == {name for name, _ in [*images, *renamed]} and len(store.failures) == 10


def test_names_that_need_no_encoder_do_not_wait_for_it(
    tmp_path: Path, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They reach the disk under way, and the batches of the others are the same."""
    monkeypatch.setattr("mlx_llama3v.embeddings.embed._NAMES", 8)
    monkeypatch.setattr("mlx_llama3v.embeddings.writer._MAX_ALIASES", 16)
    images = write(folder, {f"{n}": str(3 * n) for n in range(50)})
    run(tmp_path / "s", images[:25], FakeEncoder())
    kept: list[int] = []
    mixed = [pair for name, path in images for pair in ((f"copy{name}", path), (f"again{name}", path))]
    mixed[10:10] = [(f"gone{n}", folder / f"gone{n}") for n in range(20)]
    encoder = FakeEncoder()
    run(tmp_path / "s", mixed, encoder, progress=lambda progress: kept.append(len(Store(tmp_path / "s"))))
    assert encoder.calls == [1, 8, 8, 8]
    assert kept[69] >= 25 + 2 * 16 and kept[0] == 25  # so many names, 50 of them known, before the first is encoded
    assert set(Store(tmp_path / "s").names) == {name for name, _ in images[:25]} | {
        name for name, _ in mixed if "gone" not in name
    }


def test_a_bug_in_prepare_is_not_a_failed_picture(tmp_path: Path, folder: Path) -> None:
    class Buggy(FakeEncoder):
        def prepare(self, source: Loaded) -> tuple[SliceLayout, list[np.ndarray]]:
            raise ValueError("shapes do not match")

    with pytest.raises(ValueError, match="shapes do not match"):
        run(tmp_path / "s", write(folder, {"a": "1"}), Buggy())


def test_another_encoder_than_the_writer_was_opened_for(tmp_path: Path, folder: Path) -> None:
    with (
        StoreWriter(tmp_path / "s", {"weights": "other"}) as writer,
        pytest.raises(StoreError, match="weights is 'other' there and 'fake' here"),
    ):
        embed_images(write(folder, {"a": "1"}), FakeEncoder(), writer)


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


def test_nothing_to_do(tmp_path: Path) -> None:
    told: list[EmbedProgress] = []
    summary = run(tmp_path / "s", [], FakeEncoder(), progress=told.append)
    assert (summary.new, told[-1].total) == (0, 0) and len(Store(tmp_path / "s")) == 0


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
