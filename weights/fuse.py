"""A run merged into its model directory: projector and adapters become plain weights."""

from __future__ import annotations

from dataclasses import replace
from fnmatch import fnmatch
from pathlib import Path

import mlx.nn as nn
from mlx.utils import tree_unflatten

from mlx_llama3v.checkpoint import load_run, read_model, save_model, trained_on
from mlx_llama3v.config import ModelConfig
from mlx_llama3v.directory import check_output
from mlx_llama3v.hub import resolve
from mlx_llama3v.tensors import SHARD_BYTES, parameters, read_tensors
from mlx_llama3v.weights.card import RunFacts, model_card
from mlx_llama3v.weights.convert import drain
from mlx_llama3v.weights.quantize import measure

_REMADE = ("config.json", "README.md", "model*.safetensors*", ".*")


def fuse(model_dir: str | Path, run_dir: str | Path, out_dir: str | Path, *, shard_bytes: int = SHARD_BYTES) -> Path:
    """Write `model_dir` with what `run_dir` trained merged in; dtypes and quantization stay as they are.

    But for the run's projector, which is float32, as it was trained. A quantized layer is merged at full precision and
    quantized again, which rounds the adapter. Returns the absolute path of `out_dir`. Raises CheckpointError as
    `load_run` and `save_model` do.
    """
    source, target = resolve(model_dir).resolve(), check_output(out_dir)
    model = read_model(source)
    load_run(model, run_dir)
    decoder = model.language_model
    merged = [(name, merge(module)) for name, module in decoder.named_modules() if hasattr(module, "fuse")]
    decoder.update_modules(tree_unflatten(merged))
    config = with_run(model.config, run_dir)
    towers = ("vision_tower.", "text_tower.", "logit_")
    weights = {**read_tensors(source, towers), **parameters(model)}
    counts, _ = measure(weights, config.quantization)
    beside = {str(path.relative_to(source)): path for path in source.rglob("*") if path.is_file()}
    files: dict[str, Path | str] = {
        name: path for name, path in beside.items() if not any(fnmatch(name, made) for made in _REMADE)
    }
    files["README.md"] = model_card(config, sum(counts.values()), facts=RunFacts.read(run_dir))
    del model, decoder, merged  # or they would hold every tensor until the end
    save_model(target, config, drain(weights), files=files, shard_bytes=shard_bytes)
    return target


def with_run(config: ModelConfig, run_dir: str | Path) -> ModelConfig:
    """`config` of a model that a run was merged into: it names the run, and takes pictures as that did."""
    sources = {**config.sources, "run": Path(run_dir).expanduser().resolve().name}
    return replace(trained_on(config, run_dir), sources=sources)


def merge(adapted: nn.Module) -> nn.Module:
    """The plain layer that computes what `adapted` does, in the dtype of the layer it wraps."""
    base = adapted["linear"] if "linear" in adapted else adapted["embedding"]
    dtype = (base.scales if "scales" in base else base.weight).dtype
    merged = adapted.fuse()
    merged.set_dtype(dtype)
    return merged
