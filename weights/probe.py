"""What quantization does to a decoder: the logits of one sentence before and after, one block in memory at a time.

A 16 GB machine cannot hold an 8B model whole; so the sentence's hidden states go through the blocks one by one, and
every block's tensors are read, used and let go.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.model import Llama3V, quantize_layers
from mlx_llama3v.platform import device_name
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.text.tokens import Tokens

SENTENCE = "The quick brown fox jumps over the lazy dog, and 17 people watch it from a bridge in Paris."
_MODEL = "language_model.model."


@dataclass(frozen=True)
class Probe:
    """The change of logits on SENTENCE."""

    change: float  # root mean square of the difference, divided by the standard deviation of the logits before
    agreement: float  # share of positions whose likeliest token stayed


def probe(before: dict[str, mx.array], model_dir: Path, config: ModelConfig) -> Probe:
    """Compare the lazy decoder tensors `before` (our names; the mapping is emptied) with those of a model directory."""
    tokens = Tokens.load(model_dir, config.marker_ids, config.eos_token_ids)
    ids = mx.array([[tokens.bos, *tokens.encode(SENTENCE)]])
    reference = logits(before, replace(config, quantization=None), ids)
    found = logits(read_tensors(model_dir, ("language_model.",)), config, ids)
    spread = mx.sqrt(mx.mean((reference - mx.mean(reference, axis=-1, keepdims=True)) ** 2))
    change = mx.sqrt(mx.mean((found - reference) ** 2)) / spread
    same = mx.mean(mx.argmax(found, axis=-1) == mx.argmax(reference, axis=-1))
    return Probe(float(change.item()), float(same.item()))  # type: ignore[arg-type]


def logits(weights: dict[str, mx.array], config: ModelConfig, ids: mx.array) -> mx.array:
    """ids [1, L] -> float32 logits [L, V] of the decoder `weights`, which are consumed."""
    stored = frozenset(weights)
    shell = _shell(config, 0, stored)
    decoder: Any = shell.language_model
    _take(decoder.model.embed_tokens, weights, f"{_MODEL}embed_tokens.")
    x = decoder.model.embed_tokens(ids)
    mx.eval(x)
    for number in range(config.text_config["num_hidden_layers"]):
        block: Any = _shell(config, number, stored).language_model.layers[0]
        _take(block, weights, f"{_MODEL}layers.{number}.")
        x = block(x, "causal", None)
        mx.eval(x)
    _take(decoder.model.norm, weights, f"{_MODEL}norm.")
    if not decoder.args.tie_word_embeddings:
        _take(decoder.lm_head, weights, "language_model.lm_head.")
    found = shell.logits(decoder.model.norm(x))[0].astype(mx.float32)
    mx.eval(found)
    return found


def _shell(config: ModelConfig, number: int, stored: frozenset[str]) -> Llama3V:
    """A model of one block, quantized as block `number` is; its tensors are to be filled in."""
    shell = Llama3V(replace(config, text_config={**config.text_config, "num_hidden_layers": 1}))
    if config.quantization:
        old, new = f"{_MODEL}layers.{number}.", f"{_MODEL}layers.0."
        setting = {
            k.replace(old, new): v for k, v in config.quantization.items() if number == 0 or not k.startswith(new)
        }
        moved = frozenset(k.replace(old, new) for k in stored if number == 0 or not k.startswith(new))
        quantize_layers(shell, setting, only="language_model.", stored=moved)
    return shell


def _take(module: nn.Module, weights: dict[str, mx.array], prefix: str) -> None:
    names = [name for name in weights if name.startswith(prefix) and not name.endswith("rotary_emb.inv_freq")]
    module.load_weights([(name.removeprefix(prefix), weights.pop(name)) for name in names])
    if device_name() == "cpu":  # 16-bit products are two orders of magnitude slower there
        module.set_dtype(mx.float32)
