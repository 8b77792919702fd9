"""What learns: freeze all, then let go of what the stage and the tuning method train."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from mlx_llama3v.compat import DoRALinear, LoRALinear, linear_to_lora_layers
from mlx_llama3v.errors import RunError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.train.config import STAGES, TrainConfig


@dataclass(frozen=True)
class Trainable:
    """The parameters that learn, by name, and how many numbers they and the whole model hold."""

    shapes: dict[str, tuple[int, ...]]
    count: int
    total: int


def prepare(model: Llama3V, config: TrainConfig) -> Trainable:
    """Freeze `model` but for what `config` trains, adding LoRA or DoRA layers to the decoder where asked.

    What learns becomes float32, so that AdamW's states and small updates are exact. Fresh layers draw from
    `mx.random`. Raises RunError for adapters on adapters, full tuning of quantized weights, unknown layer keys.
    """
    model.freeze()
    if STAGES[config.stage].trains == "projector":
        model.projector.unfreeze()
    elif config.tune == "full":
        if any(isinstance(module, (nn.QuantizedLinear, nn.QuantizedEmbedding)) for module in model.modules()):
            raise RunError("tune is 'full', but the decoder is quantized; use 'lora', or convert without -q.")
        model.language_model.unfreeze()
    else:
        _add_layers(model, config)
    model.update(tree_map(lambda value: value.astype(mx.float32), model.trainable_parameters()))
    learns = dict(tree_flatten(model.trainable_parameters()))
    return Trainable(
        shapes={name: tuple(value.shape) for name, value in learns.items()},
        count=sum(value.size for value in learns.values()),
        total=sum(value.size for _, value in tree_flatten(model.parameters())),
    )


def _add_layers(model: Llama3V, config: TrainConfig) -> None:
    if any(isinstance(module, (LoRALinear, DoRALinear)) for module in model.modules()):
        raise RunError("the model has LoRA layers already; fuse the run that brought them, then train on.")
    parameters = {**config.lora_parameters(), "keys": _keys(model, config)}
    linear_to_lora_layers(model.language_model, _layers(model, config), parameters, use_dora=config.tune == "dora")


def _layers(model: Llama3V, config: TrainConfig) -> int:
    return min(config.lora_layers or len(model.layers), len(model.layers))


def _keys(model: Llama3V, config: TrainConfig) -> list[str]:
    """Names within a block of the layers to adapt: all linear ones, or those that end in a wanted key."""
    linear = [
        name
        for name, module in model.layers[-1].named_modules()
        if isinstance(module, (nn.Linear, nn.QuantizedLinear, LoRALinear, DoRALinear))
        and not name.endswith(".linear")
    ]
    for key in config.lora_keys:
        if not any(f".{name}".endswith(f".{key}") for name in linear):
            raise RunError(f"lora_keys names {key!r}; a block of this decoder has {', '.join(sorted(linear))}.")
    wanted = tuple(f".{key}" for key in config.lora_keys) or (".",) 
    return sorted(name for name in linear if not config.lora_keys or f".{name}".endswith(wanted))


def adapter_config(model: Llama3V, config: TrainConfig) -> dict[str, Any]:
    """Contents of `adapter_config.json`, as mlx-lm reads it."""
    lora = {**config.lora_parameters(), "keys": _keys(model, config)}
    return {"fine_tune_type": config.tune, "num_layers": _layers(model, config), "lora_parameters": lora}


def adapter_weights(model: Llama3V) -> dict[str, mx.array]:
    """What the decoder learned, under its own names."""
    return dict(tree_flatten(model.language_model.trainable_parameters()))
