"""The text side of a GGUF export: Llama's names, its rotary table and its vocabulary as llama.cpp reads them."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx
from tokenizers import Tokenizer

from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.text.tokens import Tokens, load_tokenizer
from mlx_llama3v.weights.gguf_file import Entry, fitting, package

# Llama-3's way to cut text into words. llama.cpp knows it as "llama-bpe" and has it built in.
_CONTRACTIONS = "(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
_WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
# The bundled base has no contractions of its own: it differs where letters follow ('sun' is one word there).
_LLAMA_BPE = (_CONTRACTIONS + _WORDS, _WORDS)


def text_entries(weights: dict[str, mx.array], config: Mapping[str, Any], type: str) -> list[Entry]:
    """The decoder's tensors (names as in a Hugging Face LLaVA) as entries of `type`. Consumed as they are loaded."""
    gguf = package()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config["num_hidden_layers"])
    entries = []
    for name in sorted(weights):
        theirs = names.get_name(name.removeprefix("language_model."), try_suffixes=(".weight", ".bias"))
        if theirs is None:
            raise CheckpointError(f"{name} has no counterpart in a GGUF Llama.")
        shape = tuple(weights[name].shape)
        heads = _heads(name, config)
        entries.append(Entry(theirs, shape, fitting(shape, type), _loader(weights, name, heads)))
    factors = rope_factors(config)
    if factors is not None:
        entries.append(Entry("rope_freqs.weight", (len(factors),), "f32", lambda: mx.array(factors)))
    return entries


def _heads(name: str, config: Mapping[str, Any]) -> int:
    """Heads whose rows change places: llama.cpp rotates neighbours, transformers the two halves; else 0."""
    if ".self_attn.q_proj." in name:
        return int(config["num_attention_heads"])
    return int(config["num_key_value_heads"]) if ".self_attn.k_proj." in name else 0


def _loader(weights: dict[str, mx.array], name: str, heads: int) -> Any:
    def load() -> mx.array:
        value = weights.pop(name)
        if not heads:
            return value
        halves = value.reshape(heads, 2, value.shape[0] // heads // 2, *value.shape[1:])
        return halves.swapaxes(1, 2).reshape(value.shape)

    return load


def rope_factors(config: Mapping[str, Any]) -> list[float] | None:
    """What llama.cpp divides each rotary frequency by: Llama 3.1's scaling; None where there is none.

    Raises CheckpointError for a scaling of another kind.
    """
    scaling = config.get("rope_scaling")
    if not scaling or scaling["rope_type"] == "default":
        return None
    if scaling["rope_type"] != "llama3":
        raise CheckpointError(f"rope scaling {scaling['rope_type']!r} is not exported to GGUF; default and llama3 are.")
    low, high = float(scaling["low_freq_factor"]), float(scaling["high_freq_factor"])
    factor, context = float(scaling["factor"]), float(scaling["original_max_position_embeddings"])
    found = []
    for pair in range(0, config["head_dim"], 2):
        turns = context * float(config["rope_theta"]) ** (-pair / config["head_dim"]) / (2 * math.pi)
        share = min(1.0, max(0.0, (turns - low) / (high - low)))  # 0: a slow rotation, scaled whole; 1: a fast one
        found.append(1 / ((1 - share) / factor + share))
    return found


def describe_text(writer: Any, config: Mapping[str, Any]) -> None:
    """Sizes and constants of the decoder."""
    writer.add_vocab_size(config["vocab_size"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(config["head_dim"])
    writer.add_rope_freq_base(float(config["rope_theta"]))
    writer.add_layer_norm_rms_eps(float(config["rms_norm_eps"]))


def describe_vocabulary(writer: Any, source: Path, tokens: Tokens, vocabulary: int, template: str) -> None:
    """Tokens, merges, control ids and the chat template. Raises CheckpointError for a tokenizer of another kind."""
    gguf = package()
    held = json.loads(load_tokenizer(source).to_str())
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(pre_tokenizer(held, source))
    names, kinds = [f"[PAD{n}]" for n in range(vocabulary)], [gguf.TokenType.UNUSED] * vocabulary
    for name, index in held["model"]["vocab"].items():
        if index < vocabulary:  # a tokenizer may know tokens that the decoder has no vectors for
            names[index], kinds[index] = name, gguf.TokenType.NORMAL
    for token in held["added_tokens"]:
        if token["id"] < vocabulary:
            names[token["id"]] = token["content"]
            kinds[token["id"]] = gguf.TokenType.CONTROL if token["special"] else gguf.TokenType.USER_DEFINED
    writer.add_token_list(names)
    writer.add_token_types(kinds)
    merges = held["model"]["merges"]
    writer.add_token_merges([merge if isinstance(merge, str) else " ".join(merge) for merge in merges])
    ending = tokens.pieces(tokens.layout.end) if not tokens.layout.markers else [tokens.eot]
    writer.add_bos_token_id(tokens.bos)
    writer.add_eos_token_id(next((piece for piece in ending if isinstance(piece, int)), tokens.eot))
    writer.add_eot_token_id(tokens.eot)
    writer.add_add_bos_token(True)
    writer.add_add_eos_token(False)
    writer.add_chat_template(template)


def pre_tokenizer(held: Mapping[str, Any], where: Path) -> str:
    """llama.cpp's name of what tokenizer.json does before its merges. Raises CheckpointError where it has none."""
    outer = held.get("pre_tokenizer") or {}
    steps = outer.get("pretokenizers", [outer])
    patterns = [step["pattern"].get("Regex") for step in steps if step.get("type") == "Split"]
    if held["model"].get("type") != "BPE" or len(patterns) != 1 or patterns[0] not in _LLAMA_BPE:
        raise CheckpointError(
            f"{where}: tokenizer.json does not cut words as Llama-3 does; llama.cpp has no name for it."
        )
    if not held["model"].get("ignore_merges", False):
        # llama.cpp takes a word that is in the vocabulary whole, as Llama-3 does; merges must come to the same.
        model = Tokenizer.from_str(json.dumps(held)).model
        apart = [word for word in held["model"]["vocab"] if len(model.tokenize(word)) != 1]
        if apart:
            raise CheckpointError(f"{where}: merges do not make {apart[0]!r} and {len(apart) - 1} other words whole.")
    return "llama-bpe"
