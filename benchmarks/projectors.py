"""Linear, MLP or self-attention: which projector learns most from the tiny world in equally many steps?

    python benchmarks/projectors.py --work DIR [--only linear:0] [--output FILE] [--plot FILE]

The recipe's claim is that two self-attention blocks beat LLaVA's linear layer. One set of pictures of the tiny world,
embedded once (unsplit); per projector and seed a stage pretrain on captions and a short stage sft on conversations:
the same rows in the same order, the same number of steps, learning rates the demo's for all; seconds are told, too,
since the attention projector hands over 16 visual tokens a slice, means of 2x2, where the others hand over all 64, as
it does itself as `unpooled`. Told are the held-out losses of both stages (with the right pictures, and by how much they
grow with wrong ones) and the score of an exam of unseen pictures. Each run is written to `--work` when it is done: call
again to go on, `--only KIND:SEED` does one.
"""

from __future__ import annotations

import argparse
import json
import statistics
from pathlib import Path
from typing import Any

import mlx_llama3v  # noqa: F401 (the BLAS, before MLX)

# isort: split
from mlx_llama3v.checkpoint import load_config, load_model, load_run
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.demo.dataset import DataSet, Exam, draw
from mlx_llama3v.demo.exam import sit
from mlx_llama3v.encoder import load_encoder
from mlx_llama3v.platform import machine
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data
from mlx_llama3v.tensors import parameters
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.trainer import TrainResult
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert

KINDS = {"linear": ("linear", 1), "mlp": ("mlp", 1), "attention": ("attention", 2), "unpooled": ("attention", 1)}
SEEDS = (0, 1, 2)
RATES = {"pretrain": 3e-3, "sft": 2e-3}  # the demo's


def prepare(work: Path, images: int, questions: int) -> DataSet:
    """Pictures and their embeddings, the same for all; drawn and embedded once."""
    data_dir = work / "data"
    if not (work / "ready").exists():
        data = draw(data_dir, images, questions, 0)
        model = model_of(work, "linear", 0)
        embed_data(model, data.captions, work / "store", image_folder=data.images, batch_size=32)
        (work / "ready").touch()
    exam = tuple(Exam(**question) for question in json.loads((data_dir / "exam.json").read_text()))
    return DataSet(data_dir / "images", data_dir / "captions.json", data_dir / "train.json", exam)


def model_of(work: Path, kind: str, seed: int) -> Path:
    """The tiny bases with a fresh projector of that kind."""
    path = work / f"model-{kind}-{seed}"
    if not (path / "config.json").exists():
        projector, pool = KINDS[kind]
        tiling = TilingConfig(max_slices=0)
        convert(TINY / "siglip", TINY / "llama", path, projector=projector, pool=pool, tiling=tiling, seed=seed)
    return path


def train(work: Path, data: DataSet, kind: str, seed: int, steps: dict[str, int]) -> dict[str, Any]:
    """Both stages and the exam."""
    model, found = model_of(work, kind, seed), dict[str, Any]()
    before: Path | None = None
    for stage, records in (("pretrain", data.captions), ("sft", data.conversations)):
        config = TrainConfig(
            stage=stage,
            iters=steps[stage],
            batch_size=16,
            seed=seed,
            learning_rate=RATES[stage],
            val_split=0.08,
            val_rows=64,
            save_every=0,
        )
        run = work / f"run-{kind}-{seed}-{stage}"
        if not (run / "projector.safetensors").exists():
            found[stage] = told(train_stage(model, records, work / "store", run, config, projector=before))
            (run / "told.json").write_text(json.dumps(found[stage]))
        found[stage] = json.loads((run / "told.json").read_text())
        before = run
    assert before is not None
    loaded, config_ = load_model(model), load_config(model)
    load_run(loaded, before)
    tokens = Tokens.load(model, config_.marker_ids, config_.eos_token_ids)
    encoder = load_encoder(model)
    result = sit(loaded, tokens, encoder, encoder, data.images, data.exam)
    return {
        "kind": kind,
        "seed": seed,
        "parameters": sum(value.size for value in parameters(loaded.projector).values()),
        **found,
        "exam": result.overall,
        "exam_blind": result.blind,
        "exam_kinds": {one.kind: one.score for one in result.kinds},
    }


def told(result: TrainResult) -> dict[str, float]:
    """Held-out loss, how much it grows with wrong pictures, and seconds of training."""
    evaluation = result.evaluation
    assert evaluation is not None and evaluation.gap is not None
    return {"loss": evaluation.eval_loss, "gap": evaluation.gap, "seconds": result.seconds}


def table(runs: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and spread over the seeds, a projector a line; printed, too."""
    lines = []
    print(f"{'projector':10} {'parameters':>10}  caption loss   gap    answer loss    exam          blind  seconds")
    for kind in KINDS:
        own = [run for run in runs if run["kind"] == kind]
        if not own:
            continue
        line: dict[str, Any] = {"kind": kind, "seeds": len(own), "parameters": own[0]["parameters"]}
        for name, values in (
            ("caption_loss", [run["pretrain"]["loss"] for run in own]),
            ("gap", [run["pretrain"]["gap"] for run in own]),
            ("answer_loss", [run["sft"]["loss"] for run in own]),
            ("exam", [run["exam"] for run in own]),
            ("blind", [run["exam_blind"] for run in own]),
            ("seconds", [run["pretrain"]["seconds"] + run["sft"]["seconds"] for run in own]),
        ):
            line[name] = statistics.mean(values)
            line[f"{name}_spread"] = max(values) - min(values)
        lines.append(line)
        print(
            f"{kind:10} {line['parameters']:10,}  {line['caption_loss']:.3f} ±{line['caption_loss_spread'] / 2:.3f}  "
            f"{line['gap']:.3f}  {line['answer_loss']:.3f} ±{line['answer_loss_spread'] / 2:.3f}  "
            f"{line['exam']:6.1%} ±{line['exam_spread'] / 2:.1%}  {line['blind']:6.1%}  {line['seconds']:6.0f}"
        )
    return lines


def plot(runs: list[dict[str, Any]], path: Path) -> None:
    """Held-out losses and exam scores, a dot a seed, a bar their mean."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.2), layout="constrained")
    for axes, title, value in zip(
        figure.subplots(1, 3),
        ("held-out captions (nats a token)", "held-out answers (nats a token)", "exam (share right)"),
        (lambda run: run["pretrain"]["loss"], lambda run: run["sft"]["loss"], lambda run: run["exam"]),
        strict=True,
    ):
        for place, kind in enumerate(KINDS):
            values = [value(run) for run in runs if run["kind"] == kind]
            if values:
                axes.bar(place, statistics.mean(values), color="0.85")
                axes.plot([place] * len(values), values, "o", color="C0", markersize=4)
        axes.set_xticks(range(len(KINDS)), KINDS, fontsize=8)
        axes.set_title(title, fontsize=10)
    FigureCanvasAgg(figure).print_png(str(path))


def main() -> None:
    """Train what is left, print, plot, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--only", default="", help="KIND:SEED")
    parser.add_argument("--images", type=int, default=900)
    parser.add_argument("--questions", type=int, default=135)
    parser.add_argument("--pretrain-steps", type=int, default=300)
    parser.add_argument("--sft-steps", type=int, default=100)
    parser.add_argument("--plot", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    data = prepare(args.work, args.images, args.questions)
    steps = {"pretrain": args.pretrain_steps, "sft": args.sft_steps}
    runs = []
    for seed in SEEDS:
        for kind in KINDS:
            file = args.work / f"result-{kind}-{seed}.json"
            if not file.exists() and args.only in ("", f"{kind}:{seed}"):
                file.write_text(json.dumps(train(args.work, data, kind, seed, steps), indent=2))
            if file.exists():
                runs.append(json.loads(file.read_text()))
    lines = table(runs)
    plot(runs, args.plot or args.work / "projectors.png")
    if args.output:
        values = {"steps": steps, "images": args.images, "table": lines, "runs": runs, **machine()}
        args.output.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
