"""Does the store keep up: opening a million pictures, planning an epoch, random reading beside sequential reading.

    python benchmarks/store.py [--images 1000000] [--slices 20000] [--width 1152 --tokens 729] [--output store.json]

Two stores of random values are written with the production writer to a temporary directory. (1) `--images` pictures
of tiny embeddings: seconds and memory to open it in a fresh process, seconds to shuffle and batch one epoch's
lengths. (2) `--slices` slices of so400m/14-384 in int8: random batches of 32, announced before they are read, beside a
sequential read of the same files (a buffer of 4 MB): from the disk (page cache emptied before each, as root on
Linux; a tenth of the slices) and from the page cache. The sequential reader throws the bytes away, the random one
leaves them in arrays.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.data.batches import order
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.platform import machine

FINGERPRINT = {"benchmark": "store"}

OPEN = """
import json, sys, time
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.platform import peak_memory as peak
before, started = peak(), time.perf_counter()
store = Store({path!r})
opened = time.perf_counter() - started
assert len(store) == {images} and "{last:07d}.jpg" in store
print(json.dumps([opened, peak(), before]))
"""


def sha(i: int) -> str:
    return hashlib.sha256(str(i).encode()).hexdigest()


def scale(path: Path, images: int) -> dict[str, float]:
    """A store of `images` pictures of 4 x 16 values."""
    layout, values = SliceLayout((2, 2)), np.random.default_rng(0).standard_normal((4, 16)).astype(np.float32)
    with StoreWriter(path, FINGERPRINT, "int8", shard_bytes=64 << 20) as writer:
        for i in range(images):
            writer.add(f"{i:07d}.jpg", sha(i), Encoded(layout, values))
    code = OPEN.format(path=str(path), images=images, last=images - 1)
    runs = [json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)] * 1
    runs += [json.loads(subprocess.run([sys.executable, "-c", code], capture_output=True, check=True).stdout)] * 1
    started = time.perf_counter()
    lengths = np.random.default_rng(1).integers(60, 900, images).tolist()
    drawn = time.perf_counter()
    order(lengths, 128, 0, 0)
    return {
        "open_seconds": statistics.median(run[0] for run in runs),
        "open_peak_megabytes": max(run[1] for run in runs) / 1e6,
        "imports_peak_megabytes": max(run[2] for run in runs) / 1e6,
        "epoch_plan_seconds": time.perf_counter() - drawn,
        "lengths_seconds": drawn - started,
    }


def reading(path: Path, slices: int, tokens: int, width: int, rounds: int, threads: int) -> dict[str, float]:
    """Random batches of 32 pictures beside reading the files from end to end."""
    side = int(tokens**0.5)
    layout = SliceLayout((side, side))
    values = np.random.default_rng(0).standard_normal((side * side, width)).astype(np.float32)
    with StoreWriter(path, FINGERPRINT, "int8") as writer:
        for i in range(slices):
            writer.add(f"{i:07d}.jpg", sha(i), Encoded(layout, values))
    store = Store(path)
    size, names = store.codec.row_bytes(width) * layout.patches, store.names
    found: dict[str, float] = {"kilobytes_a_slice": size / 1e3}
    for state in ("disk", "page_cache"):
        if state == "disk" and not drop_caches():
            continue
        rates: dict[str, list[float]] = {"sequential": [], "random": []}
        few = max(32, len(store) // (10 if state == "disk" else 1))
        for turn in range(rounds):
            for kind in rates:
                if state == "disk":
                    drop_caches()
                picked = [names[i] for i in np.random.default_rng(turn).permutation(len(store)).tolist()][:few]
                started = time.perf_counter()
                done = sequential(store, few * size) if kind == "sequential" else random(store, picked, threads) * size
                rates[kind].append(done / (time.perf_counter() - started) / 1e9)
        for kind, values in rates.items():
            found[f"{state}_{kind}_gb_s"] = statistics.median(values)
        found[f"{state}_ratio"] = found[f"{state}_random_gb_s"] / found[f"{state}_sequential_gb_s"]
    return found


def sequential(store: Store, most: int) -> int:
    """Bytes read from end to end."""
    buffer, done = bytearray(4 << 20), 0
    for shard in store.shards:
        with open(shard.path, "rb", buffering=0) as file:
            while done < most and (got := file.readinto(buffer)):
                done += got
    return done


def random(store: Store, names: list[str], threads: int) -> int:
    """Pictures read, 32 at a time."""
    batches = [names[i : i + 32] for i in range(0, len(names), 32)]

    def read(number: int) -> int:
        store.announce([name for batch in batches[number + threads : number + threads + 1] for name in batch])
        return len(store.read_batch(batches[number]))

    with ThreadPoolExecutor(threads) as pool:
        return sum(pool.map(read, range(len(batches))))


def drop_caches() -> bool:
    """Empty the page cache (Linux, root)."""
    try:
        os.sync()
        Path("/proc/sys/vm/drop_caches").write_text("3")
    except OSError:
        return False
    return True


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=1_000_000)
    parser.add_argument("--slices", type=int, default=20_000)
    parser.add_argument("--tokens", type=int, default=729)
    parser.add_argument("--width", type=int, default=1152)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: dict[str, object] = {"machine": machine(), "arguments": {k: str(v) for k, v in vars(args).items()}}
    with tempfile.TemporaryDirectory() as folder:
        found["scale"] = scale(Path(folder) / "scale", args.images)
        found["reading"] = reading(
            Path(folder) / "reading", args.slices, args.tokens, args.width, args.rounds, args.threads
        )
    print(json.dumps(found, indent=2))
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")


if __name__ == "__main__":
    main()
