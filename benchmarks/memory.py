"""The memory formula of `mlx_llama3v.plan` against what MLX reports for a LoRA or projector step of small models.

    python benchmarks/memory.py [--output FILE]

Random Llamas of several sizes, batches and lengths, with and without --grad-checkpoint, in float32 on a CPU; the peak
of the second step.
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import mlx_llama3v  # noqa: F401 (the BLAS, before MLX)

# isort: split
import mlx.core as mx
import numpy as np

from mlx_llama3v.config import ModelConfig, ProjectorConfig, VisionConfig, llama_config
from mlx_llama3v.data.batches import Batch
from mlx_llama3v.embeddings.codec import get_codec
from mlx_llama3v.model import Llama3V
from mlx_llama3v.plan import TrainJob, training_memory
from mlx_llama3v.platform import machine
from mlx_llama3v.train.config import TrainConfig
from mlx_llama3v.train.lora import prepare
from mlx_llama3v.train.memory import training_job
from mlx_llama3v.train.optim import adamw
from mlx_llama3v.train.step import Step

# hidden, layers, intermediate, vocabulary, rows, length
SIZES = (
    (256, 6, 1024, 32000, 4, 256),
    (512, 4, 1408, 32000, 2, 512),
    (512, 4, 1792, 128256, 2, 256),
    (256, 8, 768, 32000, 2, 768),
)


def measure(size: tuple[int, ...], stage: str, recompute: bool) -> tuple[int, TrainJob]:
    """Peak bytes of a step, and the job as the formula takes it. Text rows: half of the positions are answers."""
    hidden, layers, intermediate, vocab, rows, length = size
    llama = {
        "hidden_size": hidden,
        "intermediate_size": intermediate,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "vocab_size": vocab,
        "tie_word_embeddings": False,
    }
    projector = ProjectorConfig("linear", 64, hidden)
    model = Llama3V(ModelConfig(VisionConfig(64, 64, 1, 1), llama_config(llama), projector))
    config = TrainConfig(stage=stage, batch_size=rows, lanes=1, grad_checkpoint=recompute).resolved()
    learns = prepare(model, config)
    optimizer = adamw(0.0)
    optimizer.init(model.trainable_parameters())
    step = Step(model, optimizer, 1.0, compiled=False, recompute=recompute)
    mx.eval(model.state, optimizer.state)
    ids = mx.random.randint(0, vocab, (rows, length)).astype(mx.int32)
    supervised = np.zeros((rows, length), bool)
    supervised[:, length // 2 : -1] = True
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
    for _ in range(2):
        mx.clear_cache()
        mx.reset_peak_memory()
        loss, count, gradients = step.gradients(batch)
        norm = step.norm(gradients, count)
        mx.eval(loss, count, norm, gradients)
        step.update(gradients, count, norm, 1e-4)
        mx.eval(model.state, optimizer.state)
    return mx.get_peak_memory(), training_job(model, config, length, learns.count)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path)
    args = parser.parse_args()
    found: list[dict[str, Any]] = []
    for size in SIZES:
        for stage in ("pretrain", "sft"):
            for recompute in (False, True):
                peak, job = measure(size, stage, recompute)
                said = training_memory(job)
                error = said.total / peak - 1
                found.append(
                    {"size": size, "stage": stage, "recompute": recompute, "peak": peak, "formula": said.total}
                )
                print(
                    f"{size!s:38} {stage:8} {'recomputed' if recompute else 'kept':10} measured {peak / 1e6:7.1f} MB, "
                    f"formula {said.total / 1e6:7.1f} MB ({error:+.1%})",
                    flush=True,
                )
    if args.output:
        args.output.write_text(json.dumps({"found": found, **machine()}, indent=2) + "\n")


if __name__ == "__main__":
    main()
