"""`export --format gguf`: read back by transformers and by the gguf package, against our own model.

What llama.cpp itself makes of the files is in test_llama_cpp.py, which skips where it is not installed.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
import pytest
from tokenizers import Tokenizer

from mlx_llama3v.checkpoint import load_config, load_model
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.inference import load
from mlx_llama3v.weights import TINY
from mlx_llama3v.weights.convert import convert
from mlx_llama3v.weights.gguf_export import export_gguf
from mlx_llama3v.weights.gguf_file import TYPES
from mlx_llama3v.weights.gguf_text import pre_tokenizer, rope_factors
from mlx_llama3v.weights.hf_files import chat_template
from mlx_llama3v.weights.quantize import QuantConfig
from tests.family_parity import gap
from tests.hf_edit import edit
from tests.hf_llama import LLAMA3_SCALING, make_llama
from tests.hf_llava import picture
from tests.hf_parity import IDS, distance
from tests.hf_siglip import make_siglip

pytestmark = pytest.mark.usefixtures("quick_disk")

gguf = pytest.importorskip("gguf")
SQUASH = TilingConfig("squash", 0)


def make_model(directory: Path, kind: str = "mlp", tiling: TilingConfig = SQUASH, **llama: Any) -> Path:
    """A model as the recipe makes it, with a projector and markers large enough to matter."""
    vision, llm = make_siglip(directory / "siglip"), make_llama(directory / "llama", **llama)
    convert(vision, llm, directory / "model", projector=kind, tiling=tiling)

    def enlarge(weights: dict[str, mx.array]) -> None:
        for name in weights:
            if name.startswith("projector."):
                weights[name] = weights[name] * 8

    return edit(directory / "model", enlarge)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_model(tmp_path_factory.mktemp("own"))


def values(file: Path) -> dict[str, np.ndarray]:
    """Every tensor of a file in float32, as PyTorch has its shape."""
    found = gguf.GGUFReader(file).tensors
    return {t.name: gguf.dequantize(t.data, t.tensor_type).reshape(t.shape[::-1].tolist()) for t in found}


def field(file: Path, key: str) -> Any:
    return gguf.GGUFReader(file).fields[key].contents()


@pytest.mark.parametrize("tie", [False, True])
def test_transformers_reads_the_text_model(tie: bool, tmp_path: Path) -> None:
    import torch
    from transformers import LlamaForCausalLM

    model = make_model(tmp_path, tie=tie)
    out = export_gguf(model, tmp_path / "out", type="f32")
    theirs = LlamaForCausalLM.from_pretrained(out, gguf_file="model-f32.gguf", dtype=torch.float32).eval()
    with torch.no_grad():
        found = theirs(torch.tensor(IDS)).logits.numpy()
        markers = theirs.model.embed_tokens.weight[list(load_config(model).marker_ids)].numpy()
    ours = load_model(model)
    assert gap(found, np.array(ours(mx.array(IDS)))) <= 1e-4
    assert np.array_equal(markers, np.array(ours.projector.markers))  # at their reserved ids


def test_the_tokenizer_is_carried_over(model: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    out = export_gguf(model, tmp_path / "out")
    theirs = AutoTokenizer.from_pretrained(out, gguf_file="model-f16.gguf")
    tokens = load(model).tokens
    for text in ("What does the sign say? It's 12345 o'clock.", "a red\n\n circle  ", "größer 漢字"):
        assert theirs(text, add_special_tokens=False)["input_ids"] == tokens.encode(text)
    file = out / "model-f16.gguf"
    assert field(file, "tokenizer.ggml.pre") == "llama-bpe"
    assert field(file, "tokenizer.ggml.bos_token_id") == tokens.bos and field(file, "tokenizer.ggml.add_bos_token")
    assert field(file, "tokenizer.ggml.eos_token_id") == tokens.eot
    kinds = field(file, "tokenizer.ggml.token_type")
    assert kinds[tokens.eot] == gguf.TokenType.CONTROL and kinds[5] == gguf.TokenType.NORMAL


def torch_features(file: Path, directory: Path, image: Path) -> np.ndarray:
    """Projected features from nothing but the mmproj file, in PyTorch's own layers."""
    import torch
    from PIL import Image
    from transformers import SiglipImageProcessorPil, SiglipVisionConfig, SiglipVisionModel

    held = {name: torch.from_numpy(value.copy()) for name, value in values(file).items()}
    at = "clip.vision."
    config = SiglipVisionConfig(
        hidden_size=field(file, at + "embedding_length"),
        intermediate_size=field(file, at + "feed_forward_length"),
        num_hidden_layers=field(file, at + "block_count"),
        num_attention_heads=field(file, at + "attention.head_count"),
        image_size=field(file, at + "image_size"),
        patch_size=field(file, at + "patch_size"),
        layer_norm_eps=field(file, at + "attention.layer_norm_epsilon"),
        hidden_act="gelu_pytorch_tanh" if field(file, "clip.use_gelu") else "quick_gelu",
        vision_use_head=False,
    )
    names = {"v.patch_embd": "embeddings.patch_embedding", "v.position_embd": "embeddings.position_embedding"}
    names |= {"attn_out": "self_attn.out_proj", "ffn_up": "mlp.fc1", "ffn_down": "mlp.fc2"}
    names |= {"ln1": "layer_norm1", "ln2": "layer_norm2", "v.blk": "encoder.layers"}
    names |= {f"attn_{n}": f"self_attn.{n}_proj" for n in "qkv"}
    state = {}
    for name, value in held.items():
        for theirs, hf in names.items():
            name = name.replace(theirs, hf)
        state[name] = value
    tower = SiglipVisionModel(config).eval()
    missing, _ = tower.load_state_dict({k: v for k, v in state.items() if not k.startswith("mm.")}, strict=False)
    assert all("post_layernorm" in name for name in missing)
    pixels = SiglipImageProcessorPil.from_pretrained(directory)(Image.open(image), return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        hidden = tower(pixels, output_hidden_states=True).hidden_states[-1]
        x = torch.nn.functional.linear(hidden, held["mm.0.weight"], held["mm.0.bias"])
        return torch.nn.functional.linear(torch.nn.functional.gelu(x), held["mm.2.weight"], held["mm.2.bias"])[
            0
        ].numpy()


def our_features(model: Path, image: Path) -> np.ndarray:
    session = load(model)
    assert session.encoder is not None
    encoded = session.encoder.embed(image)
    grid = mx.array([encoded.layout.overview])
    return np.array(session.model.projector(mx.array(encoded.patches)[None], grid, len(encoded.patches)))[0]


@pytest.mark.parametrize("layer", [-1, -2])
def test_the_mmproj_file_holds_tower_and_projector(layer: int, tmp_path: Path) -> None:
    """Trap 14 beside: without use_gelu the features are others."""
    from tests.hf_edit import edit_json

    model = make_model(tmp_path)
    edit_json(model / "config.json", vision_feature_layer=layer)
    image = picture(tmp_path / "a.png")
    file = export_gguf(model, tmp_path / "out", type="f32") / "mmproj-f32.gguf"
    assert field(file, "clip.vision.block_count") == 4 + layer
    assert field(file, "clip.vision.feature_layer") == [4 + layer]
    expected = our_features(model, image)
    assert distance(torch_features(file, model, image), expected) <= 2e-5
    half = export_gguf(model, tmp_path / "half") / "mmproj-f16.gguf"
    assert 1e-5 < distance(torch_features(half, model, image), expected) < 3e-3


def test_trap_14_use_gelu_is_the_tanh_form(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """llama.cpp runs the quick GELU where the file does not say use_gelu; this is what that would do."""
    image = picture(tmp_path / "a.png")
    file = export_gguf(model, tmp_path / "out", type="f32") / "mmproj-f32.gguf"
    assert field(file, "clip.use_gelu") is True
    right, plain = torch_features(file, model, image), field
    monkeypatch.setitem(globals(), "field", lambda f, key: False if key == "clip.use_gelu" else plain(f, key))
    assert distance(torch_features(file, model, image), right) > 1e-3


def test_more_bits_are_closer_and_larger(model: Path, tmp_path: Path) -> None:
    """Every type is what it says; vectors stay float32, and rows of 67 cannot be blocks of 32."""
    exact = values(export_gguf(model, tmp_path / "exact", type="f32") / "model-f32.gguf")
    errors, sizes = {}, {}
    for type in TYPES[1:]:
        file = export_gguf(model, tmp_path / type, type=type) / f"model-{type}.gguf"
        found = values(file)
        assert found.keys() == exact.keys()
        errors[type] = float(np.mean([np.abs(found[n] - v).mean() / np.abs(v).mean() for n, v in exact.items()]))
        sizes[type] = file.stat().st_size
        kinds = {t.name: t.tensor_type.name for t in gguf.GGUFReader(file).tensors}
        assert kinds["blk.0.attn_norm.weight"] == "F32" and kinds["blk.0.ffn_up.weight"] == type.upper()
        assert np.array_equal(found["output_norm.weight"], exact["output_norm.weight"])
    order = ["f16", "q8_0", "q5_1", "q4_1"]
    assert [errors[t] for t in order] == sorted(errors[t] for t in order) and errors["f16"] < 1e-3 < errors[
        "q8_0"
    ] < 0.01
    assert [sizes[t] for t in order] == sorted((sizes[t] for t in order), reverse=True)
    narrow = convert(
        TINY / "siglip", make_llama(tmp_path / "l", hidden=48), tmp_path / "m", projector="mlp", tiling=SQUASH
    )
    file = export_gguf(narrow.path, tmp_path / "narrow", type="q8_0") / "model-q8_0.gguf"
    assert {t.tensor_type.name for t in gguf.GGUFReader(file).tensors} == {"F32", "F16", "Q8_0"}


def test_llama_31_scaling_is_transformers_own() -> None:
    import torch
    from transformers import LlamaConfig
    from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

    scaling = {**LLAMA3_SCALING, "original_max_position_embeddings": 8192}
    rope = {"rope_theta": 500000.0, **scaling}
    config = LlamaConfig(hidden_size=512, num_attention_heads=4, head_dim=128, rope_parameters=rope)
    theirs, _ = ROPE_INIT_FUNCTIONS["llama3"](config, torch.device("cpu"))
    ours = rope_factors({"rope_scaling": scaling, "rope_theta": 500000.0, "head_dim": 128})
    plain = 500000.0 ** (-np.arange(0, 128, 2) / 128)
    np.testing.assert_allclose(plain / np.array(ours), theirs.numpy(), rtol=1e-5)
    assert ours is not None and min(ours) == 1 and max(ours) == 8
    with pytest.raises(CheckpointError, match="'yarn'"):
        rope_factors({"rope_scaling": {"rope_type": "yarn"}})


def test_the_scaling_is_in_the_file(tmp_path: Path) -> None:
    out = export_gguf(make_model(tmp_path, rope_scaling=LLAMA3_SCALING), tmp_path / "out")
    assert values(out / "model-f16.gguf")["rope_freqs.weight"].max() == 8


def test_the_template_takes_llama_cpps_marker(model: Path) -> None:
    """A text with a marker, as llama-server renders it, gives the prompt of the Hugging Face export."""
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    tokens = load(model).tokens
    layout = load_config(model).prompt_layout

    def render(image: str | None, *contents: Any) -> str:
        turns = [{"role": role, "content": c} for role, c in zip(("user", "assistant") * 2, contents, strict=False)]
        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True)
        return environment.from_string(chat_template(layout, tokens, image)).render(
            messages=turns, add_generation_prompt=True
        )

    one = [{"type": "image"}, {"type": "text", "text": "What?"}]
    assert render(None, "<__media_aB3__> What? ") == render("<__media_aB3__>", one)
    two = [{"type": "image"}, {"type": "image"}, {"type": "text", "text": "What?"}]
    assert render(None, "<__media__><__media__>What?", "x", "y") == render("<__media__>", two, "x", "y")
    assert render(None, "a__>b", "c", "d") != render(None, "a", "c", "d")


def test_what_llama_cpp_cannot_hold_is_refused(model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def sentence(model: Path, **options: Any) -> str:
        with pytest.raises(CheckpointError) as caught:
            export_gguf(model, tmp_path / "out", **options)
        assert not (tmp_path / "out").exists() and not (tmp_path / ".out.partial").exists()
        return str(caught.value)

    for kind in ("attention", "linear"):
        assert f"kind {kind}" in (text := sentence(make_model(tmp_path / kind, kind))) and "mlp has" in text
    assert "--squash" in sentence(uhd := make_model(tmp_path / "uhd", tiling=TilingConfig()))
    assert len(list(export_gguf(uhd, tmp_path / "squashed", squash=True).glob("*.gguf"))) == 2
    assert "q4_k" in sentence(model, type="q4_k")
    config = load_config(model)
    skipping = replace(config, projector_config=replace(config.projector_config, skip=1))
    monkeypatch.setattr("mlx_llama3v.checkpoint.load_config", lambda directory: skipping)
    assert "select strategy" in sentence(model)
    monkeypatch.undo()
    sources = (tmp_path / "uhd/siglip", tmp_path / "uhd/llama", tmp_path / "quantized")
    convert(*sources, projector="mlp", tiling=SQUASH, quantize=QuantConfig(4, 32))
    assert "quantized" in sentence(tmp_path / "quantized")
    monkeypatch.setitem(sys.modules, "gguf", None)
    assert "mlx-llama3v[gguf]" in sentence(model)


def test_a_tokenizer_that_llama_cpp_does_not_know(model: Path) -> None:
    import json

    held = json.loads((model / "tokenizer.json").read_text())
    assert pre_tokenizer(held, model) == "llama-bpe"
    assert pre_tokenizer(json.loads((TINY / "llama" / "tokenizer.json").read_text()), model) == "llama-bpe"
    split = held["pre_tokenizer"]["pretokenizers"][0]
    other = {**held, "pre_tokenizer": {"type": "Sequence", "pretokenizers": [{**split, "pattern": {"Regex": r"\d"}}]}}
    with pytest.raises(CheckpointError, match="does not cut words"):
        pre_tokenizer(other, model)
    whole = {**held["model"], "ignore_merges": False, "merges": held["model"]["merges"][:-1]}
    with pytest.raises(CheckpointError, match="merges do not make"):
        pre_tokenizer({**held, "model": whole}, model)


def test_tokens_beyond_the_vocabulary_are_left_out(tmp_path: Path) -> None:
    """As where a pad token was added and the embedding not resized: Llama-3 fine-tunes have that."""
    model = make_model(tmp_path)
    size = load_config(model).text_config["vocab_size"]
    tokenizer = Tokenizer.from_file(str(model / "tokenizer.json"))
    held = json.loads(tokenizer.to_str())
    held["added_tokens"].append({**held["added_tokens"][-1], "id": size, "content": "[PAD]"})
    (model / "tokenizer.json").write_text(json.dumps(held))
    tokens = field(export_gguf(model, tmp_path / "out") / "model-f16.gguf", "tokenizer.ggml.tokens")
    assert len(tokens) == size and "[PAD]" not in tokens
