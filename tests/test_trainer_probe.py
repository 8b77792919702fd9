"""What a run holds out: rows with their own, with wrong and without pictures, judged by the same targets."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest
from mlx.utils import tree_flatten, tree_map

from mlx_llama3v.data.records import Record
from mlx_llama3v.data.rows import RowLayout
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.model import Llama3V
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.train import evaluate
from mlx_llama3v.train.evaluate import Evaluator, hold_out, shuffled
from mlx_llama3v.train.report import Callbacks, Evaluation
from tests.tiny_model import tiny_model, tiny_tokens
from tests.tiny_run import captions, chats, lines, make_store, run, settings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def test_the_probe_tells_looking_from_guessing(store: Store, tmp_path: Path) -> None:
    seen: list[Evaluation] = []
    config = settings(iters=30, learning_rate=3e-2, val_split=0.3, steps_per_eval=15, save_every=0)
    callbacks, model = Callbacks(evaluated=seen.append), tiny_model(scale=4.0)
    result = run(config, store, tmp_path / "run", callbacks=callbacks, records=captions(48), model=model)
    assert [evaluation.step for evaluation in seen] == [15, 30]
    last = seen[-1]
    assert result.evaluation == last
    assert last.eval_shuffled is not None and last.eval_blind is not None
    assert last.eval_loss < last.eval_shuffled - 0.3
    assert last.eval_loss < last.eval_blind - 0.3
    assert [line["eval_loss"] for line in lines(tmp_path / "run") if "eval_loss" in line] == [
        evaluation.eval_loss for evaluation in seen
    ]


def test_evaluating_changes_nothing(store: Store, tmp_path: Path) -> None:
    config = settings("sft", val_split=0.3, lora_dropout=0.3)
    often, never = replace(config, steps_per_eval=1), replace(config, steps_per_eval=0)
    weights = []
    for name, settings_ in (("often", often), ("never", never)):
        run(settings_, store, tmp_path / name)
        weights.append((tmp_path / name / "adapters.safetensors").read_bytes())
    assert weights[0] == weights[1]


def test_held_out_rows_do_not_depend_on_their_order() -> None:
    records = chats(200)
    used, held_out = hold_out(records, 0.2)
    assert 20 < len(held_out) < 60 and len(used) + len(held_out) == 200
    assert {r.id for r in hold_out(records[::-1], 0.2)[1]} == {r.id for r in held_out}
    assert hold_out(records, 0.0) == (records, [])


def test_shuffled_pictures_are_others() -> None:
    records = captions(24)
    pairs = list(zip(records, shuffled(records), strict=True))
    assert all(a.images != b.images and a.messages == b.messages and a.id == b.id for a, b in pairs)
    assert shuffled(records[:1] * 2) == []
    odd = {f"{n}.png": n % 2 for n in range(6)}
    pairs = list(zip(records, shuffled(records, lambda images: odd[images[0]]), strict=True))
    assert all(a.images != b.images and odd[a.images[0]] == odd[b.images[0]] for a, b in pairs)


def test_wrong_and_missing_pictures_are_judged_by_the_same_targets(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where the row with the right ones was cut: without pictures there would be room for all of it."""
    seen: dict[int, list[list[int]]] = {}
    collate = evaluate.collate

    def watched(rows: Any, *args: Any, **kwargs: Any) -> Any:
        for row in rows:
            seen.setdefault(int(row.id[4:]), []).append(row.rendered.ids[row.rendered.supervised].tolist())
        return collate(rows, *args, **kwargs)

    monkeypatch.setattr(evaluate, "collate", watched)
    config = settings("sft", val_split=0.4, iters=1, long_rows="truncate-text", max_seq_length=44)
    run(config, store, tmp_path / "run")
    cut = RowLayout(store, tiny_tokens(), tiny_model().config.projector_config, "sft", 44, "truncate-text")
    whole = replace(cut, max_length=1000)
    held_out = hold_out(chats(), 0.4)[1]
    shortened = [int(record.id[4:]) for record in held_out if len(whole.row(record)) > 44]
    assert any(len(seen[n]) == 3 for n in shortened)
    for record in held_out:
        row = cut.row(record).rendered
        assert len(seen[int(record.id[4:])]) >= 2
        assert all(ids == row.ids[row.supervised].tolist() for ids in seen[int(record.id[4:])])


def test_a_model_that_sees_nothing_is_flagged(store: Store) -> None:
    """Also where a wrong picture makes a row too long, which is then left out of all that is compared."""
    model = tiny_model(scale=1.0)
    model.projector.update(tree_map(mx.zeros_like, model.projector.parameters()))
    answers = {"0.png": "quite sure of that, " * 3, "3.png": "it"}
    records = [
        Record(name, (name,), (Message("user", "", (0,)), Message("assistant", said))) for name, said in answers.items()
    ]
    records.append(Record("text", (), (Message("user", "Say it."), Message("assistant", "it" * 9))))
    layout = RowLayout(store, tiny_tokens(), model.config.projector_config, "sft", 2048)
    most = max(len(layout.row(record)) for record in records)
    found = {}
    for limit in (most, 2048):
        rows = replace(layout, max_length=limit)
        found[limit] = evaluate.Evaluator(records, rows, model, settings("sft", lanes=1).resolved()).run(1)
        assert not found[limit].looks
    assert found[most].eval_loss == found[2048].eval_loss
    small, whole = found[most].eval_right, found[2048].eval_right
    assert small is not None and whole is not None and abs(small - whole) > 1e-4


def test_text_alone_can_be_trained_on(store: Store, tmp_path: Path) -> None:
    messages = (Message("user", "Say it."), Message("assistant", "it"))
    records = [Record(f"text-{i}", (), messages) for i in range(8)]
    result = run(settings("sft", val_split=0.4), store, tmp_path / "run", records=records)
    assert result.evaluation is not None and result.evaluation.eval_shuffled is None


def test_held_out_rows_that_make_no_row_are_counted(store: Store, tmp_path: Path) -> None:
    records = [
        Record(record.id, ("gone.png",), record.messages) if n % 4 == 0 else record
        for n, record in enumerate(captions())
    ]
    result = run(settings(val_split=0.5, iters=1), store, tmp_path / "run", records=records)
    assert {problem.where for problem in result.problems} == {f"record row-{n}" for n in range(0, 24, 4)}
    assert result.rows < 18


def test_a_probe_without_a_gap_is_flagged() -> None:
    assert not Evaluation(1, 2.0, 2.01, 2.5).looks and Evaluation(1, 2.0, 2.3, 2.5).looks
    assert Evaluation(1, 2.0, 2.3, 2.1).gap == pytest.approx(0.1)
    assert Evaluation(1, 2.0).looks and Evaluation(1, 2.0).gap is None


@pytest.mark.parametrize(("tune", "computes"), [("full", mx.bfloat16), ("dora", mx.float32), ("lora", mx.bfloat16)])
def test_an_evaluation_computes_as_a_step_does(
    tune: str, computes: mx.Dtype, store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What learns is held in float32; a 16-bit decoder would be evaluated in another type than it is trained in."""
    seen: list[set[mx.Dtype]] = []
    evaluate = Evaluator.run

    def types(model: Llama3V) -> set[mx.Dtype]:
        return {value.dtype for _, value in tree_flatten(model.language_model.trainable_parameters())}

    def look(self: Any, step: int) -> Any:
        seen.append(types(model))
        return evaluate(self, step)

    monkeypatch.setattr(Evaluator, "run", look)
    model = tiny_model(scale=1.0)
    model.language_model.set_dtype(mx.bfloat16)
    run(settings("sft", iters=2, tune=tune, val_split=0.2), store, tmp_path / "run", model=model)
    assert seen == [{computes}] and types(model) == {mx.float32}
