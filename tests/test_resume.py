"""A run that was killed and resumed ends with the same bytes as one that was not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import pytest

from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import RunError
from mlx_llama3v.train import ranks, resume, trainer
from mlx_llama3v.train.feed import Feed
from mlx_llama3v.train.report import Callbacks, Progress, Start
from tests.tiny_run import chats, make_store, run, settings

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


# Fields of metrics.jsonl that are not the same in any two runs.
MEASURED = {"rows_per_second", "tokens_per_second", "images_per_second", "peak_memory", "seconds"}


class Killed(Exception):
    """Stands for a kill in one process."""


def killed_at(step: int) -> Callbacks:
    def check(progress: Progress) -> None:
        if progress.step >= step:
            raise Killed

    return Callbacks(progress=check)


def outcome(run_dir: Path) -> dict[str, Any]:
    """All bytes and numbers that a run determines; times are left out."""
    files = [*run_dir.glob("*.safetensors"), *run_dir.glob("checkpoints/*/*.safetensors")]
    found: dict[str, Any] = {str(file.relative_to(run_dir)): file.read_bytes() for file in files}
    found["metrics"] = [
        {key: value for key, value in json.loads(line).items() if key not in MEASURED}
        for line in (run_dir / "metrics.jsonl").read_text().splitlines()
    ]
    return found


@contextmanager
def spoiled(row: str) -> Iterator[None]:
    """Within, the loss of a batch with that row is no number."""
    real = trainer.Step.gradients

    def gradients(step: Any, batch: Any) -> Any:
        loss, count, found = real(step, batch)
        return loss * float("nan") if row in batch.row_ids else loss, count, found

    with mock.patch.object(trainer.Step, "gradients", gradients):
        yield


@pytest.mark.parametrize(
    ("stage", "over"),
    [
        ("pretrain", {}),
        ("sft", {"lora_dropout": 0.3, "grad_accumulation_steps": 2, "steps_per_report": 3}),
        ("sft", {"tune": "dora", "lora_layers": 1, "save_every": 3, "steps_per_report": 5}),
        ("sft", {"tune": "full", "val_split": 0.25, "steps_per_eval": 3, "weight_decay": 0.1}),
        ("sft", {"tune_projector": True, "projector_learning_rate": 1e-3, "val_split": 0.25, "steps_per_eval": 4}),
        ("pretrain", {"pack": True, "lanes": 2}),
    ],
)
def test_resumed_is_uninterrupted(stage: str, over: dict[str, Any], store: Store, tmp_path: Path) -> None:
    config = settings(stage, **{"iters": 10, "learning_rate": 1e-2, **over})
    run(config, store, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, store, tmp_path / "cut", callbacks=killed_at(5))
    started: list[Start] = []
    run(config, store, tmp_path / "cut", resume=True, callbacks=Callbacks(started=started.append))
    assert 0 < started[0].done < 10
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_skipped_steps_and_evaluations_are_those_of_an_uninterrupted_run(store: Store, tmp_path: Path) -> None:
    """One bad row an epoch of five steps; the report in the making when the run is killed counts one of them."""
    config = settings(iters=20, val_split=0.2, steps_per_eval=3, steps_per_report=5, save_every=4, on_nan="skip")
    with spoiled("row-7"):
        whole = run(config, store, tmp_path / "whole")
        with pytest.raises(Killed):
            run(config, store, tmp_path / "cut", callbacks=killed_at(10))
        cut = run(config, store, tmp_path / "cut", resume=True)
    expected = outcome(tmp_path / "whole")
    lines = expected["metrics"]
    skipped = [line["step"] for line in lines if "skipped_rows" in line]
    assert len(skipped) > 2 and skipped[0] <= 8 < skipped[-1], "before the checkpoint and after"
    assert sum("eval_shuffled" in line for line in lines) == 7
    assert sum(line.get("skipped", 0) for line in lines) == len(skipped) == whole.skipped == cut.skipped
    assert outcome(tmp_path / "cut") == expected


def test_dropout_follows_its_batch_whatever_was_drawn_before(store: Store, tmp_path: Path) -> None:
    def drawing() -> bool:
        mx.eval(mx.random.normal((3,)))
        return False

    weights = {}
    for name, seed, stop in (("a", 0, None), ("b", 0, drawing), ("c", 1, None)):
        with mock.patch.object(Feed, "seed", seeded(seed)):
            run(settings("sft", lora_dropout=0.3), store, tmp_path / name, callbacks=Callbacks(stop=stop))
        weights[name] = (tmp_path / name / "adapters.safetensors").read_bytes()
    assert weights["a"] == weights["b"] != weights["c"]


def seeded(shift: int) -> Any:
    """Feed.seed, moved."""
    seed = Feed.seed
    return lambda feed, batch: seed(feed, batch + shift)


def test_a_lost_optimizer_state_is_noticed(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = settings("sft", iters=6, learning_rate=1e-2)
    run(config, store, tmp_path / "whole")
    with pytest.raises(Killed):
        run(config, store, tmp_path / "cut", callbacks=killed_at(4))
    restore = resume.restore

    def forgetful(checkpoint: Path, model: Any, optimizer: Any) -> None:
        state = optimizer.state
        restore(checkpoint, model, optimizer)
        optimizer.state = state

    monkeypatch.setattr(resume, "restore", forgetful)
    run(config, store, tmp_path / "cut", resume=True)
    assert outcome(tmp_path / "cut") != outcome(tmp_path / "whole")


def test_a_finished_run_is_written_again(store: Store, tmp_path: Path) -> None:
    config = settings()
    run(config, store, tmp_path / "run")
    before = outcome(tmp_path / "run")
    (tmp_path / "run" / "projector.safetensors").unlink()
    result = run(config, store, tmp_path / "run", resume=True)
    assert result.last is None
    assert outcome(tmp_path / "run") == before


def test_a_run_without_a_checkpoint_begins_anew(store: Store, tmp_path: Path) -> None:
    config = settings(iters=8, save_every=6)
    with pytest.raises(Killed):
        run(config, store, tmp_path / "cut", callbacks=killed_at(4))
    run(config, store, tmp_path / "cut", resume=True)
    run(config, store, tmp_path / "whole")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_a_run_that_has_ended_without_a_checkpoint_is_left_alone(store: Store, tmp_path: Path) -> None:
    """It could only begin anew, under the old weights and metrics."""
    run(settings(save_every=0), store, tmp_path / "run")
    before = outcome(tmp_path / "run")
    for dry_run in (True, False):
        with pytest.raises(RunError, match="holds a run that has ended, and no checkpoint to go on from"):
            run(settings(seed=1), store, tmp_path / "run", resume=True, dry_run=dry_run)
    assert outcome(tmp_path / "run") == before


def test_settings_are_compared_before_anything_is_made(store: Store, tmp_path: Path) -> None:
    """With --embed-ahead pictures of held-out rows would be encoded, into a store of other settings."""
    run(settings(val_split=0.25), store, tmp_path / "run")
    with (
        mock.patch.object(trainer.Evaluator, "hold", side_effect=AssertionError),
        pytest.raises(RunError, match="seed was 0 and is 1 now"),
    ):
        run(settings(val_split=0.25, seed=1), store, tmp_path / "run", resume=True)


@pytest.mark.parametrize("line", ["5", "null", "{}", '{"step": null}', '{"step": 9'])
def test_a_line_of_metrics_that_is_none_ends_them(line: str, store: Store, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run(settings(), store, path)
    before = outcome(path)
    shutil.rmtree(resume.checkpoints(path)[-1])
    with (path / "metrics.jsonl").open("a") as file:
        file.write(line + "\n")
    run(settings(), store, path, resume=True)
    assert outcome(path) == before


def test_old_checkpoints_go(store: Store, tmp_path: Path) -> None:
    run(settings(iters=10, keep=2), store, tmp_path / "run")
    kept = [path.name for path in resume.checkpoints(tmp_path / "run")]
    assert kept == ["step-0000008", "step-0000010"]
    assert sorted(p.name for p in (tmp_path / "run" / "checkpoints").iterdir()) == kept


def test_other_settings_are_refused(store: Store, tmp_path: Path) -> None:
    run(settings(), store, tmp_path / "run")
    with pytest.raises(RunError, match=r"batch_size was 4 and is 8 now; seed was 0") as error:
        run(settings(seed=1, batch_size=8), store, tmp_path / "run", resume=True)
    assert "step-0000006" in str(error.value)
    with pytest.raises(RunError, match=r"the records that are trained on .* changed; resume"):
        run(settings(), store, tmp_path / "run", resume=True, records=chats())
    run(settings(keep=5, save_every=3), store, tmp_path / "run", resume=True)


def test_another_projector_is_refused(store: Store, tmp_path: Path) -> None:
    from tests.tiny_model import tiny_model

    run(settings("sft"), store, tmp_path / "run")
    other = tiny_model(scale=1.0)
    other.projector.markers = other.projector.markers + 1
    with pytest.raises(RunError, match="the frozen projector changed"):
        run(settings("sft"), store, tmp_path / "run", resume=True, model=other)


def test_an_incomplete_checkpoint_is_refused_by_name(store: Store, tmp_path: Path) -> None:
    path = tmp_path / "run"
    run(settings(), store, path)
    newest = resume.checkpoints(path)[-1]
    (newest / "optimizer.safetensors").unlink()
    with pytest.raises(RunError, match=r"step-0000006 is incomplete: it has no optimizer\.safetensors"):
        run(settings(), store, path, resume=True)
    weights = (newest / "weights.safetensors").read_bytes()
    (newest / "optimizer.safetensors").write_bytes(weights[:-9])
    with pytest.raises(RunError, match=r"optimizer\.safetensors is not a whole .*; delete .*6 to go on from an older"):
        run(settings(), store, path, resume=True)
    shutil.rmtree(newest)
    state = resume.checkpoints(path)[-1] / "state.json"
    state.write_text(state.read_text()[:50])
    with pytest.raises(RunError, match=r"step-0000004/state\.json is damaged"):
        run(settings(), store, path, resume=True)


def test_a_half_written_checkpoint_is_ignored(store: Store, tmp_path: Path) -> None:
    config = settings(iters=8)
    with pytest.raises(Killed):
        run(config, store, tmp_path / "cut", callbacks=killed_at(6))
    folder = tmp_path / "cut" / "checkpoints"
    shutil.copytree(folder / "step-0000004", folder / ".step-0000006.partial")
    (folder / ".step-0000006.partial" / "state.json").unlink()
    run(config, store, tmp_path / "cut", resume=True)
    run(config, store, tmp_path / "whole")
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")
    assert not list(folder.glob(".*"))


@pytest.mark.parametrize(
    ("column", "words"),
    [(0, "rank 1 after step 4; copy the checkpoints"), (1, r"batches of 5 and of 1 rows"), (2, "give both")],
)
def test_ranks_that_would_train_otherwise(
    column: int, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each of two machines has its own disk and memory: one may lack the checkpoints, or fit another batch."""

    class Two:
        def size(self) -> int:
            return 2

        def rank(self) -> int:
            return 0

    change = mx.zeros(3)

    def both(tables: list[mx.array], group: Any) -> list[mx.array]:
        return [mx.stack([tables[0][0], tables[0][0] + change])]

    monkeypatch.setattr(ranks, "all_sum", both)
    settings = {"batch_size": 1, "seed": 0, "lanes": 2}
    ranks.require_agreement(Two(), tmp_path, 0, settings)  # type: ignore[arg-type]
    change[column] = 4
    with pytest.raises(RunError, match=words):
        ranks.require_agreement(Two(), tmp_path, 0, settings)  # type: ignore[arg-type]
