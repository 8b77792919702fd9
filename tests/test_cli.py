"""Every command's happy path and its likeliest mistakes: one sentence on stderr, status 1, no traceback."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.cli import show
from mlx_llama3v.cli.app import COMMANDS, build, run
from mlx_llama3v.cli.interrupt import interruptible
from mlx_llama3v.demo.dataset import DataSet, draw
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.quantize import QuantConfig
from tests.hf_llama import make_llama
from tests.hf_siglip import make_siglip


@dataclass(frozen=True)
class Outcome:
    status: int
    out: str
    err: str


Cli = Callable[..., Outcome]


@pytest.fixture
def cli(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Cli:
    """Run the command line in this process."""

    def call(*args: object, stdin: str | bytes = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["llama3v-mlx", *map(str, args)])
        content = stdin if isinstance(stdin, bytes) else stdin.encode(errors="surrogateescape")
        monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(content), encoding="utf-8"))
        sys.stderr.reconfigure(errors="backslashreplace")  # as the real one is
        monkeypatch.setenv("COLUMNS", "200")
        capsys.readouterr()
        status = 0
        try:
            run()
        except SystemExit as end:
            status = int(end.code or 0)
        said = capsys.readouterr()
        return Outcome(status, said.out, said.err)

    return call


def refused(outcome: Outcome, *words: str) -> None:
    """One sentence that names what was wrong."""
    assert outcome.status == 1, outcome
    assert "Traceback" not in outcome.err
    sentence = outcome.err[outcome.err.index("error: ") :].strip()
    assert "\n" not in sentence, sentence
    for word in words:
        assert word in sentence, sentence


@dataclass(frozen=True)
class World:
    """Everything a user has after convert and embed."""

    data: DataSet
    model: Path
    store: Path
    picture: Path


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    from mlx_llama3v.storing import embed_data

    root = tmp_path_factory.mktemp("world")
    data = draw(root / "data", 8, 9, seed=0)
    convert(TINY / "siglip", TINY / "llama", root / "model")
    embed_data(root / "model", data.captions, root / "store", image_folder=data.images)
    yield World(data, root / "model", root / "store", data.images / "train-00000.png")


def _picture(world: World) -> Path:
    return sorted(world.data.images.iterdir())[0]


def test_a_bar_that_begins_anew_has_a_new_rate() -> None:
    with show.bar("embed", "images") as bar:
        bar.update(900, 900, "reading headers")
        task = bar._progress.tasks[0]
        assert task.start_time is not None
        task.start_time -= 100
        bar.update(0, 900)
        assert (task.completed, task.total) == (0, 900) and (task.elapsed or 0) < 1


@pytest.mark.parametrize("width", [80, 160])
def test_a_bar_shows_all_that_it_says(width: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """In 80 columns, a Mac's terminal, a long note stands below; cut were the bar, the count and the rate."""
    said = io.StringIO()
    monkeypatch.setattr(show, "err", Console(file=said, width=width, markup=False))
    note = "loss 0.264, 4,867 tokens/s, 40.0 images/s, 112.3 MB"
    with show.bar("train (pretrain)", "steps") as bar:
        bar.update(0, 600000)
        bar._progress.tasks[0].start_time -= 3600  # type: ignore[operator]
        bar.update(300000, 600000, note)
    lines = said.getvalue().splitlines()
    assert "…" not in said.getvalue() and "300000/600000" in lines[0] and "steps/s" in lines[0] and "━" in lines[0]
    assert lines[0 if width == 160 else 1].strip().endswith(note)


# --- help


def test_help_of_every_command_has_an_example(cli: Cli) -> None:
    names = [[name] for name in COMMANDS if name != "store"] + [["store", "info"], ["store", "verify"]]
    assert len(names) >= 10
    assert all(name in cli("--help").out for name in COMMANDS)
    assert len(build().registered_commands) == len(COMMANDS) - 1
    for name in names:
        outcome = cli(*name, "--help")
        assert outcome.status == 0 and "Example" in outcome.out, name
        examples = [line.split() for line in outcome.out.splitlines() if line.startswith("    llama3v-mlx ")]
        known = {word.strip(",") for line in outcome.out.splitlines() if line[:3] == "  -" for word in line.split()}
        for example in examples:  # a line each, and of options that exist
            assert example[1 : 1 + len(name)] == name
            assert {word for word in example if word[0] == "-"} <= known, example
        assert examples, name


def test_help_names_every_option_whole(cli: Cli, monkeypatch: pytest.MonkeyPatch) -> None:
    """On a terminal of 80 columns."""
    monkeypatch.setenv("COLUMNS", "80")
    words = cli("train", "--help").out.split()
    for item in fields(TrainConfig):
        flag = item.metadata.get("flags", [f"--{item.name.replace('_', '-')}"])[0]
        assert flag.partition("/")[0] in [word.partition("/")[0].strip(",") for word in words], flag


def test_presets_are_for_train_alone(cli: Cli) -> None:
    assert "preset" in cli("train", "--help").out and "preset" not in cli("generate", "--help").out
    refused(cli("generate", "--model", "m", "--prompt", "x", "--config", "sft"), "sft is missing")


def test_version(cli: Cli) -> None:
    from mlx_llama3v import __version__

    assert cli("--version").out.strip() == __version__


# --- convert


def test_convert(cli: Cli, tmp_path: Path) -> None:
    outcome = cli("convert", "--vision", TINY / "siglip", "--llm", TINY / "llama", "--mlx-path", tmp_path / "m")
    assert outcome.status == 0 and str(tmp_path / "m") in outcome.out.splitlines()[-1]
    assert (tmp_path / "m" / "model.safetensors.index.json").is_file()


def test_convert_quantized_reports_every_layer(cli: Cli, tmp_path: Path) -> None:
    args = ("--vision", TINY / "siglip", "--llm", TINY / "llama", "--mlx-path", tmp_path / "m", "-q")
    outcome = cli("convert", *args)
    assert outcome.status == 0 and "bits per weight" in outcome.out and "q_proj" in outcome.out
    assert "On a probe sentence the logits moved by" in outcome.out


def test_convert_mistakes(cli: Cli, tmp_path: Path) -> None:
    siglip, llama, out = TINY / "siglip", TINY / "llama", tmp_path / "m"
    refused(cli("convert", "--vision", llama, "--llm", siglip, "--mlx-path", out), str(llama))
    refused(cli("convert", "--vision", tmp_path / "none", "--llm", llama, "--mlx-path", out), "none")
    pickles = tmp_path / "pickles"
    shutil.copytree(llama, pickles)
    (pickles / "model.safetensors").rename(pickles / "pytorch_model.bin")
    refused(
        cli("convert", "--vision", siglip, "--llm", pickles, "--mlx-path", out),
        "pytorch_model.bin",
        "safetensors",
    )
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "thesis.txt").write_text("do not touch")
    refused(cli("convert", "--vision", siglip, "--llm", llama, "--mlx-path", mine), "mine")
    assert (mine / "thesis.txt").read_text() == "do not touch"
    refused(cli("convert", "--vision", siglip, "--llm", llama, "--mlx-path", out, "-q", "--q-bits", 7), "7")
    refused(cli("convert", "--vision", siglip, "--llm", llama, "--mlx-path", out, "--projector", "magic"), "magic")
    wrong = cli("convert", "--vision", siglip, "--llm", llama, "--mlx-path", out, "--dtype", "int8")
    assert wrong.err.startswith("error: dtype is 'int8'")  # no empty progress bar above it
    (tmp_path / "file").touch()
    refused(cli("convert", "--vision", siglip, "--llm", llama, "--mlx-path", tmp_path / "file" / "m"), "file")
    assert not out.exists()


def test_a_model_to_be_exported_sees_squares(cli: Cli, world: World, tmp_path: Path) -> None:
    """Made for it, trained, exported and converted back: nothing is squashed that was not so in training."""
    made = ("--vision", TINY / "siglip", "--llm", TINY / "llama", "--projector", "mlp", "--tiling", "squash")
    cli("convert", *made, "--mlx-path", tmp_path / "m")
    data = ("--model", tmp_path / "m", "--data", world.data.captions)
    cli("embed", *data, "--image-folder", world.data.images, "--output", tmp_path / "s")
    cli("train", *data, "--embeddings", tmp_path / "s", "--iters", 1, "--output", tmp_path / "one")
    made_of = ("--model", tmp_path / "m", "--run", tmp_path / "one", "--output", tmp_path / "hf")
    assert cli("export", *made_of).status == 0
    assert cli("convert", "--hf-path", tmp_path / "hf", "--mlx-path", tmp_path / "back").status == 0
    sft = ("--data", world.data.conversations, "--embeddings", tmp_path / "s", "--iters", 1, "--stage", "sft")
    on = cli("train", "--model", tmp_path / "back", *sft, "--output", tmp_path / "two")  # its projector is trained
    assert on.status == 0, on.err
    refused(cli("export", "--model", world.model, "--output", tmp_path / "x"), "attention")
    refused(cli("convert", *made, "--max-slices", 2, "--mlx-path", tmp_path / "n"), "--max-slices")


def test_convert_refuses_what_would_have_no_effect(cli: Cli, tmp_path: Path) -> None:
    parts = ("convert", "--vision", TINY / "siglip", "--llm", TINY / "llama", "--mlx-path", tmp_path / "m")
    refused(cli(*parts, "--q-bits", 4, "--q-mode", "affine"), "--q-bits and --q-mode", "-q")
    refused(cli(*parts, "-q", "--q-bits", 8, "--quant-predicate", "mixed_2_6"), "--quant-predicate", "--q-bits")
    whole = ("convert", "--hf-path", tmp_path, "--mlx-path", tmp_path / "m")
    refused(cli(*whole, "--projector", "mlp", "--seed", 1), "--projector and --seed", "--hf-path")
    refused(cli(*whole, "--max-slices", 2), "--max-slices", "--hf-path")


# --- embed and store


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
    shutil.copy(_picture(world), folder / "good.png")
    (folder / "bad.png").write_bytes(b"not a picture")
    outcome = cli("embed", "--model", world.model, "--data", folder, "--output", tmp_path / "s")
    assert outcome.status == 0 and "bad.png" in outcome.err and "1 could not be read" in outcome.out


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


# --- train


def _train(cli: Cli, world: World, output: Path, *more: object, stage: str = "pretrain") -> Outcome:
    data = world.data.captions if stage == "pretrain" else world.data.conversations
    return cli(
        "train", "--model", world.model, "--stage", stage, "--data", data, "--embeddings", world.store,
        "--output", output, "--batch-size", 4, "--iters", 3, *more,
    )  # fmt: skip


def test_train_both_stages_and_use_them(cli: Cli, world: World, tmp_path: Path) -> None:
    first = _train(cli, world, tmp_path / "one")
    assert first.status == 0, first.err
    assert (tmp_path / "one" / "projector.safetensors").is_file()
    assert (tmp_path / "one" / "metrics.jsonl").is_file() and (tmp_path / "one" / "loss.png").is_file()
    second = _train(cli, world, tmp_path / "two", "--projector", tmp_path / "one", stage="sft")
    assert second.status == 0, second.err
    assert (tmp_path / "two" / "adapters.safetensors").is_file()
    outcome = cli(
        "generate", "--model", world.model, "--run", tmp_path / "two", "--image", _picture(world),
        "--prompt", "How many shapes are there?", "--max-tokens", 5, "--json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["prompt_tokens"] > 16
    merged = cli("fuse", "--model", world.model, "--run", tmp_path / "two", "--output", tmp_path / "fused")
    assert merged.status == 0 and merged.out.strip().endswith(str(tmp_path / "fused")), merged
    again = cli(
        "generate", "--model", tmp_path / "fused", "--image", _picture(world),
        "--prompt", "How many shapes are there?", "--max-tokens", 5, "--json",
    )  # fmt: skip
    assert json.loads(again.out)["tokens"] == json.loads(outcome.out)["tokens"]
    packed = convert(TINY / "siglip", TINY / "llama", tmp_path / "q4", quantize=QuantConfig(4, 32)).path
    whole = cli("fuse", "--model", packed, "--run", tmp_path / "two", "--output", tmp_path / "whole", "--dequantize")
    assert whole.status == 0 and load_config(tmp_path / "whole").quantization is None, whole
    refused(cli("fuse", "--model", world.model, "--run", world.model, "--output", tmp_path / "x"), "is not a run")


def test_rows_that_are_too_long_are_told_before_the_first_step(cli: Cli, world: World, tmp_path: Path) -> None:
    """By id, ten of each at most; cut, left out or refused, as asked."""
    answers = {f"row-{n}": "a red circle " * (1 if n < 3 else 40) for n in range(16)}
    first = json.loads(world.data.captions.read_text())[0]
    rows = [
        {**first, "id": name, "conversations": [first["conversations"][0], {"from": "gpt", "value": answer}]}
        for name, answer in answers.items()
    ]
    (tmp_path / "long.json").write_text(json.dumps(rows))
    words = {"truncate-text": "shortened: record row-", "drop": "left out: record row-"}
    for how in ("truncate-text", "drop", "error"):
        said = cli(
            "train", "--model", world.model, "--data", tmp_path / "long.json", "--embeddings", world.store, "--output",
            tmp_path / how, "--iters", 1, "--long-rows", how, "--max-seq-length", 100, "--dry-run",
        )  # fmt: skip
        if how == "error":
            refused(said, "13 of 16 rows have more than 100 tokens", "row-3", "and 3 more")
            continue
        told = [line for line in said.err.splitlines() if words[how] in line]
        assert said.status == 0 and len(told) == 10 and "... and 3 more" in said.err
        assert all(f"row-{n}" in line and " tokens" in line for n, line in enumerate(told, 3))
        assert f"{16 if how == 'truncate-text' else 3} rows (none over" in said.err


def test_ctrl_c_saves_and_says_how_to_go_on(cli: Cli, world: World, tmp_path: Path) -> None:
    output = tmp_path / "run"

    def press() -> None:
        metrics = output / "metrics.jsonl"
        while not (metrics.exists() and metrics.read_text()):
            time.sleep(0.02)
        os.kill(os.getpid(), signal.SIGINT)

    threading.Thread(target=press, daemon=True).start()
    stopped = _train(cli, world, output, "--iters", 5000, "--steps-per-report", 1)
    assert stopped.status == 130 and "stopping after this step" in stopped.err
    step = int(stopped.out[stopped.out.index("Stopped after step ") :].split()[3].rstrip(",").replace(",", ""))
    last = shlex.split(stopped.out.strip().splitlines()[-1])
    assert last[0] == "llama3v-mlx" and last[-1] == "--resume" and "mlx.launch" not in stopped.out
    resumed = cli(*last[1:-1], "--iters", step + 1, "--resume")
    assert resumed.status == 1 and "iters" in resumed.err  # the schedule of the run is another one then
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), interruptible() as asked:
        assert not asked()
        os.kill(os.getpid(), signal.SIGINT)
        assert asked()
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before


def test_sft_goes_on_from_a_projector_alone(cli: Cli, world: World, tmp_path: Path, monkeypatch: Any) -> None:
    """As in the preset's own first line: model and store are those of the run, wherever one stands."""
    monkeypatch.chdir(world.model.parent)
    at_hand = ("--model", world.model.name, "--embeddings", world.store.name, "--iters", 1)
    cli("train", "--config", "pretrain", *at_hand, "--data", world.data.captions, "--output", tmp_path / "one")
    monkeypatch.chdir(tmp_path)
    args = ("train", "--config", "sft", "--projector", "one", "--data", world.data.conversations, "--iters", 1)
    outcome = cli(*args, "--output", "two")
    assert outcome.status == 0, outcome.err
    assert (tmp_path / "two" / "adapters.safetensors").is_file()
    assert "no row is held out, so nothing is evaluated: val_split 0.002 leaves none beside" in outcome.err
    on = cli("train", "--projector", "one", "--data", world.data.captions, "--iters", 1, "--output", "on", "--dry-run")
    assert on.status == 0 and "as in the pretrain run" not in on.err, on.err  # stage pretrain finds the model, too
    refused(cli(*args[:4], world.model, *args[5:], "--output", "three"), "--model")  # no run: nothing to take over
    told = json.loads((tmp_path / "one" / "config.json").read_text())
    told["store"]["path"] = str(tmp_path / "gone")
    (tmp_path / "one" / "config.json").write_text(json.dumps(told))
    refused(cli(*args, "--output", "three"), str(tmp_path / "gone"), "--embeddings")


def test_train_writes_over_nothing(cli: Cli, world: World, tmp_path: Path) -> None:
    before = (world.model / "config.json").read_bytes()
    refused(_train(cli, world, world.model), str(world.model), "model")
    refused(_train(cli, world, world.store), str(world.store), "store")
    assert (world.model / "config.json").read_bytes() == before and not (world.store / "config.json").exists()


def test_train_config_file_and_command_line(cli: Cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "c.toml").write_text("learning_rate = 0.5\nseed = 7\n")
    outcome = _train(cli, world, tmp_path / "run", "--config", tmp_path / "c.toml", "--seed", 8)
    assert outcome.status == 0, outcome.err
    (tmp_path / "d.toml").write_text('report_to = "wandb"\nlora_keys = "q_proj"\nstage = "sft"\n')
    refused(_train(cli, world, tmp_path / "sft", "--config", tmp_path / "d.toml"), "stage pretrain")  # one word: a list
    text = (tmp_path / "run" / "config.json").read_text()
    assert '"learning_rate": 0.5' in text and '"seed": 8' in text


def test_train_mistakes(cli: Cli, world: World, tmp_path: Path) -> None:
    output = tmp_path / "run"
    base = ("train", "--model", world.model, "--stage", "pretrain", "--output", output)
    refused(cli(*base, "--data", world.data.captions, "--embeddings", tmp_path / "none"), "none")
    refused(cli(*base, "--data", tmp_path / "no.json", "--embeddings", world.store), "no.json")
    assert cli("train", "--model", world.model, "--stage", "both").status == 2
    (tmp_path / "c.toml").write_text("learnign_rate = 1\n")
    refused(_train(cli, world, output, "--config", tmp_path / "c.toml"), "learnign_rate")
    (tmp_path / "d.toml").write_text("[train]\nlearning_rate = 1\n")
    refused(_train(cli, world, output, "--config", tmp_path / "d.toml"), "[train]", "section")
    refused(_train(cli, world, output, "--tune", "dora", "--lora-keys", "q_proj"), "--tune, --lora-keys", "--stage sft")
    refused(_train(cli, world, output, "--codec", "int8"), "--codec", "--embed-ahead")
    refused(_train(cli, world, output, "--image-folder", world.data.images), "--image-folder", "--embed-ahead")
    refused(_train(cli, world, output, "--val-rows", 2, "--steps-per-eval", 1), "--steps-per-eval", "--val-split")
    refused(_train(cli, world, output, "--compile", "--lanes", 2), "--lanes", "compiled")
    sft = ("--projector", tmp_path / "one")
    refused(_train(cli, world, output, *sft, "--tune", "full", "--lora-rank", 4, stage="sft"), "--lora-rank", "full")
    refused(_train(cli, world, output, *sft, "--projector-learning-rate", 1, stage="sft"), "--tune-projector")
    refused(_train(cli, world, output, *sft, "--lora-dropout", 0.1, "--lanes", 2, stage="sft"), "--lanes", "dropout")
    refused(_train(cli, world, output, "--config", "pretrain", "--grad-accumulation-steps", 2), "rows_per_step")
    refused(_train(cli, world, output, "--learning-rate", -1), "learning_rate", "-1")
    strangers = [{"id": "x", "image": "x.png", "conversations": [{"from": "gpt", "value": "A cat."}]}]
    (tmp_path / "x.json").write_text(json.dumps(strangers))
    refused(cli(*base, "--data", tmp_path / "x.json", "--embeddings", world.store), "x.json")
    refused(_train(cli, world, output, "--projector", tmp_path / "none", stage="sft"), "none")
    refused(_train(cli, world, output, stage="sft"), "--projector")
    make_siglip(tmp_path / "other")
    cli("convert", "--vision", tmp_path / "other", "--llm", TINY / "llama", "--mlx-path", tmp_path / "m")
    base = ("train", "--model", tmp_path / "m", "--output", output)
    refused(cli(*base, "--data", world.data.captions, "--embeddings", world.store), str(world.store), "vision")


# --- generate, chat, classify


def test_generate_text_and_stdin(cli: Cli, world: World) -> None:
    args = ("generate", "--model", world.model, "--image", _picture(world), "--max-tokens", 4)
    asked = cli(*args, "--prompt", "What is it?", "--verbose")
    assert asked.status == 0 and "prompt: " in asked.err and "visual tokens" in asked.err
    assert cli(*args, "--prompt", "-", stdin="What is it?").out == asked.out


def test_generate_mistakes(cli: Cli, world: World, tmp_path: Path) -> None:
    args = ("generate", "--model", world.model, "--prompt", "What?")
    refused(cli(*args, "--image", tmp_path / "none.png"), "none.png")
    (tmp_path / "bad.jpg").write_bytes(b"\xff\xd8\xff broken")
    refused(cli(*args, "--image", tmp_path / "bad.jpg"), "bad.jpg")
    refused(cli("generate", "--model", tmp_path / "none", "--prompt", "What?"), "none")
    refused(cli(*args, "--run", tmp_path), str(tmp_path))
    refused(cli(*args, "--temp", -1), "temp")
    refused(cli(*args, "--output", "a.jsonl", "--batch-size", 2), "--output, --batch-size", "--prompts")
    many = ("generate", "--model", world.model, "--prompts")
    refused(cli(*many, tmp_path / "bad.jpg"), "bad.jpg", "UTF-8")
    refused(cli(*many, tmp_path / "bad.jpg", "--json"), "--json")
    refused(cli("generate", "--model", world.model, "--prompt", "long " * 3000), "context")


def test_chat_takes_pictures_and_commands(cli: Cli, world: World) -> None:
    lines = [
        "/help",
        f"/image {_picture(world)}",
        "What is it?",
        "/reset",
        "/image none.png",
        "/what",
        "Hello",
    ]
    outcome = cli("chat", "--model", world.model, "--max-tokens", 3, stdin="\n".join(lines))
    assert outcome.status == 0, outcome.err
    assert "next question" in outcome.out and "forgotten" in outcome.out
    assert "/what is neither a command" in outcome.err and "none.png" in outcome.err and "Traceback" not in outcome.err


def test_text_that_is_no_text_is_told(cli: Cli, world: World) -> None:
    """Bytes that are not UTF-8 reach Python as half characters."""
    half = "caf\udce9"
    refused(cli("generate", "--model", world.model, "--prompt", half), "UTF-8", "udce9")
    refused(cli("classify", "--model", world.model, "--image", _picture(world), "--text", half), "UTF-8")
    outcome = cli("chat", "--model", world.model, "--max-tokens", 2, stdin=f"{half}\nWhat?\n")
    assert outcome.status == 0 and "UTF-8" in outcome.err and outcome.out.strip()  # the conversation goes on


def test_chat_takes_a_dropped_path(cli: Cli, world: World, tmp_path: Path) -> None:
    picture = tmp_path / "my picture.png"
    shutil.copy(_picture(world), picture)
    dropped = str(picture).replace(" ", "\\ ")
    assert "next question" in cli("chat", "--model", world.model, stdin=dropped).out


def test_classify_from_both_kinds_of_directory(cli: Cli, world: World) -> None:
    args = ("--image", _picture(world), "--text", "a red circle", "--text", "a chart", "--json")
    from_checkpoint = json.loads(cli("classify", "--model", TINY / "siglip", *args).out)
    from_model = json.loads(cli("classify", "--model", world.model, *args).out)
    assert from_checkpoint == from_model
    values = from_model[0]["probabilities"]
    assert set(values) == {"a red circle", "a chart"} and all(0 <= v <= 1 for v in values.values())
    assert "probability" in cli("classify", "--model", world.model, *args[:-1]).out


def test_classify_mistakes(cli: Cli, world: World, tmp_path: Path) -> None:
    picture = _picture(world)
    refused(cli("classify", "--model", TINY / "llama", "--image", picture, "--text", "x"), str(TINY / "llama"))
    refused(cli("classify", "--model", world.model, "--image", tmp_path / "no.png", "--text", "x"), "no.png")
    assert cli("classify", "--model", world.model, "--image", picture).status == 2
    half = make_siglip(tmp_path / "half", full=False)
    refused(cli("classify", "--model", half, "--image", picture, "--text", "x"), "text tower")
    assert make_llama(tmp_path / "llama").is_dir()


# --- demo and doctor


def test_demo_in_miniature(cli: Cli, tmp_path: Path) -> None:
    output = tmp_path / "my demo"
    small = ("--images", 12, "--questions", 9, "--pretrain-epochs", 1, "--sft-epochs", 1)
    outcome = cli("demo", "--output", output, *small)
    assert outcome.status == 0, outcome.err
    values = json.loads((output / "demo.json").read_text())
    assert {
        "overall",
        "blind",
        "kinds",
        "small_text_split",
        "small_text_unsplit",
        "seconds",
        "seed",
        "device",
    } <= set(values)
    assert sum(kind["n"] for kind in values["kinds"].values()) == 9
    assert (output / "gallery.png").stat().st_size > 1000
    for command in [line for line in outcome.out.splitlines() if line.startswith("  llama3v-mlx ")]:
        assert cli(*shlex.split(command)[1:], stdin="What is it?").status == 0, command
    assert cli("demo", "--output", tmp_path / "none", "--questions", 0).status == 2
    (output / "mine.txt").write_text("keep me")
    refused(cli("demo", "--output", output, *small), "mine.txt")
    assert (output / "mine.txt").exists() and (output / "demo.json").exists()


def test_doctor(cli: Cli) -> None:
    assert {"device", "blas", "mlx", "advice"} <= json.loads(cli("doctor", "--json").out).keys()
    assert "product rate" in cli("doctor").out


# --- convert --hf-path


def test_convert_finished_model(cli: Cli, tmp_path: Path) -> None:
    from tests.hf_llava import make_llava

    source = make_llava(tmp_path / "hf")
    outcome = cli("convert", "--hf-path", source, "--dry-run", "--mlx-path", tmp_path / "m")
    assert "Family: hf-llava" in outcome.out and not (tmp_path / "m").exists()
    cli("convert", "--hf-path", source, "--mlx-path", tmp_path / "m")
    assert (tmp_path / "m" / "config.json").is_file()
    refused(cli("convert", "--hf-path", source, "--vision", source, "--mlx-path", tmp_path / "n"), "--hf-path")
    refused(cli("convert", "--mlx-path", tmp_path / "n"), "--hf-path")


# --- export


def test_export(cli: Cli, tmp_path: Path) -> None:
    from tests.hf_llava import make_llava

    cli("convert", "--hf-path", make_llava(tmp_path / "hf"), "--mlx-path", tmp_path / "m")
    outcome = cli("export", "--model", tmp_path / "m", "--output", tmp_path / "out")
    assert str(tmp_path / "out") in outcome.out and (tmp_path / "out" / "processor_config.json").is_file()
    again = cli("convert", "--hf-path", tmp_path / "out", "--mlx-path", tmp_path / "back")
    assert again.status == 0 and again.out.splitlines()[-1].endswith("back"), again.err
    refused(cli("export", "--model", tmp_path / "m", "--output", tmp_path / "p", "--format", "peft"), "--run")
    wrong = ("export", "--model", tmp_path / "m", "--output", tmp_path / "q")
    refused(cli(*wrong, "--dry-run"), "--dry-run", "--format hub")
    refused(cli(*wrong, "--format", "hub", "--repo", "a/b", "--gguf-type", "q8_0"), "--gguf-type", "--format gguf")
    assert not (tmp_path / "q").exists()
    shown = " ".join(cli("export", "--help").out.split())
    for name in ("hf", "peft", "gguf", "hub"):  # an example of each
        assert f"--format {name} --" in shown


def test_embed_ahead_takes_pool_and_slices(cli: Cli, world: World, tmp_path: Path) -> None:
    outcome = cli(
        "train", "--model", world.model, "--data", world.data.captions, "--embed-ahead", "--image-folder",
        world.data.images, "--pool", 2, "--max-slices", 0, "--output", tmp_path / "run", "--batch-size", 4,
        "--iters", 2,
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    told = json.loads((tmp_path / "run" / "config.json").read_text())["store"]
    assert told["post"]["pool"] == 2 and told["tiling"]["max_slices"] == 0
    refused(_train(cli, world, tmp_path / "two", "--pool", 2), "--pool would have no effect")


def test_of_several_processes_the_first_one_speaks(world: World, tmp_path: Path) -> None:
    for rank in (0, 1):
        done = subprocess.run(
            [sys.executable, "-c", "from mlx_llama3v.cli import main; main()", "store", "info", str(world.store)],
            env={**os.environ, "MLX_RANK": str(rank)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert bool(done.stdout) == (rank == 0), done
