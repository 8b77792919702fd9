"""Steps whose loss or gradient is no number: told by name, skipped or the end, never averaged in."""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest

from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import RunError
from mlx_llama3v.train import trainer
from mlx_llama3v.train.report import Callbacks, Evaluation, Metrics, plot
from tests.ranks import LAUNCH, launch
from tests.tiny_model import tiny_model
from tests.tiny_run import make_store, run, settings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def spoil(monkeypatch: pytest.MonkeyPatch, *steps: int) -> list[int]:
    """The loss of these batches is no number. The number of batches so far: set it to 0 to begin again."""
    gradients, calls = trainer.Step.gradients, [0]

    def sometimes(self: Any, batch: Any) -> Any:
        calls[0] += 1
        loss, count, found = gradients(self, batch)
        return (loss * float("nan") if calls[0] in steps else loss), count, found

    monkeypatch.setattr(trainer.Step, "gradients", sometimes)
    return calls


def test_a_loss_that_is_not_a_number_names_step_and_rows(store: Store, tmp_path: Path) -> None:
    model = tiny_model(scale=1.0)
    head = model.language_model.lm_head
    head.weight = mx.full(head.weight.shape, float("nan"))
    with pytest.raises(RunError, match=r"step 1: the loss is nan.*row-\d+, row-\d+"):
        run(settings(), store, tmp_path / "run", model=model)
    assert not (tmp_path / "run" / "projector.safetensors").exists()
    assert not (tmp_path / "run" / "checkpoints").exists()


def test_a_step_that_is_no_number_is_skipped_as_asked(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One bad step of six: it changes nothing, its rows are told, and it is in no mean."""
    calls = spoil(monkeypatch, 3)
    seen: list[Any] = []
    config = settings(on_nan="skip", lanes=1, steps_per_report=6, save_every=0)
    result = run(config, store, tmp_path / "run", callbacks=Callbacks(skipped=seen.append))
    assert [event.step for event in seen] == [3] and len(seen[0].skipped_rows) == 4
    assert result.last is not None and result.last.skipped == 1 and np.isfinite(result.last.loss)
    line, *_ = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(line) == {"step": 3, "skipped_rows": list(seen[0].skipped_rows)}
    calls[0] = 0
    with pytest.raises(RunError, match="step 3: the loss is nan"):
        run(replace(config, on_nan="stop"), store, tmp_path / "stop")


def test_a_report_with_skipped_steps_alone_waits(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One bad row must not end a run that reports each step."""
    spoil(monkeypatch, 1, 3)
    result = run(settings(on_nan="skip", lanes=1, steps_per_report=1), store, tmp_path / "run")
    assert result.last is not None and np.isfinite(result.last.loss)


def test_a_resumed_run_ends_though_all_that_was_left_is_skipped(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As the uninterrupted one does, which had reports before."""
    config = settings(on_nan="skip", lanes=1, steps_per_report=2, save_every=4)
    calls = spoil(monkeypatch, 5, 6)
    assert run(config, store, tmp_path / "whole").last is not None
    calls[0] = 0
    run(config, store, tmp_path / "cut", callbacks=Callbacks(stop=lambda: calls[0] == 4))
    assert run(config, store, tmp_path / "cut", resume=True).last is None
    name = "projector.safetensors"
    assert (tmp_path / "cut" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_a_held_out_loss_that_is_no_number_is_null(store: Store, tmp_path: Path) -> None:
    """NaN is not JSON."""
    metrics = Metrics(tmp_path / "metrics.jsonl")
    metrics.add(Evaluation(3, float("nan"), 1.0))
    assert json.loads((tmp_path / "metrics.jsonl").read_text()) == {"step": 3, "eval_loss": None, "eval_shuffled": 1.0}
    plot(metrics, tmp_path / "loss.png", "")


def test_skipping_every_step_is_an_error(store: Store, tmp_path: Path) -> None:
    model = tiny_model(scale=1.0)
    model.language_model.lm_head.weight = mx.full(model.language_model.lm_head.weight.shape, float("nan"))
    with pytest.raises(RunError, match=r"steps up to (\d+): not one of the last \1 had rows, and a loss"):
        run(settings(on_nan="skip"), store, tmp_path / "run", model=model)


_BAD_ROW = """
import sys
import tests.without_torch
import mlx.core as mx
from pathlib import Path
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.train import trainer
from tests.tiny_run import run, settings

real = trainer.Step.gradients

def gradients(step, batch):
    loss, count, found = real(step, batch)
    return loss * float("nan") if "row-7" in batch.row_ids else loss, count, found

trainer.Step.gradients = gradients
try:
    run(settings(lanes=1), Store(sys.argv[2]), Path(sys.argv[1]))
except trainer.RunError as error:
    group = mx.distributed.init()
    Path(sys.argv[1] + str(group.rank())).write_text(str(error))
    mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))  # or the launcher ends the other one
"""


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
def test_each_rank_names_the_rows_of_the_one_that_has_the_bad_one(store: Store, tmp_path: Path) -> None:
    done = launch(sys.executable, "-c", _BAD_ROW, str(tmp_path / "run"), str(store.path))
    assert done.returncode == 0, done.stdout + done.stderr
    said, same = ((tmp_path / f"run{rank}").read_text() for rank in (0, 1))
    assert said == same and "row-7" in said and said.count("row-") == 2, "half of a batch of four"
