"""Every command's happy path and its likeliest mistakes: one sentence on stderr, status 1, no traceback."""

from __future__ import annotations

import io
import json
import os
import shlex
import shutil
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest
from rich.console import Console

from mlx_llama3v.cli import show
from mlx_llama3v.cli.app import COMMANDS, build
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.weights import TINY
from tests.command_line import Cli, World, first_picture, refused
from tests.hf_llama import make_llama
from tests.hf_siglip import make_siglip


def test_a_bar_that_begins_anew_has_a_new_rate() -> None:
    with show.bar("embed", "images") as bar:
        bar.update(900, 900, "reading headers")
        task = bar._progress.tasks[0]
        assert task.start_time is not None
        task.start_time -= 100
        bar.update(0, 900)
        assert (task.completed, task.total) == (0, 900) and (task.elapsed or 0) < 1


def test_a_bar_that_goes_on_shows_the_rate_of_now() -> None:
    with show.bar("pretrain", "steps") as bar:
        bar.begin(500, 1000)
        task = bar._progress.tasks[0]
        assert task.start_time is not None
        task.start_time -= 10
        bar.update(510, 1000)
        assert task.fields["rate"] == "1.0 steps/s"


def test_a_model_that_cannot_see_says_so(cli: Cli, world: World, tmp_path: Path) -> None:
    """What `convert` wrote answers like a bad model; whoever forgot --run would take it for one."""
    ask = ("generate", "--model", world.model, "--prompt", "What?", "--max-tokens", 1)
    assert "is untrained, so it cannot see; train one, and give it with --run" in cli(*ask).err
    assert "is untrained" in cli("export", "--model", world.model, "--format", "hf", "--output", tmp_path / "x").err
    with_run = cli(*ask, "--run", tmp_path)
    refused(with_run, "is not a run")
    assert "untrained" not in with_run.err


def test_a_run_in_the_place_of_a_model_is_named(cli: Cli, world: World, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text(json.dumps({"train": {}, "model_path": "/where/it/is"}))
    said = "is that of a training run; give its model (/where/it/is), and the run with --run"
    refused(cli("generate", "--model", tmp_path, "--prompt", "What?"), said)
    (tmp_path / "none").mkdir()
    wrong = cli("train", "--config", "pretain", "--model", world.model, "--data", "x", "--output", tmp_path / "none")
    refused(wrong, "pretain is missing", "or one of the presets pretrain and sft")


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


# --- generate, chat, classify


def test_generate_text_and_stdin(cli: Cli, world: World) -> None:
    args = ("generate", "--model", world.model, "--image", first_picture(world), "--max-tokens", 4)
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
        f"/image {first_picture(world)}",
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
    refused(cli("classify", "--model", world.model, "--image", first_picture(world), "--text", half), "UTF-8")
    outcome = cli("chat", "--model", world.model, "--max-tokens", 2, stdin=f"{half}\nWhat?\n")
    assert outcome.status == 0 and "UTF-8" in outcome.err and outcome.out.strip()  # the conversation goes on


def test_chat_takes_a_dropped_path(cli: Cli, world: World, tmp_path: Path) -> None:
    picture = tmp_path / "my picture.png"
    shutil.copy(first_picture(world), picture)
    dropped = str(picture).replace(" ", "\\ ")
    assert "next question" in cli("chat", "--model", world.model, stdin=dropped).out


def test_classify_from_both_kinds_of_directory(cli: Cli, world: World) -> None:
    args = ("--image", first_picture(world), "--text", "a red circle", "--text", "a chart", "--json")
    from_checkpoint = json.loads(cli("classify", "--model", TINY / "siglip", *args).out)
    from_model = json.loads(cli("classify", "--model", world.model, *args).out)
    assert from_checkpoint == from_model
    values = from_model[0]["probabilities"]
    assert set(values) == {"a red circle", "a chart"} and all(0 <= v <= 1 for v in values.values())
    assert "probability" in cli("classify", "--model", world.model, *args[:-1]).out


def test_classify_mistakes(cli: Cli, world: World, tmp_path: Path) -> None:
    picture = first_picture(world)
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


def test_of_several_processes_the_first_one_speaks(world: World, tmp_path: Path) -> None:
    for rank in (0, 1):
        done = subprocess.run(
            [sys.executable, "-c", "from mlx_llama3v.cli import main; main()", "store", "info", str(world.store)],
            env={**os.environ, "MLX_RANK": str(rank)}, capture_output=True, text=True, check=True,
        )  # fmt: skip
        assert bool(done.stdout) == (rank == 0), done
