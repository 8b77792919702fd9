"""What all peers of train_step.py get: shapes, rows and random weights."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from ceiling import Product

from mlx_llama3v.config import VisionConfig

TOWERS = {
    "small": VisionConfig(384, 1536, 6, 6, image_size=224, patch_size=16),
    "so400m": VisionConfig(1152, 4304, 27, 16, image_size=224, patch_size=14),
}
BATCH, TEXT, ANSWER, VOCAB, IMAGE_ID, RANK, SCALE = 4, 64, 32, 128256, 128010, 16, 2.0
Step = Callable[[], float]  # one training step; its loss


def llama(hidden: int, layers: int) -> dict[str, Any]:
    """The decoder's configuration."""
    return {
        "model_type": "llama",
        "hidden_size": hidden,
        "intermediate_size": 4 * hidden,
        "num_hidden_layers": layers,
        "num_attention_heads": hidden // 64,
        "num_key_value_heads": hidden // 128,
        "rms_norm_eps": 1e-5,
        "vocab_size": VOCAB,
        "rope_theta": 10000.0,
        "max_position_embeddings": 2048,
        "tie_word_embeddings": False,
    }


def products(tower: VisionConfig, hidden: int, layers: int) -> list[Product]:
    """The matrix products of a LoRA step from the store.

    Forward, and back to the inputs: frozen weights have no gradient. The head is for answers alone. Of each LoRA matrix
    the gradient, too.
    """
    config, length = llama(hidden, layers), tower.grid**2 + TEXT
    tokens, heads, head = BATCH * length, config["num_attention_heads"], 64
    inner, kv = config["intermediate_size"], config["num_key_value_heads"] * head
    linear = [(2, hidden, hidden), (2, hidden, kv), (2, hidden, inner), (1, inner, hidden)]
    found: list[Product] = []
    for count, into, out in linear:
        n = count * layers
        found += [(n, 1, (tokens, into, out)), (n, 1, (tokens, out, into))]
        found += [(n, 1, (tokens, into, RANK)), (n, 1, (tokens, RANK, out))]
        found += [(n, 1, (tokens, out, RANK)), (n, 1, (tokens, RANK, into))]
        found += [(n, 1, (RANK, tokens, out)), (n, 1, (into, tokens, RANK))]
    found += [(3 * layers, BATCH * heads, (length, head, length)), (3 * layers, BATCH * heads, (length, length, head))]
    answers = BATCH * ANSWER
    return [*found, (1, 1, (answers, hidden, VOCAB)), (1, 1, (answers, VOCAB, hidden))]


def rows(tower: VisionConfig) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """ids and supervised [4, visual + text], pixels [4, side, side, 3]: a start, the picture, text."""
    random = np.random.default_rng(0)
    visual = tower.grid**2
    text = random.integers(0, 128000, (BATCH, TEXT))
    ids = np.concatenate([text[:, :4], np.full((BATCH, visual), IMAGE_ID), text[:, 4:]], 1).astype(np.int32)
    supervised = np.zeros(ids.shape, bool)
    supervised[:, -ANSWER:] = True
    return ids, supervised, random.standard_normal((BATCH, tower.image_size, tower.image_size, 3)).astype(np.float32)


def make_weights(tower: VisionConfig, hidden: int, layers: int, path: Path) -> None:
    """Random weights of tower, projector and decoder, by Hugging Face's names."""
    import torch
    from safetensors.torch import save_file
    from transformers import LlamaForCausalLM, SiglipVisionModel

    torch.manual_seed(0)
    parts = {"llm": LlamaForCausalLM(hf_llama(hidden, layers)), "vision": SiglipVisionModel(hf_siglip(tower))}
    weights = {f"{part}.{name}": value for part, model in parts.items() for name, value in model.state_dict().items()}
    for name, width in (("linear_1", tower.hidden_size), ("linear_2", hidden)):
        weights[f"projector.{name}.weight"] = torch.randn(hidden, width) * width**-0.5
        weights[f"projector.{name}.bias"] = torch.zeros(hidden)
    save_file({name: value.contiguous() for name, value in weights.items()}, str(path))


def hf_llama(hidden: int, layers: int) -> Any:
    from transformers import LlamaConfig

    values = {key: value for key, value in llama(hidden, layers).items() if key not in ("model_type", "rope_theta")}
    return LlamaConfig(**values, rope_parameters={"rope_type": "default", "rope_theta": 10000.0})


def hf_siglip(tower: VisionConfig) -> Any:
    from transformers import SiglipVisionConfig

    return SiglipVisionConfig(
        hidden_size=tower.hidden_size,
        intermediate_size=tower.intermediate_size,
        num_hidden_layers=tower.num_hidden_layers,
        num_attention_heads=tower.num_attention_heads,
        image_size=tower.image_size,
        patch_size=tower.patch_size,
    )


def part(weights: dict[str, Any], name: str) -> dict[str, Any]:
    """Those of one part, without its prefix."""
    return {key.removeprefix(f"{name}."): value for key, value in weights.items() if key.startswith(f"{name}.")}
