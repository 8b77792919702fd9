"""In how many bits a model directory keeps its parts: what `--dtype` and `-q` make of tower, projector and decoder."""

from __future__ import annotations

from collections.abc import Mapping

import mlx.core as mx
from mlx.utils import tree_map

from mlx_llama3v.checkpoint import parse_dtype
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import parameters
from mlx_llama3v.weights.quantize import LayerReport, QuantConfig, quantize_model, quantize_tower


def stored(
    model: Llama3V,
    tower: Mapping[str, mx.array],
    quantize: QuantConfig | None,
    dtype: str | None,
    *,
    trained: bool,
) -> tuple[dict[str, mx.array], tuple[LayerReport, ...]]:
    """All tensors of a model directory, lazy, and the quantization of each layer; `model` is changed in place.

    `tower` holds vision_tower.*, text_tower.* and logit_*. All parts are in `dtype`, by default as they come; with
    `quantize` tower and projector are then in 16 bit, where they come in 32. A projector that is not `trained` is
    float32 always: it is nothing but where training starts, and one seed gives one start, whatever the precision of
    the directory around it. Loading makes float32 of any (see `load_model`), and what a run learned stays so (see
    `load_run`).
    """
    asked = parse_dtype(dtype) if dtype else None

    def cast(value: mx.array) -> mx.array:
        narrow = mx.bfloat16 if quantize and value.dtype == mx.float32 else value.dtype
        return value.astype(asked or narrow)

    # logit_scale and logit_bias are two numbers; rounding them would buy nothing.
    tower = {name: v if name.startswith("logit_") else cast(v) for name, v in tower.items()}
    if trained:
        model.projector.update(tree_map(cast, model.projector.parameters()))
    if asked:
        model.language_model.set_dtype(asked)
    layers: tuple[LayerReport, ...] = ()
    if quantize and (setting := model.config.quantization):
        layers = quantize_model(model, setting)
        if quantize.tower:
            tower, more = quantize_tower(tower, model.config.vision_config, setting)
            layers += more
    return {**tower, **parameters(model)}, layers
