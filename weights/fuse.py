"""A run merged into its model directory: projector and adapters become plain weights."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_llama3v.checkpoint import check_run, load_config, load_run, read_model, save_model, trained_on
from mlx_llama3v.config import ModelConfig
from mlx_llama3v.directory import check_output
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.hub import resolve
from mlx_llama3v.model import dequantized
from mlx_llama3v.tensors import SHARD_BYTES, parameters, read_tensors
from mlx_llama3v.weights.card import RunFacts, model_card
from mlx_llama3v.weights.convert import drain
from mlx_llama3v.weights.quantize import measure

_REMADE = ("config.json", "README.md", "model*.safetensors*", ".*")


def fuse(
    model_dir: str | Path,
    run_dir: str | Path,
    out_dir: str | Path,
    *,
    dequantize: bool = False,
    shard_bytes: int = SHARD_BYTES,
) -> Path:
    """Write `model_dir` with what `run_dir` trained merged in; dtypes and quantization stay as they are.

    But for the run's projector, which is float32, as it was trained. A quantized layer is merged at full precision and
    quantized again, which rounds all its weights anew, not the adapter alone: the result answers otherwise than the
    run. With `dequantize` nothing is quantized again: all that was, a quantized tower too, is written as the numbers
    that it stands for, in the dtype of its scales. Returns the absolute path of `out_dir`. Raises CheckpointError as
    `load_run` and `save_model` do.
    """
    source, target = resolve(model_dir).resolve(), check_output(out_dir)
    check_run(source, run_dir)
    model = read_model(source, dequantize=dequantize)
    load_run(model, run_dir)
    decoder = model.language_model
    merged = [(name, merge(module)) for name, module in decoder.named_modules() if hasattr(module, "fuse")]
    decoder.update_modules(tree_unflatten(merged))
    config = with_run(model.config, run_dir)
    if target == source and config.sources != model.config.sources:
        raise CheckpointError(f"{target} is the model itself; choose another directory for the fused one.")
    held = read_tensors(source)
    towers = {name: held[name] for name in held if name.startswith(("vision_tower.", "text_tower.", "logit_"))}
    if dequantize and (setting := load_config(source).quantization):
        weights = narrowed({**dequantized(towers, setting), **parameters(model)}, held)
    else:
        weights = {**towers, **parameters(model)}
    counts, _ = measure(weights, config.quantization)
    beside = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
    files: dict[str, Path | str] = {
        name: path for name, path in beside.items() if not any(fnmatch(name, made) for made in _REMADE)
    }
    files["README.md"] = model_card(config, sum(counts.values()), facts=RunFacts.read(run_dir))
    del model, decoder, merged, held, towers  # or they would hold every tensor until the end
    save_model(target, config, drain(weights), files=files, shard_bytes=shard_bytes)
    return target


def with_run(config: ModelConfig, run_dir: str | Path) -> ModelConfig:
    """`config` of a model that a run was merged into: it names the run, and takes pictures as that did."""
    sources = {**config.sources, "run": Path(run_dir).expanduser().resolve().name}
    return replace(trained_on(config, run_dir), sources=sources)


def narrowed(weights: Mapping[str, mx.array], held: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """`weights` where those that were packed in `held` have the dtype of their scales, or the norms' for mxfp4's."""
    norms = held["language_model.model.norm.weight"].dtype
    scales = {name.removesuffix("scales") + "weight": v.dtype for name, v in held.items() if name.endswith(".scales")}
    dtypes = {name: dtype if mx.issubdtype(dtype, mx.floating) else norms for name, dtype in scales.items()}
    return {name: value.astype(dtypes.get(name, value.dtype)) for name, value in weights.items()}


def merge(adapted: nn.Module) -> nn.Module:
    """The plain layer that computes what `adapted` does, in the dtype of the layer it wraps."""
    base = adapted["linear"] if "linear" in adapted else adapted["embedding"]
    dtype = (base.scales if "scales" in base else base.weight).dtype
    merged = adapted.fuse()
    merged.set_dtype(dtype)
    return merged
