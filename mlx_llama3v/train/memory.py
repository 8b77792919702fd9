"""The memory of a run as `plan` reckons it, from the model and the settings at hand."""

from __future__ import annotations

import mlx.core as mx

from mlx_llama3v.data.batches import padded
from mlx_llama3v.model import Llama3V
from mlx_llama3v.plan import Decoder, TrainJob
from mlx_llama3v.tensors import parameters
from mlx_llama3v.train.config import STAGES, TrainConfig
from mlx_llama3v.train.loss import chunk_bytes


def training_job(model: Llama3V, config: TrainConfig, longest: int, learned: int | None = None) -> TrainJob:
    """One batch of `config.batch_size` rows of `longest` tokens.

    `learned`: numbers that learn, where `lora.prepare` has told; else they are reckoned.
    """
    weights = sum(value.nbytes for value in parameters(model).values())
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
        length=padded(longest, 32 if config.compile else 4, steps=8),
        width=activation_dtype(model).size,
        recompute=config.grad_checkpoint,
        fused_attention=False,  # MLX 0.32 gives it up inside a gradient
        chunk=chunk_bytes(),
    )


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
