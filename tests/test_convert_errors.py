"""Everything that can be wrong with a conversion: one clear sentence each, and nothing half-written."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import mlx.core as mx
import pytest

from mlx_llama3v import tensors
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import INDEX
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.quantize import QuantConfig
from tests.hf_edit import contents, copy, edit, edit_json
from tests.hf_llama import make_llama
from tests.hf_siglip import make_siglip

pytestmark = pytest.mark.usefixtures("quick_disk")


@pytest.fixture(scope="module")
def vision(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip"))


@pytest.fixture(scope="module")
def llm(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_llama(tmp_path_factory.mktemp("llama"))


def refused(message: str, *args: Any, **options: Any) -> str:
    with pytest.raises(CheckpointError, match=message) as caught:
        convert(*args, **options)
    assert "\n" not in str(caught.value)
    assert not Path(args[2]).exists()
    return str(caught.value)


def test_every_bad_tensor_of_both_is_named_at_once(vision: Path, llm: Path, tmp_path: Path) -> None:
    def spoil_llm(weights: dict[str, mx.array]) -> None:
        weights["model.norm.weight"] = mx.ones((63,))
        del weights["model.layers.1.mlp.up_proj.weight"]
        weights["model.layers.0.self_attn.q_proj.bias"] = mx.ones((64,))
        weights["lm_head.weight"] = mx.zeros(weights["lm_head.weight"].shape, mx.int8)

    bad_llm = edit(copy(llm, tmp_path / "llm"), spoil_llm)
    patch = "vision_model.embeddings.patch_embedding.weight"
    bad_vision = edit(copy(vision, tmp_path / "vision"), lambda w: w.update({patch: mx.ones((32, 3, 7, 7))}))
    message = refused("do not fit", bad_vision, bad_llm, tmp_path / "model")
    for phrase in (
        "model.norm.weight is [63], expected [64]",
        "missing model.layers.1.mlp.up_proj.weight",
        "unexpected model.layers.0.self_attn.q_proj.bias",
        "lm_head.weight is mlx.core.int8, expected mlx.core.float32",
        f"--vision: {patch} is [32, 147], expected [32, 192]",
    ):
        assert phrase in message
    assert message.count("; ") == 4


def test_swapped_arguments(vision: Path, llm: Path, tmp_path: Path) -> None:
    refused("--vision .* is a Llama language model.*swapped", llm, vision, tmp_path / "model")
    refused("--llm .* is a SigLIP model.*swapped", vision, vision, tmp_path / "model")


@pytest.mark.parametrize(
    ("kind", "words"),
    [("clip", "a CLIP model"), ("siglip2", "SigLIP 2 NaFlex"), ("dinov2", "'dinov2'"), ("llava", "finished")],
)
def test_other_towers_are_refused(kind: str, words: str, vision: Path, llm: Path, tmp_path: Path) -> None:
    other = copy(vision, tmp_path / "vision")
    edit_json(other / "config.json", model_type=kind)
    assert "swapped" not in refused(words, other, llm, tmp_path / "model")


def test_clip_that_calls_itself_siglip(vision: Path, llm: Path, tmp_path: Path) -> None:
    name = "vision_model.embeddings.class_embedding"
    other = edit(copy(vision, tmp_path / "vision"), lambda w: w.update({name: mx.ones((32,))}))
    refused("CLIP's tower", other, llm, tmp_path / "model")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"model_type": "mllama"}, "Llama 3.2 Vision"),
        ({"model_type": "clip"}, "a CLIP model"),
        ({"model_type": "mistral"}, "'mistral'"),
        ({"quantization_config": {"quant_method": "gptq"}}, "already quantized .gptq."),
        ({"quantization": {"bits": 4, "group_size": 64, "model.norm": False}}, "already quantized"),
        ({"vocab_size": 300}, "vocab_size is 300"),
    ],
)
def test_other_decoders_are_refused(
    values: dict[str, Any], words: str, vision: Path, llm: Path, tmp_path: Path
) -> None:
    other = copy(llm, tmp_path / "llm")
    edit_json(other / "config.json", **values)
    refused(words, vision, other, tmp_path / "model")


def test_only_pickles(vision: Path, llm: Path, tmp_path: Path) -> None:
    other = copy(llm, tmp_path / "llm")
    (other / "model.safetensors").rename(other / "pytorch_model.bin")
    refused("only in pytorch_model.bin; expected safetensors", vision, other, tmp_path / "model")
    (other / "pytorch_model.bin").unlink()
    refused(r"no \*.safetensors", vision, other, tmp_path / "model")


@pytest.mark.parametrize("size", [0, 5, 1000, -1])
def test_truncated_file(size: int, vision: Path, llm: Path, tmp_path: Path) -> None:
    other = copy(llm, tmp_path / "llm")
    path = other / "model.safetensors"
    path.write_bytes(path.read_bytes()[:size])
    refused("llm/model.safetensors is not a whole safetensors file", vision, other, tmp_path / "model")


def test_missing_pieces(vision: Path, llm: Path, tmp_path: Path) -> None:
    for number, (name, words) in enumerate(
        {"config.json": "config.json is missing", "tokenizer.json": "tokenizer.json is missing"}.items()
    ):
        other = copy(llm, tmp_path / f"llm{number}")
        (other / name).unlink()
        refused(words, vision, other, tmp_path / "model")
    other = copy(llm, tmp_path / "broken")
    (other / "config.json").write_text('{"model_type": "lla')
    refused("broken/config.json cannot be read as JSON", vision, other, tmp_path / "model")
    other = copy(llm, tmp_path / "index")
    (other / INDEX).write_text(json.dumps({"weight_map": {"a": "model-00001-of-00002.safetensors"}}))
    refused("names model-00001-of-00002.safetensors, which is not there", vision, other, tmp_path / "model")


def test_settings_that_cannot_be(vision: Path, llm: Path, tmp_path: Path) -> None:
    refused("'cnn'", vision, llm, tmp_path / "model", projector="cnn")
    refused("dtype is 'int8'", vision, llm, tmp_path / "model", dtype="int8")
    refused(
        "no layer .* 128",
        vision,
        make_llama(tmp_path / "l", hidden=32),
        tmp_path / "m",
        quantize=QuantConfig(4, 128),
    )
    with pytest.raises(CheckpointError, match="7 bits in groups of 48"):
        QuantConfig(7, 48)


@pytest.mark.parametrize(
    ("scaling", "words"),
    [
        ({"rope_type": "yarn", "factor": 2.0}, "scaled by 'yarn'; expected default, linear, llama3"),
        ({"rope_type": "linear"}, "linear rope scaling lacks factor"),
        ({"type": "llama3", "factor": 8.0}, "lacks low_freq_factor, high_freq_factor, original_max_position"),
        ("llama3", "rope_scaling is 'llama3'; expected an object"),
    ],
)
def test_ropes_that_no_llama_3_has(scaling: Any, words: str, vision: Path, llm: Path, tmp_path: Path) -> None:
    other = copy(llm, tmp_path / "llm")
    edit_json(other / "config.json", rope_parameters=None, rope_scaling=scaling)
    assert words in refused("rope", vision, other, tmp_path / "model")


def test_what_a_config_says_without_meaning_it(vision: Path, llm: Path, tmp_path: Path) -> None:
    other = copy(llm, tmp_path / "llm")
    edit_json(other / "config.json", quantization_config={})
    assert convert(vision, other, tmp_path / "whole").config.quantization is None
    edit_json(other / "config.json", vocab_size=None)
    refused("--llm: .*embed_tokens", vision, other, tmp_path / "model")
    (other / "model.safetensors.index.json").write_text("{}")
    assert "no weight_map" in refused("index.json", vision, other, tmp_path / "model")


def test_full_disk_is_foreseen(vision: Path, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = shutil.disk_usage(tmp_path)._replace(free=1000)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    refused("1.0 kB free", vision, llm, tmp_path / "model")
    for name in ("model", "other"):  # left by killed conversions: one will be cleared, of the other nobody knows
        (tmp_path / f".{name}.partial").mkdir()
        (tmp_path / f".{name}.partial" / "part-00000.safetensors").write_bytes(b"x" * 1_000_000)
    said = refused("1.0 kB free", vision, llm, tmp_path / "new")
    assert ".other.partial" in said and "deleted" in said
    convert(vision, llm, tmp_path / "model")


def test_other_peoples_directories_are_not_overwritten(vision: Path, llm: Path, tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.mkdir()
    (taken / "thesis.tex").write_text("years of work")
    for target, words in ((taken, "not a model directory of ours"), (llm, "not a model directory of ours")):
        with pytest.raises(CheckpointError, match=words):
            convert(vision, llm, target)
    with pytest.raises(CheckpointError, match="is a file"):
        convert(vision, llm, taken / "thesis.tex")
    model = convert(vision, llm, tmp_path / "model").path
    (model / "runs").mkdir()
    with pytest.raises(CheckpointError, match="also holds runs"):
        convert(vision, llm, model)
    assert (taken / "thesis.tex").read_text() == "years of work" and (model / "runs").is_dir()


def test_a_failed_conversion_leaves_the_old_directory(
    vision: Path, llm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = convert(vision, llm, tmp_path / "model").path
    before = contents(model)

    def stop(done: int, total: int) -> None:
        if done > total / 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        convert(vision, llm, model, seed=7, shard_bytes=50_000, progress=stop)
    assert contents(model) == before
    assert [path.name for path in tmp_path.iterdir()] == ["model"]
    (tmp_path / ".model.partial").mkdir()  # what a killed conversion leaves
    (tmp_path / ".model.partial" / "part-00000.safetensors").write_bytes(b"half")
    convert(vision, llm, model, seed=7)
    assert contents(model) != before and [path.name for path in tmp_path.iterdir()] == ["model"]


def test_only_a_model_of_the_same_is_replaced(vision: Path, llm: Path, tmp_path: Path) -> None:
    made = convert(vision, llm, tmp_path / "model").path
    convert(vision, llm, made, dtype="float16")
    before = (made / "config.json").read_bytes()
    other = copy(llm, tmp_path / "other")
    with pytest.raises(CheckpointError, match=rf"model holds another model \({vision.name} \+ {llm.name}\); remove it"):
        convert(vision, other, made)
    assert (made / "config.json").read_bytes() == before


def test_of_very_many_tensors_the_first_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"missing t00; .*missing t11; and 8 more\.$"):
        tensors.refuse([f"missing t{n:02}" for n in range(20)], tmp_path)
