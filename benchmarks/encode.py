"""SigLIP encode rate on this machine: ours, mlx-vlm and transformers, beside the matrix-product ceiling.

    python benchmarks/encode.py [--size base|so400m] [--batch N] [--rounds N] [--clock wall|cpu] [--resident]
                                [--output FILE]

The same random weights and pictures, from pixels in memory to hidden states in memory; with `--resident`, on a GPU,
both stay in its own memory, so that the tower alone is timed. float32 on a CPU; on a GPU bfloat16, where transformers
is compiled (torch.compile). Every peer runs in a process of its own (the BLAS that MLX gets here would also interpose
on PyTorch's), they take turns, and medians are compared. Outputs must agree before anything is timed. The ceiling is
the time of the tower's own matrix products alone, at its own shapes, with the BLAS that MLX has here. mlx-vlm gets the
BLAS that `mlx_llama3v` loads; of its towers gemma3's is taken, since paligemma's drops all but the first picture of a
batch and llava's computes another activation.

On a busy machine add `--clock cpu` and set OMP_NUM_THREADS=1 and MKL_NUM_THREADS=1: that compares the work of
one core, not the luck of the scheduler, but says nothing about who uses several cores well.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from ceiling import Product, ceiling, flops

from mlx_llama3v.config import ImageConfig, TilingConfig, VisionConfig

SIZES = {
    "base": VisionConfig(),
    "so400m": VisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14),
}
PEERS = ("ours", "mlx-vlm", "transformers")
AS_THEY_ARE = ImageConfig(rescale_factor=1.0, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)  # pixels, normalised here
CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
AGREE = {"float32": 1e-4, "bfloat16": 2e-2}  # root mean square of the difference, of that of the values
Run = Callable[[], np.ndarray]
Clock = Callable[[], float]


def pictures(config: VisionConfig, batch: int) -> np.ndarray:
    shape = (batch, config.image_size, config.image_size, 3)
    return np.random.default_rng(0).standard_normal(shape).astype(np.float32)


def ours(weights: Path, config: VisionConfig, pixels: np.ndarray, resident: bool) -> Run:
    import mlx.core as mx

    from mlx_llama3v.platform import default_dtype
    from mlx_llama3v.vision.encode import Encoder, patchify
    from mlx_llama3v.vision.siglip import VisionTower, position_table, tower_weights

    tower = VisionTower(config)
    tower.load_weights(list(tower_weights(mx.load(str(weights))).items()), strict=True)
    tower.set_dtype(default_dtype())
    encoder = Encoder(tower, config, AS_THEY_ARE, TilingConfig("squash"))
    grid = (config.grid, config.grid)
    if resident:
        patches = mx.array(np.stack([patchify(picture, config.patch_size) for picture in pixels]))
        positions = mx.stack([position_table(tower, grid)] * len(pixels))
        return held_on_device(lambda: tower(patches, positions))

    def run() -> np.ndarray:
        slices = [(grid, patchify(picture, config.patch_size)) for picture in pixels]
        return np.stack(encoder.encode(slices, len(slices)))

    return run


def held_on_device(compute: Callable[[], Any]) -> Run:
    """Computes without bringing anything back, but for the first time."""
    import mlx.core as mx

    calls = iter([True])

    def run() -> np.ndarray:
        found = compute()
        mx.eval(found)
        return np.array(found.astype(mx.float32)) if next(calls, False) else np.zeros(0)

    return run


def mlx_vlm(weights: Path, config: VisionConfig, pixels: np.ndarray, resident: bool) -> Run:
    import mlx.core as mx
    from mlx_vlm.models.gemma3.config import VisionConfig as Gemma3VisionConfig
    from mlx_vlm.models.gemma3.vision import VisionModel

    from mlx_llama3v.platform import default_dtype

    known = {k: v for k, v in asdict(config).items() if k in Gemma3VisionConfig.__dataclass_fields__}
    model = VisionModel(Gemma3VisionConfig(**{**known, "model_type": "siglip_vision_model"}))
    loaded = {f"vision_model.{k}": v for k, v in mx.load(str(weights)).items() if not k.startswith("head.")}
    model.load_weights(list(model.sanitize(loaded).items()), strict=True)
    model.set_dtype(default_dtype())
    if resident:
        kept = mx.array(pixels).astype(default_dtype())
        return held_on_device(lambda: model(kept, output_hidden_states=True)[2][-1])

    def run() -> np.ndarray:
        found = model(mx.array(pixels).astype(default_dtype()), output_hidden_states=True)[2][-1]
        return np.array(found.astype(mx.float32))

    return run


def transformers(weights: Path, config: VisionConfig, pixels: np.ndarray, resident: bool) -> Run:
    import torch
    from transformers import SiglipVisionModel

    gpu = torch.cuda.is_available()
    device, dtype = torch.device("cuda" if gpu else "cpu"), torch.bfloat16 if gpu else torch.float32
    model = SiglipVisionModel.from_pretrained(weights.parent, dtype=dtype, attn_implementation="sdpa").eval()
    body = model.to(device)
    if gpu:
        body = torch.compile(body)
    images = torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())
    if gpu and not resident:
        images = images.pin_memory()
    kept = images.to(device, dtype) if resident else None
    first = iter([True])

    def run() -> np.ndarray:
        with torch.inference_mode():
            given = images.to(device).to(dtype) if kept is None else kept
            found = body(given, output_hidden_states=True).hidden_states[-1]
            if kept is None or next(first, False):
                return found.float().cpu().numpy()
            torch.cuda.synchronize()
            return np.zeros(0)

    return run


def products(config: VisionConfig, batch: int) -> list[Product]:
    """The tower's matrix products."""
    P, D, L, inner = config.grid**2, config.hidden_size, config.num_hidden_layers, config.intermediate_size
    rows, heads, head = batch * P, config.num_attention_heads, D // config.num_attention_heads
    return [
        (1, 1, (rows, 3 * config.patch_size**2, D)),
        (4 * L, 1, (rows, D, D)),
        (L, 1, (rows, D, inner)),
        (L, 1, (rows, inner, D)),
        (L, batch * heads, (P, head, P)),
        (L, batch * heads, (P, P, head)),
    ]


def make(directory: Path, config: VisionConfig) -> None:
    """A random checkpoint as transformers writes it."""
    import torch
    from transformers import SiglipVisionConfig, SiglipVisionModel

    torch.manual_seed(0)
    SiglipVisionModel(SiglipVisionConfig(**asdict(config))).save_pretrained(directory)


def work(role: str, directory: Path, config: VisionConfig, batch: int, clock: Clock, resident: bool) -> None:
    """A peer's process: load, run once, then one timed run for each line on stdin."""
    channel, sys.stdout = sys.stdout, sys.stderr  # libraries may print; the channel carries JSON only

    def say(**values: Any) -> None:
        print(json.dumps(values), file=channel, flush=True)

    if role == "make":
        make(directory, config)
        return say(ready=True)
    if role == "ceiling":
        timed = ceiling(products(config, batch), clock)
        timed()
    else:
        try:
            load = {"ours": ours, "mlx-vlm": mlx_vlm, "transformers": transformers}[role]
            run = load(directory / "model.safetensors", config, pictures(config, batch), resident)
        except ImportError as error:
            return say(absent=str(error))
        np.save(directory / f"{role}.npy", run())

        def timed() -> float:
            start = clock()
            run()
            return clock() - start

    say(ready=True)
    for _ in sys.stdin:
        say(seconds=timed())


class Peer:
    """The parent's end of a peer's process."""

    def __init__(self, role: str, directory: Path, size: str, batch: int, clock: str, resident: bool):
        command = [sys.executable, __file__, "--role", role, "--directory", str(directory)]
        command += ["--size", size, "--batch", str(batch), "--clock", clock]
        command += ["--resident"] if resident else []
        self.process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.role, self.first = role, self.hear()

    def hear(self) -> dict[str, Any]:
        line = self.process.stdout.readline() if self.process.stdout else ""
        if not line:
            raise SystemExit(f"the process of {self.role!r} ended without an answer; see its output above.")
        return json.loads(line)

    def time(self) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return float(self.hear()["seconds"])

    def close(self) -> None:
        if self.process.stdin is not None:
            self.process.stdin.close()
        self.process.wait()


def start(directory: Path, size: str, batch: int, clock: str, resident: bool) -> dict[str, Peer]:
    """All peers that are installed, their outputs compared."""
    from mlx_llama3v.platform import default_dtype

    allowed = AGREE[str(default_dtype()).removeprefix("mlx.core.")]
    Peer("make", directory, size, batch, clock, resident).close()
    peers = {}
    for role in (*PEERS, "ceiling"):
        peer = Peer(role, directory, size, batch, clock, resident)
        if "absent" in peer.first:
            print(f"{role}: skipped, it is not installed ({peer.first['absent']})")
            peer.close()
        else:
            peers[role] = peer
    reference = np.load(directory / "ours.npy")
    for role in PEERS[1:]:
        if role in peers:
            other = np.load(directory / f"{role}.npy")
            gap = float(np.sqrt(np.mean((other - reference) ** 2) / np.mean(reference**2)))
            print(
                f"ours and {role} differ by {gap:.1e} of the values, at most by {np.abs(other - reference).max():.1e}"
            )
            if not gap < allowed:
                raise SystemExit(f"{role} computes something else; its time would say nothing.")
    return peers


def measure(size: str, batch: int, rounds: int, clock: str, resident: bool) -> dict[str, Any]:
    config = SIZES[size]
    with tempfile.TemporaryDirectory() as directory:
        peers = start(Path(directory), size, batch, clock, resident)
        seconds: dict[str, list[float]] = {role: [] for role in peers}
        for _ in range(rounds):
            for role, peer in peers.items():
                seconds[role].append(peer.time())
        for peer in peers.values():
            peer.close()
    return {
        "size": size,
        "batch": batch,
        "rounds": rounds,
        "clock": clock,
        "resident": resident,
        "gflop_per_slice": flops(products(config, batch)) / batch / 1e9,
        "load_average": os.getloadavg()[0],
        "omp_num_threads": os.environ.get("OMP_NUM_THREADS", "not set"),
        "seconds": seconds,
        "median_seconds": {role: statistics.median(times) for role, times in seconds.items()},
    }


def show(found: dict[str, Any]) -> None:
    median, work_done = found["median_seconds"], found["gflop_per_slice"] * found["batch"]
    print(f"{found['size']}, batch {found['batch']}, medians of {found['rounds']} rounds, {found['clock']} time")
    print(f"load average {found['load_average']:.1f}, OMP_NUM_THREADS {found['omp_num_threads']}")
    print(f"{'':14}{'slices/s':>10}{'GFLOP/s':>10}{'of ceiling':>12}{'ours is':>10}{'min..max s':>16}")
    for role, seconds in median.items():
        times = found["seconds"][role]
        row = f"{role:14}{found['batch'] / seconds:10.2f}{work_done / seconds:10.1f}"
        row += f"{median['ceiling'] / seconds:12.0%}{seconds / median['ours']:9.2f}x"
        print(row + f"{min(times):9.2f}..{max(times):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--size", choices=SIZES, default="base")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    parser.add_argument("--resident", action="store_true", help="on a GPU: pixels and results stay in its memory")
    parser.add_argument("--output", type=Path, help="write everything measured here, as JSON")
    parser.add_argument("--role", help=argparse.SUPPRESS)
    parser.add_argument("--directory", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.role:
        return work(args.role, args.directory, SIZES[args.size], args.batch, CLOCKS[args.clock], args.resident)
    from importlib.metadata import PackageNotFoundError, version

    from mlx_llama3v.platform import machine

    found = {"machine": machine(), **measure(args.size, args.batch, args.rounds, args.clock, args.resident)}
    for name in ("mlx-vlm", "transformers", "torch"):
        try:
            found["machine"][name] = version(name)
        except PackageNotFoundError:
            found["machine"][name] = "absent"
    print(", ".join(f"{key} {value}" for key, value in found["machine"].items()))
    show(found)
    if args.output:
        args.output.write_text(json.dumps(found, indent=2) + "\n")
        print(f"wrote {args.output}")


if __name__ == "__main__":
    main()
