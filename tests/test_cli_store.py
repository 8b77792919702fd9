"""`embed` and `store` from the command line: what they say, what they refuse, what they tell of damage."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from mlx_llama3v.weights import TINY
from tests.command_line import Cli, World, first_picture, refused


def test_embed_goes_on(cli: Cli, world: World, tmp_path: Path) -> None:
    args = ("embed", "--model", world.model, "--data", world.data.captions, "--output", tmp_path / "s")
    first = cli(*args, "--image-folder", world.data.images)
    shown = ("slices/s", "waiting for pictures", "% padding", "peak memory")
    assert [text for text in shown if text not in first.out] == []
    values = json.loads((tmp_path / "s" / "summary.json").read_text())
    assert values["new"] == 8 and values["slices_per_second"] > 0 and values["store"]["images"] == 8
    assert (
        0 <= values["waiting_share"] <= 1
        and 0 <= values["padding_share"] <= 0.1
        and values["peak_memory"] > 1e6
        and values["machine"]["mlx"]
    )
    assert first.status == 0 and "8 pictures encoded" in first.out and "Store:" in first.out.splitlines()[-1]
    again = cli(*args, "--image-folder", world.data.images)
    assert "0 pictures encoded" in again.out and "8 were there" in again.out


def test_embed_a_folder_with_a_broken_picture(cli: Cli, world: World, tmp_path: Path) -> None:
    folder = tmp_path / "pictures"
    folder.mkdir()
    shutil.copy(first_picture(world), folder / "good.png")
    (folder / "bad.png").write_bytes(b"not a picture")
    outcome = cli("embed", "--model", world.model, "--data", folder, "--output", tmp_path / "s")
    assert outcome.status == 0 and "bad.png" in outcome.err and "1 could not be read" in outcome.out


def test_embed_tells_a_file_from_a_place_and_a_picture_from_a_list(cli: Cli, world: World, tmp_path: Path) -> None:
    file = tmp_path / "captions.json"
    file.write_text("[]")
    model = ("embed", "--model", world.model)
    refused(cli(*model, "--data", world.data.captions, "--output", file), "captions.json is a file; expected a dir")
    refused(cli(*model, "--data", first_picture(world), "--output", tmp_path / "s"), "is a picture; expected a file")


def test_embed_mistakes(cli: Cli, world: World, tmp_path: Path) -> None:
    model, output = ("--model", world.model), ("--output", tmp_path / "s")
    refused(cli("embed", *model, "--data", tmp_path / "none.json", *output), "none.json")
    (tmp_path / "bad.json").write_text('[{"id": 1, ')
    refused(cli("embed", *model, "--data", tmp_path / "bad.json", *output), "bad.json")
    empty = tmp_path / "empty"
    empty.mkdir()
    refused(cli("embed", *model, "--data", empty, *output), "empty")
    refused(cli("embed", "--model", TINY / "siglip", "--data", world.data.captions, *output), "llama3v")
    refused(cli("embed", *model, "--data", world.data.captions, "--output", world.model), "holds a model")
    (tmp_path / "text.json").write_text(
        '[{"img": "a.png", "conversations": [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]}]'
    )
    refused(cli("embed", *model, "--data", tmp_path / "text.json", *output), "text.json", "no picture")
    learns = (
        "train",
        *model,
        "--data",
        tmp_path / "text.json",
        "--embeddings",
        world.store,
        "--output",
        tmp_path / "r",
    )
    refused(cli(*learns), "text.json", "has a picture")
    lost = cli("embed", *model, "--data", world.data.captions, "--image-folder", empty, *output)
    refused(lost, "captions.json", "--image-folder")
    outcome = cli(
        "embed", *model, "--data", world.data.captions, "--image-folder", world.data.images,
        "--output", world.store, "--max-slices", 2,
    )  # fmt: skip
    refused(outcome, "max_slices", "2", "6")


def test_store_info_and_verify(cli: Cli, world: World) -> None:
    values = json.loads(cli("store", "info", world.store, "--json").out)
    assert values["images"] == 8 and values["codec"] == "int4"
    assert {"slices", "tokens", "bytes"} <= values.keys()
    assert "images" in cli("store", "info", world.store).out
    assert "whole" in cli("store", "verify", world.store).out


def test_a_manifest_with_another_value_is_blamed_and_mended(cli: Cli, world: World, tmp_path: Path) -> None:
    store = tmp_path / "store"
    shutil.copytree(world.store, store)
    manifest = store / "manifest.json"
    values = json.loads(manifest.read_text())
    for change, field in (
        ({"codec": "int8"}, "codec"),
        ({"fingerprint": {**values["fingerprint"], "x": 1}}, "fingerprint"),
    ):
        manifest.write_text(json.dumps(values | change))
        blamed = cli("store", "verify", store)
        refused(blamed, str(store), "its manifest is not that of its shards, which are whole")
        said = " ".join(blamed.err.split())
        assert str(manifest) in said and field in said and "run again, writes it anew" in said
        assert "shard-" not in said and not (store / "damage.json").exists()
        embed = ("embed", "--model", world.model, "--data", world.data.captions, "--image-folder", world.data.images)
        assert "0 pictures encoded" in cli(*embed, "--output", store).out
        assert "all whole" in cli("store", "verify", store).out
        assert json.loads(manifest.read_text()) | {"fidelity": values["fidelity"]} == values


def test_ctrl_c_in_any_command_is_told(cli: Cli, world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(data: Path, *, partly: bool) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("mlx_llama3v.cli.store.picture_names", interrupted)
    outcome = cli("store", "prune", world.store, "--keep", world.data.captions)
    assert outcome.status == 130 and "run the same command again" in outcome.err


def test_store_mistakes(cli: Cli, world: World, tmp_path: Path) -> None:
    refused(cli("store", "info", tmp_path / "none"), "none")
    copy = tmp_path / "copy"
    shutil.copytree(world.store, copy)
    shard = next(copy.glob("shard-*.safetensors"))
    os.truncate(shard, shard.stat().st_size - 100)
    refused(cli("store", "info", copy), shard.name)


def test_damage_is_told_by_who_sets_it_aside(cli: Cli, world: World, tmp_path: Path) -> None:
    copy, some, other = tmp_path / "copy", tmp_path / "some.json", tmp_path / "other"
    some.write_text(json.dumps(json.loads(world.data.captions.read_text())[:2]))
    embed = ("embed", "--model", world.model, "--data", some, "--image-folder", world.data.images, "--output", copy)
    for strict in (False, True):
        shutil.copytree(world.store, copy)
        shard = next(copy.glob("shard-*.safetensors"))
        os.truncate(shard, shard.stat().st_size - 100)
        outcome = cli(*embed, *(["--strict"] if strict else []))
        assert f"{shard} is damaged" in outcome.err and "6 names of damaged shards not in" in outcome.err, outcome
        assert outcome.status == strict and ("1 damaged shard of" in outcome.err) == strict, outcome
        summary = json.loads((copy / "summary.json").read_text())
        assert len(summary["damage"]) == 1 and str(shard) in summary["damage"][0] and summary["lost"] == 6
        again = cli(*embed, "--strict")
        assert again.status == 0 and "damaged" not in again.err
        shutil.move(copy, other / str(strict))
    shutil.copytree(world.store, copy)
    os.truncate(shard, shard.stat().st_size - 100)
    merged = cli("store", "merge", other / "True", "--output", copy)
    assert merged.status == 0 and f"{shard} is damaged" in merged.err and "6 names of damaged" in merged.err


def test_prune_refuses_to_go_by_data_that_it_cannot_read(cli: Cli, world: World, tmp_path: Path) -> None:
    copy, keep = tmp_path / "copy", tmp_path / "keep.json"
    shutil.copytree(world.store, copy)
    rows = json.loads(world.data.captions.read_text())
    for row in rows[2:6]:
        row["conversations"] = "lost"
    keep.write_text(json.dumps(rows))
    prune = ("store", "prune", copy, "--keep", keep)
    refused(cli(*prune), "keep.json", "4 problems", "record 3", "record 5", "--force")
    assert json.loads(cli("store", "info", copy, "--json").out)["images"] == 8
    forced = cli(*prune, "--force")
    assert forced.status == 0 and "4 pictures dropped" in forced.out, forced
    assert "cannot be read" not in forced.err and json.loads(cli("store", "info", copy, "--json").out)["images"] == 4
