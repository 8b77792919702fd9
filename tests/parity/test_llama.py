"""The decoder against transformers' LlamaForCausalLM: ids and embeddings in, float32 logits out."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
import torch
from transformers import LlamaForCausalLM

from mlx_llama3v.config import ModelConfig, ProjectorConfig, VisionConfig, llama_config, stop_ids
from mlx_llama3v.model import Llama3V
from tests.hf_llama import LLAMA3_SCALING, make_llama

SCALING_32 = LLAMA3_SCALING | {"factor": 32.0}
CASES: dict[str, dict[str, Any]] = {
    "llama-3": {},
    "llama-3.1": {"rope_scaling": LLAMA3_SCALING},
    "llama-3.2": {
        "rope_scaling": SCALING_32,
        "tie": True,
        "head_dim": 32,
        "heads": 3,
        "kv_heads": 1,
        "hidden": 48,
    },
    "no grouping": {"kv_heads": 4, "tie": True},
}
LENGTHS = (1, 37, 64)


def ours(directory: Path, **changed: Any) -> Llama3V:
    """The decoder as a model directory would hold it; `changed` overrides entries of its config.json."""
    text = llama_config(json.loads((directory / "config.json").read_text()) | changed)
    config = ModelConfig(VisionConfig(), text, ProjectorConfig("linear", 8, text["hidden_size"]))
    model = Llama3V(config)
    stored = mx.load(str(directory / "model.safetensors"))
    weights = model.sanitize({f"language_model.{name}": value for name, value in stored.items()})
    model.language_model.load_weights(
        [(name.removeprefix("language_model."), value) for name, value in weights.items()], strict=True
    )
    return model


def gaps(model: Llama3V, reference: LlamaForCausalLM) -> float:
    """Largest difference of logits, through ids and through embeddings, over LENGTHS."""
    rng, found = np.random.default_rng(0), []
    for length in LENGTHS:
        ids = rng.integers(0, reference.config.vocab_size, (2, length))
        vectors = rng.normal(size=(2, length, reference.config.hidden_size)).astype(np.float32)
        with torch.no_grad():
            by_ids = reference(torch.tensor(ids)).logits.numpy()
            by_vectors = reference(inputs_embeds=torch.tensor(vectors)).logits.numpy()
        found.append(np.abs(np.array(model(mx.array(ids))) - by_ids).max())
        given = model(mx.array(ids), input_embeddings=mx.array(vectors))
        found.append(np.abs(np.array(given) - by_vectors).max())
    assert np.abs(by_ids).max() > 1  # logits of a size that makes the bound below mean something
    return float(max(found))


@pytest.fixture(scope="module", params=CASES)
def checkpoint(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"), **CASES[request.param])


@pytest.fixture(scope="module")
def reference(checkpoint: Path) -> LlamaForCausalLM:
    return LlamaForCausalLM.from_pretrained(checkpoint).eval()


def test_logits(checkpoint: Path, reference: LlamaForCausalLM) -> None:
    assert gaps(ours(checkpoint), reference) <= 1e-4


def test_logits_with_one_weight_moved(checkpoint: Path, reference: LlamaForCausalLM) -> None:
    """Twin: the bound above is felt by a single wrong element."""
    model = ours(checkpoint)
    projection = model.layers[0].self_attn.q_proj
    projection.weight = projection.weight.at[0, 0].add(0.5)
    assert gaps(model, reference) > 1e-4


def test_logits_in_the_old_spelling(checkpoint: Path, reference: LlamaForCausalLM) -> None:
    """Files before transformers 5 write rope_theta and rope_scaling, with `type`."""
    rope = json.loads((checkpoint / "config.json").read_text())["rope_parameters"]
    scaling = {k: v for k, v in rope.items() if k not in ("rope_theta", "rope_type")}
    old = {
        "rope_parameters": None,
        "rope_theta": rope["rope_theta"],
        "rope_scaling": {"type": rope["rope_type"], **scaling} if scaling else None,
    }
    assert gaps(ours(checkpoint, **old), reference) <= 1e-4


def test_logits_without_rope_settings(checkpoint: Path, reference: LlamaForCausalLM) -> None:
    """Twin: theta alone, or scaling alone, makes the difference."""
    rope = json.loads((checkpoint / "config.json").read_text())["rope_parameters"]
    plain = {"rope_theta": rope["rope_theta"], "rope_type": "default"}
    if rope["rope_type"] != "default":
        assert gaps(ours(checkpoint, rope_parameters=plain), reference) > 1e-3
    assert gaps(ours(checkpoint, rope_parameters=rope | {"rope_theta": 10000.0}), reference) > 1e-3


def test_stop_ids_of_both_files(checkpoint: Path) -> None:
    config, generation = (
        json.loads((checkpoint / name).read_text())["eos_token_id"]
        for name in ("config.json", "generation_config.json")
    )
    assert stop_ids(config, generation) == (301, 309)
