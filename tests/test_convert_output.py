"""What a conversion writes: bytes, shards, quantization, dtypes and companion files."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from mlx_llama3v.checkpoint import load_config, load_model, read_siglip_config
from mlx_llama3v.config import ImageConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import INDEX, read_tensors
from mlx_llama3v.vision.siglip import sanitize
from mlx_llama3v.weights import llama as llama_files
from mlx_llama3v.weights import siglip as siglip_files
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.quantize import QuantConfig
from tests.hf_edit import contents, copy, edit, edit_json
from tests.hf_llama import make_llama
from tests.hf_parity import IDS, distance, hf_logits, logits
from tests.hf_siglip import make_siglip
from tests.kit import KIT, needs_kit

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


def test_converting_twice_gives_the_same_bytes(vision: Path, llm: Path, tmp_path: Path) -> None:
    first = contents(convert(vision, llm, tmp_path / "model", quantize=QuantConfig(4, 32)).path)
    again = contents(convert(vision, llm, tmp_path / "model", quantize=QuantConfig(4, 32)).path)
    elsewhere = contents(convert(vision, llm, tmp_path / "other", quantize=QuantConfig(4, 32)).path)
    assert first == again == elsewhere and len(first) > 8
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model", "other"]


def test_seed_changes_the_projector_only(vision: Path, llm: Path, converted: Path, tmp_path: Path) -> None:
    convert(vision, llm, tmp_path / "model", seed=1)
    one, two = read_tensors(converted), read_tensors(tmp_path / "model")
    changed = {name.partition(".")[0] for name in one if not mx.array_equal(one[name], two[name])}
    assert changed == {"projector"}


def test_sanitizing_twice_changes_nothing(vision: Path, llm: Path) -> None:
    raw = read_tensors(vision)
    once = sanitize(raw)
    assert _same(sanitize(once), once) and not _same(once, raw)
    for module, weights in ((siglip_files, once), (llama_files, read_tensors(llm))):
        renamed = module.rename(weights)
        assert _same(module.rename(renamed), renamed) and renamed.keys() != weights.keys()


def _same(a: dict[str, mx.array], b: dict[str, mx.array]) -> bool:
    return a.keys() == b.keys() and all(a[k].shape == b[k].shape and mx.array_equal(a[k], b[k]) for k in a)


def test_sharded_input_and_output(vision: Path, llm: Path, converted: Path, tmp_path: Path) -> None:
    from transformers import LlamaForCausalLM, SiglipModel

    small_llm, small_vision = copy(llm, tmp_path / "llm"), copy(vision, tmp_path / "vision")
    for source, kind in ((small_llm, LlamaForCausalLM), (small_vision, SiglipModel)):
        model = kind.from_pretrained(source)
        (source / "model.safetensors").unlink()
        model.save_pretrained(source, max_shard_size="50KB")
        assert len(list(source.glob("model-*.safetensors"))) > 1
    convert(small_vision, small_llm, tmp_path / "model", shard_bytes=100_000)
    files = sorted(path.name for path in (tmp_path / "model").glob("*.safetensors"))
    assert len(files) > 5 and files[0] == f"model-00001-of-{len(files):05d}.safetensors"
    index = json.loads((tmp_path / "model" / INDEX).read_text())
    assert (
        list(index["weight_map"]) == sorted(index["weight_map"]) and sorted(set(index["weight_map"].values())) == files
    )
    for file in files:
        held = mx.load(str(tmp_path / "model" / file))
        assert len(held) == 1 or sum(value.nbytes for value in held.values()) <= 100_000
    assert _same(read_tensors(tmp_path / "model"), read_tensors(converted))


def test_a_conversion_holds_one_shard_at_a_time(vision: Path, tmp_path: Path) -> None:
    llm = make_llama(tmp_path / "llm", hidden=256, layers=8)
    calls: list[tuple[int, int]] = []
    mx.clear_cache()
    held = mx.get_active_memory()
    mx.reset_peak_memory()
    report = convert(vision, llm, tmp_path / "model", shard_bytes=1 << 20, progress=lambda *at: calls.append(at))
    total = sum(report.bytes.values())
    assert mx.get_peak_memory() - held < total / 4
    assert calls[-1] == (total, total) and [done for done, _ in calls] == sorted(done for done, _ in calls)


def test_quantization_touches_the_decoder_only_and_reports_each_layer(vision: Path, tmp_path: Path) -> None:
    llm = make_llama(tmp_path / "llm", hidden=96, heads=4)  # 96 is no multiple of 64, the mlp's 192 is
    report = convert(vision, llm, tmp_path / "model", quantize=QuantConfig(bits=4, group_size=64))
    downs = {f"language_model.model.layers.{n}.mlp.down_proj" for n in range(2)}
    assert {layer.name for layer in report.quantized} == downs
    assert {layer.bits for layer in report.quantized} == {4}
    assert {"language_model.lm_head", "language_model.model.embed_tokens"} < {layer.name for layer in report.layers}
    weights = read_tensors(tmp_path / "model")
    packed = {name.removesuffix(".weight") for name, value in weights.items() if value.dtype == mx.uint32}
    assert packed == downs
    assert report.bytes["language_model"] == sum(
        value.nbytes for name, value in weights.items() if name.startswith("language_model.")
    )
    assert report.parameters["language_model"] == sum(value.size for value in read_tensors(llm).values())


def test_quantized_directory_reloads_to_what_quantizing_in_memory_gives(
    vision: Path, llm: Path, converted: Path, tmp_path: Path
) -> None:
    report = convert(vision, llm, tmp_path / "model", quantize=QuantConfig(bits=4, group_size=32))
    model = load_model(converted)
    nn.quantize(model.language_model, 32, 4)
    expected = np.array(model(mx.array(IDS)))
    assert np.array_equal(logits(tmp_path / "model"), expected)
    assert distance(expected, hf_logits(llm)) > TOLERANCE
    assert 6.0 < report.bits_per_weight < 6.1  # 4 bits, and two float32 a group of 32; norms are few
    assert load_config(tmp_path / "model").quantization == {"bits": 4, "group_size": 32, "mode": "affine"}


def test_a_llama_that_mlx_lm_quantized_is_taken_as_it_is(vision: Path, llm: Path, tmp_path: Path) -> None:
    convert(vision, llm, tmp_path / "ours", quantize=QuantConfig(bits=4, group_size=32))
    theirs = copy(llm, tmp_path / "theirs")
    ours = read_tensors(tmp_path / "ours", ("language_model.",))
    weights = {name.removeprefix("language_model."): value for name, value in ours.items()}
    mx.save_safetensors(str(theirs / "model.safetensors"), weights)
    setting = {"group_size": 32, "bits": 4, "mode": "affine"}
    edit_json(theirs / "config.json", quantization=setting, quantization_config=setting)
    report = convert(vision, theirs, tmp_path / "model")
    assert report.config.quantization == setting and "quantization" not in report.config.text_config
    assert np.array_equal(logits(tmp_path / "model"), logits(tmp_path / "ours"))
    with pytest.raises(CheckpointError, match="already quantized to 4 bits"):
        convert(vision, theirs, tmp_path / "model", quantize=QuantConfig())


def test_dtype_of_tower_and_decoder(vision: Path, llm: Path, tmp_path: Path) -> None:
    half = edit(copy(vision, tmp_path / "half"), lambda w: w.update({k: v.astype(mx.float16) for k, v in w.items()}))
    convert(half, llm, tmp_path / "kept")
    convert(half, llm, tmp_path / "cast", dtype="bfloat16")
    kept, cast = _dtypes(tmp_path / "kept"), _dtypes(tmp_path / "cast")
    assert kept["vision_tower"] == {mx.float16} and kept["language_model"] == {mx.float32}
    assert cast["vision_tower"] == cast["text_tower"] == cast["language_model"] == {mx.bfloat16}
    assert kept["projector"] == cast["projector"] == {mx.float32}
    assert load_model(tmp_path / "cast")(mx.array(IDS)).dtype == mx.float32  # computing on CPU
    assert load_model(tmp_path / "cast", "bfloat16")(mx.array(IDS)).dtype == mx.bfloat16


def _dtypes(directory: Path) -> dict[str, set[mx.Dtype]]:
    found: dict[str, set[mx.Dtype]] = {}
    for name, value in read_tensors(directory).items():
        found.setdefault(name.partition(".")[0], set()).add(value.dtype)
    return found


@pytest.mark.parametrize("kind", ["attention", "linear", "mlp"])
def test_projector_is_shaped_by_both_models(kind: str, vision: Path, llm: Path, tmp_path: Path) -> None:
    config = convert(vision, llm, tmp_path / "model", projector=kind).config
    part = config.projector_config
    assert (part.kind, part.in_dim, part.hidden_dim, part.out_dim, part.num_heads) == (kind, 32, 32, 64, 4)
    assert part.pool == (2 if kind == "attention" else 1)
    assert load_model(tmp_path / "model").projector.markers.shape == (8, 64)


def test_pool_follows_the_grid_and_can_be_set(llm: Path, tmp_path: Path) -> None:
    large = make_siglip(tmp_path / "large", image_size=96, layers=1)
    assert convert(large, llm, tmp_path / "a").config.projector_config.pool == 3
    assert convert(large, llm, tmp_path / "b", pool=4).config.projector_config.pool == 4
    with pytest.raises(CheckpointError, match="pool is 13; expected 1 to 12"):
        convert(large, llm, tmp_path / "c", pool=13)


def test_markers_stop_ids_and_companion_files(vision: Path, llm: Path, tmp_path: Path) -> None:
    source = copy(llm, tmp_path / "llm")
    edit_json(source / "config.json", eos_token_id=309)
    edit_json(source / "generation_config.json", eos_token_id=[301])
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "LICENSE.txt").write_text("terms")
    (source / "training_args.bin").write_bytes(b"pickle")
    directory = convert(vision, source, tmp_path / "model").path
    config = load_config(directory)
    assert config.eos_token_ids == (301, 309)
    assert config.marker_ids == tuple(range(313, 321))
    assert (config.tiling.mode, config.tiling.max_slices) == ("uhd", 6)
    names = set(contents(directory))
    wanted = {
        "tokenizer.json",
        "tokenizer_config.json",
        "chat_template.jinja",
        "generation_config.json",
        "LICENSE.txt",
    }
    assert wanted | {"README.md", "preprocessor_config.json", "siglip/preprocessor_config.json"} <= names
    assert "training_args.bin" not in names
    card = (directory / "README.md").read_text()
    assert "has to be trained" in card and str(tmp_path) not in card


def test_buffers_of_old_files_are_ignored(vision: Path, llm: Path, converted: Path, tmp_path: Path) -> None:
    buffers = {"vision_model.embeddings.position_ids": mx.arange(16)[None]}
    buffers["text_model.embeddings.position_ids"] = mx.arange(8)[None]
    old_vision = edit(copy(vision, tmp_path / "vision"), lambda w: w.update(buffers))
    old_llm = edit(
        copy(llm, tmp_path / "llm"),
        lambda w: w.update({"model.layers.0.self_attn.rotary_emb.inv_freq": mx.ones((8,))}),
    )
    convert(old_vision, old_llm, tmp_path / "model")
    assert _same(read_tensors(tmp_path / "model"), read_tensors(converted))


def test_pixel_settings_come_from_the_checkpoint(vision: Path, tmp_path: Path) -> None:
    source = copy(vision, tmp_path / "siglip")
    edit_json(source / "preprocessor_config.json", resample=2, image_mean=[0.1, 0.2, 0.3], image_std=0.25)
    expected = ImageConfig(resample=2, image_mean=(0.1, 0.2, 0.3), image_std=(0.25, 0.25, 0.25))
    assert read_siglip_config(source)[2] == expected
    nested = {"image_processor": json.loads((source / "preprocessor_config.json").read_text())}
    (source / "processor_config.json").write_text(json.dumps(nested))  # as transformers 5 saves it
    edit_json(source / "preprocessor_config.json", resample=3)
    assert read_siglip_config(source)[2] == expected
    (source / "preprocessor_config.json").unlink()
    assert read_siglip_config(source)[2] == expected
    (source / "processor_config.json").unlink()
    with pytest.raises(CheckpointError, match=r"preprocessor_config.json is missing"):
        read_siglip_config(source)


@needs_kit
def test_config_of_a_released_siglip() -> None:
    vision, text, image = read_siglip_config(KIT / "tokenizers" / "siglip" / "siglip-base-patch16-256")
    assert (vision.hidden_size, vision.grid, vision.patch_size) == (768, 16, 16)
    assert text is not None and (text.vocab_size, text.max_position_embeddings) == (32000, 64)
    assert (image.resample, image.image_mean) == (3, (0.5, 0.5, 0.5))
