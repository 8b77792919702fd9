"""SigLIP against transformers in float32: towers, pooled vectors, texts, logits, loss, positions, layouts."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
import torch
import transformers

from mlx_llama3v import kernels
from mlx_llama3v.config import SiglipTextConfig, VisionConfig, known
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.vision.encode import patchify
from mlx_llama3v.vision.siglip import (
    SiglipModel,
    VisionTower,
    position_table,
    sanitize,
    sigmoid_loss,
    tower_weights,
)
from tests.hf_siglip import make_siglip

TOLERANCE = 1e-4


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_siglip(tmp_path_factory.mktemp("siglip"))


def ours(directory: Path, bend: str = "") -> SiglipModel:
    """The checkpoint in MLX; `bend` names a weight to change by 2%, for the twins that must fail."""
    config = json.loads((directory / "config.json").read_text())
    vision = VisionConfig(**known(VisionConfig, config["vision_config"]))
    model = SiglipModel(vision, SiglipTextConfig(**known(SiglipTextConfig, config["text_config"])))
    weights = sanitize(mx.load(str(directory / "model.safetensors")))
    if bend:
        weights[bend] = weights[bend] * 1.02
    model.load_weights(list(weights.items()), strict=True)
    return model


def tower_of(directory: Path) -> VisionTower:
    config = json.loads((directory / "config.json").read_text())
    tower = VisionTower(VisionConfig(**known(VisionConfig, config.get("vision_config", config))))
    weights = tower_weights(mx.load(str(directory / "model.safetensors")))
    tower.load_weights(list(weights.items()), strict=True)
    return tower


def theirs(directory: Path) -> torch.nn.Module:
    return transformers.SiglipModel.from_pretrained(directory, dtype=torch.float32).eval()


def pictures(count: int, height: int, width: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal((count, height, width, 3)).astype(np.float32)


def inputs(tower: VisionTower, pixels: np.ndarray) -> tuple[mx.array, mx.array]:
    patch = tower.config.patch_size
    grid = (pixels.shape[1] // patch, pixels.shape[2] // patch)
    patches = mx.array(np.stack([patchify(p, patch) for p in pixels]))
    table = position_table(tower, grid)
    return patches, mx.broadcast_to(table, (len(pixels), *table.shape))


def to_torch(pixels: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(pixels.transpose(0, 3, 1, 2).copy())


def gap(a: mx.array, b: torch.Tensor) -> float:
    assert tuple(a.shape) == tuple(b.shape)
    return float(np.abs(np.array(a) - b.detach().numpy()).max())


class Theirs(NamedTuple):
    """What transformers computes of three pictures and three texts."""

    pixels: np.ndarray
    ids: np.ndarray
    outputs: Any
    tower: Any
    text: Any


@lru_cache(maxsize=1)
def computed(directory: Path) -> Theirs:
    """Once for all twins; nothing changes `directory`."""
    reference, pixels = theirs(directory), pictures(3, 32, 32)
    ids = np.random.default_rng(1).integers(0, 64, (3, 8))
    with torch.no_grad():
        return Theirs(
            pixels,
            ids,
            reference(input_ids=torch.from_numpy(ids), pixel_values=to_torch(pixels), return_loss=True),
            reference.vision_model(to_torch(pixels), output_hidden_states=True),
            reference.text_model(torch.from_numpy(ids)),
        )


def differences(directory: Path, bend: str = "") -> dict[str, float]:
    """Largest difference of everything that the two models compute."""
    model = ours(directory, bend)
    pixels, ids, want, tower, text = computed(directory)
    patches, positions = inputs(model.vision_model, pixels)
    image_embeds = model.vision_model.pooled(patches, positions)
    text_embeds = model.text_model(mx.array(ids))
    logits = model.logits(image_embeds, text_embeds)
    found = {
        "last": gap(model.vision_model.last_hidden_state(patches, positions), tower.last_hidden_state),
        "pooled": gap(image_embeds, tower.pooler_output),
        "text": gap(text_embeds, text.pooler_output),
        "logits_per_image": gap(logits, want.logits_per_image),
        "loss": gap(sigmoid_loss(logits.T), want.loss),
    }
    for index in range(len(tower.hidden_states)):
        for layer in (index, index - len(tower.hidden_states)):
            hidden = model.vision_model(patches, positions, layer=layer)
            found[f"hidden {layer}"] = gap(hidden, tower.hidden_states[index])
    return found


def test_everything_matches_transformers(checkpoint: Path) -> None:
    wrong = {name: value for name, value in differences(checkpoint).items() if not value <= TOLERANCE}
    assert not wrong


@pytest.mark.parametrize(
    ("bend", "expected"),
    [
        ("vision_model.embeddings.patch_embedding.weight", "hidden 0"),
        ("vision_model.embeddings.position_embedding.weight", "hidden 0"),
        ("vision_model.encoder.layers.0.self_attn.k_proj.weight", "hidden 1"),
        ("vision_model.encoder.layers.2.mlp.fc2.bias", "hidden -1"),
        ("vision_model.post_layernorm.weight", "last"),
        ("vision_model.head.attention.in_proj_weight", "pooled"),
        ("vision_model.head.probe", "pooled"),
        ("text_model.encoder.layers.1.layer_norm2.bias", "text"),
        ("text_model.head.weight", "text"),
        ("logit_scale", "logits_per_image"),
        ("logit_bias", "loss"),
    ],
)
def test_twin_a_bent_weight_is_noticed(checkpoint: Path, bend: str, expected: str) -> None:
    assert differences(checkpoint, bend)[expected] > TOLERANCE


def test_twin_the_other_gelu_is_noticed(checkpoint: Path) -> None:
    tower = ours(checkpoint).vision_model
    patches, positions = inputs(tower, pictures(1, 32, 32))
    right = tower(patches, positions)
    for block in tower.encoder.layers:
        block.mlp.activation = nn.gelu
    assert mx.abs(tower(patches, positions) - right).max().item() > TOLERANCE


@pytest.mark.parametrize("form", [kernels._gelu_powers, kernels._gelu_sigmoid, kernels.gelu_tanh])
def test_both_forms_of_the_tanh_gelu(form: Callable[[mx.array], mx.array]) -> None:
    x = np.concatenate([np.linspace(-15, 15, 30_001), [-1e4, -300, 300, 1e4]]).astype(np.float32)
    exact = torch.from_numpy(x).double().requires_grad_()
    want = torch.nn.functional.gelu(exact, approximate="tanh")
    want.sum().backward()
    values, slopes = mx.value_and_grad(lambda at: form(at).sum())(mx.array(x))
    assert (np.abs(np.array(form(mx.array(x))) - want.detach().numpy()) <= 1e-6 + 1e-7 * np.abs(x)).all()
    assert np.abs(np.array(slopes) - exact.grad.numpy()).max() <= 1e-5
    assert np.isfinite(values.item())


def test_layer_choice_counts_from_both_ends(checkpoint: Path) -> None:
    tower = ours(checkpoint).vision_model
    patches, positions = inputs(tower, pictures(1, 32, 32))
    assert not mx.allclose(tower(patches, positions), tower(patches, positions, layer=-2)).item()
    assert mx.array_equal(tower(patches, positions, layer=-2), tower(patches, positions, layer=2)).item()
    for layer in (4, -5):
        with pytest.raises(CheckpointError, match="hidden states 0 to 3"):
            tower(patches, positions, layer=layer)


# hidden, intermediate, heads, patch, image: the recipe's own tower as it is; every other released width on a few
# patches, and every released patch and picture on a narrow tower, since neither knows of the other.
RELEASED = {
    "so400m-14-384": (1152, 4304, 16, 14, 384),
    "base": (768, 3072, 12, 16, 83),
    "large": (1024, 4096, 16, 16, 83),
    "giant-opt": (1536, 6144, 16, 16, 83),
    "16-224": (64, 96, 1, 16, 224),
    "16-256": (64, 96, 1, 16, 256),
    "16-384": (64, 96, 1, 16, 384),
    "16-512": (64, 96, 1, 16, 512),
    "32-256": (64, 96, 1, 32, 256),
    "14-224": (64, 96, 1, 14, 224),
}


def quickly(config: transformers.SiglipVisionConfig) -> torch.nn.Module:
    """A tower with random weights of a trained one's scale; transformers' own initialisation takes seconds."""
    with torch.device("meta"):
        model = transformers.SiglipVisionModel(config)
    model = model.to_empty(device="cpu").eval()
    with torch.no_grad():
        for name, weight in model.named_parameters():
            weight.normal_(0, 0.5 * weight[0].numel() ** -0.5 if weight.ndim > 1 else 0.1)
            if "norm" in name and name.endswith("weight"):
                weight.add_(1)
        for buffer in model.buffers():  # position_ids
            buffer.copy_(torch.arange(buffer.numel()).reshape(buffer.shape))
    return model


@pytest.mark.parametrize("size", RELEASED)
def test_released_sizes(size: str) -> None:
    """One block of each size."""
    hidden, intermediate, heads, patch, image = RELEASED[size]
    torch.manual_seed(0)
    config = transformers.SiglipVisionConfig(
        hidden_size=hidden,
        intermediate_size=intermediate,
        num_hidden_layers=1,
        num_attention_heads=heads,
        patch_size=patch,
        image_size=image,
    )
    reference = quickly(config)
    state = {k: mx.array(v.numpy()) for k, v in reference.state_dict().items() if not k.endswith("_ids")}
    tower = VisionTower(VisionConfig(**known(VisionConfig, config.to_dict())))
    tower.load_weights(list(tower_weights(state).items()), strict=True)
    pixels = pictures(1, image, image)
    with torch.no_grad():
        want = reference(to_torch(pixels))
    patches, positions = inputs(tower, pixels)
    assert patches.shape[1] == (image // patch) ** 2
    last = tower.last_hidden_state(patches, positions)
    assert gap(last, want.last_hidden_state) <= TOLERANCE
    assert gap(tower.head(last), want.pooler_output) <= TOLERANCE


ODD = [(4, 4), (1, 1), (1, 16), (16, 1), (5, 3), (7, 9), (3, 5), (2, 8)]


def hf_positions(reference: torch.nn.Module, grid: tuple[int, int]) -> torch.Tensor:
    h, w = grid
    return reference.embeddings.interpolate_pos_encoding(torch.zeros(1, h * w, 32), h * 8, w * 8)


@pytest.mark.parametrize("grid", ODD)
def test_resampled_positions_match(checkpoint: Path, grid: tuple[int, int]) -> None:
    tower, reference = ours(checkpoint).vision_model, theirs(checkpoint).vision_model
    pixels = pictures(1, grid[0] * 8 + 3, grid[1] * 8)  # three rows more than whole patches: cut off by both
    with torch.no_grad():
        table = reference.embeddings.interpolate_pos_encoding(
            torch.zeros(1, grid[0] * grid[1], 32), grid[0] * 8, grid[1] * 8
        )
        want = reference(to_torch(pixels), interpolate_pos_encoding=True).last_hidden_state
    assert gap(position_table(tower, grid)[None], table) <= 1e-5
    assert gap(tower.last_hidden_state(*inputs(tower, pixels)), want) <= TOLERANCE


def test_twin_transposed_grid_is_noticed(checkpoint: Path) -> None:
    tower, reference = ours(checkpoint).vision_model, theirs(checkpoint).vision_model
    assert gap(position_table(tower, (3, 5))[None], hf_positions(reference, (5, 3))) > 0.01


def test_padded_batch_equals_one_by_one(checkpoint: Path) -> None:
    tower = ours(checkpoint).vision_model
    grids = [(4, 4), (5, 3), (1, 7), (2, 2)]
    single = [inputs(tower, pictures(1, h * 8, w * 8, seed=h)) for h, w in grids]
    # Padding holds large numbers, not zeros: a leak would show.
    margins = [[(0, 0), (0, 16 - h * w), (0, 0)] for h, w in grids]
    patches = mx.concatenate([mx.pad(p, m, constant_values=50.0) for (p, _), m in zip(single, margins, strict=True)])
    positions = mx.concatenate([mx.pad(t, m) for (_, t), m in zip(single, margins, strict=True)])
    lengths = mx.array([h * w for h, w in grids])
    mask = mx.arange(16)[None] < lengths[:, None]
    batch, pooled = tower(patches, positions, mask), tower.pooled(patches, positions, mask)
    for i, (p, t) in enumerate(single):
        assert mx.abs(batch[i, : p.shape[1]] - tower(p, t)[0]).max().item() <= TOLERANCE
        assert mx.abs(pooled[i] - tower.pooled(p, t)[0]).max().item() <= TOLERANCE
    unmasked = tower(patches, positions)
    assert mx.abs(unmasked[1, :15] - tower(*single[1])[0]).max().item() > TOLERANCE


def test_three_key_layouts_load_the_same_tower(tmp_path: Path) -> None:
    """A full model, a tower as transformers 5 saves it, and one with the older `vision_model.` prefix."""
    bare = make_siglip(tmp_path / "bare", full=False)
    weights = mx.load(str(bare / "model.safetensors"))
    assert "embeddings.patch_embedding.weight" in weights, "transformers changed its layout"
    prefixed = {f"vision_model.{key}": value for key, value in weights.items()}
    ids = {"vision_model.embeddings.position_ids": mx.arange(16)[None]}
    full = {**prefixed, **ids, "text_model.head.bias": mx.zeros((32,)), "logit_scale": mx.zeros((1,))}
    want = tower_weights(weights)
    assert want["embeddings.patch_embedding.weight"].shape == (32, 8 * 8 * 3)
    for layout in (prefixed, full):
        found = tower_weights(layout)
        assert found.keys() == want.keys()
        assert all(mx.array_equal(found[key], want[key]).item() for key in want)
    pixels = pictures(1, 32, 32)
    reference = transformers.SiglipVisionModel.from_pretrained(bare, dtype=torch.float32).eval()
    with torch.no_grad():
        hidden = reference(to_torch(pixels)).last_hidden_state
    tower = tower_of(bare)
    assert gap(tower.last_hidden_state(*inputs(tower, pixels)), hidden) <= TOLERANCE


def test_sanitize_is_idempotent_and_reads_mlx_convolutions(checkpoint: Path) -> None:
    weights = mx.load(str(checkpoint / "model.safetensors"))
    once = sanitize(weights)
    twice = sanitize(once)
    assert once.keys() == twice.keys()
    assert all(mx.array_equal(once[key], twice[key]).item() for key in once)
    key = "vision_model.embeddings.patch_embedding.weight"
    mlx_layout = {key: weights[key].transpose(0, 2, 3, 1)}
    assert mx.array_equal(sanitize(mlx_layout)[key], once[key]).item()


def test_tower_without_head(tmp_path: Path) -> None:
    tower = tower_of(make_siglip(tmp_path, full=False, vision_use_head=False))
    patches, positions = inputs(tower, pictures(1, 32, 32))
    assert tower.last_hidden_state(patches, positions).shape == (1, 16, 32)
    with pytest.raises(CheckpointError, match="pooling head"):
        tower.pooled(patches, positions)


def test_unknown_activation_is_refused() -> None:
    with pytest.raises(CheckpointError, match="quick_gelu"):
        VisionTower(VisionConfig(num_hidden_layers=1, hidden_act="quick_gelu"))


def test_sigmoid_loss_with_labels() -> None:
    """Several true images a text: the written-out sum over pairs."""
    logits = np.random.default_rng(0).standard_normal((3, 4)).astype(np.float32)
    labels = np.array([[1, 1, -1, 0], [-1, 1, -1, 0], [-1, -1, 1, 1]], np.float32)
    want = (-np.log(1 / (1 + np.exp(-labels * logits))) * np.abs(labels)).sum() / 4
    assert sigmoid_loss(mx.array(logits), mx.array(labels)).item() == pytest.approx(want, rel=1e-5)
    assert sigmoid_loss(mx.array(logits)).item() != pytest.approx(want, rel=1e-3)
