"""The memory formula of `mlx_llama3v.plan` against what MLX reports, and what it says of Llama-3-8B on a Mac.

    python benchmarks/memory.py [--sizes all|float32] [--table] [--output FILE]

A LoRA or projector step of random Llamas of several sizes, batches and lengths, with much text and little, with and
without --grad-checkpoint, in float32, 4-bit and bfloat16 on a CPU, evaluated in a lane as the trainer does: the formula
beside `mx.get_peak_memory`. First the sizes to which its factors were fitted, then others; then the other ways of
tuning (few layers, few kinds of them, dropout, DoRA, all weights), again at fitted sizes and others. Then, from the
same formula, without measuring: for Llama-3-8B in 4-bit with bfloat16 activations, rows of 1024 tokens (one picture of
seven so400m slices, 81 visual tokens each), the rows at once that fit three quarters of 16, 24, 36 and 64 GB, and what
they take.
`--table`: only that. `--sizes float32`: without the slow ones.
"""

from __future__ import annotations

import argparse
import gc
import json
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import mlx_llama3v  # noqa: F401 (the BLAS, before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlx_llama3v.config import ModelConfig, ProjectorConfig, VisionConfig, llama_config
from mlx_llama3v.data.batches import Batch
from mlx_llama3v.embeddings.codec import get_codec
from mlx_llama3v.errors import RunError
from mlx_llama3v.lanes import lanes
from mlx_llama3v.model import Llama3V, quantize_decoder
from mlx_llama3v.plan import Decoder, Learning, TrainJob, largest_batch, training_memory
from mlx_llama3v.platform import machine
from mlx_llama3v.projector import Projector
from mlx_llama3v.tensors import parameters
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.lora import prepare
from mlx_llama3v.train.loss import CHUNK_BYTES, GPU_CHUNKS
from mlx_llama3v.train.memory import projection, training_job
from mlx_llama3v.train.optim import adamw
from mlx_llama3v.train.step import Step

# hidden, layers, intermediate, vocabulary, rows, length; what the weights are; where in a row its answer begins.
Size = tuple[tuple[int, ...], str, float]
FITTED: tuple[Size, ...] = (
    ((256, 2, 896, 32000, 2, 512), "float32", 0.5),
    ((512, 4, 1792, 32000, 1, 640), "float32", 0.5),
    ((256, 4, 512, 8000, 4, 384), "float32", 0.5),
    ((256, 4, 2048, 8000, 4, 256), "float32", 0.5),
    ((768, 2, 2688, 32000, 2, 256), "float32", 0.5),
    ((512, 8, 1792, 32000, 2, 384), "4-bit", 0.5),
    ((512, 3, 1792, 128256, 4, 128), "float32", 0.5),
    ((1024, 2, 3584, 32000, 1, 512), "4-bit", 0.5),
    ((256, 5, 1024, 16000, 3, 448), "float32", 0.5),
    ((256, 4, 896, 8000, 2, 256), "bfloat16", 0.5),
    ((512, 2, 1024, 2000, 2, 384), "float32", 0.9),
    ((384, 4, 1024, 4000, 2, 256), "float32", 0.8),
    ((256, 4, 1024, 2000, 2, 384), "bfloat16", 0.9),
    ((128, 4, 512, 4000, 4, 256), "float32", 0.9),
    ((256, 6, 512, 8000, 1, 768), "float32", 0.5),
)
OTHERS: tuple[Size, ...] = (
    ((256, 3, 1024, 32000, 3, 448), "float32", 0.5),
    ((256, 8, 768, 2000, 2, 320), "float32", 0.5),
    ((384, 3, 1536, 50000, 3, 200), "4-bit", 0.5),
    ((256, 4, 1024, 8000, 3, 384), "bfloat16", 0.5),
    ((768, 2, 2048, 16000, 1, 256), "float32", 0.5),
    ((256, 4, 896, 16000, 2, 384), "float32", 0.1),
    ((512, 3, 1536, 8000, 2, 256), "float32", 0.9),
    ((384, 6, 1024, 24000, 2, 256), "4-bit", 0.1),
    ((512, 2, 1792, 16000, 1, 256), "bfloat16", 0.2),
    ((256, 3, 768, 50000, 2, 256), "float32", 0.1),
    ((128, 4, 512, 4000, 4, 256), "float32", 0.5),
    ((192, 3, 512, 4000, 2, 320), "float32", 0.2),
    ((640, 2, 1792, 12000, 2, 192), "float32", 0.7),
    ((256, 4, 768, 4000, 1, 256), "bfloat16 4-bit", 0.7),
)
# Ways of tuning the decoder beside LoRA on all its layers; at sizes to which DoRA's factors were fitted, and others.
WAYS: dict[str, dict[str, Any]] = {
    "last block": {"lora_layers": 1},
    "last two": {"lora_layers": 2},
    "q and v": {"lora_keys": ("q_proj", "v_proj")},
    "down": {"lora_keys": ("down_proj",)},
    "dropout": {"lora_dropout": 0.05},
    "projector too": {"lora_layers": 1, "tune_projector": True},
    "DoRA": {"tune": "dora"},
    "DoRA, dropout": {"tune": "dora", "lora_dropout": 0.05},
    "full": {"tune": "full"},
}
WAYS_FITTED: tuple[Size, ...] = (
    ((256, 4, 1024, 8000, 3, 384), "float32", 0.5),
    ((256, 6, 512, 8000, 1, 768), "float32", 0.5),
    ((256, 4, 1536, 4000, 2, 256), "float32", 0.7),
    ((512, 3, 1792, 4000, 2, 192), "4-bit", 0.8),
    ((256, 4, 1024, 2000, 2, 384), "bfloat16", 0.9),
    ((256, 3, 512, 2000, 1, 192), "bfloat16 4-bit", 0.7),
)
WAYS_OTHERS: tuple[Size, ...] = (
    ((384, 4, 1024, 4000, 2, 256), "float32", 0.8),
    ((256, 5, 1024, 16000, 3, 320), "float32", 0.5),
    ((128, 6, 512, 2000, 4, 384), "float32", 0.7),
    ((384, 6, 1024, 24000, 2, 256), "4-bit", 0.3),
    ((256, 4, 768, 4000, 2, 256), "4-bit", 0.8),
    ((256, 12, 512, 4000, 1, 64), "float32", 0.5),
    ((384, 3, 1024, 4000, 2, 192), "bfloat16", 0.8),
    ((192, 4, 512, 3000, 2, 224), "bfloat16 4-bit", 0.7),
)
LLAMA3_8B = Decoder(4096, 32, 14336, 32, 8, 128, 128256)
MACS = (16, 24, 36, 64)  # GB


def made(size: tuple[int, ...], form: str) -> Llama3V:
    """A random model; `form`: the decoder's weights: float32, bfloat16, 4-bit (float32 beside it), bfloat16 4-bit."""
    hidden, layers, intermediate, vocab, _, _ = size
    llama = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": max(1, hidden // 256),
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    projector = ProjectorConfig("linear", 64, hidden)
    model = Llama3V(ModelConfig(VisionConfig(64, 64, 1, 1), llama_config(llama), projector))
    if form.startswith("bfloat16"):
        model.set_dtype(mx.bfloat16)
    if form.endswith("4-bit"):
        quantize_decoder(model)
    return model


def measure(
    size: tuple[int, ...], stage: str, recompute: bool, form: str = "float32", begins: float = 0.5, **settings: Any
) -> tuple[int, TrainJob]:
    """Peak bytes of a step, and the job as the formula takes it; rows of text, whose answer `begins` at that share."""
    gc.collect()  # models are cyclic: those of other measurements would count
    mx.clear_cache()
    others = mx.get_active_memory()  # what else this process holds
    model, (vocab, rows, length) = made(size, form), size[3:]
    config = TrainConfig(stage=stage, batch_size=rows, lanes=1, grad_checkpoint=recompute, **settings).resolved()
    targets = int(length - 1 - int(begins * length))
    job = training_job(model, config, length, targets=targets)
    learns = prepare(model, config)
    optimizer = adamw(0.0)
    optimizer.init(model.trainable_parameters())
    step = Step(model, optimizer, 1.0, compiled=False, recompute=recompute, dtype=learns.dtype)
    mx.eval(model.state, optimizer.state)
    ids = mx.random.randint(0, vocab, (rows, length)).astype(mx.int32)
    supervised = np.zeros((rows, length), bool)
    supervised[:, int(begins * length) : -1] = True
    batch = Batch(
        ids=ids,
        source=mx.zeros(ids.shape, mx.int32) + (mx.arange(length) == 0).astype(mx.int32),
        targets=ids,
        supervised=mx.array(supervised),
        picks=mx.array(np.flatnonzero(supervised).astype(np.int32)),
        stored={},
        codec=get_codec("float16"),
        grid=None,
        num_tokens=0,
        lengths=(length,) * rows,
        row_ids=("",) * rows,
        images=0,
    )
    mx.eval(ids, batch.source, batch.supervised, batch.picks)
    peak = 0
    for _ in range(3):
        mx.clear_cache()
        mx.reset_peak_memory()
        with lanes(2) as side:  # with one, MLX would be handed the whole graph
            loss, count, gradients = side.start(partial(step.gradients, batch)).result()
        norm = step.norm(gradients, count)
        mx.eval(loss, count, norm, gradients)
        step.update(gradients, count, norm, 1e-4)
        mx.eval(model.state, optimizer.state)
        del loss, count, norm, gradients
        peak = max(peak, mx.get_peak_memory() - others)
    return peak, job


def compare(kind: str, size: Size, way: str = "") -> list[dict[str, Any]]:
    """Both stages of one size, or sft in one of `WAYS`, blocks kept and recomputed: measured beside the formula.

    Printed, too.
    """
    found = []
    sizes, form, begins = size
    settings = WAYS[way] if way else {}
    for stage in ("sft",) if way else ("pretrain", "sft"):
        for recompute in (False, True):
            if (recompute and "lora_dropout" in settings) or ("4-bit" in form and way == "full"):
                continue  # refused by `train`
            peak, job = measure(sizes, stage, recompute, form, begins, **settings)
            said = training_memory(job).total
            one = {"kind": kind, "size": size, "stage": stage, "way": way, "recompute": recompute}
            found.append(one | {"peak": peak, "formula": said, "error": said / peak - 1})
            print(
                f"{sizes!s:34} {form:14} {begins:3} {way or stage:13} {'recomputed' if recompute else 'kept':10} "
                f"measured {peak / 1e6:7.1f} MB, formula {said / 1e6:7.1f} MB ({said / peak - 1:+.1%})",
                flush=True,
            )
    return found


def llama3_8b(recompute: bool, stage: str) -> TrainJob:
    """One row of 1024 tokens on a GPU; 0.56 bytes a weight (4 bits, and a scale and bias of 16 for each 64)."""
    d, rank = LLAMA3_8B, 16
    q, kv, middle = d.heads * d.head_dim, d.kv_heads * d.head_dim, d.intermediate
    linear = d.hidden * (2 * q + 2 * kv + 3 * middle) * d.layers + 2 * d.vocab * d.hidden
    projector = ProjectorConfig()
    learned = sum(value.size for value in parameters(Projector(projector)).values())
    if adapted := stage == "sft":
        learned = rank * (2 * (d.hidden + q) + 2 * (d.hidden + kv) + 3 * (d.hidden + middle)) * d.layers
    return TrainJob(
        decoder=d,
        weights=round(0.5625 * linear) + 4 * learned,
        learned=learned,
        updated=learned,
        decoder_learns=Learning(d.layers) if adapted else None,
        reached=d.layers,
        rows=1,
        length=1024,
        width=2,
        recompute=recompute,
        chunk=GPU_CHUNKS * CHUNK_BYTES,
        targets=512,
        **projection(projector, 7, 729, 2, learns=not adapted, scores=True),
        sums=2,
    )


def table() -> list[dict[str, Any]]:
    """Rows at once on each Mac, of both stages; printed, too."""
    found = []
    for stage in ("pretrain", "sft"):
        for recompute in (False, True):
            for memory in MACS:
                job, limit = llama3_8b(recompute, stage), memory * 10**9
                try:
                    rows = largest_batch(job, limit)
                except RunError:
                    rows = 0
                total = training_memory(replace(job, rows=max(1, rows))).total
                found.append({"mac": memory, "stage": stage, "recompute": recompute, "rows": rows, "bytes": total})
                fits = f"{rows:3} rows at once" if rows else "not one row"
                how = "--grad-checkpoint" if recompute else ""
                print(f"{memory} GB  {stage:8} {how:17} {fits}, {total / 1e9:5.1f} GB", flush=True)
    return found


def main() -> None:
    """Measure, print, write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", choices=("all", "float32"), default="all")
    parser.add_argument("--table", action="store_true")
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    ways = ("fitted, other ways", WAYS_FITTED, tuple(WAYS)), ("other, other ways", WAYS_OTHERS, tuple(WAYS))
    for kind, sizes, how in () if args.table else (("fitted", FITTED, ("",)), ("other", OTHERS, ("",)), *ways):
        for size in sizes:
            if args.sizes in ("all", size[1]):
                found += [one for way in how for one in compare(kind, size, way)]
        errors = [one["error"] for one in found if one["kind"] == kind]
        print(f"{kind} sizes: {len(errors)} steps, the formula is {min(errors):+.1%} to {max(errors):+.1%} off")
    macs = table()
    if args.output:
        args.output.write_text(json.dumps({"found": found, "llama3_8b": macs, **machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
