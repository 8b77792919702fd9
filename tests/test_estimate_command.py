"""`embed --estimate` from the command line, and `embed` where pictures cannot be read."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

from mlx_llama3v.embeddings.store import Store
from tests.command_line import Cli, refused
from tests.test_estimate import model, photos  # noqa: F401  (fixtures)


def test_the_command(cli: Cli, model: Path, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    args = ("embed", "--model", model, "--data", photos, "--output", tmp_path / "s")
    shown = cli(*args, "--estimate")
    assert shown.status == 0 and "slices/s" in shown.out and "float16" in shown.out and "int4" in shown.out
    assert "left out: broken.jpg" in shown.err and "stored once" in shown.out
    whole = json.loads(cli(*args, "--estimate", "--json").out)
    assert whole["pictures"] == 6 and list(whole["unreadable"]) == ["broken.jpg"] and whole["fits"]["int4"] is True
    single = json.loads(cli(*args, "--estimate", "--json", "--max-slices", 0).out)
    assert single["slices"] == 6 < whole["slices"] and single["bytes"]["int8"] < whole["bytes"]["int8"]
    assert not (tmp_path / "s").exists()
    refused(cli(*args, "--estimate", "--strict"), "1 pictures or records would be left out")
    refused(cli(*args, "--json"), "--json belongs to --estimate")


def test_a_name_that_is_no_unicode_is_no_crash(cli: Cli, model: Path, photos: Path, tmp_path: Path) -> None:  # noqa: F811
    talk = [{"from": "human", "value": "<image>"}, {"from": "gpt", "value": "x"}]
    names = ("0.jpg", "\ud800/a.png", "\ud800.png")
    (tmp_path / "d.json").write_text(json.dumps([{"image": name, "conversations": talk} for name in names]))
    args = ("--model", model, "--data", tmp_path / "d.json", "--image-folder", photos, "--output", tmp_path / "s")
    said = json.loads(cli("embed", *args, "--estimate", "--json").out)
    assert said["pictures"] == 1 and [*said["unreadable"]] == [*names[1:]]
    assert cli("embed", *args, "--estimate").status == 0
    shown = cli("embed", *args)
    assert shown.status == 0 and "2 could not be read" in shown.out and "its name is not valid Unicode" in shown.err


def test_strict_is_an_error_after_everything_else_is_stored(
    cli: Cli,
    model: Path,  # noqa: F811
    photos: Path,  # noqa: F811
    tmp_path: Path,
) -> None:
    args = ("embed", "--model", model, "--data", photos, "--output", tmp_path / "s")
    refused(cli(*args, "--strict"), "1 pictures or records could not be read")
    assert len(Store(tmp_path / "s")) == 6
    lenient = cli(*args)
    assert lenient.status == 0 and "1 could not be read" in lenient.out
    (tmp_path / "good").mkdir()
    shutil.copy(photos / "0.jpg", tmp_path / "good")
    assert (
        cli("embed", "--model", model, "--data", tmp_path / "good", "--output", tmp_path / "g", "--strict").status == 0
    )
