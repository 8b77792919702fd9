"""One `train()` for both stages: check all data, prepare the model, step, write down, go on after a kill.

The data order is a pure function of (seed, epoch), and what a step does of the state before it; so a run that was
killed and resumed ends with the same bytes as one that was not. The embeddings come from the store alone: no
vision tower is loaded here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import asdict, dataclass
from functools import lru_cache
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
from mlx.utils import tree_flatten

from mlx_llama3v.data.batches import Batch, Row, build_rows, collate, order
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.errors import DataError, RunError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import machine
from mlx_llama3v.tensors import parameters, save_safetensors_atomic, write_text
from mlx_llama3v.text.prompt import describe
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train import resume as resuming
from mlx_llama3v.train.config import STAGES, TrainConfig
from mlx_llama3v.train.evaluate import Evaluator, hold_out
from mlx_llama3v.train.lora import Trainable, adapter_config, adapter_weights, prepare
from mlx_llama3v.train.optim import adamw, learning_rate
from mlx_llama3v.train.report import METRICS, Callbacks, Evaluation, Metrics, Progress, Start, Window, plot
from mlx_llama3v.train.step import Step, add

_AHEAD = 2  # batches read while a step computes
# Settings that may change between a run and its resumption: the result does not depend on them.
_FREE = ("save_every", "keep", "steps_per_report", "steps_per_eval", "val_rows")


@dataclass(frozen=True)
class TrainResult:
    """What a run made. `problems` are the rows that were left out."""

    run_dir: Path
    steps: int
    rows: int
    problems: tuple[Problem, ...]
    trainable: Trainable
    last: Progress | None  # None for a run that was finished before
    evaluation: Evaluation | None
    seconds: float


def train(
    config: TrainConfig,
    model: Llama3V,
    tokens: Tokens,
    store: Store,
    records: Sequence[Record],
    run_dir: Path | str,
    *,
    resume: bool = False,
    callbacks: Callbacks | None = None,
) -> TrainResult:
    """Train one stage of `model` (in place) on the stored pictures of `records`, and write a run directory.

    Args:
        model: as converted; for stage sft with the projector of the pretrain run applied.
        run_dir: gets config.json, metrics.jsonl, loss.png, projector.safetensors, in stage sft the adapters, and
            checkpoints while it runs. Refused where it holds a run, unless `resume`.
        resume: go on from the newest checkpoint, or from the start where there is none.

    Raises:
        DataError: no row can be trained on.
        RunError: settings that clash, other settings than the checkpoint's, a loss that is not a number.
        StoreError: embeddings that do not fit the model, or a damaged shard.
    """
    run = _Run(config.resolved(), model, tokens, store, records, Path(run_dir), callbacks or Callbacks())
    return run.go(resume)


class _Run:
    """One call of `train`."""

    def __init__(
        self,
        config: TrainConfig,
        model: Llama3V,
        tokens: Tokens,
        store: Store,
        records: Sequence[Record],
        run_dir: Path,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.model, self.store, self.run_dir, self.callbacks = config, model, store, run_dir, callbacks
        used, held_out = hold_out(records, config.val_split)
        self.rows, problems = build_rows(
            used, store, tokens, model.config.projector_config, config.max_seq_length, config.stage
        )
        self.problems = tuple(problems)
        if not self.rows:
            why = f"the first: {problems[0]}" if problems else "there is no record"
            raise DataError(f"none of {len(used)} records can be trained on; {why}.")
        self.evaluator = Evaluator(held_out, store, tokens, model, config) if held_out else None
        self.sample = tuple(describe(self.rows[0].rendered, tokens))
        self.order = _Order(self.rows, config)

    def go(self, resume: bool) -> TrainResult:
        checkpoint = self._checkpoint(resume)
        settings = self._settings()
        mx.random.seed(self.config.seed)
        self.trainable = prepare(self.model, self.config)
        self.optimizer = adamw(self.config.weight_decay)
        self.optimizer.init(self.model.trainable_parameters())
        self.window, done = Window(), 0
        if checkpoint is not None:
            state = resuming.read_state(checkpoint)
            resuming.require_same(checkpoint, state.settings, settings)
            resuming.restore(checkpoint, self.model, self.optimizer)
            self.window, done = Window(**state.window), state.step
        mx.eval(self.model.parameters(), self.optimizer.state)
        self.settings, self.evaluation, self.last = settings, None, None
        self._write_config()
        self.metrics = Metrics.open(self.run_dir / METRICS, done)
        self._started(done)
        self.model.train()
        if done < self.order.steps:
            self._loop(done)
        self.model.eval()
        return self._finish()

    def _checkpoint(self, resume: bool) -> Path | None:
        """The checkpoint to go on from. Raises RunError where a run would be overwritten."""
        found = resuming.checkpoints(self.run_dir)
        if not resume and (found or (self.run_dir / METRICS).exists()):
            raise RunError(f"{self.run_dir} holds a run already; resume it, or choose another directory.")
        return found[-1] if found else None

    def _settings(self) -> dict[str, Any]:
        """All that the result depends on and a resumed run could get wrong."""
        data = sha256()
        for row in self.rows:
            data.update(row.id.encode() + b"\0" + row.rendered.ids.tobytes())
        settings = {key: value for key, value in self.config.to_dict().items() if key not in _FREE}
        if STAGES[self.config.stage].trains == "decoder":
            settings["projector"] = _digest(parameters(self.model.projector))
        return {**settings, "data": data.hexdigest(), "store": _plain_digest(self.store.fingerprint)}

    def _loop(self, done: int) -> None:
        config = self.config
        step = Step(self.model, self.optimizer, config.clip, config.compile)
        batches = self.order.batches(done, self.store, self.model)
        for number in range(done, self.order.steps):
            rate = self.order.learning_rate(number)
            self._step(step, [next(batches) for _ in range(self.order.size(number))], rate)
            now, last = number + 1, number + 1 == self.order.steps
            if last or now % config.steps_per_report == 0:
                self._report(now, rate)
            if self.evaluator and (last or config.steps_per_eval and now % config.steps_per_eval == 0):
                self._evaluate(now)
            if config.save_every and (last or now % config.save_every == 0):
                self._save(now)
        batches.close()
