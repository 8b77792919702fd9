"""Hugging Face data sets: parquet and save_to_disk, pictures as bytes and as names, damaged files."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from mlx_llama3v.data.dataset import DataSet, read_data
from mlx_llama3v.data.hf import TableCell
from mlx_llama3v.data.sources import Refused
from mlx_llama3v.errors import DataError
from mlx_llama3v.text.prompt import Message

pa = pytest.importorskip("pyarrow")
pq = pytest.importorskip("pyarrow.parquet")

PICTURE = pa.struct([("bytes", pa.binary()), ("path", pa.string())]) if hasattr(pa, "struct") else None


def picture(content: bytes | None, path: str | None = None) -> dict[str, Any]:
    return {"bytes": content, "path": path}


def talk(*turns: str) -> list[dict[str, str]]:
    return [{"role": ("user", "assistant")[i % 2], "content": turn} for i, turn in enumerate(turns)]


def table(rows: list[dict[str, Any]], picture_type: Any = None, column: str = "images") -> Any:
    kind = pa.list_(PICTURE) if picture_type is None else picture_type
    arrays = {key: [row.get(key) for row in rows] for key in dict.fromkeys(key for row in rows for key in row)}
    return pa.table({key: pa.array(v, kind) if key == column else pa.array(v) for key, v in arrays.items()})


def rows(count: int = 5) -> list[dict[str, Any]]:
    """Row n has n % 3 pictures."""
    return [
        {
            "images": [picture(f"{n}.{i}".encode(), "same-name.jpg") for i in range(n % 3)],
            "messages": talk("<image>" * (n % 3) + f"What is {n}?", f"It is {n}."),
        }
        for n in range(count)
    ]


def contents(data: DataSet) -> dict[str, bytes]:
    return {name: source.read() for name, source in data.pictures().items()}  # type: ignore[union-attr]


def save(folder: Path, made: Any, *, files: int = 1) -> Path:
    """What `datasets.save_to_disk` writes (checked against datasets 5.2)."""
    folder.mkdir(parents=True)
    step = -(-made.num_rows // files)
    names = [f"data-{n:05d}-of-{files:05d}.arrow" for n in range(files)]
    for n, name in enumerate(names):
        part = made.slice(n * step, step)
        with pa.OSFile(str(folder / name), "wb") as file, pa.ipc.new_stream(file, part.schema) as writer:
            writer.write_table(part, max_chunksize=2)
    (folder / "state.json").write_text(json.dumps({"_data_files": [{"filename": name} for name in names]}))
    (folder / "dataset_info.json").write_text("{}")
    return folder


def test_images_and_messages_in_parquet(tmp_path: Path) -> None:
    pq.write_table(table(rows(50)), tmp_path / "train.parquet", row_group_size=20)
    data = read_data(tmp_path / "train.parquet")
    assert not data.problems and len(data.records) == 50
    assert contents(data) == {f"train.parquet#{n}.{i}": f"{n}.{i}".encode() for n in range(50) for i in range(n % 3)}
    record = data.records[41]
    assert record.id == "train.parquet#41" and record.images == ("train.parquet#41.0", "train.parquet#41.1")
    assert record.messages == (Message("user", "What is 41?", (0, 1)), Message("assistant", "It is 41."))


def test_cells_are_read_in_any_order_and_in_other_processes(tmp_path: Path) -> None:
    pq.write_table(table(rows(50)), tmp_path / "train.parquet", row_group_size=20)
    sources = read_data(tmp_path / "train.parquet").pictures()
    for name in (*reversed(sources), *sources):
        cell = pickle.loads(pickle.dumps(sources[name]))
        assert cell.read() == name.split("#")[1].encode()
    assert str(cell) == f"{tmp_path}/train.parquet row 49 picture 0"
    with pytest.raises(OSError, match="it has 50 rows"):
        TableCell(tmp_path / "train.parquet", "images", 50, 0).read()
    with pytest.raises(OSError, match="out of range"):
        TableCell(tmp_path / "train.parquet", "images", 1, 7).read()
    with pytest.raises(OSError):
        TableCell(tmp_path / "gone.parquet", "images", 1, 0).read()


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_other_ways_to_hold_pictures(tmp_path: Path, form: str) -> None:
    made = {
        "struct": table([{"image": picture(b"x"), "messages": talk("hi", "ho")}], PICTURE, "image"),
        "binary": table([{"image": b"x", "messages": talk("hi", "ho")}], pa.binary(), "image"),
        "binaries": table([{"images": [b"x"], "messages": talk("hi", "ho")}], pa.list_(pa.binary())),
        "nulls": table([{"images": [picture(b"x")], "messages": talk("hi", "ho")}, {"images": None}]),
        "large": table([{"images": [picture(b"x")], "messages": talk("hi", "ho")}], pa.large_list(PICTURE)),
    }
    for kind, values in made.items():
        path = tmp_path / kind
        if form == "parquet":
            path = path.with_suffix(".parquet")
            pq.write_table(values, path)
        else:
            save(path, values)
        data = read_data(path)
        assert list(contents(data).values()) == [b"x"], kind
        assert data.records[0].images == data.names and data.names[0].endswith("#0.0")


@pytest.mark.parametrize("form", ["parquet", "saved"])
def test_a_column_that_holds_no_pictures_is_named_once(tmp_path: Path, form: str) -> None:
    for n, (cell, kind) in enumerate([
        ([[picture(b"x")]], pa.list_(pa.list_(PICTURE))),
        (7, pa.int64()),
        ([{"url": "a.jpg"}], pa.list_(pa.struct([("url", pa.string())]))),
    ]):  # fmt: skip
        values, path = table([{"images": cell, "messages": talk("hi", "ho")}], kind), tmp_path / f"{n}.parquet"
        if form == "parquet":
            pq.write_table(values, path)
        else:
            path = save(path.with_suffix(""), values)
        with pytest.raises(
            DataError, match=r" has .*(list|int64).* in its column 'images'; expected bytes, names of f"
        ):
            read_data(path)


@pytest.mark.parametrize("mixed", [False, True])
def test_pictures_by_name_lie_beside_the_file(tmp_path: Path, mixed: bool) -> None:
    (tmp_path / "a.jpg").write_bytes(b"file a")
    (tmp_path.parent / "up.jpg").write_bytes(b"up")
    values = [
        {"images": [picture(None, "a.jpg")], "messages": talk("<image>what", "a")},
        {"images": [picture(None, "../up.jpg")], "messages": talk("<image>what", "up")},
        *([{"images": [picture(b"held", "b.jpg")], "messages": talk("<image>what", "b")}] if mixed else []),
    ]
    pq.write_table(table(values), tmp_path / "t.parquet")
    data = read_data(tmp_path / "t.parquet")
    assert data.names[: 2 + mixed] == (*(["t.parquet#2.0"] if mixed else []), "a.jpg", "../up.jpg")
    found = data.pictures(tmp_path)
    assert found["a.jpg"] == tmp_path / "a.jpg" and isinstance(found["../up.jpg"], Refused)
    names = table([{"images": ["a.jpg"], "messages": talk("<image>what", "a")}], pa.list_(pa.string()))
    pq.write_table(names, tmp_path / "names.parquet")
    assert read_data(tmp_path / "names.parquet").pictures() == {"a.jpg": tmp_path / "a.jpg"}


def test_parts_say_which_turn_brings_the_next_picture(tmp_path: Path) -> None:
    content = [
        [{"type": "text", "text": "First?"}, {"type": "image", "text": None}],
        [{"type": "text", "text": "A."}],
        [{"type": "image", "text": None}, {"type": "text", "text": "Second?"}],
        [{"type": "text", "text": "B."}],
    ]
    messages = [{"role": ("user", "assistant")[i % 2], "content": parts} for i, parts in enumerate(content)]
    pq.write_table(table([{"images": [picture(b"1"), picture(b"2")], "messages": messages}]), tmp_path / "vsft.parquet")
    record = read_data(tmp_path / "vsft.parquet").records[0]
    assert [message.images for message in record.messages] == [(0,), (), (1,), ()]
    assert [message.text for message in record.messages] == ["First?", "A.", "Second?", "B."]


def test_captions_and_pictures_alone(tmp_path: Path) -> None:
    pq.write_table(table([{"image": picture(b"x"), "text": "A cat."}], PICTURE, "image"), tmp_path / "c.parquet")
    assert read_data(tmp_path / "c.parquet").records[0].caption
    pq.write_table(table([{"image": picture(b"x"), "label": 3}], PICTURE, "image"), tmp_path / "p.parquet")
    data = read_data(tmp_path / "p.parquet")
    assert data.names == ("p.parquet#0.0",) and not data.records and not data.problems


def test_a_folder_of_parquet_and_its_files_agree_on_names(tmp_path: Path) -> None:
    for n in range(2):
        pq.write_table(table(rows(4)), tmp_path / f"train-{n:05d}-of-00002.parquet")
    data = read_data(tmp_path)
    assert len(data.records) == 8 and len(contents(data)) == 6
    assert read_data(tmp_path / "train-*.parquet").names == data.names
    assert set(read_data(tmp_path / "train-00001-of-00002.parquet").names) < set(data.names)
    pq.write_table(table(rows(4)), tmp_path / "test-00000-of-00001.parquet")
    with pytest.raises(DataError, match=r"holds the splits test, train; give one, as '.*/train\*\.parquet'"):
        read_data(tmp_path)
    assert read_data(tmp_path / "train*.parquet").names == data.names


def test_splits_in_folders_of_their_own(tmp_path: Path) -> None:
    for split in ("train", "test"):
        (tmp_path / "default" / split).mkdir(parents=True)
        pq.write_table(table(rows(4)), tmp_path / "default" / split / "0000.parquet")
    with pytest.raises(DataError, match=r"give one, as '.*/default/train'"):
        read_data(tmp_path)
    assert len(read_data(tmp_path / "default" / "train").records) == 4


def test_a_saved_data_set(tmp_path: Path) -> None:
    folder = save(tmp_path / "saved" / "train", table(rows(10)), files=2)
    data = read_data(folder)
    assert len(data.records) == 10 and not data.problems
    expected = {f"{n}.{i}".encode() for n in range(10) for i in range(n % 3)}
    assert set(contents(data).values()) == expected and "data-00001-of-00002.arrow#0.1" in data.names
    (tmp_path / "saved" / "dataset_dict.json").write_text(json.dumps({"splits": ["train", "test"]}))
    with pytest.raises(DataError, match=rf"several splits; give one of them: {tmp_path}/saved/train, "):
        read_data(tmp_path / "saved")
    (folder / "data-00001-of-00002.arrow").unlink()
    missing = read_data(folder)
    assert len(missing.records) == 5 and missing.problems[0].where == "data-00001-of-00002.arrow"
    (folder / "state.json").write_text('{"_data_files": 5}')
    with pytest.raises(DataError, match="is not a whole `save_to_disk` folder"):
        read_data(folder)


def test_what_datasets_itself_saves(tmp_path: Path) -> None:
    datasets = pytest.importorskip("datasets")
    image = datasets.Image(decode=False)
    features = datasets.Features(
        images=datasets.Sequence(image) if datasets.__version__ < "4" else datasets.List(image),
        messages=[{"role": datasets.Value("string"), "content": datasets.Value("string")}],
    )
    made = datasets.Dataset.from_list(rows(7), features=features)
    made.save_to_disk(str(tmp_path / "saved"))
    made.to_parquet(str(tmp_path / "t.parquet"))
    found = [read_data(tmp_path / name) for name in ("saved", "t.parquet")]
    assert [len(data.records) for data in found] == [7, 7]
    assert [*contents(found[0]).values()] == [*contents(found[1]).values()] != []
    assert found[0].records[2].messages == found[1].records[2].messages


@pytest.mark.parametrize("damage", ["cut", "noise", "empty", "text", "columns"])
def test_a_damaged_file_is_an_error_alone_and_a_problem_beside_others(tmp_path: Path, damage: str) -> None:
    bad = tmp_path / "b.parquet"
    pq.write_table(table(rows()), bad)
    content = bad.read_bytes()
    noise = bytearray(content)
    noise[len(content) - 200 : len(content) - 100] = b"\xaa" * 100  # in the footer
    forms = {"cut": content[: len(content) // 2], "noise": bytes(noise), "empty": b"", "text": b"hello"}
    if damage == "columns":
        pq.write_table(pa.table({"a": [1]}), bad)
    else:
        bad.write_bytes(forms[damage])
    with pytest.raises(DataError, match=rf"{bad} (cannot be read as a table|has the columns a; expected)"):
        read_data(bad)
    pq.write_table(table(rows()), tmp_path / "a.parquet")
    data = read_data(tmp_path)
    assert len(data.records) == 5 and [problem.where for problem in data.problems] == ["b.parquet"]


def test_bytes_damaged_after_reading_are_an_oserror(tmp_path: Path) -> None:
    path = tmp_path / "t.parquet"
    pq.write_table(table(rows()), path)
    cell = next(iter(read_data(path).pictures().values()))
    os.truncate(path, 100)
    with pytest.raises(OSError):
        TableCell(path, "images", 1, 0).read() if cell is None else cell.read()  # type: ignore[union-attr]


def test_rows_that_cannot_be_used_are_problems(tmp_path: Path) -> None:
    values = [*rows(3), {"images": [], "messages": None}, {"images": [], "messages": talk("<image>two", "x")}]
    pq.write_table(table(values), tmp_path / "t.parquet")
    data = read_data(tmp_path / "t.parquet")
    assert len(data.records) == 3
    assert [str(problem) for problem in data.problems] == [
        "t.parquet: row 3: it has neither a conversation nor a picture",
        "t.parquet: row 4: it has more image placeholders than pictures",
    ]
