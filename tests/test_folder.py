"""A folder of pictures: what is found, what is told of and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_llama3v.data.folder import folder_images
from mlx_llama3v.errors import DataError


def test_a_folder_of_pictures(tmp_path: Path) -> None:
    for name in (
        "b.JPG",
        "a.png",
        "sub/ü.webp",
        "notes.txt",
        ".hidden.png",
        ".cache/c.png",
        "sub.png/inner.gif",
    ):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    (tmp_path / "empty").mkdir()
    found, problems = folder_images(tmp_path)
    assert not problems
    assert list(found) == ["a.png", "b.JPG", "sub.png/inner.gif", "sub/ü.webp"]
    assert found["sub/ü.webp"] == tmp_path / "sub/ü.webp"
    with pytest.raises(DataError, match="holds no picture"):
        folder_images(tmp_path / "empty")
    with pytest.raises(DataError, match="is not a folder"):
        folder_images(tmp_path / "a.png")


def test_files_of_a_folder_that_look_like_pictures_are_told_of(tmp_path: Path) -> None:
    for name in ("IMG_1.HEIC", "sub/raw.dng", "b.jfif", "a.JPE", "notes.txt", ".x.heic"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    found, problems = folder_images(tmp_path)
    assert list(found) == ["a.JPE", "b.jfif"]
    assert [problem.where for problem in problems] == ["IMG_1.HEIC", "sub/raw.dng"]
    assert str(problems[0]) == "IMG_1.HEIC: .heic is a format that cannot be read; make a JPEG or PNG of it"
    (tmp_path / "a.JPE").unlink()
    (tmp_path / "b.jfif").unlink()
    with pytest.raises(DataError, match=r"holds no picture \(.*\); the first problem: IMG_1.HEIC: .heic is a format"):
        folder_images(tmp_path)
