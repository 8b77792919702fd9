"""What a run on pictures holds in memory beside what `train` says before its first step.

    python benchmarks/memory_pictures.py [--stage sft] [--output FILE]

memory.py measures steps on text. Here short runs go through `train` itself, from a store of random embeddings of split
pictures (seven slices of so400m's 729 x 1152 each), with projectors that a small decoder does not outweigh: what is
read ahead and decoded, the projector's own numbers, and its way back where it learns (stage pretrain; in sft it is
frozen). A process each.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from itertools import product
from pathlib import Path
from typing import Any

import mlx_llama3v  # noqa: F401 (the BLAS, before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlx_llama3v.config import Encoded, ModelConfig, ProjectorConfig, SliceLayout, VisionConfig, llama_config
from mlx_llama3v.data.records import Record
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import machine
from mlx_llama3v.text.prompt import Message
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks, Start
from mlx_llama3v.train.trainer import train
from mlx_llama3v.weights import TINY

WIDTH, PICTURES = 1152, 8
LAYOUT = SliceLayout((27, 27), rows=3, cols=2, tile=(27, 27))
STAGES, CODECS, HIDDEN, BATCHES, LANES = ("pretrain", "sft"), ("int4", "float16"), (256, 512), (1, 2), (1, 2)


def fill(path: Path, codec: str) -> None:
    """A store of random pictures."""
    with StoreWriter(path, {"weights": "random"}, codec) as writer:
        for n in range(PICTURES):
            values = np.random.default_rng(n).standard_normal((LAYOUT.patches, WIDTH)).astype(np.float32)
            writer.add(f"{n}.png", f"{n:064x}", Encoded(LAYOUT, values))


def one(work: Path, stage: str, codec: str, hidden: int, batch: int, lanes: int) -> tuple[int, int]:
    """(what train says, peak) in bytes, of a few steps."""
    tokens = Tokens.load(TINY / "llama")
    llama = {
        "hidden_size": 256,
        "intermediate_size": 512,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tokens.size,
        "max_position_embeddings": 8192,
    }
    projector = ProjectorConfig("attention", WIDTH, 256, hidden_dim=hidden, num_heads=hidden // 64)
    model = Llama3V(ModelConfig(VisionConfig(WIDTH, 256, 1, 16, 378, 14), llama_config(llama), projector))
    mx.eval(model.parameters())
    asked = "What is it?" if stage == "sft" else ""
    answer = Message("assistant", "a red circle on a white table")
    records = [Record(f"{i}", (f"{i % PICTURES}.png",), (Message("user", asked, (0,)), answer)) for i in range(32)]
    config = TrainConfig(stage=stage, iters=3, batch_size=batch, lanes=lanes, val_split=0.0, save_every=0)
    told: list[Start] = []
    mx.reset_peak_memory()
    train(config, model, tokens, Store(work / codec), records, work / "run", callbacks=Callbacks(started=told.append))
    return told[0].memory, mx.get_peak_memory()


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--one", nargs=6, help=argparse.SUPPRESS)
    parser.add_argument("--stage", choices=STAGES, action="append")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    if args.one:
        work, stage, codec, *sizes = args.one
        print(json.dumps(one(Path(work), stage, codec, *map(int, sizes))))
        return
    found: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for codec in CODECS:
            fill(Path(folder) / codec, codec)
        for n, case in enumerate(product(args.stage or STAGES, CODECS, HIDDEN, BATCHES, LANES)):
            stage, codec, hidden, batch, lanes = case
            (work := Path(folder) / str(n)).mkdir()
            (work / codec).symlink_to(Path(folder) / codec)
            command = [sys.executable, __file__, "--one", str(work), *map(str, case)]
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            said, peak = json.loads(done.stdout.splitlines()[-1])
            found.append({"case": case, "formula": said, "peak": peak, "error": said / peak - 1})
            print(
                f"{stage:8} {codec:7} {hidden} wide, rows {batch}, lanes {lanes}: measured {peak / 1e6:7.1f} MB, "
                f"formula {said / 1e6:7.1f} MB ({said / peak - 1:+.1%})",
                flush=True,
            )
    for stage in args.stage or STAGES:
        errors = [one["error"] for one in found if one["case"][0] == stage]
        print(f"{stage}: {len(errors)} runs, the formula is {min(errors):+.1%} to {max(errors):+.1%} off")
    if args.output:
        args.output.write_text(json.dumps({"found": found, **machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
