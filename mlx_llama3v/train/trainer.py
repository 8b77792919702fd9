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
from itertools import chain, islice
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v import plan
from mlx_llama3v.data.batches import Batch
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.data.rows import RowLayout, build_rows
from mlx_llama3v.embeddings.lock import Lock
from mlx_llama3v.embeddings.store import Reader, described
from mlx_llama3v.errors import DataError, RunError
from mlx_llama3v.lanes import Lanes, lanes
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import machine
from mlx_llama3v.tensors import marks, parameters, save_safetensors_atomic, write_text
from mlx_llama3v.text.prompt import describe
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train import resume as checkpointing
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.evaluate import Evaluator, hold_out
from mlx_llama3v.train.feed import Feed, decode
from mlx_llama3v.train.lora import Trainable, adapter_weights, prepare
from mlx_llama3v.train.memory import fitted, job_of, longest_row
from mlx_llama3v.train.optim import adamw, learning_rate
from mlx_llama3v.train.ranks import all_sum, gather, require_agreement
from mlx_llama3v.train.report import METRICS, Callbacks, Evaluation, Metrics, Progress, Skipped, Start, Window, plot
from mlx_llama3v.train.sinks import Sinks, require
from mlx_llama3v.train.step import Step, add

_HOPELESS = 20  # steps in a row that are no number: then it is not the rows


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
    stopped: int | None = None  # after which step, where `Callbacks.stop` asked for it
    unseen: tuple[Problem, ...] = ()  # rows that were left out when their turn came (Feed.unseen)
    skipped: int = 0  # steps of the whole run that changed nothing


def train(
    config: TrainConfig,
    model: Llama3V,
    tokens: Tokens,
    store: Reader,
    records: Sequence[Record],
    run_dir: Path | str,
    *,
    problems: Sequence[Problem] = (),
    resume: bool = False,
    callbacks: Callbacks | None = None,
    notes: Mapping[str, Any] | None = None,
    dry_run: bool = False,
) -> TrainResult:
    """Train one stage of `model` (in place) on the stored pictures of `records`, and write a run directory.

    Args:
        model: fresh from its directory; for stage sft with the projector of a pretrain run applied.
        run_dir: gets config.json, metrics.jsonl, loss.png, projector.safetensors, in stage sft the adapters,
            and checkpoints on the way. Refused where it holds a run, unless `resume`.
        problems: of records that could not be read, which are told with those of the others.
        resume: go on from the newest checkpoint, or from the start where there is none.
        notes: JSON-ready facts for config.json that only the caller knows (paths).
        dry_run: check everything, tell `callbacks.started`, and write nothing.

    Under `mlx.launch` every rank calls this with the same arguments, reads its part of each batch, and ends with the
    same weights; the first one writes. A resumed run may have another number of ranks.

    Raises:
        DataError: no record can be trained on.
        RunError: settings that clash or differ from the checkpoint's, a loss that is not a number.
        StoreError: embeddings that do not fit the model, a damaged shard.
    """
    checkpointing.check_place(Path(run_dir))
    require(config.report_to)
    run = _Run(config.resolved(), model, tokens, store, records, problems, Path(run_dir), callbacks or Callbacks())
    if dry_run:
        return run.dry(resume)
    lock = Lock(Path(run_dir)) if run.first else None  # two trainings into one directory would mix their checkpoints
    try:
        return run.go(resume, notes or {})
    finally:
        if lock is not None:
            lock.release()


class _Run:
    """One call of `train`; made when all data were checked and laid out."""

    def __init__(
        self,
        config: TrainConfig,
        model: Llama3V,
        tokens: Tokens,
        store: Reader,
        records: Sequence[Record],
        problems: Sequence[Problem],
        path: Path,
        callbacks: Callbacks,
    ) -> None:
        self.model, self.store, self.path, self.callbacks = model, store, path, callbacks
        self.group = mx.distributed.init()
        self.first = self.group.rank() == 0
        used, held_out = hold_out(records, config.val_split)
        if not used:
            raise DataError(f"val_split {config.val_split:g} holds out all {len(records)} records; give a smaller one.")
        most = min(config.max_seq_length, int(model.config.text_config["max_position_embeddings"]))
        layout = RowLayout(store, tokens, model.config.projector_config, config.stage, most, config.long_rows)
        self.rows, left_out = build_rows(used, layout)
        if not len(self.rows):
            raise DataError(f"none of {len(used)} records can be trained on; the first: {left_out[0]}.")
        self.left_out = (*problems, *left_out)
        self.longest = longest_row(self.rows)
        self.config = config = fitted(config, model, self.rows, self.longest, self.group.size())
        self.memory = plan.training_memory(job_of(model, config, self.longest, self.group.size())).total
        self.evaluator = Evaluator(held_out, layout, model, config, self.group)
        self.settings = checkpointing.settings(config, self.rows.records, tokens, model, store)
        self.feed = Feed(self.rows, store, model.config, config, self.group.rank(), self.group.size())
        self.sample = tuple(describe(self.rows[0].rendered, tokens))
        self.tokens = tokens
        self.decoder = marks(parameters(model.language_model))  # before it has adapters
        self.window = Window()
        self.metrics = Metrics(self.path / METRICS)
        self.drawn = -1  # lines of metrics in the last picture
        self.last: Progress | None = None
        self.evaluation: Evaluation | None = None

    @property
    def problems(self) -> tuple[Problem, ...]:
        """Of all records."""
        return (*self.left_out, *self.evaluator.problems)

    def dry(self, resume: bool) -> TrainResult:
        """Everything up to the first step, but nothing is written."""
        state = self._state(checkpoint) if (checkpoint := checkpointing.newest(self.path, resume)) else None
        self.trainable = prepare(self.model, self.config)
        self._tell(state.step if state else 0)
        return self._result(None)

    def go(self, resume: bool, notes: Mapping[str, Any]) -> TrainResult:
        """Prepare, restore, train, write."""
        state = self._state(checkpoint) if (checkpoint := checkpointing.newest(self.path, resume)) else None
        self.evaluator.hold()
        mx.random.seed(self.config.seed)
        self.trainable = prepare(self.model, self.config)
        self.optimizer = adamw(self.config.weight_decay, two_rates=self.config.tune_projector)
        self.optimizer.init(self.model.trainable_parameters())
        mx.eval(self.model.parameters(), self.optimizer.state)
        done = self._restore(checkpoint, state) if checkpoint and state else 0
        require_agreement(self.group, self.path, done, self.settings)
        if self.first:  # nothing was written before every rank had looked
            self.path.mkdir(parents=True, exist_ok=True)
            write_text(self.path / "config.json", json.dumps(self._describe(notes), indent=2) + "\n")
        self.metrics = Metrics.open(self.path / METRICS, done, write=self.first)
        self._tell(done)
        self.model.train()
        self.sinks = Sinks(self.config.report_to if self.first else (), self.path, self.config.to_dict(), done)
        with closing(self.feed.batches(done)) as batches, lanes(self.config.lanes) as side, closing(self.sinks):
            stopped = self._loop(done, batches, side)
        self.model.eval()
        if stopped is None and self.first:
            self._write_weights()
        self._plot()
        mx.eval(all_sum([mx.array(0.0)], self.group))  # launchers end the others with the first that ends: wait
        return self._result(stopped)

    def _tell(self, done: int) -> None:
        if self.callbacks.started and self.first:
            self.callbacks.started(self._start(done))

    def _result(self, stopped: int | None) -> TrainResult:
        return TrainResult(
            run_dir=self.path,
            steps=self.feed.steps,
            rows=len(self.rows),
            problems=self.problems,
            trainable=self.trainable,
            last=self.last,
            evaluation=self.evaluation,
            seconds=self.window.before,
            stopped=stopped,
            unseen=tuple(self.feed.unseen.values()),
            skipped=sum("skipped_rows" in line for line in self.metrics.lines),
        )

    def _state(self, checkpoint: Path) -> checkpointing.State:
        """Where a checkpoint stands. Raises RunError where it is of another run than this would be."""
        state = checkpointing.read_state(checkpoint)
        checkpointing.require_same(checkpoint, state.settings, self.settings)
        return state

    def _restore(self, checkpoint: Path, state: checkpointing.State) -> int:
        """Go back to where a checkpoint stands; the number of steps done."""
        checkpointing.restore(checkpoint, self.model, self.optimizer)
        self.window = Window(**state.window)
        self.feed.unseen = {row: Problem(f"record {row}", why) for row, why in state.unseen.items()}
        return state.step

    def _describe(self, notes: Mapping[str, Any]) -> dict[str, Any]:
        """config.json: every resolved setting, and what the run was made of and on."""
        held_out = len(self.evaluator.rows)
        return {
            **notes,
            "train": self.config.to_dict(),
            "steps": self.feed.steps,
            "data": {"rows": len(self.rows), "held_out": held_out, "left_out": len(self.problems)},
            "trainable": {"parameters": self.trainable.count, "of": self.trainable.total},
            "store": described(self.store),
            "decoder": self.decoder,
            "model": self.model.config.to_dict(),
            "machine": machine(),
        }

    def _start(self, done: int) -> Start:
        return Start(
            rows=len(self.rows),
            held_out=len(self.evaluator.rows),
            problems=self.problems,
            longest=int(self.rows.bounds.max()),
            shortened=self.rows.shortened,
            batch_size=self.config.batch_size,
            batches_per_step=self.config.grad_accumulation_steps,
            rows_per_step=self.config.rows_per_step,
            memory=self.memory,
            memory_limit=plan.memory_limit(),
            steps=self.feed.steps,
            done=done,
            trainable=self.trainable,
            sample=self.sample,
        )

    def _loop(self, done: int, batches: Iterator[list[Batch]], side: Lanes) -> int | None:
        """All steps that are left; the step after which the run was asked to stop, None where it was not."""
        config, steps = self.config, self.feed.steps
        how = (config.clip, bool(config.compile), config.grad_checkpoint, self.trainable.dtype)
        step = Step(self.model, self.optimizer, *how)
        mx.eval(self.model.state, self.optimizer.state)  # lanes take no work of another thread over
        for number in range(done, steps):
            stop = self._step(step, number, batches, side)
            now, last = number + 1, number + 1 == steps
            if last or now % config.steps_per_report == 0:
                self._report(now)
            if self.evaluator.rows and (last or (config.steps_per_eval and now % config.steps_per_eval == 0)):
                with step.rounded():
                    self._evaluate(now)
            if (config.save_every and (last or now % config.save_every == 0)) or (stop and not last):
                self._save(now)
            if stop and not last:
                return now
        return None

    def _rate(self, number: int, peak: float) -> float:
        return learning_rate(number, self.feed.steps, peak, self.config.warmup, self.config.min_learning_rate)

    def _step(self, step: Step, number: int, batches: Iterator[list[Batch]], side: Lanes) -> bool:
        """One optimizer step over its batches: a sum of gradients, divided once by the number of targets.

        Whether any rank was asked to stop.
        """
        started = time.perf_counter()
        total, seen, own = self._sum(step, number, batches, side)
        stop = bool(self.callbacks.stop and self.callbacks.stop())
        loss, count, gradients, counts = all_sum((*total, mx.array([*own.counts(), float(stop)])), self.group)
        norm = step.norm(gradients, count)
        mx.eval(loss, count, norm, gradients, counts)
        *sums, stops = np.array(counts).tolist()
        if not float(count):  # all rows were left out: AdamW's means would move the weights all the same
            self.window.skipped += 1
            self.metrics.add(Skipped(number + 1, ()))
        elif math.isfinite(float(loss)) and math.isfinite(float(norm)):
            config = self.config
            rates = self._rate(number, config.learning_rate or 0.0), self._rate(number, config.projector_learning_rate)
            step.update(gradients, count, norm, *rates)
            del gradients, total
            mx.eval(self.model.state, self.optimizer.state)
            self.window.add(float(loss), float(count), float(norm), sums, time.perf_counter() - started)
        else:
            self._not_a_number(number, float(loss) / max(1.0, float(count)), float(norm), seen)
        return stops > 0

    def _sum(
        self, step: Step, number: int, batches: Iterator[list[Batch]], side: Lanes
    ) -> tuple[Any, list[tuple[mx.array, tuple[str, ...]]], Window]:
        """This rank's (loss, targets, gradients) of a step, every part's loss with its rows, and what they count."""
        total: Any = None
        seen: list[tuple[mx.array, tuple[str, ...]]] = []
        own = Window()
        first = self.feed.first(number)
        for batch, parts in enumerate(islice(batches, self.feed.first(number + 1) - first), first):
            mx.random.seed(self.feed.seed(batch))
            mx.eval(decode(parts))  # that of the first batch alone is still to be done
            at_work = [(part, side.start(partial(step.gradients, part))) for part in parts]
            self.feed.decode_next()
            for part, running in at_work:
                found = running.result()
                total = found if total is None else add(total, found)
                mx.eval(total)  # or the gradients of all parts of the step would wait for the last one
                seen.append((found[0], part.row_ids))
                own.see(part)
            at_work.clear()  # or their gradients would wait for the next batch's
        return total or step.nothing(), seen, own

    def _not_a_number(
        self, number: int, loss: float, norm: float, seen: list[tuple[mx.array, tuple[str, ...]]]
    ) -> None:
        """A step whose loss or gradient is no number changes nothing. Raises RunError unless `on_nan` is skip."""
        bad = chain(*(ids for value, ids in seen if not math.isfinite(float(value))))
        # Where every loss is a number, a gradient is none: it may be that of any row.
        rows = tuple(gather([*bad], self.group) or gather([*chain(*(ids for _, ids in seen))], self.group))
        if self.config.on_nan == "stop":
            raise RunError(
                f"step {number + 1}: the loss is {loss:.4g}, the norm of its gradient {norm:.4g}, on the rows "
                f"{', '.join(rows)}; look at these, lower the learning rate, or go on without them: --on-nan skip."
            )
        self.window.skipped += 1
        self.metrics.add(skipped := Skipped(number + 1, rows))
        if self.callbacks.skipped and self.first:
            self.callbacks.skipped(skipped)

    def _report(self, now: int) -> None:
        if not self.window.steps:
            if self.window.skipped < _HOPELESS and (self.window.before or now < self.feed.steps):
                return  # a few bad rows; the window goes on
            raise RunError(
                f"steps up to {now}: not one of the last {self.window.skipped:.0f} had rows, and a loss and gradient "
                "that are numbers; if no pictures were left out, the weights themselves may be damaged. Go on from an "
                "older checkpoint with a lower learning rate."
            )
        epoch = self.feed.first(now) / self.feed.per_epoch
        rate = self._rate(now - 1, self.config.learning_rate or 0.0)
        self.last = self.window.report(now, self.feed.steps, epoch, rate)
        self.window = Window(before=self.last.seconds)
        self.metrics.add(self.last)
        self.sinks.add(self.last)
        if self.callbacks.progress and self.first:
            self.callbacks.progress(self.last)

    def _evaluate(self, now: int) -> None:
        self.evaluation = self.evaluator.run(now)
        self.metrics.add(self.evaluation)
        self.sinks.add(self.evaluation)
        self._plot()
        if self.callbacks.evaluated and self.first:
            self.callbacks.evaluated(self.evaluation)

    def _plot(self) -> None:
        """Draw what is new."""
        if self.first and self.drawn != len(self.metrics.lines):
            self.drawn = len(self.metrics.lines)
            plot(self.metrics, self.path / "loss.png", f"{self.config.stage}: {self.trainable.count:,} parameters")

    def _save(self, now: int) -> None:
        if not self.first:
            return
        state = checkpointing.State(
            step=now,
            seed=self.config.seed,
            batches=self.feed.first(now),
            settings=self.settings,
            window=asdict(self.window),
            unseen={row: problem.reason for row, problem in self.feed.unseen.items()},
        )
        checkpointing.save(self.path, state, self.model, self.optimizer, self.config.keep)

    def _write_weights(self) -> None:
        """What `checkpoint.load_run` applies: the projector, trained or not, and what the decoder learned."""
        save_safetensors_atomic(self.path / checkpointing.PROJECTOR, parameters(self.model.projector))
        if config := self.trainable.adapter_config:
            save_safetensors_atomic(self.path / "adapters.safetensors", adapter_weights(self.model))
            write_text(self.path / "adapter_config.json", json.dumps(config, indent=2) + "\n")
