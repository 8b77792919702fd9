"""Quantized conversion: bits, modes, what the probe says, and that nothing half-made is left behind."""

from __future__ import annotations

import shutil
import signal
import time
from pathlib import Path

import mlx.core as mx
import numpy as np
import pytest
from typer.testing import CliRunner

from mlx_llama3v.checkpoint import load_config, load_model, load_siglip
from mlx_llama3v.cli.app import build
from mlx_llama3v.directory import leftovers
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.model import layer_setting
from mlx_llama3v.tensors import read_tensors
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.probe import logits
from mlx_llama3v.weights.quantize import BITS, RECIPES, QuantConfig
from mlx_llama3v.weights.storage import Storage
from mlx_llama3v.weights.vlm import convert_vlm
from tests.forked import start
from tests.hf_llama import LLAMA3_SCALING, make_llama
from tests.hf_llava import make_llava
from tests.hf_parity import features
from tests.hf_siglip import make_siglip

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llava(tmp_path_factory.mktemp("hf"))


def test_more_bits_change_less(llava: Path, tmp_path: Path) -> None:
    changes, sizes = [], []
    for bits in (2, 3, 4, 5, 6, 8):
        report = convert_vlm(llava, tmp_path / f"q{bits}", quantize=QuantConfig(bits, 32))
        assert report.probe is not None
        changes.append(report.probe.change)
        sizes.append(report.bits_per_weight)
        load_model(tmp_path / f"q{bits}")
    assert changes == sorted(changes, reverse=True) and sizes == sorted(sizes)
    assert changes[-1] < 0.05 < changes[0]


def test_mxfp4_is_read_back(llava: Path, tmp_path: Path) -> None:
    report = convert_vlm(llava, tmp_path / "m", quantize=QuantConfig(4, 32, "mxfp4"))
    assert report.probe is not None and 0 < report.probe.change < 1
    assert load_config(tmp_path / "m").quantization == {"bits": 4, "group_size": 32, "mode": "mxfp4"}
    held = read_tensors(tmp_path / "m")
    scales = held["language_model.model.layers.0.mlp.up_proj.scales"]
    assert scales.dtype == mx.uint8
    assert not [name for name in held if name.startswith(("vision_tower", "projector")) and "scales" in name]
    assert np.isfinite(np.array(load_model(tmp_path / "m")(mx.array([[1, 2, 3]])))).all()


@pytest.mark.parametrize(
    ("bits", "group", "mode"), [(7, 64, "affine"), (4, 64, "mxfp4"), (3, 32, "mxfp4"), (4, 32, "x")]
)
def test_settings_that_do_not_exist(bits: int, group: int, mode: str) -> None:
    with pytest.raises(CheckpointError, match=r"mxfp4|7 bits.*MLX has 2, 3, 4, 5, 6 or 8 bits|'x'"):
        QuantConfig(bits, group, mode)


def test_seven_bits_are_refused_with_those_that_there_are() -> None:
    """In one sentence; the list is MLX's own, and --help has it, too."""
    with pytest.raises(CheckpointError) as refusal:
        QuantConfig(7)
    assert str(refusal.value).endswith("; MLX has 2, 3, 4, 5, 6 or 8 bits in groups of 32, 64 or 128.")
    shown = CliRunner().invoke(build(["convert"]), ["convert", "--help"], env={"COLUMNS": "200"}).output
    assert "Bits per weight: 2, 3, 4, 5, 6 or 8." in shown
    for bits in range(2, 10):
        if bits in BITS:
            mx.eval(mx.quantize(mx.ones((32, 64)), 64, bits))
        else:
            with pytest.raises(ValueError, match="not supported"):
                mx.quantize(mx.ones((32, 64)), 64, bits)


@pytest.mark.parametrize("tie", [False, True])
def test_the_probe_runs_the_model_itself(tie: bool, tmp_path: Path) -> None:
    """Block by block, the logits are those of the whole decoder, quantized or not."""
    llm = make_llama(tmp_path / "llm", tie=tie, rope_scaling=LLAMA3_SCALING)
    vision = make_siglip(tmp_path / "vision")
    for quantize in (None, QuantConfig(4, 32)):
        target = tmp_path / f"{quantize}"
        report = convert(vision, llm, target, quantize=quantize)
        assert (report.probe is None) == (quantize is None)
        ids = mx.array([[300, 5, 9, 200, 17]])
        found = logits(read_tensors(target, ("language_model.",)), load_config(target), ids)
        assert np.abs(np.array(found) - np.array(load_model(target)(ids))[0]).max() < 1e-4


def slow_conversion(source: Path, target: Path) -> None:
    """What is killed: a file is written every few tensors, with time to see it."""
    convert_vlm(source, target, shard_bytes=20000, progress=lambda done, total: time.sleep(0.02))


def test_a_killed_conversion_leaves_no_model_directory(llava: Path, tmp_path: Path) -> None:
    target, partial = tmp_path / "model", tmp_path / ".model.partial"
    child = start(slow_conversion, llava, target)
    while child.is_alive() and not (partial / "part-00001.safetensors").exists():
        time.sleep(0.002)
    assert [path for path, _ in leftovers(tmp_path)] == []  # its writer lives
    child.kill()
    child.join(60)
    assert child.exitcode == -signal.SIGKILL
    assert not target.exists() and [path for path, _ in leftovers(tmp_path)] == [partial]
    convert_vlm(llava, target)  # the next run clears what was left
    assert load_config(target) and not partial.exists()


def test_an_error_in_the_middle_leaves_nothing(llava: Path, tmp_path: Path) -> None:
    def stop(done: int, total: int) -> None:
        if done > total // 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert_vlm(llava, tmp_path / "model", progress=stop)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("recipe", RECIPES)
def test_mixed_recipes_are_mlx_lms(recipe: str) -> None:
    """Layer for layer, for an 8B's 32 blocks and for others."""
    from mlx_lm.convert import mixed_quant_predicate_builder
    from mlx_lm.models.llama import Model, ModelArgs

    for layers in (1, 16, 28, 32):
        small = {"hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 1, "rms_norm_eps": 1e-5}
        text = {**small, "model_type": "llama", "num_hidden_layers": layers, "vocab_size": 64}
        model = Model(ModelArgs.from_dict({**text, "tie_word_embeddings": False}))
        theirs = mixed_quant_predicate_builder(recipe, model, 32)
        setting = QuantConfig(4, 32, recipe=recipe).setting(layers)
        for name, module in model.named_modules():
            if hasattr(module, "to_quantized"):
                assert layer_setting(setting, f"language_model.{name}") == theirs(name, module), name


def test_a_mixed_model_lies_between_and_is_read_back(tmp_path: Path) -> None:
    llm, vision = make_llama(tmp_path / "llm", layers=8), make_siglip(tmp_path / "vision")
    found = {}
    for name, quantize in (
        ("low", QuantConfig(3, 32)),
        ("mixed", QuantConfig(4, 32, recipe="mixed_3_6")),
        ("high", QuantConfig(6, 32)),
    ):
        found[name] = report = convert(vision, llm, tmp_path / name, quantize=quantize)
        assert report.probe is not None
        ids = mx.array([[300, 5, 9, 200, 17]])
        seen = logits(read_tensors(tmp_path / name, ("language_model.",)), load_config(tmp_path / name), ids)
        assert np.abs(np.array(seen) - np.array(load_model(tmp_path / name)(ids))[0]).max() < 1e-4
    assert found["low"].bits_per_weight < found["mixed"].bits_per_weight < found["high"].bits_per_weight
    changes = [found[name].probe.change for name in ("low", "mixed", "high")]  # type: ignore[union-attr]
    assert changes == sorted(changes, reverse=True)
    counts = {name: report.parameters["language_model"] for name, report in found.items()}
    assert len(set(counts.values())) == 1  # packed weights are counted as what they stand for
    bits = {layer.name: layer.bits for layer in found["mixed"].layers}
    assert bits["language_model.lm_head"] == 6 and bits["language_model.model.layers.1.self_attn.v_proj"] == 3
    assert bits["language_model.model.layers.0.mlp.down_proj"] == 6


def test_the_tower_is_quantized_only_where_asked(tmp_path: Path) -> None:
    """Its blocks, not its patches, positions and head; features stay close and the whole SigLIP is still read."""
    llm, vision = make_llama(tmp_path / "llm"), make_siglip(tmp_path / "vision", hidden=64, intermediate_size=131)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(TINY / "siglip" / name, vision)
    plain = convert(vision, llm, tmp_path / "plain", quantize=QuantConfig(8, 32))
    report = convert(vision, llm, tmp_path / "asked", quantize=QuantConfig(8, 32, tower=True))
    assert not [name for name in read_tensors(plain.path) if "tower" in name and name.endswith("scales")]
    scales = [name for name in read_tensors(report.path) if "tower" in name and name.endswith("scales")]
    assert len(scales) == 3 * 5 and all("encoder.layers" in name for name in scales)  # fc2's rows are 131 wide
    assert report.bytes["vision_tower"] < plain.bytes["vision_tower"]
    assert report.parameters == plain.parameters
    assert {layer.bits for layer in report.layers if layer.name.startswith("vision_tower")} == {8, None}
    a, b = features(plain.path), features(report.path)
    assert 1e-6 < np.abs(a - b).max() < 0.05 * np.abs(a).max()
    assert load_siglip(report.path).model
    with pytest.raises(CheckpointError, match="quantized"):
        from mlx_llama3v.weights.export import export_hf

        export_hf(report.path, tmp_path / "out")


def test_an_embedding_that_is_the_head_has_the_heads_bits() -> None:
    """Llama 3.2's 1B and 3B have no other."""
    recipe = QuantConfig(4, 32, recipe="mixed_2_6")
    tied, untied = recipe.setting(16, tied=True), recipe.setting(16)
    assert tied["language_model.model.embed_tokens"]["bits"] == 6 == untied["language_model.lm_head"]["bits"]
    assert "language_model.model.embed_tokens" not in untied
    assert Storage(recipe).setting({"num_hidden_layers": 16, "tie_word_embeddings": True}) == tied


def test_recipes_that_do_not_exist() -> None:
    with pytest.raises(CheckpointError, match="mixed_5_7"):
        QuantConfig(recipe="mixed_5_7")
    with pytest.raises(CheckpointError, match="affine"):
        QuantConfig(4, 32, "mxfp4", recipe="mixed_4_6")
