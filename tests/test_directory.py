"""Directories written whole: what a killed command leaves is told from what a running one writes, cleared or named."""

from __future__ import annotations

from pathlib import Path

import pytest

from mlx_llama3v.cli import show
from mlx_llama3v.directory import leftovers, replacing, write_directory
from mlx_llama3v.errors import CheckpointError

pytestmark = pytest.mark.usefixtures("quick_disk")


def abandoned(folder: Path, name: str) -> Path:
    """What is left where a conversion to `name` was killed."""
    partial = folder / f".{name}.partial"
    partial.mkdir()
    (partial / "part-00000.safetensors").write_bytes(b"x" * 1500)
    return partial


def test_the_next_writer_of_a_name_clears_what_is_left(tmp_path: Path) -> None:
    partial = abandoned(tmp_path, "model")
    with replacing(tmp_path / "model") as new:
        assert list(new.iterdir()) == []
        (new / "config.json").write_text('{"model_type": "llama3v"}')
    assert not partial.exists() and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_other_names_are_told_with_their_size(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    partial = abandoned(tmp_path, "other")
    (tmp_path / ".notes.partial").mkdir()  # not ours: no weights in it
    assert leftovers(tmp_path) == [(partial, 1500)]
    with write_directory(tmp_path / "model") as new:
        (new / "model.gguf").touch()
        assert leftovers(tmp_path) == [(partial, 1500)]  # the one that is being written is not left over
    show.leftovers(tmp_path / "model")
    said = capsys.readouterr().err
    assert str(partial) in said and "1.5 kB" in said and "delete" in said
    assert partial.exists()


def test_two_writers_of_one_name(tmp_path: Path) -> None:
    with replacing(tmp_path / "model") as new:
        (new / "config.json").write_text('{"model_type": "llama3v"}')
        with pytest.raises(CheckpointError, match="being written by another process"), replacing(tmp_path / "model"):
            pass
        assert (new / "config.json").is_file()
    assert (tmp_path / "model" / "config.json").is_file()
    with replacing(tmp_path / "model"):  # it may be replaced once it is whole
        pass


def test_an_error_leaves_the_old_one(tmp_path: Path) -> None:
    with replacing(tmp_path / "model") as new:
        (new / "config.json").write_text('{"model_type": "llama3v"}')
    with pytest.raises(KeyboardInterrupt), replacing(tmp_path / "model"):
        raise KeyboardInterrupt
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
