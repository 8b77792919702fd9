"""In how many bits a model directory keeps its parts: what `--dtype` and `-q` make of tower, projector and decoder."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
from mlx.utils import tree_map

from mlx_llama3v.checkpoint import parse_dtype
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import parameters
from mlx_llama3v.weights.quantize import LayerReport, QuantConfig, quantize_model, quantize_tower


@dataclass(frozen=True)
class Storage:
    """What was asked for: bits of the decoder (and the tower), and the dtype of all else; None: as it comes.

    Raises CheckpointError for a dtype that does not exist.
    """

    quantize: QuantConfig | None = None
    dtype: str | None = None

    def __post_init__(self) -> None:
        if self.dtype is not None:
            parse_dtype(self.dtype)

    def setting(self, text_config: Mapping[str, Any]) -> dict[str, Any] | None:
        """The quantization of such a decoder as config.json has it; None where there is none."""
        if self.quantize is None:
            return None
        return self.quantize.setting(text_config["num_hidden_layers"], bool(text_config["tie_word_embeddings"]))

    def cast(self, value: mx.array, narrow: bool) -> mx.array:
        """A tensor that is not quantized, as asked for; where nothing was and it is `narrow`, in 16 bit."""
        if self.dtype is not None:
            return value.astype(parse_dtype(self.dtype))
        return value.astype(mx.bfloat16) if narrow and value.dtype == mx.float32 else value


def stored(
    model: Llama3V, tower: Mapping[str, mx.array], storage: Storage, *, trained: bool, kept: bool = False
) -> tuple[dict[str, mx.array], tuple[LayerReport, ...]]:
    """All tensors of a model directory, lazy, and the quantization of each layer; `model` is changed in place.

    `tower` holds vision_tower.*, text_tower.* and logit_*. Beside a decoder of 16 bit or fewer it has no more either
    (SigLIP is released in float32), nor has a projector that was `trained`, unless the source was `kept`: a model of
    ours that was exported, which comes back as it was. A projector that is not `trained` is float32 always: it is
    nothing but where training starts, and one seed gives one start, whatever the precision of the directory around it.
    Loading makes float32 of any (see `load_model`), and what a run learned stays so (see `load_run`).
    """
    # logit_scale and logit_bias are two numbers; rounding them would buy nothing.
    decoder = model.language_model.model.embed_tokens.weight.dtype  # the largest tensor; packed where it is quantized
    narrow = storage.quantize is not None or (not kept and decoder != mx.float32)
    tower = {name: v if name.startswith("logit_") else storage.cast(v, narrow) for name, v in tower.items()}
    if trained:
        model.projector.update(tree_map(lambda value: storage.cast(value, narrow), model.projector.parameters()))
    if storage.dtype is not None:
        model.language_model.set_dtype(parse_dtype(storage.dtype))
    layers: tuple[LayerReport, ...] = ()
    if storage.quantize and (setting := model.config.quantization):
        layers = quantize_model(model, setting)
        if storage.quantize.tower:
            tower, more = quantize_tower(tower, model.config.vision_config, setting)
            layers += more
    return {**tower, **parameters(model)}, layers
