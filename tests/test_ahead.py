"""Training from a store that is filled while it is read: the same embeddings, in a fraction of the disk."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from threading import Event
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from PIL import Image

from mlx_llama3v import ahead as ahead_module
from mlx_llama3v.ahead import CHANNELS, HELD, Ahead, AheadConfig, scan
from mlx_llama3v.cli.interrupt import interruptible
from mlx_llama3v.config import ImageConfig, TilingConfig, VisionConfig
from mlx_llama3v.data.dataset import read_data
from mlx_llama3v.demo.dataset import DataSet, draw
from mlx_llama3v.embeddings.codec import fidelity
from mlx_llama3v.embeddings.lock import LOCK, Lock
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import RunError, StoreError
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data
from mlx_llama3v.tensors import load_file
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.evaluate import hold_out
from mlx_llama3v.train.report import Callbacks, Start
from mlx_llama3v.train.trainer import TrainResult
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from tests.forked import start
from tests.tiny_run import undrawn

BUDGET = 400_000  # the whole store takes about 1.4 MB


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> DataSet:
    return draw(tmp_path_factory.mktemp("data"), 60, 9, 6)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("model") / "model").path


@pytest.fixture(scope="module")
def whole(model: Path, data: DataSet, tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("whole") / "store"
    embed_data(model, data.captions, path, image_folder=data.images, codec="float16")
    return Store(path)


def images(data: DataSet) -> dict[str, Path]:
    return {row["image"]: data.images / row["image"] for row in json.loads(data.captions.read_text())}


def turns(names: list[str], epochs: int, size: int = 4) -> list[tuple[int, list[str]]]:
    """Batches of a run: every epoch in another order."""
    found: list[list[str]] = []
    for epoch in range(epochs):
        shuffled = names.copy()
        random.Random(epoch).shuffle(shuffled)
        found += [shuffled[i : i + size] for i in range(0, len(shuffled), size)]
    return [*enumerate(found)]


def held(directory: Path) -> int:
    return sum(file.stat().st_size for file in directory.rglob("shard-*"))


def test_every_read_is_what_a_full_store_gives(model: Path, data: DataSet, whole: Store, tmp_path: Path) -> None:
    paths = images(data)
    run = turns([*paths], epochs=2)
    assert sum(shard.bytes for shard in whole.shards) > 3 * BUDGET
    with Ahead(tmp_path, AheadConfig(str(model), BUDGET, "float16"), paths) as ahead:
        store = ahead.store
        assert len(store) == 60 and store.width == whole.width and not store.failures
        assert all(store.layout(name) == whole.layout(name) for name in paths)
        store.expect(run)
        most = 0
        for turn, names in run:
            store.begin(turn)
            most = max(most, held(tmp_path))
            for name, coded in zip(names, store.read_batch(names), strict=True):
                assert coded.layout == whole.layout(name)
                np.testing.assert_allclose(store.read(name).patches, whole.read(name).patches, rtol=2e-3, atol=2e-3)
        assert 0 < most <= 1.5 * BUDGET
    assert not [*tmp_path.glob("rolling-*")]


def test_the_encoder_begins_before_all_reads_are_known(model: Path, data: DataSet, tmp_path: Path) -> None:
    """Of a long run it takes minutes to lay out all rows. An error on the way is told to who waits."""
    paths, more = images(data), Event()
    first, second, *_ = turns([*paths], epochs=1)

    def reads() -> Iterator[tuple[int, list[str]]]:
        yield first
        assert more.wait(60)
        yield second
        raise ValueError("no further")

    with Ahead(tmp_path, AheadConfig(str(model), BUDGET, "float16"), paths) as ahead:
        ahead.store.expect(reads())
        ahead.store.begin(0)
        assert not more.is_set() and [ahead.store.read(name) for name in first[1]]
        more.set()
        ahead.store.begin(1)
        with pytest.raises(StoreError, match=r"what is to be read next cannot be written to .*: no further"):
            ahead.store.begin(2)


def test_a_resumed_run_reads_from_its_own_turn(model: Path, data: DataSet, whole: Store, tmp_path: Path) -> None:
    paths = images(data)
    run = turns([*paths], epochs=1)
    with Ahead(tmp_path, AheadConfig(str(model), BUDGET, codec="int8"), paths) as ahead:
        ahead.store.expect(run)
        ahead.store.begin(3)
    with Ahead(tmp_path, AheadConfig(str(model), BUDGET, codec="int8"), paths, resume=True) as ahead:
        ahead.store.expect(run[7:])
        for turn, names in run[7:]:
            ahead.store.begin(turn)
            for name in names:
                error = fidelity(whole.read(name).patches, ahead.store.read(name).patches)
                assert error["relative_error"] < 0.01


def test_held_out_pictures_are_there_at_any_time(model: Path, data: DataSet, whole: Store, tmp_path: Path) -> None:
    paths = images(data)
    always = [*paths][:5]
    with Ahead(tmp_path / "a", AheadConfig(str(model), BUDGET, "float16"), paths) as ahead:
        assert not ahead.store.hold(always)
        for name in always:
            np.testing.assert_allclose(ahead.store.read(name).patches, whole.read(name).patches, rtol=2e-3, atol=2e-3)
    Ahead(tmp_path / "b", AheadConfig(str(model), BUDGET, "int8"), paths).store.hold(always)
    for name, part in load_file(tmp_path / "b" / CHANNELS).items():  # the codec is fitted once, to all of the data
        np.testing.assert_array_equal(Store(tmp_path / "b" / HELD).shards[0].channels[name], np.array(part))


def test_unreadable_pictures_are_told(model: Path, data: DataSet, tmp_path: Path) -> None:
    paths = images(data)
    names = [*paths]
    (tmp_path / "no.png").write_bytes(b"no picture")
    half = tmp_path / "half.png"
    half.write_bytes(paths[names[1]].read_bytes()[:-300])  # a good header, a bad end
    paths |= {"no.png": tmp_path / "no.png", "half.png": half}
    with Ahead(tmp_path / "ahead", AheadConfig(str(model), BUDGET, "float16"), paths) as ahead:
        store = ahead.store
        assert [*store.failures] == ["no.png"] and "no.png" not in store and "half.png" in store
        store.expect([(0, [names[0], "half.png"]), (1, [names[2]])])
        assert [*store.begin(0, [names[0], "half.png"])] == ["half.png"] and store.read(names[0]).patches.any()
        with pytest.raises(StoreError, match=r"no embedding of 'half\.png' in turn 0"):
            store.read("half.png")
        assert not store.begin(1, [names[2]])
        assert store.read(names[2]).patches.any()


def test_a_second_start_leaves_a_live_run_alone(model: Path, data: DataSet, tmp_path: Path) -> None:
    paths = images(data)
    live, dead = tmp_path / f"rolling-{os.getppid()}", tmp_path / "rolling-999999999"
    for folder in (live, dead):
        folder.mkdir(parents=True)
    with Ahead(tmp_path, AheadConfig(str(model), BUDGET, "float16"), paths) as ahead:
        ahead.store.expect([(0, [*paths][:2])])
        assert live.is_dir() and not dead.exists()
    assert [*tmp_path.glob("rolling-*")] == [live]


def test_a_wrong_folder_is_named_and_leaves_nothing_to_a_second_try(model: Path, data: DataSet, tmp_path: Path) -> None:
    paths = images(data)
    config = AheadConfig(str(model), BUDGET, "int4")
    with pytest.raises(StoreError, match=r"not one of 60 pictures can be read, the first: .*; --image-folder"):
        Ahead(tmp_path / "ahead", config, {name: tmp_path / path.name for name, path in paths.items()})
    assert not (tmp_path / "ahead").exists()
    some = dict([*paths.items()][:1])
    for resume, same in ((False, False), (True, True)):
        Ahead(tmp_path / "ahead", config, some)._fit()
        before = (tmp_path / "ahead" / CHANNELS).read_bytes()
        Ahead(tmp_path / "ahead", config, paths, resume=resume)._fit()
        assert ((tmp_path / "ahead" / CHANNELS).read_bytes() == before) == same


def test_an_encoder_that_dies_is_an_error_not_a_hang(model: Path, data: DataSet, tmp_path: Path) -> None:
    paths = images(data)
    with Ahead(tmp_path, AheadConfig(str(model), BUDGET, "float16"), paths) as ahead:
        ahead.store.expect(turns([*paths], epochs=50))
        ahead.store.begin(2)
        assert ahead._process is not None
        ahead._process.kill()
        with pytest.raises(StoreError, match=r"the encoder of .* has ended"):
            for turn in range(3, 700):
                ahead.store.begin(turn)


def test_who_waits_for_the_encoder_is_let_go(model: Path, data: DataSet, tmp_path: Path) -> None:
    """Else a run that ends, or is told to, would wait for one more batch."""
    with Ahead(tmp_path, AheadConfig(str(model), BUDGET, "float16"), images(data)) as ahead:
        ahead.store.expect([(0, [*images(data)][:2])])
        with ThreadPoolExecutor(1) as pool:
            waiting = pool.submit(ahead.store.begin, 1)  # never comes
            ahead.store.leave()
            with pytest.raises(StoreError, match="is read no more"):
                waiting.result(10)
        ahead.store.expect([(0, [*images(data)][:2])])
        ahead.store.begin(0)


def test_the_encoder_ends_with_its_parent(model: Path, data: DataSet, tmp_path: Path) -> None:
    paths = images(data)
    ahead = Ahead(tmp_path, AheadConfig(str(model), BUDGET, "float16"), paths)
    ahead.store.expect(turns([*paths], epochs=50))
    ahead.store.begin(0)
    process = ahead._process
    assert process is not None and process.poll() is None
    started = time.monotonic()
    ahead.close()
    assert process.poll() is not None and time.monotonic() - started < 10


def settings(**more: Any) -> TrainConfig:
    values = {"epochs": 2, "batch_size": 4, "val_split": 0.1, "save_every": 6, "compile": False}
    return TrainConfig("pretrain", steps_per_report=1, **{**values, **more})


def ahead(
    model: Path, data: DataSet, folder: Path, batch_size: int = 16, config: TrainConfig | None = None, **more: Any
) -> TrainResult:
    """A run whose pictures are embedded while it trains."""
    how = AheadConfig(str(model), BUDGET, "float16", batch_size=batch_size)
    places = model, data.captions, folder / "ahead", folder / "run"
    with undrawn():
        return train_stage(*places, config or settings(), ahead=how, image_folder=data.images, **more)


def test_a_run_is_that_of_a_full_store(model: Path, data: DataSet, whole: Store, tmp_path: Path) -> None:
    """Also when it was killed on the way and went on."""
    with undrawn():
        full = train_stage(model, data.captions, whole.path, tmp_path / "full", settings())
    assert full.last is not None and full.evaluation is not None and full.steps > 20
    process = start(ahead, model, data, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not (metrics.exists() and len(metrics.read_text().splitlines()) >= 9):
        time.sleep(0.01)
    process.kill()
    process.join(60)
    seen: list[Start] = []
    ours = ahead(model, data, tmp_path, resume=True, callbacks=Callbacks(started=seen.append))
    assert process.exitcode == -signal.SIGKILL and 0 < seen[0].done < full.steps
    assert ours.last is not None and ours.evaluation is not None and ours.steps == full.steps
    assert ours.last.loss == pytest.approx(full.last.loss, rel=1e-3)
    assert ours.evaluation.eval_loss == pytest.approx(full.evaluation.eval_loss, rel=1e-3)
    mine, theirs = (load_file(tmp_path / name / "projector.safetensors") for name in ("run", "full"))
    for name, value in theirs.items():
        np.testing.assert_allclose(np.array(mine[name]), np.array(value), rtol=1e-2, atol=2e-3)


def test_who_does_not_train_writes_nothing(model: Path, data: DataSet, tmp_path: Path) -> None:
    """Neither a dry run nor a start that is refused; nor is a run that begins kept from it by what an old one left."""
    assert ahead(model, data, tmp_path, dry_run=True).steps > 0 and not [*tmp_path.iterdir()]
    paths = images(data)
    Ahead(tmp_path / "ahead", AheadConfig(str(model), BUDGET, "int8"), paths).store.hold([*paths][:2])
    old = {file: file.read_bytes() for file in (tmp_path / "ahead").rglob("*.*")}
    lock = Lock(tmp_path / "run")
    with pytest.raises(StoreError, match="is being written by process"):
        ahead(model, data, tmp_path)
    lock.release()
    (tmp_path / "run" / "metrics.jsonl").write_text("{}")
    with pytest.raises(RunError, match="holds a run already"):
        ahead(model, data, tmp_path)
    assert old == {file: file.read_bytes() for file in (tmp_path / "ahead").rglob("*.*")}
    (tmp_path / "run" / "metrics.jsonl").unlink()
    assert ahead(model, data, tmp_path, config=settings(iters=1)).evaluation is not None
    assert Store(tmp_path / "ahead" / HELD).codec.name == "float16"


def test_rows_are_those_of_a_full_store(model: Path, data: DataSet, tmp_path: Path) -> None:
    """However many held-out ones cannot be used: too long, or with a picture that cannot be decoded. So with training
    rows, which are in one batch here."""
    folder = tmp_path / "images"
    config = settings(iters=1, batch_size=60, val_split=0.3, val_rows=2, max_seq_length=200)
    shutil.copytree(data.images, folder)
    values = json.loads(data.captions.read_text())
    held_out = {record.id for record in hold_out(read_data(data.captions).records, 0.3)[1]}
    *long, bad = [value for value in values if value["id"] in held_out][:9]
    for value in long:
        value["conversations"][-1]["value"] *= 20
    late = next(value for value in values if value["id"] not in held_out)
    for image in (bad["image"], late["image"]):
        (folder / image).write_bytes((folder / image).read_bytes()[:-300])  # with a good header
    (tmp_path / "captions.json").write_text(json.dumps(values))
    mine = replace(data, captions=tmp_path / "captions.json", images=folder)
    embed_data(model, mine.captions, tmp_path / "store", image_folder=folder, codec="float16")
    with undrawn():
        full = train_stage(model, mine.captions, tmp_path / "store", tmp_path / "full", config)
    ours = ahead(model, mine, tmp_path, config=config)
    assert {problem.where for problem in ours.problems} == {f"record {value['id']}" for value in [*long, bad]}
    assert [problem.where for problem in ours.unseen] == [f"record {late['id']}"]
    assert {problem.where for problem in full.problems} == {p.where for p in (*ours.problems, *ours.unseen)}
    assert ours.last is not None and full.last is not None and ours.last.tokens == full.last.tokens
    assert ours.last.loss == pytest.approx(full.last.loss, rel=1e-3)
    assert ours.evaluation is not None and full.evaluation is not None
    for name, value in asdict(full.evaluation).items():
        assert value is None or getattr(ours.evaluation, name) == pytest.approx(value, rel=1e-3)


SLOW = """
import time
from mlx_llama3v.embeddings import embed
from mlx_llama3v.vision.encode import Encoder
made, embed._WINDOW = Encoder.encode_as, 1
Encoder.encode_as = lambda *given: (time.sleep(0.1), made(*given))[1]
"""


def waiting(model: Path, data: DataSet, folder: Path) -> None:
    """A run that waits for its encoder most of the time, in a session of its own as from a terminal."""
    os.setsid()
    ahead_module._CHILD = SLOW + ahead_module._CHILD
    with interruptible() as stop:
        stopped = ahead(model, data, folder, batch_size=1, callbacks=Callbacks(stop=stop)).stopped
    (folder / "stopped").write_text(str(stopped))


@pytest.mark.parametrize("how", [signal.SIGINT, signal.SIGKILL])
def test_a_run_that_waits_for_its_encoder_is_ended(
    model: Path, data: DataSet, tmp_path: Path, how: signal.Signals
) -> None:
    """By Ctrl-C, which a terminal sends to all: what was trained is saved. The encoder ends with any run."""
    process = start(waiting, model, data, tmp_path)
    metrics = tmp_path / "run" / "metrics.jsonl"
    while process.is_alive() and not (
        metrics.exists() and metrics.read_text() and [*tmp_path.glob("ahead/rolling-*/wanted.json")]
    ):
        time.sleep(0.005)
    (rolling,) = tmp_path.glob("ahead/rolling-*")
    assert process.pid is not None and (rolling / LOCK).read_text()
    (os.killpg if how == signal.SIGINT else os.kill)(process.pid, how)
    process.join(60)
    if how == signal.SIGINT:
        done = int((tmp_path / "stopped").read_text())
        assert process.exitcode == 0 and not rolling.exists()
        assert (tmp_path / "run" / "checkpoints" / f"step-{done:07}").exists()
    else:
        for _ in range(50):
            with suppress(StoreError):
                return Lock(rolling).release()
            time.sleep(0.1)
        raise AssertionError("the encoder lives on")


def test_headers_are_read_many_at_a_time(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A future for each of 600,000 pictures took a gigabyte."""
    submitted, submit = 0, ThreadPoolExecutor.submit

    def counting(self: ThreadPoolExecutor, *work: Any) -> Any:
        nonlocal submitted
        submitted += 1
        return submit(self, *work)

    monkeypatch.setattr(ThreadPoolExecutor, "submit", counting)
    Image.new("RGB", (20, 30)).save(tmp_path / "a.png")
    paths = {f"{n}": tmp_path / ("a.png" if n % 2 else "gone.png") for n in range(2000)}
    encoder: Any = SimpleNamespace(image=ImageConfig(), vision=VisionConfig(), tiling=TilingConfig())
    layouts, problems = scan(paths, encoder)
    assert len(layouts) == len(problems) == 1000 and 0 < submitted < 20 and "no such file" in problems["0"]


def test_a_budget_below_one_picture_is_refused(model: Path, data: DataSet, tmp_path: Path) -> None:
    with pytest.raises(StoreError, match=r"takes [0-9.]+ kB, but --store-budget is 1\.0 kB"):
        Ahead(tmp_path, AheadConfig(str(model), 1000), images(data))
