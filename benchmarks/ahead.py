"""`train --embed-ahead` beside its two sides alone: does it run at the rate of the slower one?

    python benchmarks/ahead.py [--images 800] [--rounds 3] [--work DIR] [--output FILE]

The tiny bases on pictures of the tiny world: (encode) all pictures are embedded; (train) one epoch of stage pretrain
from the full store; (ahead) the same epoch while a second process embeds what is read next, in a tenth of the disk.
On Linux every process has one core of its own, the encoder the second one, alone as well as together: so neither side
takes from the other what two machines, or a GPU and a CPU, would not share. Pictures a second, from the first report
to the last, so that starting up does not count; medians; the share that is told is that of the slower side.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from mlx_llama3v.platform import machine

CODE = """
import json, os, sys, time
from pathlib import Path
from mlx_llama3v.platform import without_torch
without_torch()
work, out, side, budget = Path(sys.argv[1]), Path(sys.argv[2]), sys.argv[3], int(sys.argv[4])
def pin(pid, core):
    if hasattr(os, "sched_setaffinity") and os.cpu_count() > 1:
        for task in os.listdir(f"/proc/{pid}/task"):
            os.sched_setaffinity(int(task), {core})
pin(os.getpid(), int(side == "encode"))
from mlx_llama3v.ahead import AheadConfig
from mlx_llama3v.stages import train_stage
from mlx_llama3v.storing import embed_data
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.report import Callbacks
seen = []
def tell(done):
    seen.append((time.perf_counter(), done))
data, images, model = work / "data" / "captions.json", work / "data" / "images", work / "model"
if side == "encode":
    embed_data(model, data, out, image_folder=images, progress=lambda p: tell(p.done))
else:
    config = TrainConfig(batch_size=8, steps_per_report=1, save_every=0, lanes=1)
    def started(start):
        for task in os.listdir("/proc/self/task") if os.path.exists("/proc/self/task") else ():
            for child in Path(f"/proc/self/task/{task}/children").read_text().split():
                pin(child, 1)
    def step(p):
        started(None)
        tell(8 * p.step)
    ahead = AheadConfig(str(model), budget, batch_size=16) if side == "ahead" else None
    store = out / "store" if ahead else work / "store"
    calls = Callbacks(progress=step)
    train_stage(model, data, store, out, config, ahead=ahead, image_folder=images, callbacks=calls)
first, last = seen[len(seen) // 5], seen[-1]
print(json.dumps((last[1] - first[1]) / (last[0] - first[0])))
"""


def prepare(work: Path, images: int) -> int:
    """Pictures, the model and a full store, once; bytes of a tenth of the store."""
    from mlx_llama3v.demo.dataset import draw
    from mlx_llama3v.embeddings.store import Store
    from mlx_llama3v.storing import embed_data
    from mlx_llama3v.weights import TINY
    from mlx_llama3v.weights.convert import convert

    if not (work / "ready").exists():
        data = draw(work / "data", images, 0, 0)
        model = convert(TINY / "siglip", TINY / "llama", work / "model").path
        embed_data(model, data.captions, work / "store", image_folder=data.images)
        (work / "ready").touch()
    return sum(shard.bytes for shard in Store(work / "store").shards) // 10


def rate(work: Path, side: str, budget: int) -> float:
    """Pictures a second of one side, in a process of its own."""
    threads = {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    with tempfile.TemporaryDirectory(dir=work) as out:
        command = [sys.executable, "-c", CODE, str(work), f"{out}/run", side, str(budget)]
        done = subprocess.run(command, capture_output=True, text=True, env={**os.environ, **threads})
    if done.returncode:
        raise SystemExit(done.stderr)
    return float(json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=800)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--work", type=Path)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        work = args.work or Path(folder)
        work.mkdir(parents=True, exist_ok=True)
        budget = prepare(work, args.images)
        rates: dict[str, list[float]] = {"encode": [], "train": [], "ahead": []}
        for _ in range(args.rounds):
            for side, values in rates.items():
                values.append(rate(work, side, budget))
    found: dict[str, Any] = {side: statistics.median(values) for side, values in rates.items()}
    share = found["ahead"] / min(found["encode"], found["train"])
    print(
        f"pictures/s: encoding {found['encode']:.1f}, training {found['train']:.1f}, both {found['ahead']:.1f}: "
        f"{share:.0%} of the slower side"
    )
    if args.output:
        values = {"images": args.images, "rounds": rates, **found, "share": share, **machine()}
        args.output.write_text(json.dumps(values, indent=2) + "\n")


if __name__ == "__main__":
    main()
