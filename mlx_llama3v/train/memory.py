"""The memory of a run as `plan` reckons it, from the model and the settings at hand."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_llama3v.config import Grid, ProjectorConfig
from mlx_llama3v.data.batches import LENGTHS, padded
from mlx_llama3v.data.rows import Row, Rows
from mlx_llama3v.model import Llama3V
from mlx_llama3v.plan import INPUTS, Decoder, Learning, TrainJob, at_once, largest_batch, linear, memory_limit
from mlx_llama3v.platform import device_name
from mlx_llama3v.tensors import parameters
from mlx_llama3v.train.config import MOST_ROWS, STAGES, TrainConfig
from mlx_llama3v.train.feed import pad_to
from mlx_llama3v.train.loss import chunk_bytes

_LOOKED_AT = 64  # rows
_FEW, _TOKENS = 8, 4096  # rows, and tokens, that a batch may have at least


def longest_row(rows: Rows) -> Row:
    """Of the rows that may be the longest, by their bounds, the one that is."""
    places = np.argsort(-rows.bounds, kind="stable")[:_LOOKED_AT]
    return max((rows[place] for place in places.tolist()), key=len)


def rows_of_use(rows: Rows) -> int:
    """Rows beyond which a batch is no faster, and padded more: a power of two, 8 at least, by the mean length of some.

    With 4096 tokens each byte of a weight that is read has thousands of operations, where devices of today want a
    hundred or so; and the more rows are put together, the more unequal they are.
    """
    places = np.unique(np.linspace(0, len(rows) - 1, _LOOKED_AT).astype(int))
    typical = np.mean([len(rows[place]) for place in places.tolist()])
    most = _FEW
    while most * typical < _TOKENS and most < MOST_ROWS:
        most *= 2
    return most


def training_job(
    model: Llama3V,
    config: TrainConfig,
    length: int,
    grids: Sequence[Grid] = (),
    *,
    targets: int | None = None,
    ranks: int = 1,
) -> TrainJob:
    """One batch of `config.batch_size` rows of `length` tokens, `targets` of them to be learned, and slices `grids`.

    `model` as it was loaded: adapters and float32 copies are still to come. A batch is shared by `ranks`.
    """
    projector, width = model.config.projector_config, activation_dtype(model).size
    learns = STAGES[config.stage].trains == "projector" or config.tune_projector
    patches = [h * w for h, w in grids]
    most = max(patches, default=0)  # slices are padded to the largest
    decoder, decoder_learns = _decoder(model), _decoder_learns(model, config)
    full = decoder_learns is not None and config.tune == "full"
    modules = [model.language_model] * full + [model.projector] * learns
    values = [value for module in modules for value in parameters(module).values()]
    sizes = [value.size for value in values]
    adapters = 0 if full else _adapters(config, decoder, decoder_learns)
    learned = adapters + sum(sizes)
    frozen = sum(value.nbytes for value in parameters(model).values()) - sum(value.nbytes for value in values)
    lanes = min(config.lanes, config.batch_size) or config.lanes  # a batch of one row has one part
    return TrainJob(
        decoder=decoder,
        weights=frozen + 4 * learned,
        learned=learned,
        updated=adapters + at_once(sizes),
        decoder_learns=decoder_learns,
        reached=decoder_learns.blocks if decoder_learns and not (learns or full) else decoder.layers,
        rows=max(1, -(-config.batch_size // ranks)),
        length=padded(length, pad_to(config), steps=LENGTHS),
        width=width,
        recompute=config.grad_checkpoint,
        chunk=chunk_bytes(),
        targets=length if targets is None else targets,
        **projection(projector, len(patches), most, width, learns=learns, scores=device_name() != "cpu", lanes=lanes),
        lanes=max(1, config.lanes),
        sums=2 if config.grad_accumulation_steps > 1 or config.lanes > 1 or config.rows_per_step else 1,
    )


def job_of(model: Llama3V, config: TrainConfig, row: Row, ranks: int = 1) -> TrainJob:
    """One batch of rows like `row`; see `training_job`."""
    grids = [grid for layout in row.layouts for grid in layout.grids]
    return training_job(model, config, len(row), grids, targets=row.targets, ranks=ranks)


def fitted(config: TrainConfig, model: Llama3V, rows: Rows, longest: Row, ranks: int = 1) -> TrainConfig:
    """`config` with the batch size that the memory of this machine holds, and is of use, where it is 0.

    Raises RunError.
    """
    if config.batch_size:
        return config
    most = min(rows_of_use(rows), -(-(config.rows_per_step or MOST_ROWS) // ranks))
    batch_size = ranks * largest_batch(job_of(model, config, longest), memory_limit(), most)
    return replace(config, batch_size=batch_size).resolved()


_READ = 3  # batches, in float16 or as codes: the one at work, and two that are read ahead


def projection(
    projector: ProjectorConfig, slices: int, patches: int, width: int, *, learns: bool, scores: bool, lanes: int = 1
) -> dict[str, int]:
    """The bytes of a TrainJob that pictures take: a row of `slices` of that many patches; an activation has `width`.

    What is on top while the projector is at work is fitted to projectors alone, of 196 and 729 patches a slice.
    `scores`: those of attention are kept for the way back, as on a GPU (kernels.py computes them again on a CPU).
    """
    hidden, out = projector.hidden_dim, projector.out_dim
    numbers = slices * patches * projector.in_dim
    if projector.kind == "attention":  # a block: 9 arrays, 3 of four times the width, and the probabilities
        probabilities = projector.num_heads * patches**2 * scores * learns
        kept = projector.num_layers * (patches * 21 * hidden + probabilities) + 3 * patches * hidden
        on_top = 17 * patches * hidden + probabilities
        if not learns:  # less of it where lanes go piece by piece
            on_top = max((13 if lanes > 1 else 20) * patches * hidden, patches * (projector.in_dim + 4 * hidden))
    else:
        kept, on_top = {"linear": (1, 2), "stored": (0, 0)}.get(projector.kind, (5, 6))
        kept, on_top = kept * patches * out, on_top * patches * out + (0 if learns else patches * projector.in_dim)
    return {
        "patches": (_READ * 2 + width * learns) * numbers,  # its own numbers it keeps only where it learns
        "projector": width * slices * kept * learns,
        "projecting": width * slices * on_top,
    }


def _decoder(model: Llama3V) -> Decoder:
    args = model.language_model.args
    return Decoder(
        hidden=args.hidden_size,
        layers=args.num_hidden_layers,
        intermediate=args.intermediate_size,
        heads=args.num_attention_heads,
        kv_heads=args.num_key_value_heads or args.num_attention_heads,
        head_dim=args.head_dim or args.hidden_size // args.num_attention_heads,
        vocab=args.vocab_size,
    )


def _decoder_learns(model: Llama3V, config: TrainConfig) -> Learning | None:
    if STAGES[config.stage].trains == "projector":
        return None
    blocks = model.language_model.args.num_hidden_layers
    if config.tune == "full":
        return Learning(blocks)
    wanted = config.lora_keys or tuple(INPUTS)
    return Learning(
        blocks=min(config.lora_layers or blocks, blocks),
        layers=tuple(name for name in INPUTS if any(f".{name}".endswith(f".{key}") for key in wanted)),
        dora=config.tune == "dora",
        dropout=config.lora_dropout > 0,
        quantized=any(isinstance(module, nn.QuantizedLinear) for module in model.language_model.modules()),
    )


def _adapters(config: TrainConfig, decoder: Decoder, learns: Learning | None) -> int:
    """Numbers of LoRA or DoRA matrices."""
    if learns is None:
        return 0
    sides = [linear(decoder)[name] for name in learns.layers]
    magnitudes = sum(outputs for _, outputs in sides) if learns.dora else 0
    return learns.blocks * (config.lora_rank * sum(map(sum, sides)) + magnitudes)


def activation_dtype(model: Llama3V) -> mx.Dtype:
    """What the decoder computes in: the type of its norms."""
    return model.language_model.model.norm.weight.dtype
