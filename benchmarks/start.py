"""How long `train` takes to begin: 600k conversations read, checked and put in order, up to the end of the first step.

    python benchmarks/start.py [--rows 600000] [--turns 2] [--work DIR] [--output FILE]

A LLaVA JSON of `--rows` conversations about as many pictures, and a store of their embeddings (tiny ones: 2 x 2
patches a picture; the index is of full size), are drawn once into `--work`. Then, each in a process of its own: the
JSON alone is read, and stage pretrain of the tiny bases runs until its first step is done. Imports count.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np

from mlx_llama3v.platform import machine

READ = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from mlx_llama3v.data.dataset import read_data
imported = time.perf_counter()
read = read_data(Path(sys.argv[1]) / "data.json")
print(json.dumps([time.perf_counter() - imported, len(read.records)]))
"""
TRAIN = """
import json, sys, time
began = time.perf_counter()
from pathlib import Path
from mlx_llama3v.platform import without_torch
without_torch()  # as the command does
from mlx_llama3v.stages import train_stage
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks
work, run, times = Path(sys.argv[1]), Path(sys.argv[2]), [time.perf_counter() - began]
def tell(event):
    times.append(time.perf_counter() - began)
train_stage(
    work / "model", work / "data.json", work / "store", run, TrainConfig(batch_size=8, steps_per_report=1),
    callbacks=Callbacks(started=tell, progress=tell, stop=lambda: True),
)
print(json.dumps(times))
"""


def draw(work: Path, rows: int, turns: int) -> None:
    """Model, conversations and store; what is there is kept."""
    from mlx_llama3v.config import Encoded, SliceLayout
    from mlx_llama3v.embeddings.writer import StoreWriter
    from mlx_llama3v.encoder import load_encoder
    from mlx_llama3v.weights import TINY
    from mlx_llama3v.weights.convert import convert

    if (work / "data.json").exists():
        return
    model = convert(TINY / "siglip", TINY / "llama", work / "model").path
    encoder = load_encoder(str(model))
    layout = SliceLayout((2, 2))
    values = np.random.default_rng(0).standard_normal((4, encoder.vision.hidden_size)).astype(np.float32)
    with StoreWriter(work / "store", encoder.fingerprint(), "int8", shard_bytes=64 << 20) as writer:
        for n in range(rows):
            writer.add(name(n), hashlib.sha256(str(n).encode()).hexdigest(), Encoded(layout, values))
    talks = [conversation(n, turns) for n in range(rows)]
    (work / "data.json.part").write_text(json.dumps(talks), encoding="utf-8")
    (work / "data.json.part").rename(work / "data.json")


def name(n: int) -> str:
    return f"{n // 1000:05d}/{n:09d}.jpg"


def conversation(n: int, turns: int) -> dict[str, Any]:
    """A row as LLaVA's: a question with the picture, answers of about a caption's length."""
    talk = []
    for turn in range(0, turns, 2):
        asked = "<image>\nRender a clear and concise summary of the photo." if turn == 0 else "What else is there?"
        told = f"picture {n}, turn {turn}: a red circle on a white table beside two blue boxes and a green bottle"
        talk += [{"from": "human", "value": asked}, {"from": "gpt", "value": told}]
    return {"id": f"{n:09d}", "image": name(n), "conversations": talk}


def run(code: str, *arguments: Path) -> Any:
    """What a process of its own prints."""
    done = subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)], capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def main() -> None:
    """Draw, measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=600_000)
    parser.add_argument("--turns", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path, help="where the data are drawn, and kept [default: a temporary folder]")
    parser.add_argument("--draw", action="store_true", help="only draw the data")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder) / "work"
        work.mkdir(parents=True, exist_ok=True)
        draw(work, args.rows, args.turns)
        if args.draw:
            return
        read = statistics.median(run(READ, work)[0] for _ in range(args.rounds))
        times = []
        for n in range(args.rounds):
            started = time.perf_counter()
            times.append([*run(TRAIN, work, Path(folder) / f"run-{n}"), time.perf_counter() - started])
    imported, checked, stepped, _ = (statistics.median(column) for column in zip(*times, strict=True))
    found = {
        "rows": args.rows,
        "turns": args.turns,
        "read_seconds": read,
        "imports_seconds": imported,
        "checked_seconds": checked,
        "first_step_seconds": stepped,
    }
    print(
        f"{args.rows:,} rows of {args.turns} turns: {read:.1f} s to read the JSON; from the start of the process "
        f"{imported:.1f} s to import, {checked:.1f} s until all is read and checked, {stepped:.1f} s until the first "
        "step is done"
    )
    if args.output:
        args.output.write_text(json.dumps({**found, **machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
