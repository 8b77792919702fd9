"""Which family a checkpoint is of: told by its configuration and its keys, whatever its folder is called."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import mlx.core as mx
import pytest
import torch
import transformers

from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.vision.siglip import VisionTower
from mlx_llama3v.weights.family import Source, tower_config
from mlx_llama3v.weights.vlm import FAMILIES, detect
from tests.hf_edit import edit_json
from tests.hf_llava import make_llava
from tests.parity import test_bunny, test_minicpm, test_vila, test_vision_alpha

pytestmark = pytest.mark.usefixtures("quick_disk")


def _minicpm(kind: str) -> Callable[[Path], object]:
    return lambda folder: test_minicpm.Reference(folder / "words").write(folder / "model", kind)


# Release -> its family, and what writes a tiny one into folder/model.
RELEASES: dict[str, tuple[str, Callable[[Path], object]]] = {
    "llava-siglip-llama-3": ("hf-llava", lambda folder: make_llava(folder / "model")),
    "Mantis-8B-siglip-llama3": (
        "hf-llava",
        lambda folder: make_llava(folder / "model", extra=("<image>", "<|pad|>"), padding=0),
    ),
    "Bunny-Llama-3-8B-V": ("bunny", lambda folder: test_bunny.Reference(folder / "model", (1,))),
    "Bunny-v1_1-Llama-3-8B-V": ("bunny", lambda folder: test_bunny.Reference(folder / "model", (1, 2, 3))),
    "llama-3-vision-alpha-hf": ("vision-alpha", lambda folder: test_vision_alpha.Reference(folder / "model")),
    "MiniCPM-Llama3-V-2_5": ("minicpm-v-2.5", _minicpm("minicpmv")),
    "llama3v": ("minicpm-v-2.5", _minicpm("llama3v")),
    "Llama-3-VILA1.5-8b": ("vila", lambda folder: test_vila.Reference(folder / "model")),
}


@pytest.mark.parametrize("release", RELEASES)
def test_a_misleading_folder_name_misleads_nobody(release: str, tmp_path: Path) -> None:
    """The same family and the same configuration under the name of every other release, and under CLIP's."""
    family, write = RELEASES[release]
    write(tmp_path)
    expected = None
    for name in (*RELEASES, "llava-v1.5-clip-vit-large", "Qwen2-VL", "model.v2.6"):
        (tmp_path / name).symlink_to(tmp_path / "model")
        source = Source.open(tmp_path / name)
        found = detect(source)
        assert found.name == family, name
        config = found.configure(source)
        expected = expected or config
        assert config == expected, name


def test_every_family_is_among_them() -> None:
    assert {family for family, _ in RELEASES.values()} == {family.name for family in FAMILIES}


def test_a_tower_named_after_clips_is_no_clip(tmp_path: Path) -> None:
    """mm_vision_tower may be a path; where the tower is in the file, its keys decide."""
    reference = test_bunny.Reference(tmp_path / "hf", (1,))
    edit_json(tmp_path / "hf" / "config.json", mm_vision_tower=f"/data/clips/patch8-{test_bunny.SIDE}")
    assert detect(Source.open(reference.directory)).name == "bunny"
    empty = Source(tmp_path, {"mm_vision_tower": "openai/clip-vit-large"}, {}, tmp_path)
    with pytest.raises(CheckpointError, match="CLIP"):
        detect(empty)


# Width and heads of the released towers.
HEADS = {"base": (768, 12), "large": (1024, 16), "so400m": (1152, 16), "giant-opt": (1536, 16)}


@pytest.mark.parametrize("size", HEADS)
def test_heads_follow_from_the_width_where_no_config_says(size: str, tmp_path: Path) -> None:
    """Bunny, llama3v and vision-alpha ship no vision_config: heads of 72 (so400m) and of 96 (giant-opt) are known."""
    width, heads = HEADS[size]
    tensors = {
        "vision.embeddings.patch_embedding.weight": mx.zeros((width, 3, 16, 16)),
        "vision.embeddings.position_embedding.weight": mx.zeros((256, width)),
        "vision.encoder.layers.0.mlp.fc1.weight": mx.zeros((8, width)),
    }
    found = tower_config(Source(tmp_path, {}, tensors, tmp_path))
    assert (found.hidden_size, found.num_attention_heads, found.image_size) == (width, heads, 256)
    given = tower_config(Source(tmp_path, {}, tensors, tmp_path), {"hidden_size": width, "num_attention_heads": 8})
    assert given.num_attention_heads == 8  # a config that says it is believed


def test_a_config_without_heads_means_transformers_default(tmp_path: Path) -> None:
    """12, which is not giant-opt's: its own config.json says 16."""
    torch.manual_seed(0)
    values = {"hidden_size": 192, "intermediate_size": 8, "num_hidden_layers": 1, "image_size": 32, "patch_size": 16}
    theirs = transformers.SiglipVisionModel(transformers.SiglipVisionConfig(**values)).eval()
    found = tower_config(Source(tmp_path, {}, {}, tmp_path), values)
    assert found.num_attention_heads == theirs.config.num_attention_heads == 12
    with pytest.raises(CheckpointError, match="1000 wide cannot have 12 heads"):
        VisionTower(tower_config(Source(tmp_path, {}, {}, tmp_path), {**values, "hidden_size": 1000}))
