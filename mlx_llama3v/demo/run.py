"""The demo: draw a world, convert, embed, train both stages, and sit an exam. The library calls of the commands."""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mlx_llama3v.checkpoint import load_config, load_model, load_run
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.demo.dataset import DataSet, Exam, draw
from mlx_llama3v.demo.exam import Result, sit
from mlx_llama3v.demo.gallery import draw_gallery
from mlx_llama3v.embeddings.codec import CODECS
from mlx_llama3v.embeddings.codec import DEFAULT as DEFAULT_CODEC
from mlx_llama3v.encoder import load_encoder
from mlx_llama3v.errors import RunError
from mlx_llama3v.knob import knob
from mlx_llama3v.platform import machine
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks, Progress, Start
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert

Report = Callable[[str, int, int, str], None]  # (step of the demo, done, total, note)


@dataclass(frozen=True)
class DemoConfig:
    """Size of the demo; the defaults take about five minutes of two x86-64 cores."""

    images: int = knob(2400, "Training pictures to draw.", min=1)
    questions: int = knob(270, "Exam questions, one unseen picture each.", min=1)
    pretrain_epochs: int = knob(6, "Passes over the captions (stage pretrain).", min=1)
    sft_epochs: int = knob(2, "Passes over the conversations (stage sft).", min=1)
    batch_size: int = knob(16, "Rows a training step.", min=1)
    codec: str = knob(DEFAULT_CODEC, "How the store holds embeddings.", choices=tuple(CODECS))
    seed: int = knob(0, "Changes the pictures, the order and the fresh weights.")


@dataclass(frozen=True)
class DemoResult:
    """Where everything is, and the exam's result."""

    output: Path
    model: Path
    store: Path
    pretrain: Path
    sft: Path
    data: DataSet
    exam: Result
    seconds: float

    @property
    def samples(self) -> list[tuple[Exam, str]]:
        """The first questions of five kinds with the model's answers."""
        return list(zip(self.data.exam, self.exam.answers, strict=True))[:5]


def run(output: Path, config: DemoConfig, report: Report) -> DemoResult:
    """Do it all below `output`; what an earlier run left there is replaced.

    Raises UserError.
    """
    started = time.time()
    _clear(output)
    model, store = output / "model", output / "store"
    data = draw(
        output / "data",
        config.images,
        config.questions,
        config.seed,
        lambda n, of: report("draw pictures", n, of, ""),
    )
    convert(
        TINY / "siglip",
        TINY / "llama",
        model,
        tiling=TilingConfig(max_slices=6),
        seed=config.seed,
        progress=lambda n, of: report("convert", n // 1000, of // 1000, ""),
    )
    embed_data(
        model,
        data.captions,
        store,
        image_folder=data.images,
        codec=config.codec,
        batch_size=32,
        progress=lambda p: report("embed", p.done, p.total, f"{p.slices:,} slices"),
    )
    _train(output, config, data, report)
    report("exam", 0, len(data.exam), "")
    exam = _exam(model, output / "sft", data)
    report("exam", len(data.exam), len(data.exam), "")
    draw_gallery(output / "gallery.png", data.images, data.exam, exam.answers)
    result = DemoResult(
        output, model, store, output / "pretrain", output / "sft", data, exam, round(time.time() - started, 1)
    )
    _write(result, config)
    return result


def _train(output: Path, config: DemoConfig, data: DataSet, report: Report) -> None:
    """Both stages, on the model and the store below `output`."""
    settings: dict[str, Any] = {
        "batch_size": config.batch_size,
        "seed": config.seed,
        "save_every": 0,
        "steps_per_report": 10,
    }
    for stage, records, epochs, rate in (
        ("pretrain", data.captions, config.pretrain_epochs, 3e-3),
        ("sft", data.conversations, config.sft_epochs, 2e-3),
    ):
        train_stage(
            output / "model",
            records,
            output / "store",
            output / stage,
            TrainConfig(stage=stage, epochs=epochs, learning_rate=rate, **settings),
            projector=output / "pretrain" if stage == "sft" else None,
            callbacks=_training(report, stage),
        )


def _clear(output: Path) -> None:
    """Remove what an earlier demo made. Raises RunError where `output` is something else."""
    ours = ("data", "model", "store", "pretrain", "sft", "demo.json", "gallery.png")
    foreign = [path.name for path in output.iterdir() if path.name not in ours] if output.is_dir() else []
    if foreign or output.is_file():
        raise RunError(f"{output} holds {', '.join(foreign[:3]) or 'a file'}; choose a new directory with --output.")
    for name in ours:
        if (output / name).is_dir():
            shutil.rmtree(output / name)
        else:
            (output / name).unlink(missing_ok=True)
    output.mkdir(parents=True, exist_ok=True)


def _training(report: Report, stage: str) -> Callbacks:
    """Pass a run's events on; the first one starts the clock of its bar."""
    name = f"train ({stage})"

    def started(start: Start) -> None:
        report(name, start.done, start.steps, "")

    def progress(p: Progress) -> None:
        report(name, p.step, p.steps, f"loss {p.loss:.3f}")

    return Callbacks(started=started, progress=progress)


def _exam(model_dir: Path, run_dir: Path, data: DataSet) -> Result:
    config = load_config(model_dir)
    model = load_model(model_dir)
    load_run(model, run_dir)
    tokens = Tokens.load(model_dir, config.marker_ids, config.eos_token_ids)
    split, unsplit = load_encoder(model_dir), load_encoder(model_dir, max_slices=0)
    return sit(model, tokens, split, unsplit, data.images, data.exam)


def _write(result: DemoResult, config: DemoConfig) -> None:
    """demo.json: every number, with what it was measured on."""
    exam = result.exam
    values = {
        "overall": exam.overall,
        "blind": exam.blind,
        "kinds": {kind.kind: {"score": kind.score, "blind": kind.blind, "n": kind.n} for kind in exam.kinds},
        "small_text_split": exam.small_text_split,
        "small_text_unsplit": exam.small_text_unsplit,
        "seconds": result.seconds,
        "seed": config.seed,
        "config": asdict(config),
        **machine(),
    }
    (result.output / "demo.json").write_text(json.dumps(values, indent=2) + "\n")
