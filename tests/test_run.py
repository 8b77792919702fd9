"""Runs: applied to a model, refused where they do not fit, and merged into a model directory."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from mlx.utils import tree_flatten

from mlx_llama3v.checkpoint import (
    load_config,
    load_model,
    load_run,
    save_safetensors_atomic,
)
from mlx_llama3v.compat import linear_to_lora_layers
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.model import Llama3V, dequantized, layer_setting
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.fuse import fuse
from mlx_llama3v.weights.quantize import QuantConfig
from tests.hf_edit import contents, edit_json
from tests.hf_llama import make_llama
from tests.hf_parity import IDS, distance, features, logits
from tests.hf_siglip import make_siglip


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def model_dir(vision: Path, llm: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(vision, llm, tmp_path_factory.mktemp("out") / "model").path


def write_run(
    model: Llama3V,
    run: Path,
    kind: str = "lora",
    keys: tuple[str, ...] = ("self_attn.q_proj",),
    prefix: str = "",
) -> Path:
    """Wrap `model` as training does, set every trained tensor to noise, and save projector and adapters."""
    run.mkdir()
    parameters = {"rank": 4, "scale": 2.0, "dropout": 0.1, "keys": list(keys)}
    linear_to_lora_layers(model.language_model, 1, parameters, use_dora=kind == "dora")
    mx.random.seed(1)
    leaves = tree_flatten(model.language_model.parameters())
    trained = {name: value for name, value in leaves if name.rpartition(".")[2] in ("lora_a", "lora_b", "m")}
    noise = {name: value + 0.3 * mx.random.normal(value.shape) for name, value in trained.items()}
    model.language_model.load_weights(list(noise.items()), strict=False)
    model.projector.markers = mx.random.normal(model.projector.markers.shape)
    model.eval()
    save_safetensors_atomic(run / "adapters.safetensors", {prefix + name: value for name, value in noise.items()})
    save_safetensors_atomic(run / "projector.safetensors", dict(tree_flatten(model.projector.parameters())))
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": parameters}
    (run / "adapter_config.json").write_text(json.dumps(config))
    return run


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("prefix", ["", "language_model."])
def test_a_run_is_applied(kind: str, prefix: str, model_dir: Path, tmp_path: Path) -> None:
    trained = load_model(model_dir)
    run = write_run(trained, tmp_path / "run", kind, prefix=prefix)
    model = load_model(model_dir)
    before = model(mx.array(IDS))
    load_run(model, run)
    expected = trained(mx.array(IDS))
    assert mx.array_equal(model(mx.array(IDS)), expected)
    assert not mx.allclose(before, expected, atol=1e-2)
    assert mx.array_equal(model.projector.markers, trained.projector.markers)
    assert not model.language_model.layers[1].self_attn.q_proj.dropout.training


def test_adapters_are_what_mlx_lm_reads(model_dir: Path, tmp_path: Path) -> None:
    from mlx_lm.tuner.utils import load_adapters

    trained = load_model(model_dir)
    run = write_run(trained, tmp_path / "run")
    decoder = load_model(model_dir).language_model
    load_adapters(decoder, str(run))
    decoder.eval()
    assert mx.array_equal(decoder(mx.array(IDS)), trained(mx.array(IDS)))


def test_a_run_of_stage_pretrain_has_a_projector_only(model_dir: Path, tmp_path: Path) -> None:
    model = load_model(model_dir)
    run = write_run(load_model(model_dir), tmp_path / "run")
    (run / "adapters.safetensors").unlink()
    before = model(mx.array(IDS))
    load_run(model, run)
    assert mx.array_equal(model(mx.array(IDS)), before)
    with pytest.raises(CheckpointError, match="is not a run; expected projector"):
        load_run(model, tmp_path)


@pytest.mark.parametrize("stage", ["pretrain", "sft"])
def test_a_run_that_has_not_ended_is_not_used(stage: str, model_dir: Path, tmp_path: Path) -> None:
    """Stopped, or killed between two of its files: half of one would be taken for another kind of run."""
    run = write_run(load_model(model_dir), tmp_path / "run")
    (run / "config.json").write_text(json.dumps({"train": {"stage": stage}}))
    load_run(load_model(model_dir), run)
    for name in ("adapters.safetensors", "projector.safetensors"):
        (run / name).unlink()
        if (stage, name) == ("pretrain", "adapters.safetensors"):
            load_run(load_model(model_dir), run)
            continue
        with pytest.raises(CheckpointError, match=rf"has not ended \(no .*{name}.*--resume"):
            load_run(load_model(model_dir), run)


def test_every_bad_tensor_of_a_run_is_named_at_once(model_dir: Path, tmp_path: Path) -> None:
    run = write_run(load_model(model_dir), tmp_path / "run")
    adapters = mx.load(str(run / "adapters.safetensors"))
    name = "model.layers.1.self_attn.q_proj.lora_a"
    adapters["model.layers.0.self_attn.q_proj.lora_a"] = adapters.pop(name)
    save_safetensors_atomic(run / "adapters.safetensors", adapters)
    projector = mx.load(str(run / "projector.safetensors"))
    projector["markers"] = projector["markers"][:, :5]
    save_safetensors_atomic(run / "projector.safetensors", projector)
    with pytest.raises(CheckpointError) as caught:
        load_run(load_model(model_dir), run)
    for phrase in (
        "projector: markers is [8, 5], expected [8, 64]",
        f"adapters: missing {name}",
        "adapters: unexpected model.layers.0.self_attn.q_proj.lora_a",
    ):
        assert phrase in str(caught.value)


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"fine_tune_type": "prefix"}, "fine_tune_type is 'prefix'"),
        ({"num_layers": None}, "num_layers is missing"),
        ({"lora_parameters": {"rank": 4}}, "lora_parameters.scale, lora_parameters.dropout is missing"),
    ],
)
def test_bad_adapter_config(values: dict[str, Any], words: str, model_dir: Path, tmp_path: Path) -> None:
    run = write_run(load_model(model_dir), tmp_path / "run")
    edit_json(run / "adapter_config.json", **values)
    with pytest.raises(CheckpointError, match=words):
        load_run(load_model(model_dir), run)
    (run / "adapter_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"adapter_config.json is missing"):
        load_run(load_model(model_dir), run)


def test_a_fully_trained_decoder_is_applied_and_fused(model_dir: Path, tmp_path: Path) -> None:
    trained = load_model(model_dir)
    decoder = {name: value + 0.1 for name, value in tree_flatten(trained.language_model.parameters())}
    trained.language_model.load_weights(list(decoder.items()))
    run = tmp_path / "run"
    run.mkdir()
    save_safetensors_atomic(run / "adapters.safetensors", decoder)
    (run / "adapter_config.json").write_text('{"fine_tune_type": "full"}')
    half = load_model(model_dir, "bfloat16")
    load_run(half, run)
    assert half(mx.array(IDS)).dtype == mx.bfloat16
    assert np.array_equal(logits(fuse(model_dir, run, tmp_path / "fused")), trained(mx.array(IDS)))
    del decoder["model.norm.weight"]
    save_safetensors_atomic(run / "adapters.safetensors", decoder)
    with pytest.raises(CheckpointError, match=r"adapters: missing model.norm.weight\.$"):
        load_run(load_model(model_dir), run)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_fused_equals_adapter(kind: str, model_dir: Path, tmp_path: Path) -> None:
    trained = load_model(model_dir)
    run = write_run(trained, tmp_path / "run", kind, ("self_attn.q_proj", "mlp.down_proj"))
    fused = fuse(model_dir, run, tmp_path / "fused", shard_bytes=100_000)
    assert distance(logits(fused), np.array(trained(mx.array(IDS)))) < 1e-5
    assert distance(logits(fused), logits(model_dir)) > 1e-3
    assert mx.array_equal(load_model(fused).projector.markers, trained.projector.markers)
    one, two = read_tensors(model_dir), read_tensors(fused)
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in two.items()}
    kept = set(contents(model_dir)) - {"model.safetensors"}
    assert kept <= set(contents(fused)) and "siglip/preprocessor_config.json" in kept
    (run / "config.json").write_text(json.dumps({"store": {"post": {"pool": 2}}}))
    assert load_config(fuse(model_dir, run, tmp_path / "pooled")).patch_pool == 2
    assert load_config(fused).patch_pool == 1
    assert load_config(fused).sources["run"] == "run" and "run `run`" in (fused / "README.md").read_text()


def test_fusing_keeps_quantization_and_dtype(vision: Path, llm: Path, tmp_path: Path) -> None:
    base = convert(vision, llm, tmp_path / "base", quantize=QuantConfig(8, 32), dtype="bfloat16").path
    trained = load_model(base)
    run = write_run(trained, tmp_path / "run", "dora")
    fused = fuse(base, run, tmp_path / "fused")
    one, two = read_tensors(base), read_tensors(fused)
    assert {k: (v.shape, v.dtype) for k, v in one.items()} == {k: (v.shape, v.dtype) for k, v in two.items()}
    assert distance(logits(fused), np.array(trained(mx.array(IDS)))) < 0.05
    fuse(fused, run, fused)  # in place


QUANTS = {
    "q4": QuantConfig(4, 32, tower=True),
    "mixed": QuantConfig(4, 32, recipe="mixed_3_6"),
    "mxfp4": QuantConfig(4, 32, "mxfp4"),
    "plain": None,
}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantize", QUANTS)
def test_dequantized_the_fused_model_is_the_adapted_one(
    quantize: str, kind: str, vision: Path, llm: Path, tmp_path: Path
) -> None:
    """With nothing rounded again; and a model that was never quantized is the same with the option as without."""
    base = convert(vision, llm, tmp_path / "base", quantize=QUANTS[quantize]).path
    trained = load_model(base)
    run = write_run(trained, tmp_path / "run", kind, ("self_attn.q_proj", "mlp.down_proj"))
    expected = np.array(trained(mx.array(IDS)))
    plain, again = fuse(base, run, tmp_path / "plain", dequantize=True), fuse(base, run, tmp_path / "again")
    assert np.abs(logits(plain) - expected).max() <= 1e-4
    if quantize == "plain":
        assert contents(plain) == contents(again)
        return
    assert distance(logits(again), expected) > 1e-3
    assert load_config(plain).quantization is None and "quantiz" not in (plain / "config.json").read_text()
    assert "quantized" not in (plain / "README.md").read_text()
    assert distance(features(plain), features(base)) < 0.02  # the tower's scales are bfloat16
    whole = convert(vision, llm, tmp_path / "whole").path
    assert {k: v.shape for k, v in read_tensors(plain).items()} == {k: v.shape for k, v in read_tensors(whole).items()}


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize("quantize", [name for name, setting in QUANTS.items() if setting is not None])
def test_fusing_rounds_the_adapted_layers_and_nothing_else(
    quantize: str, kind: str, vision: Path, llm: Path, tmp_path: Path
) -> None:
    """As --help tells: rounded once, as the layer was, so that what the run learned stays."""
    base = convert(vision, llm, tmp_path / "base", quantize=QUANTS[quantize]).path
    trained = load_model(base)
    keys = ("self_attn.q_proj", "mlp.down_proj")
    run = write_run(trained, tmp_path / "run", kind, keys)
    adapted = np.array(trained(mx.array(IDS)))
    fused, plain = fuse(base, run, tmp_path / "fused"), fuse(base, run, tmp_path / "plain", dequantize=True)
    before, after, merged = read_tensors(base), read_tensors(fused), read_tensors(plain)
    layers = {f"language_model.model.layers.1.{key}" for key in keys}
    changed = {name for name, value in after.items() if not mx.array_equal(value, before[name])}
    assert {name.rpartition(".")[0] for name in changed} == {*layers, "projector"}
    setting = load_config(base).quantization
    assert setting is not None
    for layer in layers:
        how, wanted = layer_setting(setting, layer), merged[f"{layer}.weight"]
        best = mx.dequantize(*mx.quantize(wanted, **how), **how, dtype=mx.float32)
        errors = [
            float(mx.abs(found - wanted).mean()) for found in (dequantized(after, setting)[f"{layer}.weight"], best)
        ]
        assert errors[0] < 1.01 * errors[1], layer
    assert 0 < distance(logits(fused), adapted) < 0.25 * distance(logits(base), adapted)


def test_dequantized_weights_have_the_dtype_of_their_scales(vision: Path, llm: Path, tmp_path: Path) -> None:
    base = convert(vision, llm, tmp_path / "base", quantize=QuantConfig(4, 32, tower=True), dtype="bfloat16").path
    trained = load_model(base)
    run = write_run(trained, tmp_path / "run")
    plain = fuse(base, run, tmp_path / "plain", dequantize=True)
    dtypes = {v.dtype for k, v in read_tensors(plain).items() if not k.startswith(("projector.", "logit_"))}
    assert dtypes == {mx.bfloat16}
    assert distance(logits(plain), np.array(trained(mx.array(IDS)))) < 0.02
