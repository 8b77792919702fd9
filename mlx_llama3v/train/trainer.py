"""One `train()` for both stages: check all data, prepare the model, step, write down, go on after a kill.

The data order is a pure function of the seed, and a step of the state before it; so a run that was killed and
resumed ends with the same bytes as one that was not. Embeddings come from the store alone: no vision tower is
loaded here.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import asdict, dataclass
from functools import partial
from hashlib import sha256
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v.data.batches import Batch, build_rows
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.embeddings.store import Reader
from mlx_llama3v.errors import DataError, RunError
from mlx_llama3v.lanes import Lanes, lanes
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import machine
from mlx_llama3v.tensors import digest, parameters, save_safetensors_atomic, write_text
from mlx_llama3v.text.prompt import describe
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train import resume as checkpointing
from mlx_llama3v.train.config import STAGES, TrainConfig
from mlx_llama3v.train.evaluate import Evaluator, hold_out
from mlx_llama3v.train.feed import Feed
from mlx_llama3v.train.lora import Trainable, adapter_weights, prepare
from mlx_llama3v.train.optim import adamw, learning_rate
from mlx_llama3v.train.report import METRICS, Callbacks, Evaluation, Metrics, Progress, Start, Window, plot
from mlx_llama3v.train.step import Step, add

# What may differ between a run and its resumption: the result does not depend on it.
_FREE = ("save_every", "keep", "steps_per_report", "steps_per_eval", "val_rows")


@dataclass(frozen=True)
class TrainResult:
    """What a run made. `problems` are the rows that were left out."""

    run_dir: Path
    steps: int
    rows: int
    problems: tuple[Problem, ...]
    trainable: Trainable
    last: Progress | None  # None where nothing was left to do
    evaluation: Evaluation | None
    seconds: float


def train(
    config: TrainConfig,
    model: Llama3V,
    tokens: Tokens,
    store: Reader,
    records: Sequence[Record],
    run_dir: Path | str,
    *,
    resume: bool = False,
    callbacks: Callbacks | None = None,
    notes: Mapping[str, Any] | None = None,
) -> TrainResult:
    """Train one stage of `model` (in place) on the stored pictures of `records`, and write a run directory.

    Args:
        model: fresh from its directory; for stage sft with the projector of a pretrain run applied.
        run_dir: gets config.json, metrics.jsonl, loss.png, projector.safetensors, in stage sft the adapters,
            and checkpoints on the way. Refused where it holds a run, unless `resume`.
        resume: go on from the newest checkpoint, or from the start where there is none.
        notes: JSON-ready facts for config.json that only the caller knows (paths).

    Raises:
        DataError: no record can be trained on.
        RunError: settings that clash or differ from the checkpoint's, a loss that is not a number.
        StoreError: embeddings that do not fit the model, a damaged shard.
    """
    run = _Run(config.resolved(), model, tokens, store, records, Path(run_dir), callbacks or Callbacks())
    return run.go(resume, notes or {})


class _Run:
    """One call of `train`; made when all data were checked and laid out."""

    def __init__(
        self,
        config: TrainConfig,
        model: Llama3V,
        tokens: Tokens,
        store: Reader,
        records: Sequence[Record],
        path: Path,
        callbacks: Callbacks,
    ) -> None:
        self.config, self.model, self.store, self.path, self.callbacks = config, model, store, path, callbacks
        used, held_out = hold_out(records, config.val_split)
        self.rows, problems = build_rows(
            used, store, tokens, model.config.projector_config, config.max_seq_length, config.stage
        )
        if not self.rows:
            why = f"the first: {problems[0]}" if problems else "there is none"
            raise DataError(f"none of {len(used)} records can be trained on; {why}.")
        self.evaluator = Evaluator(held_out, store, tokens, model, config)
        self.problems = (*problems, *self.evaluator.problems)
        self.feed = Feed(self.rows, store, model.config, config)
        self.sample = tuple(describe(self.rows[0].rendered, tokens))
        self.window = Window()
        self.last: Progress | None = None
        self.evaluation: Evaluation | None = None

    def go(self, resume: bool, notes: Mapping[str, Any]) -> TrainResult:
        """Prepare, restore, train, write."""
        checkpoint = self._checkpoint(resume)
        self.settings = self._settings()
        mx.random.seed(self.config.seed)
        self.trainable = prepare(self.model, self.config)
        self.optimizer = adamw(self.config.weight_decay)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.parameters(), self.optimizer.state)
        done = self._restore(checkpoint) if checkpoint else 0
        self.path.mkdir(parents=True, exist_ok=True)
        write_text(self.path / "config.json", json.dumps(self._describe(notes), indent=2) + "\n")
        self.metrics = Metrics.open(self.path / METRICS, done)
        if self.callbacks.started:
            self.callbacks.started(self._start(done))
        self.model.train()
        with closing(self.feed.batches(done)) as batches, lanes(self.config.lanes) as made:
            self._loop(done, batches, made)
        self.model.eval()
        self._write_weights()
        plot(self.metrics, self.path / "loss.png", f"{self.config.stage}: {self.trainable.count:,} parameters")
        return TrainResult(
            run_dir=self.path,
            steps=self.feed.steps,
            rows=len(self.rows),
            problems=self.problems,
            trainable=self.trainable,
            last=self.last,
            evaluation=self.evaluation,
            seconds=self.window.before,
        )

    def _checkpoint(self, resume: bool) -> Path | None:
        """The checkpoint to go on from. Raises RunError where a run would be overwritten."""
        found = checkpointing.checkpoints(self.path)
        if not resume and (found or (self.path / METRICS).exists()):
            raise RunError(f"{self.path} holds a run already; resume it, or choose another directory.")
        return found[-1] if found else None

    def _restore(self, checkpoint: Path) -> int:
        """Go back to where a checkpoint stands; the number of steps done."""
        state = checkpointing.read_state(checkpoint)
        checkpointing.require_same(checkpoint, state.settings, self.settings)
        checkpointing.restore(checkpoint, self.model, self.optimizer)
        self.window = Window(**state.window)
        return state.step

    def _settings(self) -> dict[str, Any]:
        """All that the result depends on and that a resumed run could get wrong."""
        settings = {key: value for key, value in self.config.to_dict().items() if key not in _FREE}
        rows = sha256()
        for row in self.rows:
            rows.update("\0".join((row.id, *row.images, "")).encode() + row.rendered.ids.tobytes())
        settings["rows"] = rows.hexdigest()
        settings["embeddings"], settings["codec"] = self.store.manifest.digest, self.store.codec.name
        if STAGES[self.config.stage].trains == "decoder":  # frozen, so no checkpoint brings it back
            settings["projector"] = digest(parameters(self.model.projector))
        return settings

    def _describe(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """config.json: every resolved setting, and what the run was made of and on."""
        held_out = len(self.evaluator.rows)
        return {
            **notes,
            "train": self.config.to_dict(),
            "steps": self.feed.steps,
            "data": {"rows": len(self.rows), "held_out": held_out, "left_out": len(self.problems)},
            "trainable": {"parameters": self.trainable.count, "of": self.trainable.total},
            "store": {
                "path": str(self.store.path),
                "codec": self.store.codec.name,
                "post": self.store.manifest.post,
            },
            "model": self.model.config.to_dict(),
            "machine": machine(),
        }

    def _start(self, done: int) -> Start:
        return Start(
            rows=len(self.rows),
            held_out=len(self.evaluator.rows),
            problems=self.problems,
            longest=max(map(len, self.rows)),
            steps=self.feed.steps,
            done=done,
            trainable=self.trainable,
            sample=self.sample,
        )

    def _loop(self, done: int, batches: Iterator[list[Batch]], side: Lanes) -> None:
        config, steps = self.config, self.feed.steps
        step = Step(self.model, self.optimizer, config.clip, bool(config.compile))
        mx.eval(self.model.state, self.optimizer.state)  # lanes take no work of another thread over
        for number in range(done, steps):
            rate = learning_rate(number, steps, config.learning_rate or 0.0, config.warmup, config.min_learning_rate)
            self._step(step, number, batches, side, rate)
            now, last = number + 1, number + 1 == steps
            if last or now % config.steps_per_report == 0:
                self._report(now, rate)
            if self.evaluator.rows and (last or (config.steps_per_eval and now % config.steps_per_eval == 0)):
                self._evaluate(now)
            if config.save_every and (last or now % config.save_every == 0):
                self._save(now)

    def _step(self, step: Step, number: int, batches: Iterator[list[Batch]], side: Lanes, rate: float) -> None:
        """One optimizer step over its batches: a sum of gradients, divided once by the number of targets."""
        window, started = self.window, time.perf_counter()
        total: Any = None
        seen: list[tuple[mx.array, tuple[str, ...]]] = []
        for parts in islice(batches, self.feed.first(number + 1) - self.feed.first(number)):
            for part, running in [(part, side.start(partial(step.gradients, part))) for part in parts]:
                found = running.result()
                total = found if total is None else add(total, found)
                seen.append((found[0], part.row_ids))
                window.see(part)
        loss, count, gradients = total
        norm = step.update(gradients, count, rate)
        mx.eval(self.model.state, self.optimizer.state, loss, count, norm)
        window.add(float(loss), float(count), float(norm), time.perf_counter() - started)
        if not math.isfinite(float(loss) + float(norm)):
            bad = [ids for value, ids in seen if not math.isfinite(float(value))] or [ids for _, ids in seen]
            raise RunError(
                f"step {number + 1}: the loss is {float(loss) / float(count):.4g}, the norm of its gradient "
                f"{float(norm):.4g}, on the rows {', '.join(chain(*bad))}; look at these, or lower the learning rate."
            )

    def _report(self, now: int, rate: float) -> None:
        epoch = self.feed.first(now) / self.feed.per_epoch
        self.last = self.window.report(now, self.feed.steps, epoch, rate)
        self.window = Window(before=self.last.seconds)
        self.metrics.add(self.last)
        if self.callbacks.progress:
            self.callbacks.progress(self.last)

    def _evaluate(self, now: int) -> None:
        self.evaluation = self.evaluator.run(now)
        self.metrics.add(self.evaluation)
        if self.callbacks.evaluated:
            self.callbacks.evaluated(self.evaluation)

    def _save(self, now: int) -> None:
        state = checkpointing.State(
            step=now,
            seed=self.config.seed,
            batches=self.feed.first(now),
            settings=self.settings,
            window=asdict(self.window),
        )
        checkpointing.save(self.path, state, self.model, self.optimizer, self.config.keep)

    def _write_weights(self) -> None:
        """What `checkpoint.load_run` applies: the projector, trained or not, and what the decoder learned."""
        save_safetensors_atomic(self.path / "projector.safetensors", parameters(self.model.projector))
        if config := self.trainable.adapter_config:
            save_safetensors_atomic(self.path / "adapters.safetensors", adapter_weights(self.model))
            write_text(self.path / "adapter_config.json", json.dumps(config, indent=2) + "\n")
