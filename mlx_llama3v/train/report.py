"""What a run tells: events for whoever watches it, `metrics.jsonl`, and the curves in `loss.png`."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v.data.batches import Batch
from mlx_llama3v.data.records import Problem
from mlx_llama3v.tensors import write_text
from mlx_llama3v.train.lora import Trainable

METRICS = "metrics.jsonl"
_CURVES = {
    "loss": "training",
    "eval_loss": "held out",
    "eval_shuffled": "wrong pictures",
    "eval_blind": "no pictures",
}


@dataclass(frozen=True)
class Start:
    """Before the first step: all data were checked, the model is ready."""

    rows: int
    held_out: int  # rows kept for evaluation
    problems: tuple[Problem, ...]  # rows left out, and why
    longest: int  # no row has more tokens
    shortened: tuple[Problem, ...]  # rows that are cut (`long_rows`)
    batch_size: int  # rows
    batches_per_step: int
    rows_per_step: int  # that were asked for; 0: left to the two above
    steps: int
    done: int  # steps done before, of a resumed run
    trainable: Trainable
    memory: int  # bytes that a step of the longest rows is reckoned to hold, see plan.py
    memory_limit: int  # bytes that there are
    sample: tuple[tuple[str, str, int], ...]  # the first row as (text, kind, tokens) spans, see text.prompt.describe


@dataclass(frozen=True)
class Progress:
    """A stretch of steps, every `steps_per_report`; rates and means are over that stretch alone."""

    step: int
    steps: int
    epoch: float
    loss: float  # nats a target
    learning_rate: float
    grad_norm: float  # mean over the steps, before clipping
    tokens: int  # targets
    rows_per_second: float
    tokens_per_second: float  # positions of rows, without padding
    images_per_second: float
    padding: float  # share of the positions
    peak_memory: int  # bytes that MLX held at most since the start
    seconds: float  # since the start of the run, evaluations and interruptions left out
    skipped: int = 0  # steps without an update, see Skipped


@dataclass(frozen=True)
class Skipped:
    """A step without an update: its loss or gradient was no number (`on_nan` skip), or all rows were left out."""

    step: int
    skipped_rows: tuple[str, ...]


@dataclass(frozen=True)
class Evaluation:
    """Loss on the held-out rows: as they are, and of those with pictures with each other's, and without any.

    A model that looks has the lowest loss by far with the right ones. None where rows have no pictures.
    """

    step: int
    eval_loss: float
    eval_shuffled: float | None = None
    eval_blind: float | None = None
    eval_right: float | None = None  # of the rows that the two before are of, where those are not all

    @property
    def gap(self) -> float | None:
        """By how much the loss grows without the right pictures, at least; None where rows have none."""
        others = [loss for loss in (self.eval_shuffled, self.eval_blind) if loss is not None]
        return min(others) - self._right if others else None

    @property
    def _right(self) -> float:
        return self.eval_loss if self.eval_right is None else self.eval_right

    @property
    def looks(self) -> bool:
        """Whether the pictures are used: the gap is more than a hundredth of the loss."""
        return self.gap is None or self.gap > 0.01 * self._right


@dataclass(frozen=True)
class Callbacks:
    """Who watches a run; each may be left out."""

    started: Callable[[Start], None] | None = None
    progress: Callable[[Progress], None] | None = None
    evaluated: Callable[[Evaluation], None] | None = None
    skipped: Callable[[Skipped], None] | None = None
    stop: Callable[[], bool] | None = None  # asked after every step; True: save a checkpoint and return


@dataclass
class Window:
    """Running sums of the report in the making; they travel with a checkpoint."""

    loss: float = 0.0
    tokens: float = 0.0
    norm: float = 0.0
    steps: float = 0.0
    skipped: float = 0.0
    rows: float = 0.0
    images: float = 0.0
    positions: float = 0.0
    padded: float = 0.0
    seconds: float = 0.0  # of this stretch
    before: float = 0.0  # seconds of the run before it

    def see(self, batch: Batch) -> None:
        """Count the rows of a batch."""
        self.rows += len(batch.lengths)
        self.images += batch.images
        self.positions += sum(batch.lengths)
        self.padded += batch.ids.size

    def counts(self) -> tuple[float, float, float, float]:
        """What `see` counted, to be added up over the ranks."""
        return self.rows, self.images, self.positions, self.padded

    def add(self, loss: float, tokens: float, norm: float, counts: Sequence[float], seconds: float) -> None:
        """Count a step: its summed loss over so many targets, and the `counts` of its batches."""
        self.loss += loss
        self.tokens += tokens
        self.norm += norm
        self.seconds += seconds
        self.steps += 1
        self.rows += counts[0]
        self.images += counts[1]
        self.positions += counts[2]
        self.padded += counts[3]

    def report(self, step: int, steps: int, epoch: float, learning_rate: float) -> Progress:
        """The report of this stretch, which ends at `step` of `steps`."""
        seconds = max(self.seconds, 1e-9)
        return Progress(
            step=step,
            steps=steps,
            epoch=round(epoch, 4),
            loss=self.loss / max(self.tokens, 1),
            learning_rate=learning_rate,
            grad_norm=self.norm / max(self.steps, 1),
            tokens=int(self.tokens),
            rows_per_second=self.rows / seconds,
            tokens_per_second=self.positions / seconds,
            images_per_second=self.images / seconds,
            padding=1 - self.positions / max(self.padded, 1),
            peak_memory=mx.get_peak_memory(),
            seconds=self.before + self.seconds,
            skipped=int(self.skipped),
        )


@dataclass
class Metrics:
    """`metrics.jsonl`: one JSON object a line, rewound to the checkpoint when a run is resumed."""

    path: Path
    lines: list[dict[str, Any]] = field(default_factory=list)
    write: bool = True

    @classmethod
    def open(cls, path: Path, done: int, *, write: bool = True) -> Metrics:
        """Keep what was written up to step `done`, as far as lines are whole: a kill cuts the last one short."""
        lines = [line for line in _read(path) if line["step"] <= done] if done else []
        if write:
            write_text(path, "".join(json.dumps(line) + "\n" for line in lines))
        return cls(path, lines, write)

    def add(self, event: Progress | Evaluation | Skipped) -> None:
        """Append one line."""
        line = {key: value for key, value in asdict(event).items() if value is not None}
        line |= {key: None for key, value in line.items() if isinstance(value, float) and not math.isfinite(value)}
        self.lines.append(line)
        if not self.write:
            return
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")


def _read(path: Path) -> Iterable[dict[str, Any]]:
    if path.is_file():
        for line in path.read_text(encoding="utf-8").splitlines():
            try:
                found = json.loads(line)
                int(found["step"])
            except (ValueError, TypeError, KeyError):  # whatever follows is of nothing that can be told
                return
            yield found


def plot(metrics: Metrics, path: Path, title: str) -> None:
    """Draw training and evaluation loss and the learning rate over the steps."""
    if not any(key in line for line in metrics.lines for key in _CURVES):
        return
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4))  # with fixed margins: to find them would take as long as to draw
    axes = figure.subplots(gridspec_kw={"left": 0.1, "right": 0.86, "bottom": 0.12, "top": 0.92})
    for key, label in _CURVES.items():
        points = [(line["step"], line[key]) for line in metrics.lines if line.get(key) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="." if len(points) < 30 else "", linewidth=1.5)
    axes.set(xlabel="step", ylabel="loss (nats a token)", title=title)
    axes.legend(frameon=False)
    rates = [(line["step"], line["learning_rate"]) for line in metrics.lines if "learning_rate" in line]
    if rates:
        twin = axes.twinx()
        twin.plot(*zip(*rates, strict=True), color="0.75", linewidth=1, zorder=0)
        twin.set_ylabel("learning rate", color="0.5")
    FigureCanvasAgg(figure).print_png(str(path))
