"""Filling a store: pictures are prepared and shards written while the encoder works, and little is at risk."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlx_llama3v.config import Grid, SliceLayout
from mlx_llama3v.embeddings.codec import get_codec
from mlx_llama3v.embeddings.embed import embed_images
from mlx_llama3v.embeddings.form import Made
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import StoreError
from mlx_llama3v.vision.pool import Pool
from tests.fake_encoder import LAYOUTS, SHARD_BYTES, WIDTH, FakeEncoder, check, run, write


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
