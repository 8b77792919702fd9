"""A training run of seconds: random pictures in a store, a tiny model, records whose answers name the picture.

`python -m tests.tiny_run DIRECTORY STORE` does the short runs, and one with dropout, whole and in two parts; the
process may be one of several ranks.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten

from mlx_llama3v.config import Encoded
from mlx_llama3v.data.records import Record
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.train import trainer
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks
from mlx_llama3v.train.trainer import TrainResult, train
from tests.tiny_model import D_VISION, PLAIN, SPLIT, tiny_model, tiny_tokens

PICTURES = 6
NAMES = ("red", "green", "a blue one", "white", "black circle", "grey")


def make_store(path: Path, codec: str = "float16") -> Store:
    """Six pictures that differ, one of them split."""
    with StoreWriter(path, {"weights": "random"}, codec) as writer:
        for n in range(PICTURES):
            layout = SPLIT if n == 3 else PLAIN
            values = np.random.default_rng(n).standard_normal((layout.patches, D_VISION))
            writer.add(f"{n}.png", f"{n:064x}", Encoded(layout, values.astype(np.float32)))
    return Store(path)


def captions(count: int = 24) -> list[Record]:
    """Bare captions."""
    return [
        Record(
            f"row-{i}",
            (f"{i % PICTURES}.png",),
            (Message("user", "", (0,)), Message("assistant", NAMES[i % PICTURES])),
        )
        for i in range(count)
    ]


def chats(count: int = 24) -> list[Record]:
    """Two turns about a picture, answers of different lengths."""
    return [
        Record(
            f"row-{i}",
            (f"{i % PICTURES}.png",),
            (
                Message("user", "What?", (0,)),
                Message("assistant", NAMES[i % PICTURES]),
                Message("user", "Sure?" * (1 + i % 3)),
                Message("assistant", "yes, quite sure" if i % 2 else "no"),
            ),
        )
        for i in range(count)
    ]


def settings(stage: str = "pretrain", **over: Any) -> TrainConfig:
    """Small steps of a small model."""
    values = {
        "iters": 6,
        "batch_size": 4,
        "save_every": 2,
        "steps_per_report": 2,
        "compile": False,
        "lora_rank": 4,
    }
    return TrainConfig(stage=stage, **{**values, **over})


def undrawn() -> AbstractContextManager[Any]:
    """While it is open, loss.png is left empty: to draw it takes longer than all else of a tiny run."""
    return mock.patch.object(trainer, "plot", lambda metrics, file, title: file.touch())


def run(config: TrainConfig, store: Store, path: Path, *, drawn: bool = False, **over: Any) -> TrainResult:
    """Train a fresh tiny model, see `undrawn`."""
    if not drawn:
        with undrawn():
            return run(config, store, path, drawn=True, **over)
    records = over.pop("records", captions() if config.stage == "pretrain" else chats())
    model = over.pop("model", None) or tiny_model(scale=1.0)
    return train(config, model, tiny_tokens(), store, records, path, **over)


def lines(run_dir: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


# Steps of two batches, the last of which has a single row; and steps of one row, so that a second rank has none.
SHORT: dict[str, tuple[str, dict[str, Any]]] = {
    "pretrain": ("pretrain", {}),
    "sft": ("sft", {}),
    "alone": ("pretrain", {"iters": 3, "epochs": 1, "batch_size": 1, "grad_accumulation_steps": 1}),
}


def short_run(name: str, store: Store, path: Path) -> None:
    """One of SHORT; the first step's gradients are written, too."""
    stage, over = SHORT[name]
    base = {"iters": 0, "epochs": 2, "batch_size": 5, "val_split": 0.2, "grad_accumulation_steps": 2, "clip": 0.5}
    config = settings(stage, **{**base, **over})
    records = [record for record in chats(31) if record.id != "row-30"]
    update, first = trainer.Step.update, path / "gradients.safetensors"

    def seen(step: Any, gradients: Any, count: mx.array, *how: Any) -> None:
        if mx.distributed.init().rank() == 0 and not first.exists():
            mx.save_safetensors(str(first), {name: value / count for name, value in tree_flatten(gradients)})
        update(step, gradients, count, *how)

    with mock.patch.object(trainer.Step, "update", seen):
        run(replace(config, learning_rate=3e-3), store, path, records=records)


def parted_run(store: Store, path: Path, stop_after: int) -> TrainResult:
    """With dropout: stopped after a step, where that is not 0, and resumed.

    Random numbers are drawn between the steps, on each rank as many others, of which the checkpoint knows nothing.
    """
    config = settings("sft", lora_dropout=0.3, learning_rate=1e-2, iters=8, save_every=0)
    for until in (stop_after, 0) if stop_after else (0,):
        steps = iter(range(1, 9))

        def stop(steps: Iterator[int] = steps, until: int = until) -> bool:
            for _ in range(1 + mx.distributed.init().rank()):
                mx.eval(mx.random.normal((3,)))
            return next(steps) == until

        result = run(config, store, path, resume=not until and stop_after > 0, callbacks=Callbacks(stop=stop))
    return result


if __name__ == "__main__":
    directory, store = Path(sys.argv[1]), Store(sys.argv[2])
    for name in SHORT:
        short_run(name, store, directory / name)
    for stop_after in (0, 3):
        parted_run(store, directory / f"parted-{stop_after}", stop_after)
