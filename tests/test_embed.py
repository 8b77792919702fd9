"""Filling a store: every picture once, the unreadable ones listed, and a run that goes on after it was stopped."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from mlx_llama3v.config import Grid, SliceLayout
from mlx_llama3v.data.sources import FilePart
from mlx_llama3v.embeddings.embed import EmbedProgress, embed_images
from mlx_llama3v.embeddings.ranks import Ranks
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import StoreError
from mlx_llama3v.source import Loaded
from tests.fake_encoder import WIDTH, FakeEncoder, check, run, write


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


def test_nothing_to_do(tmp_path: Path) -> None:
    told: list[EmbedProgress] = []
    summary = run(tmp_path / "s", [], FakeEncoder(), progress=told.append)
    assert (summary.new, told[-1].total) == (0, 0) and len(Store(tmp_path / "s")) == 0
