"""A run from records to a run directory that a chat can use."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.checkpoint import load_run
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import DataError, RunError
from mlx_llama3v.model import quantize_decoder
from mlx_llama3v.tensors import parameters
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.train import memory
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.evaluate import hold_out
from mlx_llama3v.train.report import Callbacks, Progress, Start
from tests.tiny_model import tiny_model
from tests.tiny_run import captions, lines, make_store, run, settings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def copied(values: dict[str, mx.array]) -> dict[str, bytes]:
    return {name: np.array(value).tobytes() for name, value in values.items()}


def test_pretrain_learns_and_leaves_the_decoder_as_it_was(store: Store, tmp_path: Path) -> None:
    model = tiny_model(scale=4.0)
    decoder, projector = copied(parameters(model.language_model)), copied(parameters(model.projector))
    config = settings(iters=30, learning_rate=3e-2, save_every=0)
    result = run(config, store, tmp_path / "run", model=model, drawn=True)
    assert copied(parameters(model.language_model)) == decoder
    changed = copied(parameters(model.projector))
    assert all(changed[name] != value for name, value in projector.items())
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.4
    assert result.last is not None and result.last.loss == losses[-1]
    names = {path.name for path in (tmp_path / "run").iterdir() if path.name != ".lock"}
    assert names == {"config.json", "loss.png", "metrics.jsonl", "projector.safetensors"}
    assert (tmp_path / "run" / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("tune", ["lora", "dora"])
def test_sft_learns_and_leaves_all_else_as_it_was(tune: str, store: Store, tmp_path: Path) -> None:
    model = tiny_model(scale=1.0)
    before = copied(parameters(model))
    config = settings("sft", iters=20, learning_rate=3e-2, tune=tune, save_every=0)
    result = run(config, store, tmp_path / "run", model=model)
    after = copied(parameters(model))
    adapted = {name.replace(".linear.", "."): value for name, value in after.items()}
    assert all(adapted[name] == value for name, value in before.items())
    assert all(np.frombuffer(after[name], np.float32).any() for name in result.trainable.shapes)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < 0.85 * losses[0]


@pytest.mark.parametrize(("stage", "tune"), [("pretrain", "lora"), ("sft", "lora"), ("sft", "dora"), ("sft", "full")])
def test_a_run_is_loaded_as_it_was_trained(stage: str, tune: str, store: Store, tmp_path: Path) -> None:
    model = tiny_model(scale=1.0)
    run(settings(stage, tune=tune, learning_rate=1e-2), store, tmp_path / "run", model=model)
    fresh = tiny_model(scale=1.0)
    load_run(fresh, tmp_path / "run")
    assert copied(parameters(fresh)) == copied(parameters(model))
    ids = mx.array([[1, 2, 3, 4]])
    np.testing.assert_array_equal(np.array(fresh(ids)), np.array(model(ids)))


def test_all_data_are_checked_first(store: Store, tmp_path: Path) -> None:
    good = captions(8)
    bad = [
        Record("gone", ("nowhere.png",), good[0].messages),
        Record("mute", good[0].images, (Message("user", "", (0,)), Message("assistant", " "))),
        Record("long", good[0].images, (Message("user", "", (0,)), Message("assistant", "word " * 200))),
    ]
    seen: list[Start] = []
    config = settings(max_seq_length=100, iters=2)
    result = run(config, store, tmp_path / "run", records=[*good, *bad], callbacks=Callbacks(started=seen.append))
    assert [problem.where for problem in result.problems] == ["record gone", "record mute", "record long"]
    (start,) = seen
    assert (start.rows, start.problems, start.steps, start.done) == (8, result.problems, 2, 0)
    assert start.longest <= 100
    assert [text for text, kind, _ in start.sample if kind == "target"] == ["red<|end_of_text|>"]
    assert any(kind == "visual" for _, kind, _ in start.sample)
    with pytest.raises(DataError, match="none of 3 records can be trained on; the first: record gone"):
        run(config, store, tmp_path / "none", records=bad)
    assert not (tmp_path / "none").exists()


def test_records_that_cannot_be_read_are_told_with_the_others(store: Store, tmp_path: Path) -> None:
    seen: list[Start] = []
    unread = [Problem("rows.jsonl line 4", "it is no JSON")]
    for name, dry in (("dry", True), ("run", False)):
        callbacks = Callbacks(started=seen.append)
        result = run(settings(iters=1), store, tmp_path / name, problems=unread, callbacks=callbacks, dry_run=dry)
        assert result.problems == seen[-1].problems and result.problems[0] == unread[0]
    described = json.loads((tmp_path / "run" / "config.json").read_text())
    assert described["data"]["left_out"] == len(result.problems)


def test_a_split_that_leaves_nothing_is_named(store: Store, tmp_path: Path) -> None:
    held_out = hold_out(captions(), 0.5)[1]
    with pytest.raises(DataError, match=f"val_split 0.5 holds out all {len(held_out)} records; give a smaller one"):
        run(settings(val_split=0.5), store, tmp_path / "run", records=held_out)


def test_config_json_holds_every_setting(store: Store, tmp_path: Path) -> None:
    config = settings(iters=0, epochs=2, batch_size=5, grad_accumulation_steps=2)
    run(config, store, tmp_path / "run", notes={"from": "captions.json"})
    values = json.loads((tmp_path / "run" / "config.json").read_text())
    assert values["train"] == config.resolved().to_dict()
    assert values["train"]["learning_rate"] == 1e-3
    assert values["steps"] == 5  # 24 rows are 5 batches an epoch, 10 in all, two a step
    assert values["data"] == {"rows": 24, "held_out": 0, "left_out": 0}
    assert values["from"] == "captions.json"
    assert values["machine"]["device"]


def test_every_row_is_trained_once_an_epoch(store: Store, tmp_path: Path) -> None:
    config = settings(iters=0, epochs=2, batch_size=5, grad_accumulation_steps=3, steps_per_report=100)
    seen: list[Progress] = []
    run(config, store, tmp_path / "run", callbacks=Callbacks(progress=seen.append))
    (progress,) = seen
    assert (progress.step, progress.steps, progress.epoch) == (4, 4, 2.0)
    tokens = sum(len(record.messages[1].text) for record in captions())  # a letter is a token or part of one
    assert 2 * 24 * 2 <= progress.tokens <= 2 * (tokens + 24)
    assert 0 < progress.padding < 1 and progress.rows_per_second > 0


def test_a_run_is_not_overwritten(store: Store, tmp_path: Path) -> None:
    run(settings(iters=2, save_every=0), store, tmp_path / "run")
    with pytest.raises(RunError, match="holds a run already"):
        run(settings(iters=2), store, tmp_path / "run")
    (tmp_path / "run" / "projector.safetensors").unlink()
    (tmp_path / "run" / "metrics.jsonl").write_text("")  # ended before its first report
    run(settings(iters=2), store, tmp_path / "run")


def test_a_compiled_run_learns_the_same(store: Store, tmp_path: Path) -> None:
    found = []
    for compiled in (False, True):
        model = tiny_model(scale=1.0)
        config = settings("sft", compile=compiled, iters=4, learning_rate=1e-2, lora_keys=("q_proj",))
        run(config, store, tmp_path / str(compiled), model=model)
        found.append(parameters(model))
    for name, value in found[0].items():
        np.testing.assert_allclose(np.array(found[1][name]), np.array(value), atol=2e-4, err_msg=name)


def test_lanes_add_up(store: Store, tmp_path: Path) -> None:
    found = []
    for count in (1, 2, 3):
        model = tiny_model(scale=1.0)
        seen: list[Progress] = []
        config = settings(compile=False, iters=3, lanes=count, save_every=0, steps_per_report=3)
        run(config, store, tmp_path / str(count), model=model, callbacks=Callbacks(progress=seen.append))
        found.append((seen[0], parameters(model)))
    for progress, weights in found[1:]:
        assert progress.tokens == found[0][0].tokens
        assert progress.loss == pytest.approx(found[0][0].loss, rel=1e-5)
        assert progress.grad_norm == pytest.approx(found[0][0].grad_norm, rel=1e-3)
        for name, value in found[0][1].items():
            np.testing.assert_allclose(np.array(weights[name]), np.array(value), atol=5e-4, err_msg=name)


def test_the_order_depends_on_the_seed(store: Store, tmp_path: Path) -> None:
    def weights(name: str, seed: int) -> bytes:
        run(settings(seed=seed, save_every=0), store, tmp_path / name)
        return (tmp_path / name / "projector.safetensors").read_bytes()

    assert weights("a", 0) == weights("b", 0) != weights("c", 1)


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("stage", "both", "stage is 'both'; expected pretrain or sft"),
        ("batch_size", -1, "batch_size is -1; expected at least 0"),
        ("val_split", 1.0, r"val_split is 1.0; expected between 0 and 0.95"),
        ("learning_rate", float("nan"), "learning_rate is nan"),
        ("tune", "qlora", "expected lora or dora or full"),
    ],
)
def test_settings_that_make_no_sense_are_refused(name: str, value: Any, message: str) -> None:
    with pytest.raises(RunError, match=message):
        TrainConfig(**{name: value})


def test_the_stage_has_its_own_learning_rate() -> None:
    assert TrainConfig().resolved().learning_rate == 1e-3
    assert TrainConfig(stage="sft").resolved().learning_rate == 2e-4
    assert TrainConfig(stage="sft", tune="full").resolved().learning_rate == 2e-5
    assert TrainConfig(stage="sft", tune="full", learning_rate=1e-4).resolved().learning_rate == 1e-4
    assert TrainConfig(learning_rate=3e-3).resolved().learning_rate == 3e-3


def test_another_model_does_not_go_on(store: Store, tmp_path: Path) -> None:
    config = settings("sft", iters=4)
    run(config, store, tmp_path / "run", callbacks=Callbacks(stop=lambda: True))
    other = tiny_model()
    other.config = replace(other.config, sources={"llm": "another"})
    with pytest.raises(RunError, match="the model changed"):
        run(config, store, tmp_path / "run", model=other, resume=True)
    for dry in (True, False):
        other = tiny_model(scale=1.0)
        norm = other.language_model.model.norm
        norm.weight = norm.weight * 1.01
        with pytest.raises(RunError, match="the weights of the decoder changed"):
            run(config, store, tmp_path / "run", model=other, resume=True, dry_run=dry)
    assert run(config, store, tmp_path / "run", resume=True, dry_run=True).last is None


def test_accumulation_holds_one_sum(store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of sixteen parts of a step, too: it is evaluated as it grows."""
    from mlx_llama3v.train import trainer

    waiting: list[bool] = []
    real = trainer.mx.eval
    monkeypatch.setattr(trainer.mx, "eval", lambda *args: (waiting.append(True), real(*args))[1])
    counts = {}
    for parts in (1, 16):
        waiting.clear()
        run(settings(iters=1, grad_accumulation_steps=parts, lanes=1), store, tmp_path / str(parts))
        counts[parts] = len(waiting)
    assert counts[16] - counts[1] == 2 * 15  # the embeddings of each, and the sum


def test_a_run_that_is_asked_to_stop_saves_and_goes_on(store: Store, tmp_path: Path) -> None:
    run(settings(), store, tmp_path / "whole")
    asked = iter([False, False, True])
    result = run(settings(), store, tmp_path / "cut", callbacks=Callbacks(stop=lambda: next(asked)))
    assert result.stopped == 3 and not (tmp_path / "cut" / "projector.safetensors").exists()
    result = run(settings(), store, tmp_path / "cut", resume=True)
    assert result.stopped is None
    names = [tmp_path / name / "projector.safetensors" for name in ("whole", "cut")]
    assert names[0].read_bytes() == names[1].read_bytes()


def test_a_dry_run_tells_all_and_writes_nothing(store: Store, tmp_path: Path) -> None:
    seen: list[Start] = []
    result = run(settings(), store, tmp_path / "run", dry_run=True, callbacks=Callbacks(started=seen.append))
    assert result.steps == 6 and seen[0].memory > 0 and not (tmp_path / "run").exists()


class Lossy(Store):
    """Finds out that pictures cannot be decoded when their turn comes, as with --embed-ahead."""

    gone: frozenset[str] = frozenset()

    def begin(self, turn: int, names: Sequence[str] = ()) -> dict[str, str]:
        return {name: "cut short" for name in names if name in self.gone}


def test_a_row_whose_picture_cannot_be_decoded_is_not_trained(store: Store, tmp_path: Path) -> None:
    lossy, records = Lossy(store.path), captions()
    lossy.gone = frozenset({"2.png", "3.png"})
    seen = [record for record in records if lossy.gone.isdisjoint(record.images)]
    config = settings(iters=3, batch_size=24, lanes=2)
    ours = run(config, lossy, tmp_path / "ours", records=records)
    theirs = run(config, store, tmp_path / "theirs", records=seen)
    assert {problem.where for problem in ours.unseen} == {f"record {record.id}" for record in records} - {
        f"record {record.id}" for record in seen
    }
    assert ours.last is not None and theirs.last is not None and ours.last.tokens == theirs.last.tokens
    assert ours.last.loss == pytest.approx(theirs.last.loss, rel=1e-5)
    lossy.gone = frozenset(store.names) - {"0.png"}  # most steps have no row
    few = run(settings(iters=12, batch_size=1), lossy, tmp_path / "few", records=records)
    stop = Callbacks(stop=iter([*[False] * 7, True]).__next__)
    run(settings(iters=12, batch_size=1), lossy, tmp_path / "cut", records=records, callbacks=stop)
    cut = run(settings(iters=12, batch_size=1), lossy, tmp_path / "cut", records=records, resume=True)
    assert cut.unseen == few.unseen and len(cut.unseen) > 6, "those that were left out before it was stopped"
    assert few.last is not None and few.last.skipped > 0 and 0 < few.skipped < 12


def test_a_step_without_rows_changes_nothing(store: Store, tmp_path: Path) -> None:
    """AdamW would move the weights by its means, and shrink them."""
    lossy, records = Lossy(store.path), captions(6)
    config = settings(iters=6, batch_size=1, weight_decay=0.5, save_every=1, keep=9)
    lossy.gone = frozenset({"1.png"})
    result = run(config, lossy, tmp_path / "run", records=records)
    name = "checkpoints/step-{:07d}/weights.safetensors"
    weights = [(tmp_path / "run" / name.format(step)).read_bytes() for step in range(1, 7)]
    (empty,) = (line["step"] for line in lines(tmp_path / "run") if "skipped_rows" in line)
    same = [step for step, pair in enumerate(pairwise(weights), 2) if pair[0] == pair[1]]
    assert same == [empty] and result.skipped == 1


def test_the_projector_learns_with_its_own_rate(store: Store, tmp_path: Path) -> None:
    base = settings("sft", tune_projector=True, learning_rate=1e-2, iters=1, warmup=0.0, save_every=0)
    before = tiny_model(scale=1.0).projector.markers
    moved = {}
    for rate in (1e-3, 1e-4):
        model = tiny_model(scale=1.0)
        result = run(replace(base, projector_learning_rate=rate), store, tmp_path / str(rate), model=model)
        moved[rate] = float(mx.abs(model.projector.markers - before).max())
        lora = dict(tree_flatten(model.language_model.trainable_parameters()))
        assert max(float(mx.abs(v).max()) for n, v in lora.items() if n.endswith("lora_b")) == pytest.approx(
            1e-2, rel=0.1
        )
    assert moved[1e-3] == pytest.approx(1e-3, rel=0.05) and moved[1e-4] == pytest.approx(1e-4, rel=0.05)
    assert {name.partition(" ")[0] for name in result.trainable.parts} == {"projector", "decoder,"}
    with pytest.raises(RunError, match="tune_projector is for stage sft"):
        settings(tune_projector=True)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_decoder_of_four_bits_is_trained_on(stage: str, store: Store, tmp_path: Path) -> None:
    model = tiny_model(scale=4.0 if stage == "pretrain" else 1.0)
    quantize_decoder(model, bits=4, group_size=32)
    before = copied(parameters(model.language_model))
    config = settings(stage, iters=30, learning_rate=3e-2, save_every=0)
    result = run(config, store, tmp_path / "run", model=model)
    losses = [line["loss"] for line in lines(tmp_path / "run")]
    assert losses[-1] < losses[0] - 0.2
    after = {name.replace(".linear.", "."): value for name, value in copied(parameters(model.language_model)).items()}
    assert all(after[name] == value for name, value in before.items())
    assert any(name.endswith(".scales") for name in before)
    assert result.trainable.count == sum(int(np.prod(shape)) for shape in result.trainable.shapes.values())
    with pytest.raises(RunError, match="tune is 'full', but the decoder is quantized"):
        run(settings("sft", tune="full"), store, tmp_path / "full", model=tiny_quantized())


def tiny_quantized() -> Any:
    model = tiny_model(scale=1.0)
    quantize_decoder(model, bits=4, group_size=32)
    return model


def test_the_batch_size_can_follow_from_the_memory(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[Start] = []
    config = settings(batch_size=0, rows_per_step=8, iters=1)
    monkeypatch.setattr(memory, "memory_limit", lambda: 1 << 40)
    run(config, store, tmp_path / "roomy", callbacks=Callbacks(started=seen.append))
    monkeypatch.setattr(memory, "memory_limit", lambda: 1)
    with pytest.raises(RunError, match=r"one row of .* tokens needs about"):
        run(config, store, tmp_path / "tight")
    assert (seen[0].batch_size, seen[0].batches_per_step) == (8, 1)
