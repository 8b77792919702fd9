"""One entry to all data: which reader takes what, patterns, and embed and train agreeing on the names."""

from __future__ import annotations

import io
import json
import os
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from mlx_llama3v.data.dataset import expand, read_data
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import DataError, RunError
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data, picture_names
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from tests.test_webdataset import shard, talk


def encoded(colour: tuple[int, int, int], size: tuple[int, int] = (48, 40)) -> bytes:
    made = io.BytesIO()
    Image.new("RGB", size, colour).save(made, "PNG")
    return made.getvalue()


RED, BLUE = encoded((200, 10, 10)), encoded((10, 10, 200), (40, 60))


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY / "siglip", TINY / "llama", tmp_path_factory.mktemp("model") / "model").path


def train(model: Path, data: Path, store: Path, output: Path, **options: Any) -> Any:
    config = TrainConfig(
        stage="pretrain", iters=2, batch_size=2, learning_rate=1e-3, val_split=0.0, compile=False, save_every=0
    )
    return train_stage(model, data, store, output, config, **options)


def test_shards_are_embedded_and_trained_on(model: Path, tmp_path: Path) -> None:
    members = {
        "a.png": RED, "a.txt": "red", "b.png": BLUE, "b.json": talk("<image>\nWhich?", "blue", image="x.png"),
        "c.png": RED, "c.txt": "red again", "d.png": b"broken", "d.txt": "nothing",
    }  # fmt: skip
    data = shard(tmp_path / "s.tar", members)
    report = embed_data(model, data, tmp_path / "store")
    assert (report.summary.new, report.summary.duplicates, report.summary.failed) == (2, 1, 1)
    assert [problem.where for problem in report.problems] == ["s.tar/d.png"]
    assert set(Store(tmp_path / "store").names) == {f"s.tar/{name}.png" for name in "abc"}
    result = train(model, data, tmp_path / "store", tmp_path / "run")
    assert result.rows == 3 and [problem.where for problem in result.problems] == ["record d"]
    again = embed_data(model, tmp_path / "s*.tar", tmp_path / "store")
    assert (again.summary.new, again.summary.reused) == (0, 3)
    assert set(picture_names(data)) == set(Store(tmp_path / "store").names) | {"s.tar/d.png"}


def test_tables_are_embedded_and_trained_on(model: Path, tmp_path: Path) -> None:
    pytest.importorskip("pyarrow")
    from tests.test_hf import picture, pq, save, table
    from tests.test_hf import talk as messages

    values = table(
        [
            {"images": [picture(RED, "x.png")], "messages": messages("<image>", "red")},
            {"images": [picture(BLUE, "x.png"), picture(RED)], "messages": messages("<image><image>Which?", "both")},
        ]
    )
    pq.write_table(values, tmp_path / "t.parquet")
    for data in (tmp_path / "t.parquet", save(tmp_path / "saved", values)):
        store = tmp_path / f"store-{data.name}"
        report = embed_data(model, data, store)
        assert (report.summary.new, report.summary.duplicates, report.summary.failed) == (2, 1, 0)
        assert train(model, data, store, tmp_path / f"run-{data.name}").rows == 2


def test_refused_pictures_are_listed_and_never_stored(model: Path, tmp_path: Path) -> None:
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "in.png").write_bytes(RED)
    (tmp_path / "out.png").write_bytes(BLUE)
    os.symlink("../out.png", tmp_path / "images" / "link.png")
    names = ["in.png", "../out.png", "link.png", str(tmp_path / "out.png"), "https://x.org/a.png"]
    rows = [json.loads(talk("<image>", "x", image=name, id=name)) for name in names]
    data = tmp_path / "rows.json"
    data.write_text(json.dumps(rows))
    options: dict[str, Any] = {"image_folder": tmp_path / "images"}
    report = embed_data(model, data, tmp_path / "store", **options)
    store = Store(tmp_path / "store")
    assert set(store.names) == {"in.png"} and set(store.failures) == set(names[1:])
    assert report.summary.failed == 4 and all("it " in reason for reason in store.failures.values())
    assert "outside" in store.failures["link.png"] and "web address" in store.failures[names[4]]
    assert "\n" not in "".join(store.failures.values())
    problems = train(model, data, tmp_path / "store", tmp_path / "run").problems
    assert {problem.where for problem in problems} == {f"record {name}" for name in names[1:]}
    assert all("outside" in problem.reason for problem in problems[:3])
    allowed = embed_data(model, data, tmp_path / "store", allow_outside=True, **options)
    assert allowed.summary.failed == 1 and set(Store(tmp_path / "store").names) == set(names[:4])


def test_ahead_takes_files_alone(model: Path, tmp_path: Path) -> None:
    from mlx_llama3v.ahead import AheadConfig

    data = shard(tmp_path / "s.tar", {"a.png": RED, "a.txt": "red"})
    ahead = AheadConfig(str(model), budget=1 << 30)
    with pytest.raises(RunError, match=r"s\.tar holds its pictures itself .*run `llama3v-mlx embed`"):
        train(model, data, tmp_path / "store", tmp_path / "run", ahead=ahead)
    (tmp_path / "rows.json").write_text(f"[{talk('<image>', 'x', image='https://x.org/a.png')}]")
    with pytest.raises(RunError, match=r"rows\.json: 'https.*' cannot be embedded ahead: it is a web address"):
        train(model, tmp_path / "rows.json", tmp_path / "store", tmp_path / "run", ahead=ahead)


def test_pictures_alone_are_nothing_to_train_on(model: Path, tmp_path: Path) -> None:
    data = shard(tmp_path / "s.tar", {"a.png": RED})
    embed_data(model, data, tmp_path / "store")
    with pytest.raises(DataError, match=r"s\.tar has no record to train on"):
        train(model, data, tmp_path / "store", tmp_path / "run")


def test_a_folder_of_several_kinds_is_refused(tmp_path: Path) -> None:
    shard(tmp_path / "s.tar", {"a.png": RED})
    (tmp_path / "b.png").write_bytes(BLUE)
    with pytest.raises(DataError, match=r"holds \.tar files beside others; give a pattern"):
        read_data(tmp_path)
    assert read_data(tmp_path / "*.tar").names == ("s.tar/a.png",)
    with pytest.raises(DataError, match=r"matches .*b\.png; a pattern takes"):
        read_data(tmp_path / "*")
    with pytest.raises(DataError, match="matches no file"):
        read_data(tmp_path / "{1..3}.tar")


def test_a_name_with_brackets_that_exists_is_no_pattern(tmp_path: Path) -> None:
    shard(tmp_path / "a[1].tar", {"a.png": RED})
    assert read_data(tmp_path / "a[1].tar").names == ("a[1].tar/a.png",)
    (tmp_path / "p[0]").mkdir()
    (tmp_path / "p[0]" / "x.png").write_bytes(RED)
    assert read_data(tmp_path / "p[0]").names == ("x.png",)


@pytest.mark.parametrize(
    ("pattern", "names"),
    [
        ("s-{00..02}.tar", ["s-00.tar", "s-01.tar", "s-02.tar"]),
        ("s-{8..11}.tar", ["s-8.tar", "s-9.tar", "s-10.tar", "s-11.tar"]),
        ("{a,b}-{1..2}.tar", ["a-1.tar", "a-2.tar", "b-1.tar", "b-2.tar"]),
        ("s-{02..00}.tar", ["s-02.tar", "s-01.tar", "s-00.tar"]),
    ],
)
def test_braces(tmp_path: Path, pattern: str, names: list[str]) -> None:
    for name in names[1:]:
        (tmp_path / name).touch()
    found, missing = expand(str(tmp_path / pattern))
    assert [path.name for path in found] == names[1:] and [path.name for path in missing] == names[:1]


def test_a_pattern_for_too_many_files_is_refused() -> None:
    for pattern in ("s-{0..99999999999}.tar", "{0..9999}{0..9999}.tar"):
        with pytest.raises(DataError, match="more than 1000000 files"):
            expand(pattern)


@given(st.text("ab{},.0123456789*[]?-", max_size=24))
def test_no_pattern_breaks_it(pattern: str) -> None:
    try:
        expand(f"/nonexistent/{pattern}")
    except DataError as error:
        assert "more than" in str(error)
