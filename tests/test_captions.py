"""A folder of captioned pictures: words beside each, and Hugging Face's tables."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from PIL import Image

from mlx_llama3v.data.dataset import DataSet, read_data
from tests.command_line import Cli, World, refused


def picture(folder: Path, name: str) -> None:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (40, 30), (len(name) * 9 % 256, 80, 200)).save(folder / name)


def captions(data: DataSet) -> dict[str, list[str]]:
    """Answers by the pictures they are about."""
    found: dict[str, list[str]] = {}
    for record in data.records:
        assert set(record.images) <= set(data.held)
        found.setdefault(" ".join(record.images), []).append(record.messages[-1].text)
    return found


def problems(data: DataSet) -> list[str]:
    return [str(problem) for problem in data.problems]


def test_words_beside_each_picture(tmp_path: Path) -> None:
    for name in ("b.jpg", "a.png", "sub/c.jpeg", "sub/d.v2.jpg", "e.jpg", "f.jpg", "alone.jpg"):
        picture(tmp_path, name)
    talk = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "a fox"}]
    for name, text in {
        "a.txt": "\ufeffa dog",
        "b.caption": "a cat",
        "b.json": json.dumps({"caption": "not this: the text comes first"}),
        "sub/c.json": json.dumps({"caption": "a cow", "width": 40}),
        "sub/d.v2.txt": "a hen",
        "sub/d.txt": "of nothing",
        "e.json": json.dumps({"id": 7, "image": "e.jpg", "conversations": talk}),
        "f.json": json.dumps({"width": 40}),
        "README.txt": "about all",
        "captions.json": json.dumps([{"image": "a.png", "conversations": talk}]),
    }.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    data = read_data(tmp_path)
    assert captions(data) == {
        "a.png": ["a dog"],
        "b.jpg": ["a cat"],
        "e.jpg": ["a fox"],
        "sub/c.jpeg": ["a cow"],
        "sub/d.v2.jpg": ["a hen"],
    }
    assert [record.id for record in data.records] == ["a.png", "b.jpg", "7", "sub/c.jpeg", "sub/d.v2.jpg"]
    assert [record.caption for record in data.records] == [True, True, False, True, True]
    assert len(data.held) == 7 and not data.problems


def test_words_that_cannot_be_used_are_told(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"):
        picture(tmp_path, name)
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    (tmp_path / "b.json").write_text("{")
    (tmp_path / "c.txt").mkdir()
    (tmp_path / "d.json").write_text(json.dumps({"conversations": [{"from": "nobody", "value": "x"}]}))
    (tmp_path / "e.txt").write_bytes(b"x" * ((16 << 20) + 1))
    data = read_data(tmp_path)
    assert not data.records and len(data.held) == 5
    assert [told.partition(":")[0] for told in sorted(problems(data))] == ["a.jpg", "b.jpg", "c.jpg", "d.jpg", "e.jpg"]
    for words in (
        "'utf-8' codec",
        "not readable",
        "c.txt cannot be read",
        "the role 'nobody'",
        "has more than",
    ):
        assert any(words in told for told in problems(data)), words


@pytest.mark.parametrize("place", ["", "train/"])
def test_hugging_faces_tables(place: str, tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg", "in/c.jpg", "d.jpg", "e.jpg"):
        picture(tmp_path, place + name)
    talk = [{"role": "user", "content": "Which?"}, {"role": "assistant", "content": "both"}]
    rows = [
        {"file_name": "a.jpg", "text": "a dog"},
        {"file_name": "a.jpg", "caption": "the same dog"},
        {"file_name": "./in/c.jpg", "text": "a cow, in"},
        {"file_names": ["a.jpg", "b.jpg"], "messages": talk},
        {"file_name": "e.jpg", "label": 3},
        {"file_name": "missing.jpg", "text": "x"},
        {"text": "x"},
        {"file_name": "../../a.jpg", "text": "x"},
    ]
    table = "".join(json.dumps(row) + "\n" for row in rows) + "\n[1]\n{\n"
    (tmp_path / place / "metadata.jsonl").write_text(table, encoding="utf-8")
    (tmp_path / place / "a.txt").write_text("not this: the table has it")
    (tmp_path / place / "d.txt").write_text("a hen")
    data = read_data(tmp_path)
    both = f"{place}a.jpg {place}b.jpg"
    assert captions(data) == {
        f"{place}a.jpg": ["a dog", "the same dog"],
        both: ["both"],
        f"{place}d.jpg": ["a hen"],
        f"{place}in/c.jpg": ["a cow, in"],
    }
    where = f"{place}metadata.jsonl: line"
    told = problems(data)
    assert told[0] == f"{where} 6: its picture '{place}missing.jpg' is not there"
    assert told[1] == f"{where} 7: it names no picture; expected file_name"
    assert told[2].startswith(f"{where} 8: its picture '") and told[2].endswith("a.jpg' is not there")
    assert told[3] == f"{where} 10: it is [1]; expected an object"
    assert told[4].startswith(f"{where} 11: not JSON") and len(told) == 5


def test_a_table_of_commas(tmp_path: Path) -> None:
    for name in ("a.jpg", "b.jpg"):
        picture(tmp_path, name)
    (tmp_path / "metadata.csv").write_text(
        'file_name,text\na.jpg,"a dog, ""Rex"",\nrunning"\nb.jpg\n', encoding="utf-8"
    )
    data = read_data(tmp_path)
    assert captions(data) == {"a.jpg": ['a dog, "Rex",\nrunning']} and not data.problems
    (tmp_path / "metadata.csv").write_bytes(b"file_name,text\na.jpg,x\nb.jpg,caf\xe9\n")
    assert "metadata.csv: it cannot be read to its end" in problems(read_data(tmp_path))[0]


def test_links_that_lead_out_of_the_folder(tmp_path: Path) -> None:
    (tmp_path / "secret").write_text('{"file_name": "b.jpg", "text": "secret"}\n')
    for name in ("in/a.jpg", "in/b.jpg"):
        picture(tmp_path, name)
    (tmp_path / "in" / "a.txt").symlink_to(tmp_path / "secret")
    (tmp_path / "in" / "metadata.jsonl").symlink_to(tmp_path / "secret")
    data = read_data(tmp_path / "in")
    assert not data.records and len(data.problems) == 2
    assert all("outside: --allow-outside follows it" in told for told in problems(data))
    assert len(read_data(tmp_path / "in", allow_outside=True).records) == 2


def test_a_folder_trains(cli: Cli, world: World, tmp_path: Path) -> None:
    for n in range(6):
        picture(tmp_path / "photos", f"{n}.jpg")
    train = ("train", "--model", world.model, "--data", tmp_path / "photos", "--iters", "1", "--batch-size", "2")
    ahead = ("--embed-ahead", "--image-folder", tmp_path / "photos")
    refused(
        cli(*train, *ahead, "--output", tmp_path / "none"), "has no record to train on: its pictures have no captions"
    )
    for n in range(6):
        (tmp_path / "photos" / f"{n}.txt").write_text(f"picture {n}")
    embedded = cli("embed", "--model", world.model, "--data", tmp_path / "photos", "--output", tmp_path / "store")
    assert embedded.status == 0, embedded
    done = cli(*train, "--embeddings", tmp_path / "store", "--output", tmp_path / "run")
    assert done.status == 0, done
    done = cli(*train, *ahead, "--output", tmp_path / "ahead")
    assert done.status == 0, done
