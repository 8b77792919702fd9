"""What a smaller store costs: bytes, fidelity, and the demo's accuracy with each codec over several seeds.

    python benchmarks/codecs.py [--seeds 3] [--images 1200] [--output codecs.json]

(1) On embeddings of the bundled tower, and on the same with planted outlier channels as large towers have them: bytes
against float16, relative error and cosine (of the other channels, where some are planted), and what lossless zstd
would still take off the codes. (2) The demo, smaller than its default, once a codec and seed: everything equal but
the store. Accuracy is of answers to fresh pictures, as a user would ask; its standard error over the questions is
printed beside the spread over seeds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
from pathlib import Path
from random import Random

import numpy as np
import zstandard

from mlx_llama3v.demo import scenes
from mlx_llama3v.demo.draw import render
from mlx_llama3v.demo.run import DemoConfig, run
from mlx_llama3v.embeddings.codec import CODECS, fidelity, get_codec
from mlx_llama3v.encoder import load_encoder
from mlx_llama3v.platform import machine
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert


def activations(folder: Path, pictures: int = 64) -> np.ndarray:
    """Embeddings [N, D] of drawn pictures by the bundled tower."""
    encoder = load_encoder(convert(TINY / "siglip", TINY / "llama", folder / "model").path)
    rng, found = Random(5), []
    for i in range(pictures):
        path = folder / f"{i}.png"
        render(scenes.sample(rng)).save(path)
        found.append(encoder.embed(path).patches)
    return np.concatenate(found).astype(np.float32)


def sizes(values: np.ndarray, columns: np.ndarray) -> dict[str, dict[str, float]]:
    """Per codec, fitted to the first half and measured on the second."""
    sample, rest = values[: len(values) // 2], values[len(values) // 2 :]
    found = {}
    for name in CODECS:
        codec = get_codec(name)
        channels = codec.fit(sample)
        parts = codec.encode(rest, channels)
        stored = sum(part.nbytes for part in parts.values())
        packed = sum(len(zstandard.compress(np.ascontiguousarray(part).tobytes(), 3)) for part in parts.values())
        found[name] = {
            "share_of_float16": stored / (rest.size * 2),
            "with_zstd": packed / (rest.size * 2),
            **fidelity(rest[:, columns], codec.decode({**parts, **channels})[:, columns]),
        }
    return found


def accuracy(args: argparse.Namespace, folder: Path) -> dict[str, dict[str, object]]:
    """The demo's scores, per codec a value a seed."""
    found: dict[str, dict[str, object]] = {}
    for seed in range(args.seeds):
        for name in CODECS:
            config = DemoConfig(
                images=args.images,
                questions=args.questions,
                pretrain_epochs=args.pretrain_epochs,
                sft_epochs=args.sft_epochs,
                codec=name,
                seed=seed,
            )
            exam = run(folder / "demo", config, lambda *_: None).exam
            mine = found.setdefault(name, {"overall": [], "small_text": []})
            mine["overall"].append(exam.overall)  # type: ignore[attr-defined]
            mine["small_text"].append(exam.small_text_split)  # type: ignore[attr-defined]
            print(f"seed {seed} {name:8} {exam.overall:.3f} (blind {exam.blind:.3f})", flush=True)
    for scores in found.values():
        overall: list[float] = scores["overall"]  # type: ignore[assignment]
        mean = statistics.mean(overall)
        scores["mean"] = mean
        scores["deviation_over_seeds"] = statistics.stdev(overall) if len(overall) > 1 else None
        scores["standard_error_of_questions"] = (mean * (1 - mean) / (args.questions * len(overall))) ** 0.5
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--images", type=int, default=1200)
    parser.add_argument("--questions", type=int, default=540)
    parser.add_argument("--pretrain-epochs", type=int, default=4)
    parser.add_argument("--sft-epochs", type=int, default=2)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, object] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    with tempfile.TemporaryDirectory() as folder:
        values = activations(Path(folder))
        found["tiny_tower"] = sizes(values, np.arange(values.shape[1]))
        outliers = values.copy()
        outliers[:, [3, 40, 77, 100]] *= np.array([20, 30, 40, 60], np.float32)
        outliers[:, 9] += 50 * values.std()
        found["with_outliers"] = sizes(outliers, np.setdiff1d(np.arange(values.shape[1]), [3, 9, 40, 77, 100]))
        for key in ("tiny_tower", "with_outliers"):
            print(key, json.dumps(found[key], indent=2))
        if args.seeds:
            found["demo"] = accuracy(args, Path(folder))
    print(json.dumps(found, indent=2))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
