"""Tar shards: samples, names, and shards that are cut short, damaged or hostile."""

from __future__ import annotations

import io
import json
import tarfile
from collections.abc import Mapping
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama3v.data.dataset import DataSet, read_data
from mlx_llama3v.errors import DataError
from mlx_llama3v.text.prompt import Message


def shard(path: Path, members: Mapping[str, bytes | str], **options: int) -> Path:
    with tarfile.open(path, "w", **options) as tar:  # type: ignore[call-overload]
        for name, content in members.items():
            data = content.encode() if isinstance(content, str) else content
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return path


def talk(*turns: str, **keys: object) -> str:
    roles = ["human", "gpt"]
    return json.dumps({**keys, "conversations": [{"from": roles[i % 2], "value": t} for i, t in enumerate(turns)]})


def contents(data: DataSet) -> dict[str, bytes]:
    return {name: source.read() for name, source in data.pictures().items()}  # type: ignore[union-attr]


def test_captions_and_conversations(tmp_path: Path) -> None:
    long = "deep/" * 30 + "0004"
    members = {
        "0001.jpg": b"one",
        "0001.txt": "A cat.\n",
        "0002.png": b"two",
        "0002.json": talk("<image>\nWhat?", "A dog.", image="coco/elsewhere.jpg", id="row"),
        "0003.jpg": b"three",
        "0003.json": json.dumps({"caption": "A bird.", "url": "https://x"}),
        f"{long}.webp": b"four",
        f"{long}.txt": "Wörter",
        "0005.json": talk("No picture?", "None."),
        "0006.jpg": b"six",
        "readme.md": "x",
        "README.txt": "A cat and a dog.",
        "deep/LICENSE.txt": b"\xff",
        "._0006.jpg": b"a Mac's",
        "0007.HEIC": b"seven",
    }
    data = read_data(shard(tmp_path / "s.tar", members))
    assert [problem.where for problem in data.problems] == ["s.tar: 0007.HEIC"]
    assert contents(data) == {
        "s.tar/0001.jpg": b"one",
        "s.tar/0002.png": b"two",
        "s.tar/0003.jpg": b"three",
        f"s.tar/{long}.webp": b"four",
        "s.tar/0006.jpg": b"six",
    }
    first, second, third, fourth, fifth = data.records
    assert first.caption and first.messages == (Message("user", "", (0,)), Message("assistant", "A cat.\n"))
    assert second.id == "row" and second.images == ("s.tar/0002.png",)
    assert second.messages == (Message("user", "What?", (0,)), Message("assistant", "A dog."))
    assert third.messages[-1].text == "A bird." and fourth.messages[-1].text == "Wörter"
    assert fifth.images == () and fifth.id == "0005"


def test_several_pictures_in_a_sample(tmp_path: Path) -> None:
    rows = {"a": ["right.jpg", "left.jpg"], "b": ["x", "y"], "c": ["only-one-of-two"]}
    members: dict[str, bytes | str] = {}
    for key, names in rows.items():
        names = [f"{key}.{name}" for name in names] if key == "a" else names
        members |= {f"{key}.left.jpg": b"l", f"{key}.right.jpg": b"r", f"{key}.json": talk("hi", "x", image=names)}
    data = read_data(shard(tmp_path / "s.tar", members))
    assert data.records[0].images == ("s.tar/a.right.jpg", "s.tar/a.left.jpg")  # by name
    assert data.records[1].images == ("s.tar/b.left.jpg", "s.tar/b.right.jpg")  # in their order
    assert [str(problem) for problem in data.problems] == [
        "s.tar: c: its conversation names other pictures than it holds"
    ]


def test_members_that_are_no_neighbours_are_a_problem(tmp_path: Path) -> None:
    """As `tar` packs them in the order of a folder; one sample after the other they are read."""
    names = [f"{n}{ending}" for ending in (".jpg", ".txt") for n in range(5)]
    apart = read_data(shard(tmp_path / "s.tar", {name: name for name in [*names, "info.json"]}))
    assert not apart.records and len(apart.names) == 5
    assert [str(problem) for problem in apart.problems][:1] == [
        "s.tar: 0: its text has no picture next to it in the shard; sort the shard by name"
    ]
    assert len(apart.problems) == 5 + 1  # and what is no JSON
    lost = read_data(shard(tmp_path / "l.tar", {"1.jpg": "x", "000123.txt": "A cat.", "my-readme.txt": "A dog."}))
    assert [problem.where for problem in lost.problems] == ["l.tar: 000123", "l.tar: my-readme"]
    together = read_data(shard(tmp_path / "t.tar", {name: name for name in sorted(names)}))
    assert len(together.records) == 5 and not together.problems


def test_names_with_points_in_them(tmp_path: Path) -> None:
    """A key ends at the first point, but not where that would make one sample of many."""
    members: dict[str, bytes | str] = {}
    for n in range(3):
        members |= {f"a/Shot 05-01 at 10.15.{n}{ending}": f"{n}" for ending in (".png", ".txt")}
    members |= {"1.left.jpg": "l", "1.right.jpg": "r", "1.txt": "both"}
    members |= {"2.left.jpg": "l", "2.left.txt": "left", "2.right.jpg": "r"}
    members |= {"3.jpg": "x", "3.caption.txt": "three"}
    members |= {"4.jpg": "x", "4.a.txt": "first", "4.b.txt": "second", "4.json": "{}"}
    data = read_data(shard(tmp_path / "s.tar", members))
    found = {record.messages[-1].text: record.images for record in data.records}
    shots = {f"{n}": (f"s.tar/a/Shot 05-01 at 10.15.{n}.png",) for n in range(3)}
    assert found == shots | {
        "both": ("s.tar/1.left.jpg", "s.tar/1.right.jpg"),
        "left": ("s.tar/2.left.jpg",),
        "three": ("s.tar/3.jpg",),
        "first": ("s.tar/4.jpg",),
    }
    assert [*map(str, data.problems)] == ["s.tar: 4.b.txt: its sample has a .txt before it, which is used"]
    assert len(data.names) == 9


def test_equal_keys_of_two_shards_are_two_pictures(tmp_path: Path) -> None:
    for n in range(2):
        shard(tmp_path / f"shard-{n:03d}.tar", {"0.jpg": f"{n}".encode(), "0.txt": f"number {n}"})
    folder = read_data(tmp_path)
    assert contents(folder) == {"shard-000.tar/0.jpg": b"0", "shard-001.tar/0.jpg": b"1"}
    assert [record.messages[-1].text for record in folder.records] == ["number 0", "number 1"]
    for pattern in ("shard-{000..001}.tar", "shard-*.tar", "shard-{000,001}.tar"):
        assert read_data(tmp_path / pattern).names == folder.names
    assert read_data(tmp_path / "shard-001.tar").names == ("shard-001.tar/0.jpg",)
    more = read_data(tmp_path / "shard-{000..003}.tar")
    assert more.names == folder.names
    assert [problem.where for problem in more.problems] == [str(tmp_path / f"shard-00{n}.tar") for n in (2, 3)]


def test_of_two_pictures_of_one_name_the_first_is_used_and_the_other_told_of(tmp_path: Path) -> None:
    """As `tar -r` leaves them: one would vanish, or get the other's caption."""
    members = [("a.jpg", "one"), ("a.jpg", "two"), ("a.txt", "first"), ("b.jpg", "b")]
    with tarfile.open(tmp_path / "s.tar", "w") as tar:
        for name, content in [*members, ("a.jpg", "three"), ("a.txt", "second")]:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content.encode()))
    data = read_data(tmp_path / "s.tar")
    assert contents(data) == {"s.tar/a.jpg": b"one", "s.tar/b.jpg": b"b"}
    assert [record.messages[-1].text for record in data.records] == ["first"]
    said = "s.tar: a.jpg: a picture of that name stands before it, which is used"
    assert [*map(str, data.problems)] == [said, said]


SAMPLES = {
    f"{n:04d}.{kind}": bytes([n]) * 700 if kind == "jpg" else f"text {n}" for n in range(5) for kind in ("jpg", "txt")
}


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 1 << 16))
def test_of_a_truncated_shard_what_is_whole_is_used(tmp_path_factory: pytest.TempPathFactory, cut: int) -> None:
    path = tmp_path_factory.getbasetemp() / "cut.tar"
    whole = shard(path, SAMPLES).read_bytes()
    cut %= len(whole)
    path.write_bytes(whole[:cut])
    try:
        data = read_data(path)
    except DataError as error:
        assert str(path) in str(error) and cut < 512 + 700
        return
    found = contents(data)
    assert all(found[name] == SAMPLES[name.split("/")[1]] for name in found)
    assert len(found) == sum(cut >= sample * 2560 + 512 + 700 for sample in range(5))
    if cut < 5 * 2560 + 512:
        assert any("cut.tar" in problem.where for problem in data.problems)
    for record in data.records:
        assert record.messages[-1].text == f"text {int(record.images[0][8:12])}"


def test_a_damaged_header_ends_a_shard_and_is_named(tmp_path: Path) -> None:
    path = shard(tmp_path / "s.tar", SAMPLES)
    content = bytearray(path.read_bytes())
    content[2560 : 2560 + 512] = b"\xff" * 512  # the header of the second sample's picture
    path.write_bytes(content)
    data = read_data(path)
    assert data.names == ("s.tar/0000.jpg",)
    assert "damaged at byte 2560" in data.problems[0].reason and data.problems[0].where == "s.tar"


def test_names_and_links_that_lead_out(tmp_path: Path) -> None:
    path = tmp_path / "s.tar"
    with tarfile.open(path, "w") as tar:
        for name in ("../up.jpg", "/etc/abs.jpg", "a/../../b.jpg", "good.jpg"):
            info = tarfile.TarInfo(name)
            info.size = 1
            tar.addfile(info, io.BytesIO(b"x"))
        for kind in (tarfile.SYMTYPE, tarfile.LNKTYPE, tarfile.FIFOTYPE):
            info = tarfile.TarInfo(f"link{kind!r}.jpg")
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)
    data = read_data(path)
    assert data.names == ("s.tar/good.jpg",)
    reasons = [problem.reason for problem in data.problems]
    assert reasons == ["its name leads out of the shard"] * 3 + ["it is a link or a device; expected a file"] * 3


def test_text_that_cannot_be_read_is_a_problem(tmp_path: Path) -> None:
    members = {
        "a.jpg": b"x", "a.txt": b"\xff\xfe\xfa",
        "b.jpg": b"x", "b.json": "{",
        "c.jpg": b"x", "c.json": "5", "c.txt": "fine",
        "d.jpg": b"x", "d.json": talk("<image><image>", "y", image="d.jpg"),
    }  # fmt: skip
    data = read_data(shard(tmp_path / "s.tar", members))
    assert [problem.where for problem in data.problems] == ["s.tar: a", "s.tar: b", "s.tar: d"]
    assert len(data.names) == 4 and len(data.records) == 1


@pytest.mark.parametrize(
    ("name", "content"), [("x.tar", b"not a tar file" * 100), ("x.tar", b""), ("x.tar.gz", b"\x1f\x8b")]
)
def test_what_is_no_shard_is_an_error_that_names_it(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(DataError, match=f"{name} (cannot be read as a tar file|is compressed)"):
        read_data(tmp_path / name)
    if name == "x.tar":  # beside a good one it is a problem
        shard(tmp_path / "y.tar", {"a.jpg": b"x"})
        data = read_data(tmp_path)
        assert data.names == ("y.tar/a.jpg",) and data.problems[0].where == "x.tar"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 20), st.binary(min_size=1, max_size=40))
def test_no_bytes_break_the_reader(tmp_path_factory: pytest.TempPathFactory, block: int, noise: bytes) -> None:
    path = tmp_path_factory.getbasetemp() / "noise.tar"
    content = bytearray(shard(path, SAMPLES).read_bytes())
    at = block * 512 + noise[0]
    content[at : at + len(noise)] = noise
    path.write_bytes(content)
    try:
        data = read_data(path)
    except DataError as error:
        assert str(path) in str(error)
    else:
        contents(data)
