"""The Llama side of a conversion: a checkpoint of Hugging Face or of mlx-lm, recognised, read and renamed."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v.config import llama_config, stop_ids
from mlx_llama3v.directory import LEGAL_FILES, TOKENIZER_FILES
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import read_json, read_tensors
from mlx_llama3v.weights.siglip import describe

PREFIX = "language_model."
_HEADS = ("lm_head.weight", "embed_tokens.weight")
FILES = (*TOKENIZER_FILES, *LEGAL_FILES)


@dataclass(frozen=True)
class LlamaSource:
    """A Llama checkpoint under the names of a model directory, with its completed configuration.

    `names`: theirs -> ours.
    """

    directory: Path
    config: dict[str, Any]
    eos_token_ids: tuple[int, ...]
    quantization: dict[str, Any] | None  # how mlx-lm has quantized it already
    names: dict[str, str]
    weights: dict[str, mx.array] = field(repr=False)


def read_llama(directory: Path) -> LlamaSource:
    """Read a Llama lazily. Raises CheckpointError for any other model and for foreign quantization.

    Stop ids come from both config.json and generation_config.json: either may lack <|eot_id|>.
    """
    values = read_json(directory / "config.json")
    kind = values.get("model_type", "llama")
    if kind != "llama":
        hint = "; are --vision and --llm swapped?" if str(kind).startswith("siglip") else "."
        raise CheckpointError(f"--llm {directory} is {describe(kind)}, expected a Llama checkpoint{hint}")
    quantization = _quantization(values, directory)
    path = directory / "generation_config.json"
    generation = read_json(path) if path.is_file() else {}
    # The tensors themselves say what they are; a dtype in the configuration would only go stale.
    stale = ("quantization", "quantization_config", "dtype", "torch_dtype")
    config = llama_config({key: value for key, value in values.items() if key not in stale})
    config["tie_word_embeddings"] = config["tie_word_embeddings"] and not has_own_head(directory)
    tensors = read_tensors(directory)
    return LlamaSource(
        directory,
        config,
        stop_ids(values.get("eos_token_id"), generation.get("eos_token_id")),
        quantization,
        {name: next(iter(rename({name: value}))) for name, value in tensors.items()},
        rename(tensors),
    )


def has_own_head(directory: Path) -> bool:
    """Whether a checkpoint holds a head that is not its embedding: then it counts, whatever config.json says of ties.

    As in transformers 5. The two are read for themselves, and let go.
    """
    tensors = read_tensors(directory)
    head, table = (next((v for name, v in tensors.items() if name.endswith(end)), None) for end in _HEADS)
    del tensors
    if head is None or table is None or head.shape != table.shape:
        return False
    return not mx.array_equal(head, table).item()


def _quantization(values: dict[str, Any], directory: Path) -> dict[str, Any] | None:
    """mlx-lm's own setting, where it is one for all layers; anything else cannot be read."""
    found = values.get("quantization")
    if not found and not values.get("quantization_config"):
        return None
    mixed = isinstance(found, dict) and any(isinstance(value, dict | bool) for value in found.values())
    if isinstance(found, dict) and not mixed and found.get("mode", "affine") == "affine":
        return {"group_size": found["group_size"], "bits": found["bits"], "mode": "affine"}
    method = (values.get("quantization_config") or {}).get("quant_method", "not one affine setting")
    raise CheckpointError(
        f"--llm {directory} is already quantized ({method}); expected the original weights, or mlx-lm's "
        "affine quantization with one setting for all layers."
    )


def rename(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """transformers' names -> a model directory's; idempotent."""
    return {name if name.startswith(PREFIX) else PREFIX + name: value for name, value in weights.items()}
