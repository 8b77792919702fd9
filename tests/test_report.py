"""What a run tells: rates that are true, and the curves of loss.png."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from typing import Any

import pytest
from matplotlib.backends.backend_agg import FigureCanvasAgg

from mlx_llama3v.cli import train as command
from mlx_llama3v.data.records import Record
from mlx_llama3v.data.rows import RowLayout, build_rows
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.train import trainer
from mlx_llama3v.train.report import Callbacks, Progress
from tests.tiny_model import tiny_model, tiny_tokens
from tests.tiny_run import captions, make_store, run, settings


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    return make_store(tmp_path_factory.mktemp("store"))


def test_rates_are_what_was_done_over_the_time_it_took(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock on which every step takes four seconds; an epoch has each row once, some without a picture."""
    ticks = count(0, 4)
    monkeypatch.setattr(trainer.time, "perf_counter", lambda: float(next(ticks)))
    seen: list[Progress] = []
    padded: list[list[int]] = [[], []]  # positions of every part of a batch, by report
    gradients = trainer.Step.gradients

    def watched(step: Any, batch: Any) -> Any:
        padded[len(seen)].append(batch.ids.size)
        return gradients(step, batch)

    monkeypatch.setattr(trainer.Step, "gradients", watched)
    config = settings(iters=6, batch_size=2, grad_accumulation_steps=2, lanes=2, steps_per_report=3, save_every=0)
    words = (Message("user", "Say it."), Message("assistant", "it"))
    records = [record if n % 3 else Record(record.id, (), words) for n, record in enumerate(captions())]
    run(config, store, tmp_path / "run", records=records, callbacks=Callbacks(progress=seen.append))
    monkeypatch.undo()
    layout = RowLayout(store, tiny_tokens(), tiny_model().config.projector_config, "pretrain", 1000)
    rows, _ = build_rows(records, layout)
    tokens, targets = sum(map(len, rows)), sum(row.targets for row in rows)
    assert [one.seconds for one in seen] == [12.0, 24.0] and sum(one.tokens for one in seen) == targets
    assert 12 * sum(one.tokens_per_second for one in seen) == pytest.approx(tokens)
    assert 12 * sum(one.images_per_second for one in seen) == pytest.approx(16)
    for one, sizes in zip(seen, padded, strict=True):
        assert one.rows_per_second == 1.0 and one.images_per_second < 1 and one.peak_memory > 0
        assert len(sizes) == 12 and one.padding == pytest.approx(1 - 12 * one.tokens_per_second / sum(sizes))
    notes: list[tuple[Any, ...]] = []

    class Bar:
        def update(self, *what: Any) -> None:
            notes.append(what)

    watch = command._watch(Bar(), lambda: False, 0.0, False)  # type: ignore[arg-type]
    assert watch.progress is not None
    one = seen[0]
    watch.progress(one)
    rate = f"{one.tokens_per_second:,.0f} tokens/s, {one.images_per_second:,.1f} images/s"
    assert notes == [(3, 6, f"loss {one.loss:.3f}, {rate}, {command.show.size(one.peak_memory)}")]


def test_the_curves_are_drawn_anew_at_each_evaluation(
    store: Store, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Training, held-out, wrong-picture and blind loss, each point as metrics.jsonl has it."""
    drawn: list[dict[str, list[tuple[float, float]]]] = []
    draw = FigureCanvasAgg.print_png

    def look(canvas: FigureCanvasAgg, *how: Any, **more: Any) -> None:
        curves = canvas.figure.axes[0].get_lines()
        drawn.append({str(line.get_label()): list(zip(*line.get_data(), strict=True)) for line in curves})
        draw(canvas, *how, **more)

    monkeypatch.setattr(FigureCanvasAgg, "print_png", look)
    config = settings(iters=6, val_split=0.25, steps_per_eval=2, steps_per_report=1)
    run(config, store, tmp_path / "run", drawn=True)
    lines = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    keys = {
        "training": "loss",
        "held out": "eval_loss",
        "wrong pictures": "eval_shuffled",
        "no pictures": "eval_blind",
    }
    assert [len(curves["held out"]) for curves in drawn] == [1, 2, 3]
    assert drawn[-1] == {
        label: [(line["step"], line[key]) for line in lines if key in line] for label, key in keys.items()
    }
    assert len(drawn[-1]["training"]) == 6
