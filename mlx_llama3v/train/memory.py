"""The memory of a run as `plan` reckons it, from the model and the settings at hand."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import Grid, ProjectorConfig
from mlx_llama3v.data.batches import LENGTHS, padded
from mlx_llama3v.data.rows import Row, Rows
from mlx_llama3v.model import Llama3V
from mlx_llama3v.plan import Decoder, TrainJob
from mlx_llama3v.tensors import parameters
from mlx_llama3v.train.config import STAGES, TrainConfig
from mlx_llama3v.train.feed import pad_to
from mlx_llama3v.train.loss import chunk_bytes

_LOOKED_AT = 64  # rows


def longest_row(rows: Rows) -> Row:
    """Of the rows that may be the longest, by their bounds, the one that is."""
    places = np.argsort(-rows.bounds, kind="stable")[:_LOOKED_AT]
    return max((rows[place] for place in places.tolist()), key=len)


def training_job(
    model: Llama3V,
    config: TrainConfig,
    length: int,
    grids: Sequence[Grid] = (),
    *,
    targets: int | None = None,
    learned: int | None = None,
) -> TrainJob:
    """One batch of `config.batch_size` rows of `length` tokens, `targets` of them to be learned, and slices `grids`.

    `learned`: numbers that learn, where `lora.prepare` has told; else they are reckoned.
    """
    projector, width = model.config.projector_config, activation_dtype(model).size
    learns = STAGES[config.stage].trains == "projector" or config.tune_projector
    patches = [h * w for h, w in grids]
    most = max(patches, default=0)  # slices are padded to the largest
    weights = sum(value.nbytes for value in parameters(model).values())
    if learned is None and STAGES[config.stage].trains == "decoder" and config.tune == "full":  # becomes float32
        weights += sum(4 * value.size - value.nbytes for value in parameters(model.language_model).values())
    args = model.language_model.args
    trains_decoder = STAGES[config.stage].trains == "decoder"
    return TrainJob(
        decoder=Decoder(
            hidden=args.hidden_size,
            layers=args.num_hidden_layers,
            intermediate=args.intermediate_size,
            heads=args.num_attention_heads,
            kv_heads=args.num_key_value_heads or args.num_attention_heads,
            head_dim=args.head_dim or args.hidden_size // args.num_attention_heads,
            vocab=args.vocab_size,
        ),
        weights=weights,
        learned=_learned(model, config) if learned is None else learned,
        adapted=trains_decoder,
        rows=max(1, config.batch_size),
        length=padded(length, pad_to(config), steps=LENGTHS),
        width=width,
        recompute=config.grad_checkpoint,
        chunk=chunk_bytes(),
        targets=length if targets is None else targets,
        patches=width * len(patches) * most * projector.in_dim,
        projector=width * len(patches) * kept(projector, most) if learns else 0,
        lanes=max(1, config.lanes),
        sums=2 if config.grad_accumulation_steps > 1 or config.lanes > 1 or config.rows_per_step else 1,
    )


def job_of(model: Llama3V, config: TrainConfig, row: Row, learned: int | None = None) -> TrainJob:
    """One batch of rows like `row`."""
    grids = [grid for layout in row.layouts for grid in layout.grids]
    return training_job(model, config, len(row), grids, targets=row.targets, learned=learned)


def kept(projector: ProjectorConfig, patches: int) -> int:
    """Numbers that the projector keeps of one slice for its backward pass."""
    hidden, out = projector.hidden_dim, projector.out_dim
    if projector.kind == "attention":  # a block: 9 arrays, 3 of four times the width, and the probabilities
        block = patches * 21 * hidden + projector.num_heads * patches**2
        return projector.num_layers * block + 3 * patches * hidden
    return patches * (projector.in_dim + 4 * out)


def _learned(model: Llama3V, config: TrainConfig) -> int:
    projector = sum(value.size for value in parameters(model.projector).values())
    if STAGES[config.stage].trains == "projector":
        return projector
    args, total = model.language_model.args, projector if config.tune_projector else 0
    if config.tune == "full":
        return total + sum(value.size for value in parameters(model.language_model).values())
    head = args.head_dim or args.hidden_size // args.num_attention_heads
    q, kv = args.num_attention_heads * head, (args.num_key_value_heads or args.num_attention_heads) * head
    sides = 2 * (args.hidden_size + q) + 2 * (args.hidden_size + kv) + 3 * (args.hidden_size + args.intermediate_size)
    return total + config.lora_rank * sides * (config.lora_layers or args.num_hidden_layers)


def activation_dtype(model: Llama3V) -> mx.Dtype:
    """What the decoder computes in: the type of its norms."""
    return model.language_model.model.norm.weight.dtype
