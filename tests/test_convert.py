"""The production converter on tiny random Hugging Face checkpoints, held against transformers."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.weights.convert import convert
from tests.hf_edit import copy, edit, edit_json
from tests.hf_llama import LLAMA3_SCALING, make_llama
from tests.hf_parity import distance, features, hf_features, hf_logits, logits
from tests.hf_siglip import make_siglip

pytestmark = pytest.mark.usefixtures("quick_disk")

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def converted(vision: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(vision, llm, tmp_path_factory.mktemp("out") / "model").path


@pytest.fixture(scope="module")
def theirs(vision: Path, llm: Path) -> tuple[np.ndarray, np.ndarray]:
    """Features and logits of transformers."""
    return hf_features(vision).hidden_states[-1].numpy(), hf_logits(llm)


# -- parity, and that it can fail


def test_tower_matches_transformers(vision: Path, converted: Path) -> None:
    expected = hf_features(vision).hidden_states
    for layer in (-1, -2, 0):
        assert distance(features(converted, layer), expected[layer].numpy()) <= TOLERANCE


@pytest.mark.parametrize("over", [{}, {"tie": True, "rope_scaling": LLAMA3_SCALING}, {"head_dim": 24, "kv_heads": 1}])
def test_decoder_matches_transformers(over: dict[str, Any], vision: Path, tmp_path: Path) -> None:
    llm = make_llama(tmp_path / "llm", **over)
    convert(vision, llm, tmp_path / "model")
    assert distance(logits(tmp_path / "model"), hf_logits(llm)) <= TOLERANCE


@pytest.mark.parametrize(
    "name",
    [
        "vision_tower.embeddings.patch_embedding.weight",
        "vision_tower.embeddings.position_embedding.weight",
        "vision_tower.encoder.layers.1.layer_norm2.bias",
        "language_model.model.layers.0.self_attn.k_proj.weight",
        "language_model.model.norm.weight",
        "language_model.lm_head.weight",
    ],
)
def test_parity_fails_for_a_perturbed_weight(
    name: str, theirs: tuple[np.ndarray, np.ndarray], converted: Path, tmp_path: Path
) -> None:
    spoilt = copy(converted, tmp_path / "spoilt")
    edit(spoilt, lambda weights: weights.update({name: weights[name] + 0.05}))
    far = [distance(found(spoilt), expected) for found, expected in zip((features, logits), theirs, strict=True)]
    assert max(far) > 10 * TOLERANCE


# -- the traps of reference/checkpoints.md


def test_trap_1_rope_parameters_only(vision: Path, tmp_path: Path) -> None:
    llm = make_llama(tmp_path / "llm", rope_scaling=LLAMA3_SCALING)
    written = json.loads((llm / "config.json").read_text())
    assert "rope_parameters" in written and "rope_theta" not in written  # as transformers 5 saves it
    convert(vision, llm, tmp_path / "new")
    config = load_config(tmp_path / "new").text_config
    assert config["rope_theta"] == 500000.0 and config["rope_scaling"]["factor"] == 8.0
    assert config["rope_parameters"]["rope_theta"] == 500000.0

    old = copy(llm, tmp_path / "old-llm")  # the spelling before transformers 5
    scaling = {key: value for key, value in LLAMA3_SCALING.items() if key != "rope_type"} | {"type": "llama3"}
    edit_json(old / "config.json", rope_parameters=None, rope_theta=500000.0, rope_scaling=scaling)
    convert(vision, old, tmp_path / "old")
    assert np.array_equal(logits(tmp_path / "old"), logits(tmp_path / "new"))

    bare = copy(llm, tmp_path / "bare-llm")  # what is lost when neither is read
    edit_json(bare / "config.json", rope_parameters=None)
    convert(vision, bare, tmp_path / "bare")
    assert distance(logits(tmp_path / "bare"), hf_logits(llm)) > 10 * TOLERANCE


def test_trap_2_head_is_untied_unless_the_config_says_so(vision: Path, llm: Path, tmp_path: Path) -> None:
    silent = copy(llm, tmp_path / "llm")
    edit_json(silent / "config.json", tie_word_embeddings=None)
    convert(vision, silent, tmp_path / "model")
    assert load_config(tmp_path / "model").text_config["tie_word_embeddings"] is False
    assert distance(logits(tmp_path / "model"), hf_logits(llm)) <= TOLERANCE


def test_trap_2_tied_head_in_the_file_is_dropped(vision: Path, tmp_path: Path) -> None:
    llm = make_llama(tmp_path / "llm", tie=True)
    edit(llm, lambda w: w.update({"lm_head.weight": w["model.embed_tokens.weight"]}))
    convert(vision, llm, tmp_path / "model")
    assert not [name for name in read_tensors(tmp_path / "model") if "lm_head" in name]


def test_trap_2_a_head_of_its_own_is_kept_whatever_the_config_says(vision: Path, tmp_path: Path) -> None:
    """transformers 5 compares the two, and does not tie what differs."""
    llm = edit(
        make_llama(tmp_path / "llm", tie=True), lambda w: w.update({"lm_head.weight": -w["model.embed_tokens.weight"]})
    )
    config = convert(vision, llm, tmp_path / "model").config
    assert config.text_config["tie_word_embeddings"] is False
    assert distance(logits(tmp_path / "model"), hf_logits(llm)) <= TOLERANCE


def test_trap_3_gelu_is_the_tanh_form(vision: Path, converted: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = hf_features(vision).hidden_states[-1].numpy()
    assert load_config(converted).vision_config.hidden_act == "gelu_pytorch_tanh"
    monkeypatch.setattr("mlx_llama3v.vision.siglip._activation", lambda name: nn.gelu_fast_approx)
    assert distance(features(converted), expected) > 10 * TOLERANCE


def test_trap_5_features_precede_the_post_layernorm(vision: Path, converted: Path) -> None:
    assert load_config(converted).vision_feature_layer == -1
    assert distance(features(converted), hf_features(vision).last_hidden_state.numpy()) > 0.1


def test_trap_9_three_prefix_layouts_are_one_tower(vision: Path, llm: Path, tmp_path: Path) -> None:
    lone = make_siglip(tmp_path / "bare", full=False)
    assert "embeddings.patch_embedding.weight" in mx.load(str(lone / "model.safetensors"))
    prefixed = copy(lone, tmp_path / "prefixed")
    edit(prefixed, lambda w: [w.update({f"vision_model.{name}": w.pop(name)}) for name in list(w)])
    towers = []
    for source in (lone, prefixed):
        convert(source, llm, tmp_path / f"{source.name}-model")
        assert load_config(tmp_path / f"{source.name}-model").siglip_text_config is None
        towers.append(features(tmp_path / f"{source.name}-model"))
    assert np.array_equal(*towers)
    assert distance(towers[0], hf_features(lone).hidden_states[-1].numpy()) <= TOLERANCE
    full = edit(copy(vision, tmp_path / "full"), lambda w: w.update(_tower_of(lone)))
    convert(full, llm, tmp_path / "full-model")
    assert np.array_equal(features(tmp_path / "full-model"), towers[0])


def _tower_of(lone: Path) -> dict[str, mx.array]:
    weights = mx.load(str(lone / "model.safetensors"))
    return {f"vision_model.{name}": value for name, value in weights.items()}


def test_trap_11_vision_config_survives_saving(vision: Path, llm: Path, tmp_path: Path) -> None:
    report = convert(vision, llm, tmp_path / "model")
    assert report.config.vision_config.hidden_size == 32
    written = json.loads((tmp_path / "model" / "config.json").read_text())
    assert written["vision_config"]["hidden_size"] == 32 and written["text_config"]["hidden_size"] == 64
