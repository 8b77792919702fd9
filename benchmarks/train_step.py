"""A LoRA step on the decoder: ours from the store, ours encoding each step, full logits, mlx-vlm, transformers.

    python benchmarks/train_step.py [--tower small|so400m] [--peers a,b] [--rounds N] [--output FILE]

The same random weights (Llama with `--hidden` 512, 8 layers, vocabulary 128256; LLaVA-1.5's two-layer projector; a
SigLIP tower at 224 px) and the same rows (the tower's patches and 64 text tokens, half of them answers, batch 4),
LoRA of rank 16 on all linear layers, AdamW. The ceiling is the time of the matrix products of our step alone, at their
own shapes (ceiling.py). float32 on a CPU; on a GPU frozen weights are bfloat16. Each peer runs in
a process of its own; the median of `--rounds` steps after one that warms up is taken. Memory is what MLX reports at
its peak (for PyTorch: what it allocated on the GPU; on a CPU what the process held at its peak beyond what it held
when everything was imported), and the same without the weights.

mlx-vlm's own LLaVA model, loss and step (`mlx_vlm.trainer`) are taken. It cannot run this batch: it hands the padding
mask [B, L] to the attention, which fails for more than one row, and is not causal for one. So there are two: "mlx-vlm"
is the batch of 4 without that mask, "mlx-vlm 4x1" its unchanged path, four rows accumulated. Pictures of a batch it
mixes up (each row gets the last one's), so losses are not equal.
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
from contextlib import ExitStack
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import Any

import numpy as np
from ceiling import ceiling, flops
from step_peers import mlx_vlm, transformers
from step_work import BATCH, IMAGE_ID, RANK, SCALE, TOWERS, Step, llama, make_weights, part, products, rows

from mlx_llama3v.config import (
    Encoded,
    ImageConfig,
    ModelConfig,
    ProjectorConfig,
    SliceLayout,
    TilingConfig,
    VisionConfig,
    llama_config,
)

PEERS = ("ours", "ceiling", "ours encoding", "full logits", "mlx-vlm", "mlx-vlm 4x1", "transformers")
LANES = ExitStack()  # for the life of a process: a context that nobody holds would end, and its threads with it


def our_model(args: argparse.Namespace, weights: dict[str, Any]) -> Any:
    """The product's model with these weights."""
    from mlx_llama3v.model import Llama3V
    from mlx_llama3v.platform import default_dtype

    tower = TOWERS[args.tower]
    projector = ProjectorConfig("mlp", tower.hidden_size, args.hidden)
    model = Llama3V(ModelConfig(tower, llama_config(llama(args.hidden, args.layers)), projector))
    model.language_model.load_weights(list(part(weights, "llm").items()))
    model.language_model.set_dtype(default_dtype())
    model.projector.body.load_weights(list(part(weights, "projector").items()))
    return model


def our_encoder(tower: VisionConfig, weights: dict[str, Any]) -> Any:
    """The product's tower, for pixels that are normalised."""
    from mlx_llama3v.platform import default_dtype
    from mlx_llama3v.vision.encode import Encoder
    from mlx_llama3v.vision.siglip import VisionTower, tower_weights

    body = VisionTower(tower)
    body.load_weights(list(tower_weights(part(weights, "vision")).items()), strict=True)
    body.set_dtype(default_dtype())
    as_they_are = ImageConfig(rescale_factor=1.0, image_mean=(0.0,) * 3, image_std=(1.0,) * 3)
    return Encoder(body, tower, as_they_are, TilingConfig("squash"))


def encoded(encoder: Any, tower: VisionConfig, pixels: np.ndarray) -> list[np.ndarray]:
    """The patch embeddings of all pictures."""
    from mlx_llama3v.vision.encode import patchify

    return encoder.encode([((tower.grid, tower.grid), patchify(one, tower.patch_size)) for one in pixels], BATCH)


def data(tower: VisionConfig, weights: dict[str, Any], path: Path) -> tuple[Any, list[Any]]:
    """The store at `path`, filled where it is not there, and the rows that read it."""
    from mlx_llama3v.data.rows import Row
    from mlx_llama3v.embeddings.store import Store
    from mlx_llama3v.embeddings.writer import StoreWriter
    from mlx_llama3v.text.prompt import FIRST_VISUAL, Rendered

    ids, supervised, pixels = rows(tower)
    layout = SliceLayout((tower.grid, tower.grid))
    if not path.exists():
        with StoreWriter(path, {}, "float16") as writer:
            for n, values in enumerate(encoded(our_encoder(tower, weights), tower, pixels)):
                writer.add(f"{n}", f"{n:064x}", Encoded(layout, values))
    source = np.where(ids == IMAGE_ID, FIRST_VISUAL + np.cumsum(ids == IMAGE_ID, 1) - 1, 0).astype(np.int32)
    laid_out = [Row(str(n), Rendered(ids[n], source[n], supervised[n]), (str(n),), (layout,)) for n in range(BATCH)]
    return Store(path), laid_out


def full_logits(model: Any, batch: Any) -> Any:
    """What a step's `gradients` are without the product's head: logits of all positions at once."""
    import mlx.core as mx
    import mlx.nn as nn

    def loss(model: Any) -> mx.array:
        inputs = batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens
        logits = model(batch.ids, input_embeddings=model.embed(*inputs)).astype(mx.float32)
        return (nn.losses.cross_entropy(logits, batch.targets) * batch.supervised).sum()

    learned = model.trainable_parameters()
    value, gradients = nn.value_and_grad(model, loss)(model)
    model.update(learned)  # the transformation left its own placeholders there
    return value, batch.supervised.sum(), gradients


def ours(args: argparse.Namespace, work: Path, how: str) -> tuple[Step, float]:
    """The product's own model, step and lanes; `how` is the peer's name. A step, and the bytes of the weights."""
    import mlx.core as mx

    from mlx_llama3v.data.batches import collate
    from mlx_llama3v.lanes import lanes
    from mlx_llama3v.tensors import parameters
    from mlx_llama3v.train.config import TrainConfig
    from mlx_llama3v.train.lora import prepare
    from mlx_llama3v.train.optim import adamw
    from mlx_llama3v.train.step import Step as TrainStep
    from mlx_llama3v.train.step import add

    tower = TOWERS[args.tower]
    weights: Any = mx.load(str(work / "weights.safetensors"))
    model = our_model(args, weights)
    store, laid_out = data(tower, weights, work / "store")
    encoder, pixels = our_encoder(tower, weights) if how == "ours encoding" else None, rows(tower)[2]
    config = TrainConfig(stage="sft", batch_size=BATCH, lora_rank=RANK, lora_scale=SCALE).resolved()
    learns = prepare(model, config)
    optimizer = adamw(0.0)
    optimizer.init(model.trainable_parameters())
    step = TrainStep(model, optimizer, 1.0, bool(config.compile), dtype=learns.dtype)
    mx.eval(model.state, optimizer.state)  # lanes take no work of another thread over
    parts = [model, *([encoder.tower] if encoder else [])]
    size = sum(value.nbytes for module in parts for value in parameters(module).values())
    side = LANES.enter_context(lanes(config.lanes))

    def start(lane: int, found: list[np.ndarray] | None) -> Any:
        batch = collate(laid_out[lane :: config.lanes], store, model.config, 4)
        if found is not None:
            batch = replace(batch, stored={"patches": mx.array(np.stack(found[lane :: config.lanes]))})
        return side.start(
            partial(full_logits, model, batch) if how == "full logits" else partial(step.gradients, batch)
        )

    def run() -> float:
        found = encoded(encoder, tower, pixels) if encoder else None
        running = [start(lane, found) for lane in range(config.lanes)]
        loss, count, gradients = reduce(add, (one.result() for one in running))
        norm = step.norm(gradients, count)
        mx.eval(loss, count, gradients, norm)
        step.update(gradients, count, norm, 1e-4)
        mx.eval(model.state, optimizer.state)
        return float(loss) / float(count)

    return run, size


def held() -> int:
    """Bytes that this process holds now."""
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024


def child(args: argparse.Namespace, work: Path) -> None:
    """Run one peer, and print what it took."""
    peers: dict[str, Any] = {
        "mlx-vlm": mlx_vlm,
        "mlx-vlm 4x1": lambda args, work: mlx_vlm(args, work, BATCH),
        "transformers": transformers,
    }
    if args.child == "transformers":
        import peft  # noqa: F401
        import torch
    else:
        import mlx.core as mx

        from mlx_llama3v.platform import load_blas

        load_blas()
    if args.child == "ceiling":
        timed, work_done = ceiling(shapes := products(TOWERS[args.tower], args.hidden, args.layers)), flops(shapes)
        seconds = statistics.median([timed() for _ in range(args.rounds + 1)][1:])
        print(json.dumps({"seconds": seconds, "gflop": work_done / 1e9}))
        return
    before = held()
    run, size = peers[args.child](args, work) if args.child in peers else ours(args, work, args.child)
    losses, times = [run()], []
    if args.child != "transformers":
        mx.reset_peak_memory()
    elif torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
    for _ in range(args.rounds):
        start = time.perf_counter()
        losses.append(run())
        times.append(time.perf_counter() - start)
    if args.child == "transformers":
        from mlx_llama3v.platform import peak_memory

        gpu = torch.cuda.is_available()
        peak = torch.cuda.max_memory_allocated() if gpu else peak_memory() - before
        threads = torch.get_num_threads()
    else:
        threads, peak = 0, mx.get_peak_memory()
    report = {"seconds": statistics.median(times), "peak": peak, "weights": size, "losses": losses, "threads": threads}
    sys.stdout.write(json.dumps(report) + "\n")
    sys.stdout.flush()
    os._exit(0)  # lanes are threads that nobody ends


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tower", choices=TOWERS, default="small")
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--layers", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--peers", default=",".join(PEERS))
    parser.add_argument("--output", type=Path)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--work", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child == "weights":
        make_weights(TOWERS[args.tower], args.hidden, args.layers, args.work / "weights.safetensors")
        return
    if args.child:
        child(args, args.work)
        return
    from mlx_llama3v.platform import machine

    results: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as work:
        passed = ["--tower", args.tower, "--hidden", str(args.hidden), "--layers", str(args.layers)]
        command = [sys.executable, __file__, *passed, "--rounds", str(args.rounds), "--work", work, "--child"]
        subprocess.run([*command, "weights"], check=True, stderr=subprocess.DEVNULL)
        for peer in args.peers.split(","):
            done = subprocess.run([*command, peer], capture_output=True, text=True)
            if done.returncode:
                sys.exit(f"{peer}: {done.stderr[-2000:]}")
            results[peer] = json.loads(done.stdout.strip().splitlines()[-1])
            show(peer, results)
    report = {"tower": args.tower, "hidden": args.hidden, "layers": args.layers, "results": results, **machine()}
    print(json.dumps(machine()))
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def show(peer: str, results: dict[str, Any]) -> None:
    """One line a peer; ratios are to ours, where it has run."""
    found = results[peer]
    if peer == "ceiling":
        rate, ours = found["gflop"] / found["seconds"], results.get("ours", found)
        print(
            f"{peer:14} {1000 * found['seconds']:8.1f} ms, the matrix products of a step alone: {found['gflop']:.1f} "
            f"GFLOP at {rate:.1f} GFLOP/s; our step is at {found['seconds'] / ours['seconds']:.0%} of it",
            flush=True,
        )
        return
    above = found["peak"] - found["weights"]
    base = results.get("ours", found)
    print(
        f"{peer:14} {1000 * found['seconds']:8.1f} ms a step ({found['seconds'] / base['seconds']:4.2f}x ours), "
        f"peak {found['peak'] / 1e9:5.2f} GB, above the weights {above / 1e9:5.2f} GB "
        f"(ours {(base['peak'] - base['weights']) / max(1, above):4.2f}x of it), loss {found['losses'][0]:.4f}",
        flush=True,
    )


if __name__ == "__main__":
    main()
