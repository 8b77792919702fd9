"""What learns in each stage, and that nothing else does."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.compat import DoRALinear, LoRALinear
from mlx_llama3v.errors import RunError
from mlx_llama3v.model import quantize_decoder
from mlx_llama3v.tensors import parameters
from mlx_llama3v.train.lora import prepare
from tests.tiny_model import tiny_model
from tests.tiny_run import settings

LINEAR = [f"mlp.{x}_proj" for x in ("down", "gate", "up")] + [f"self_attn.{x}_proj" for x in "koqv"]


def test_pretrain_trains_the_projector_and_its_markers() -> None:
    model = tiny_model()
    learns = prepare(model, settings("pretrain"))
    assert {f"projector.{name}" for name in parameters(model.projector)} == learns.shapes.keys()
    assert learns.shapes["projector.markers"] == (8, 32)
    assert learns.adapter_config is None
    assert learns.total == sum(value.size for value in parameters(model).values())
    assert 0 < learns.count < learns.total


@pytest.mark.parametrize(("tune", "layer", "leaves"), [("lora", LoRALinear, 2), ("dora", DoRALinear, 3)])
def test_sft_adds_layers_to_the_last_blocks(tune: str, layer: type, leaves: int) -> None:
    model = tiny_model()
    learns = prepare(model, settings("sft", tune=tune, lora_layers=1))
    assert len(learns.shapes) == leaves * len(LINEAR)
    assert all(name.startswith("language_model.model.layers.1.") for name in learns.shapes)
    assert isinstance(model.layers[1].mlp.up_proj, layer)
    assert isinstance(model.layers[0].mlp.up_proj, nn.Linear)
    assert learns.adapter_config == {
        "fine_tune_type": tune,
        "num_layers": 1,
        "lora_parameters": {"rank": 4, "scale": 2.0, "dropout": 0.0, "keys": LINEAR},
    }


def test_layers_are_chosen_by_the_end_of_their_name() -> None:
    learns = prepare(tiny_model(), settings("sft", lora_keys=("q_proj", "mlp.up_proj")))
    assert learns.adapter_config is not None
    assert learns.adapter_config["lora_parameters"]["keys"] == ["mlp.up_proj", "self_attn.q_proj"]
    assert len(learns.shapes) == 2 * 2 * 2


def test_full_tuning_trains_the_decoder_alone() -> None:
    model = tiny_model()
    learns = prepare(model, settings("sft", tune="full"))
    assert {f"language_model.{name}" for name in parameters(model.language_model)} == learns.shapes.keys()


@pytest.mark.parametrize(("tune", "states"), [("lora", mx.bfloat16), ("dora", mx.bfloat16), ("full", mx.float32)])
def test_what_learns_is_float32(tune: str, states: mx.Dtype) -> None:
    model = tiny_model()
    model.language_model.set_dtype(mx.bfloat16)
    prepare(model, settings("sft", tune=tune))
    learned = dict(tree_flatten(model.trainable_parameters()))
    assert {value.dtype for value in learned.values()} == {mx.float32}
    assert model.hidden(mx.array([[1, 2, 3]])).dtype == states
    frozen = {name: value.dtype for name, value in parameters(model.language_model).items()}
    assert tune == "full" or frozen["model.layers.0.mlp.up_proj.linear.weight"] == mx.bfloat16


def test_a_fresh_adapter_changes_nothing() -> None:
    ids = mx.array([[1, 2, 3]])
    model = tiny_model()
    before = model(ids)
    prepare(model, settings("sft"))
    assert mx.abs(model(ids) - before).max().item() < 1e-5


def quantized() -> Any:
    model = tiny_model()
    quantize_decoder(model, bits=4, group_size=32)
    return model


def test_a_quantized_decoder_takes_adapters() -> None:
    learns = prepare(quantized(), settings("sft"))
    assert learns.shapes["language_model.model.layers.0.mlp.up_proj.lora_a"] == (32, 4)


def test_what_cannot_be_trained_is_refused() -> None:
    with pytest.raises(RunError, match="quantized"):
        prepare(quantized(), settings("sft", tune="full"))
    with pytest.raises(RunError, match=r"lora_keys names wq; a block has mlp\.down_proj, "):
        prepare(tiny_model(), settings("sft", lora_keys=("q_proj", "wq")))
    adapted = tiny_model()
    prepare(adapted, settings("sft"))
    with pytest.raises(RunError, match="LoRA layers already"):
        prepare(adapted, settings("sft"))


@pytest.mark.parametrize("setting", [{"bits": bits} for bits in (2, 3, 4, 5, 6, 8)] + [{"bits": 4, "mode": "mxfp4"}])
@pytest.mark.parametrize("kind", [LoRALinear, DoRALinear])
def test_fresh_adapters_of_any_width_change_nothing(kind: Any, setting: dict[str, Any]) -> None:
    base = nn.Linear(128, 24, bias=False).to_quantized(group_size=32, **setting)
    x = mx.random.normal((2, 128))
    adapted = kind.from_base(base, r=4)
    assert np.allclose(adapted(x), base(x), atol=1e-4)
    assert adapted.lora_a.shape == (128, 4) and adapted.fuse().bits == setting["bits"]
