"""Presets, TOML files, what stage sft takes over, and reports to other libraries."""

from __future__ import annotations

import json
import shutil
import sys
import tomllib
from dataclasses import fields, replace
from datetime import date
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import typer

from mlx_llama3v.cli import train as command
from mlx_llama3v.cli.options import PRESETS, config_file
from mlx_llama3v.embeddings.store import Manifest, Store
from mlx_llama3v.errors import RunError
from mlx_llama3v.train.config import TrainConfig
from tests.tiny_run import make_store, run, settings

RECIPE = {"pretrain": (256, 1e-3), "sft": (128, 2e-5)}  # LLaVA-1.5's batch and learning rate
LORA = {"pretrain": 1e-3, "sft": 2e-4}  # LLaVA-1.5's, too


@pytest.mark.parametrize("stage", RECIPE)
def test_presets_are_the_recipe(stage: str) -> None:
    values = tomllib.loads((PRESETS / f"{stage}.toml").read_text())
    assert values.keys() <= {item.name for item in fields(TrainConfig)}
    config = TrainConfig(**values)
    whole = replace(config, tune="full").resolved()  # the recipe tunes the whole decoder
    assert (config.stage, config.rows_per_step, whole.learning_rate) == (stage, *RECIPE[stage])
    assert config.resolved().learning_rate == LORA[stage]
    assert (config.warmup, config.min_learning_rate, config.epochs) == (0.03, 0.0, 1)
    assert config.batch_size == 0, "as many as fit"
    for fits in (1, 4, 32, 1024):
        found = replace(config, batch_size=fits).resolved()
        assert found.batch_size * found.grad_accumulation_steps == config.rows_per_step


@pytest.mark.parametrize(("rows", "batch", "batches"), [(100, 64, (2, 50)), (10, 4, (3, 4)), (5, 8, (1, 5))])
def test_rows_of_a_step_are_split_evenly(rows: int, batch: int, batches: tuple[int, int]) -> None:
    config = TrainConfig(batch_size=batch, rows_per_step=rows).resolved()
    assert (config.grad_accumulation_steps, config.batch_size) == batches


def test_a_batch_that_is_fitted_to_the_memory_has_lanes() -> None:
    assert TrainConfig(batch_size=0).resolved().lanes == TrainConfig(batch_size=64).resolved().lanes


def _context(name: str) -> typer.Context:
    return typer.Context(typer.main.get_command(_app()), info_name=name)  # type: ignore[return-value]


def _app() -> typer.Typer:
    app = typer.Typer()
    command.register(app)
    return app


def test_an_unknown_key_names_the_nearest(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("learnign_rate = 1\nlora-rnak = 4\n")
    with pytest.raises(RunError, match=r"learnign_rate \(did you mean learning_rate\?\).*\(did you mean lora_rank\?\)"):
        config_file(_context("train"), tmp_path / "a.toml")
    context = _context("train")
    config_file(context, Path("sft"))
    assert context.default_map is not None and context.default_map["rows_per_step"] == 128


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("keep = true", "keep is true; expected a value, since it is no switch"),
        ('keep = "three"', 'keep is "three": .*valid integer'),
        ("iters = 1.5", "iters is 1.5: .*valid integer"),
        ("iters = [1, 2]", r"iters is \[1, 2\]: .*valid integer"),
        ('learning-rate = "fast"', 'learning_rate is "fast": '),
        ('tune = "qlora"', 'tune is "qlora": .*not one of'),
        ("pack = 1", "pack is 1; expected true or false"),
        ("lora-keys = [1, true]", r"lora_keys is \[1, true\]; expected a value"),
        ("data = 1979-05-27", None),
    ],
)
def test_a_value_of_the_wrong_kind_names_file_and_option(line: str, words: str | None, tmp_path: Path) -> None:
    """A TOML file is held to what the command line takes: `iters = 1.5` was trained as one step."""
    (tmp_path / "a.toml").write_text(f'lora-keys = "q_proj"\n{line}\n' if "keys" not in line else line)
    context = _context("train")
    if words is None:
        config_file(context, tmp_path / "a.toml")
        assert context.default_map == {"lora_keys": ["q_proj"], "data": date(1979, 5, 27)}
        return
    with pytest.raises(RunError, match=rf"a\.toml: {words}"):
        config_file(context, tmp_path / "a.toml")


def test_sft_takes_over_what_it_should(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = TrainConfig(max_seq_length=512, seed=7, val_split=0.1, learning_rate=0.5, batch_size=64)
    (tmp_path / "config.json").write_text(json.dumps({"train": config.to_dict(), "model": "m"}))
    before = command._before(tmp_path)
    values = TrainConfig(stage="sft", seed=9).to_dict()
    every = {**vars(command.Embedding()), **values}
    command._check_used(every, before["train"], {"steps_per_eval"})  # there will be rows for it
    command._check_used(every, {}, {"steps_per_eval", "val_split"})  # a preset's, and --val-split 0
    with pytest.raises(RunError, match="--steps-per-eval would have no effect"):
        command._check_used(every, {}, {"steps_per_eval"})
    command._inherit(values, before["train"], {"seed"})
    assert (values["max_seq_length"], values["val_split"], values["seed"]) == (512, 0.1, 9)
    assert values["learning_rate"] is None and values["batch_size"] == TrainConfig().batch_size
    said = capsys.readouterr().err
    assert "max_seq_length is 512, as in the pretrain run" in said
    assert "seed is 9; the pretrain run had 7" in said
    assert set(command.INHERITED) <= values.keys() and command._before(tmp_path / "none.safetensors") == {}
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(RunError, match=r"config\.json is damaged"):
        command._before(tmp_path)


def test_sft_makes_embeddings_as_the_run_before_had_them(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Or its projector would meet slices, with markers, that it never saw."""
    store = {"path": "x", "codec": "float16", "post": {"pool": 2}, "tiling": {"mode": "uhd", "max_slices": 0}}
    before = {"train": TrainConfig(seed=3).to_dict(), "store": store}
    for ahead, stage, taken in ((True, "sft", True), (False, "sft", False), (True, "pretrain", False)):
        values = {**vars(command.Embedding(embed_ahead=ahead)), **TrainConfig(stage=stage).to_dict()}
        command._inherit(values, command._inherited(before, values), {"pool"})
        expected = ("float16", None, 0) if taken else (vars(command.Embedding())["codec"], None, None)
        assert (values["codec"], values["pool"], values["max_slices"]) == expected
        assert ("pool is None; the pretrain run had 2" in capsys.readouterr().err) == taken
        assert values["seed"] == (3 if stage == "sft" else 0)
    made = tmp_path / "store"
    made.mkdir()
    for held, said in ((0, False), (6, True)):
        Manifest({"tiling": {"mode": "uhd", "max_slices": held}}, "float16", {}).write(made)
        command._compare_slices(before, made)
        found = capsys.readouterr().err
        assert ("holds up to 6 slices beside the overview; the pretrain run had 0" in found.replace("\n", " ")) == said
    command._compare_slices({}, made)
    command._compare_slices(before, None)


def test_the_last_lines_say_what_was_skipped_and_how_to_go_on(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    result = run(settings(iters=1), store, tmp_path / "run")
    command._say(replace(result, skipped=2), dry_run=False)
    command._say(replace(result, skipped=1, last=None), dry_run=False)
    command._say(replace(result, last=None), dry_run=False)
    said = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("Run:")]
    assert "2 steps skipped; last loss" in said[0]
    assert said[1].endswith("1 step skipped; every step that was left was skipped.")
    assert said[2].endswith("; nothing was left to do.")
    monkeypatch.setattr(sys, "argv", ["llama3v-mlx", "train", "--data", "a b.json"])
    for environment, start in (({}, ""), ({"MLX_RANK": "0"}, "mlx.launch ... -- ")):
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        with pytest.raises(typer.Exit):
            command._say(replace(result, stopped=3), dry_run=False)
        again = capsys.readouterr().out.splitlines()[-1]
        assert again == f"{start}llama3v-mlx train --data 'a b.json' --resume"


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


class Seen(list[Any]):
    """Stands for a writer of either library."""

    closed = False
    id = "as3f"

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.append((step, {name: value}))

    def log(self, values: dict[str, float], step: int) -> None:
        self.append((step, values))

    def close(self) -> None:
        self.closed = True

    finish = close


def test_reports_reach_both_libraries(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every number of every report and evaluation, at its step; closed at the end."""
    writers, begun = (Seen(), Seen()), list[Any]()
    board, wandb = ModuleType("tensorboardX"), ModuleType("wandb")
    board.SummaryWriter = lambda path, purge_step: begun.append((path, purge_step)) or writers[0]  # type: ignore[attr-defined]
    wandb.init = lambda **how: begun.append(how) or writers[1]  # type: ignore[attr-defined]
    monkeypatch.setitem(sys.modules, "tensorboardX", board)
    monkeypatch.setitem(sys.modules, "wandb", wandb)
    config = settings(report_to=("tensorboard", "wandb"), iters=4, val_split=0.3)
    result = run(config, store, tmp_path / "run")
    assert begun[0] == (str(tmp_path / "run" / "tensorboard"), 1) and begun[1]["config"] == config.resolved().to_dict()
    for writer in writers:
        assert writer.closed
        found: dict[tuple[int, str], float] = {(step, key): v for step, part in writer for key, v in part.items()}
        assert {step for step, _ in found} == {2, 4}
        assert result.last is not None and result.evaluation is not None
        assert found[4, "loss"] == result.last.loss and found[4, "eval_loss"] == result.evaluation.eval_loss
        assert found[4, "eval_shuffled"] == result.evaluation.eval_shuffled
    assert begun[1]["id"] is None
    shutil.rmtree(tmp_path / "run" / "checkpoints" / "step-0000004")
    run(config, store, tmp_path / "run", resume=True)  # the same run on the page, too
    assert begun[2][1] == 3 and begun[3]["id"] == Seen.id


@pytest.mark.parametrize(("name", "library"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_library_is_named(
    name: str, library: str, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(RunError, match=f"pip install {library}"):
        run(settings(report_to=(name,), iters=1), store, tmp_path / "run", dry_run=True)
    with pytest.raises(RunError, match="report_to is mlflow; expected tensorboard or wandb"):
        settings(report_to=("mlflow",))


def test_the_last_line_names_what_a_run_holds(store: Store, tmp_path: Path) -> None:
    assert command.written(run(settings(iters=1), store, tmp_path / "a")) == ["projector"]
    sft = run(settings("sft", iters=1), store, tmp_path / "b")
    assert command.written(sft) == ["adapters (lora)", "projector as it was"]
    both = run(settings("sft", iters=1, tune="full", tune_projector=True), store, tmp_path / "c")
    assert command.written(both) == ["adapters: the whole decoder", "projector"]


@pytest.mark.parametrize(("device", "compiled"), [("metal", True), ("cuda", False), ("cpu", False)])
def test_the_step_is_compiled_where_that_pays(device: str, compiled: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mlx_llama3v.train.config.device_name", lambda: device)
    assert TrainConfig().resolved().compile is compiled
    assert TrainConfig(compile=not compiled).resolved().compile is not compiled
