"""What learns: freeze all, then let go of what the stage and the tuning method train."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from math import prod
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_llama3v.compat import DoRALinear, LoRALinear, linear_to_lora_layers
from mlx_llama3v.errors import RunError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import parameters
from mlx_llama3v.train.config import STAGES, TrainConfig
from mlx_llama3v.train.memory import activation_dtype


@dataclass(frozen=True)
class Trainable:
    """The parameters that learn.

    Attributes:
        shapes: of every tensor that learns, by its name in the model.
        count, total: numbers that learn, and numbers in all.
        adapter_config: what `adapter_config.json` says, as for mlx-lm; None where the projector learns.
        dtype: what the decoder's part of them is rounded to in a step (`Step`), so that a 16-bit decoder computes in
            16 bits throughout: beside a float32 matrix MLX makes a float32 copy of each layer's input.
    """

    shapes: dict[str, tuple[int, ...]]
    count: int
    total: int
    adapter_config: dict[str, Any] | None
    dtype: mx.Dtype

    @property
    def parts(self) -> list[str]:
        """What learns, in words, with how many numbers."""
        sizes: dict[str, int] = defaultdict(int)
        for name, shape in self.shapes.items():
            kind = (self.adapter_config or {}).get("fine_tune_type", "")
            sizes["projector" if name.startswith("projector.") else f"decoder, {kind}"] += prod(shape)
        return [f"{name} {size:,}" for name, size in sorted(sizes.items())]


def prepare(model: Llama3V, config: TrainConfig) -> Trainable:
    """Freeze `model` but for what `config` trains, adding LoRA or DoRA layers to the decoder where asked.

    What learns becomes float32, so that AdamW's states and small updates are exact. Fresh layers draw from
    `mx.random`. Raises RunError for adapters on adapters, full tuning of quantized weights, unknown keys.
    """
    dtype = activation_dtype(model)
    model.freeze()
    adapters = None
    if STAGES[config.stage].trains == "projector":
        model.projector.unfreeze()
    elif config.tune == "full":
        if any(isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for module in model.modules()):
            raise RunError("tune is 'full', but the decoder is quantized; use 'lora', or convert without -q.")
        model.language_model.unfreeze()
        adapters = {"fine_tune_type": "full", "num_layers": len(model.layers)}
    else:
        adapters = _add_layers(model, config)
    if config.tune_projector:
        model.projector.unfreeze()
    model.update(tree_map(lambda value: value.astype(mx.float32), model.trainable_parameters()))
    learns = dict(tree_flatten(model.trainable_parameters()))
    return Trainable(
        shapes={name: tuple(value.shape) for name, value in learns.items()},
        count=sum(value.size for value in learns.values()),
        total=sum(value.size for value in parameters(model).values()),
        adapter_config=adapters,
        dtype=mx.float32 if config.tune == "dora" else dtype,  # DoRA's norms of whole rows need more than 16 bits
    )


def _add_layers(model: Llama3V, config: TrainConfig) -> dict[str, Any]:
    """Wrap the decoder's linear layers; what `adapter_config.json` says of it."""
    if any(isinstance(module, (LoRALinear, DoRALinear)) for module in model.modules()):
        raise RunError("the model has LoRA layers already; fuse the run that brought them, then train on.")
    layers = min(config.lora_layers or len(model.layers), len(model.layers))
    lora = {
        "rank": config.lora_rank,
        "scale": config.lora_scale,
        "dropout": config.lora_dropout,
        "keys": _keys(model.layers[-1], config.lora_keys),
    }
    linear_to_lora_layers(model.language_model, layers, lora, use_dora=config.tune == "dora")
    return {"fine_tune_type": config.tune, "num_layers": layers, "lora_parameters": lora}


def _keys(block: nn.Module, wanted: tuple[str, ...]) -> list[str]:
    """Names within a block of the layers to adapt: all linear ones, or those that end in a wanted name."""
    kinds = (nn.Linear, nn.QuantizedLinear)
    linear = sorted(name for name, module in block.named_modules() if isinstance(module, kinds))
    found = {key: [name for name in linear if f".{name}".endswith(f".{key}")] for key in wanted}
    if unknown := [key for key, names in found.items() if not names]:
        raise RunError(f"lora_keys names {', '.join(unknown)}; a block has {', '.join(linear)}.")
    return sorted({name for names in found.values() for name in names}) if wanted else linear


def adapter_weights(model: Llama3V) -> dict[str, mx.array]:
    """What the decoder learned, under its own names."""
    return dict(tree_flatten(model.language_model.trainable_parameters()))
