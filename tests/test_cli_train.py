"""`train` from the command line: both stages and what is made of them, Ctrl-C, settings and refusals."""

from __future__ import annotations

import json
import os
import shlex
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.cli.interrupt import interruptible
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.quantize import QuantConfig
from tests.command_line import Cli, Outcome, World, first_picture, refused
from tests.hf_siglip import make_siglip


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
        "generate", "--model", world.model, "--run", tmp_path / "two", "--image", first_picture(world),
        "--prompt", "How many shapes are there?", "--max-tokens", 5, "--json",
    )  # fmt: skip
    assert outcome.status == 0, outcome.err
    assert json.loads(outcome.out)["prompt_tokens"] > 16
    refused(
        cli("fuse", "--model", world.model, "--run", tmp_path / "two", "--output", world.model), "is the model itself"
    )
    merged = cli("fuse", "--model", world.model, "--run", tmp_path / "two", "--output", tmp_path / "fused")
    assert merged.status == 0 and merged.out.strip().endswith(str(tmp_path / "fused")), merged
    again = cli(
        "generate", "--model", tmp_path / "fused", "--image", first_picture(world),
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
