"""Where pictures may be read, with real symbolic links; and stretches of larger files."""

from __future__ import annotations

import errno
import json
import os
import pickle
import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama3v.data.dataset import read_data
from mlx_llama3v.data.sources import FilePart, Folders, Refused
from mlx_llama3v.errors import StoreError
from mlx_llama3v.storing import picture_names
from tests.test_webdataset import shard


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """images/ with a picture, and links out of it; secret.png beside it."""
    (tmp_path / "images" / "sub").mkdir(parents=True)
    (tmp_path / "images" / "a.png").write_bytes(b"a")
    (tmp_path / "secret.png").write_bytes(b"s")
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "b.png").write_bytes(b"b")
    os.symlink(tmp_path / "secret.png", tmp_path / "images" / "link.png")
    os.symlink(tmp_path / "outside", tmp_path / "images" / "folder")
    os.symlink("a.png", tmp_path / "images" / "inner.png")
    return tmp_path


NOWHERE = ("data/../../secret.png", "a.png/../link.png", "../none.png")
ESCAPES = ["../secret.png", "sub/../../secret.png", "link.png", "folder/b.png", *NOWHERE]


@pytest.mark.parametrize("name", ESCAPES)
def test_a_name_that_leaves_the_folder_is_refused(place: Path, name: str) -> None:
    found = Folders([place / "images"]).find(name)
    assert isinstance(found, Refused) and "it lies outside" in found.reason and "--allow-outside" in found.reason
    with pytest.raises(OSError, match="it lies outside"):
        found.read()
    allowed = Folders([place / "images"], allow_outside=True).find(name)
    assert isinstance(allowed, Path) and allowed.is_file() is (name not in NOWHERE)


def test_an_absolute_name_is_refused_unless_it_leads_inside(place: Path) -> None:
    folders = Folders([place / "images"])
    assert isinstance(folders.find(str(place / "secret.png")), Refused)
    assert isinstance(folders.find("/etc/hostname"), Refused)
    assert folders.find(str(place / "images" / "a.png")) == place / "images" / "a.png"


def test_what_stays_inside_is_read(place: Path) -> None:
    folders = Folders([place / "images"])
    for name in ("a.png", "sub/../a.png", "inner.png", "data/a.png"):
        found = folders.find(name)
        assert isinstance(found, Path) and found.read_bytes() == b"a"
    os.symlink(place / "images", place / "through")  # the folder that was given may be a link itself
    assert Folders([place / "through"]).find("a.png") == place / "through" / "a.png"
    assert isinstance(Folders([place / "through"]).find("link.png"), Refused)
    assert folders.find("none.png") == place / "images" / "none.png"  # whoever opens it says that it is not there


def test_a_link_is_named_with_where_it_leads(place: Path) -> None:
    found = Folders([place / "images"]).find("link.png")
    assert isinstance(found, Refused) and f"(it leads to {place / 'secret.png'})" in found.reason


def test_a_sibling_whose_name_begins_alike_is_outside(place: Path) -> None:
    (place / "images2").mkdir()
    (place / "images2" / "c.png").write_bytes(b"c")
    assert isinstance(Folders([place / "images"]).find("../images2/c.png"), Refused)


@pytest.mark.parametrize("name", ["https://example.org/a.png", "s3://bucket/a.png"])
def test_a_web_address_is_refused(place: Path, name: str) -> None:
    found = Folders([place]).find(name)
    assert isinstance(found, Refused) and "web address" in found.reason


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.sampled_from(["..", ".", "a.png", "sub", "link.png", "folder", "b.png", "data", "", "/"]), max_size=6)
)
def test_nothing_that_is_found_lies_outside(tmp_path_factory: pytest.TempPathFactory, parts: list[str]) -> None:
    base = tmp_path_factory.getbasetemp() / "escape"
    if not base.exists():
        (base / "images" / "sub").mkdir(parents=True)
        (base / "images" / "a.png").write_bytes(b"a")
        (base / "b.png").write_bytes(b"secret")
        os.symlink("..", base / "images" / "folder")
        os.symlink("../b.png", base / "images" / "link.png")
    found = Folders([base / "images"]).find("/".join(parts))
    if isinstance(found, Path):
        assert os.path.realpath(found).startswith(os.path.realpath(base / "images"))


def test_the_root_of_the_file_system_is_not_searched() -> None:
    from mlx_llama3v.data.llava import search_folders

    assert isinstance(search_folders(Path("/tmp")).find("/etc/hostname"), Refused)
    assert isinstance(search_folders(Path("/tmp/a")).find("etc/hostname"), Path)  # where it is not: below /tmp/a
    assert not search_folders(Path("/tmp/a")).find("etc/hostname").is_file()  # type: ignore[union-attr]


def test_a_folder_of_pictures_with_links_out_of_it(place: Path) -> None:
    found = read_data(place / "images").pictures()
    assert isinstance(found["link.png"], Refused) and isinstance(found["inner.png"], Path)
    assert "folder/b.png" not in found  # links to folders are not followed
    assert isinstance(read_data(place / "images").pictures(allow_outside=True)["link.png"], Path)
    assert [str(problem) for problem in read_data(place / "images").problems] == [
        "folder: it is a link to a folder outside: --allow-outside follows it"
    ]


def test_a_folder_below_that_cannot_be_read_is_a_problem(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """`store prune` would drop its pictures, `embed --strict` pass over them. Root may read all, so it is feigned."""
    scandir = os.scandir

    def refusing(path: str) -> Any:
        if os.path.basename(path) == "sub":
            raise PermissionError(errno.EACCES, "Permission denied", path)
        return scandir(path)

    monkeypatch.setattr(os, "scandir", refusing)
    os.symlink("nowhere.png", place / "images" / "broken.png")
    os.unlink(place / "images" / "folder")
    said = "sub: this folder cannot be read (Permission denied), so nothing in it is used"
    assert [*map(str, read_data(place / "images").problems)] == [
        said,
        "broken.png: it is a broken link, no file, or must not be read",
    ]
    with pytest.raises(StoreError, match=re.escape(f"2 problems, the first: {said}")):
        picture_names(place / "images")
    (place / "tars" / "sub").mkdir(parents=True)
    shard(place / "tars" / "a.tar", {"a.jpg": b"a"})
    assert [*map(str, read_data(place / "tars").problems)] == [said]


def test_linked_folders_are_followed_where_that_is_allowed(place: Path) -> None:
    """Once each, under their own names where they have one here: links may lead in circles."""
    os.symlink("..", place / "outside" / "up")
    os.symlink("sub", place / "images" / "again")
    os.symlink(".", place / "images" / "circle")
    (place / "images" / "sub" / "c.png").write_bytes(b"c")
    (place / "images" / ".hidden").mkdir()
    os.symlink(".hidden", place / "images" / "shown")
    (place / "images" / ".hidden" / "d.png").write_bytes(b"d")
    data = read_data(place / "images", allow_outside=True)
    inside = ["a.png", "inner.png", "link.png", "shown/d.png", "sub/c.png"]
    assert [*data.names] == sorted([*inside, "folder/b.png", "folder/up/secret.png"]) and not data.problems
    found = data.pictures(allow_outside=True)
    assert all(isinstance(source, Path) and source.is_file() for source in found.values())
    assert [*read_data(place / "images").names] == inside


def test_a_name_that_is_no_unicode_is_refused(place: Path) -> None:
    """JSON can spell half an emoji. A name that the system gave, in another encoding, is as good as any."""
    for name in ("\ud800/a.png", "\ud800.png", "sub/\udfff"):
        for allow in (False, True):
            found = Folders([place / "images"], allow_outside=allow).find(name)
            assert isinstance(found, Refused) and found.reason == "its name is not valid Unicode"
            assert str(found).isascii()
    assert Folders([place / "images"]).find("\udcff.png") == place / "images" / "\udcff.png"


def test_refused_pictures_of_a_data_file(place: Path) -> None:
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    rows = [{"image": name, "conversations": talk} for name in ("a.png", "link.png", "../secret.png")]
    (place / "rows.json").write_text(json.dumps(rows))
    found = read_data(place / "rows.json").pictures(place / "images")
    assert {name: type(source).__name__ for name, source in found.items()} == {
        "a.png": "PosixPath",
        "link.png": "Refused",
        "../secret.png": "Refused",
    }


def test_a_part_of_a_file(tmp_path: Path) -> None:
    (tmp_path / "big").write_bytes(bytes(range(100)))
    part = FilePart(tmp_path / "big", 10, 20, "x.png")
    assert part.read() == bytes(range(10, 30)) and str(part) == f"{tmp_path}/big: x.png"
    assert pickle.loads(pickle.dumps(part)) == part
    with pytest.raises(OSError, match="ends in the middle"):
        FilePart(tmp_path / "big", 90, 20, "x.png").read()
    with pytest.raises(FileNotFoundError):
        FilePart(tmp_path / "gone", 0, 1, "x.png").read()
    (tmp_path / "big").write_bytes(bytes(200_000))
    whole = FilePart(tmp_path / "big", 0, 200_000, "x.png")
    assert len(whole.head()) < 100_000 and len(whole.read()) == 200_000
