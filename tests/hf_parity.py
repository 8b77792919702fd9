"""The same input through a converted model directory and through transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.checkpoint import load_model, load_tower
from mlx_llama3v.vision.encode import patchify
from mlx_llama3v.vision.siglip import position_table

IDS = [[5, 9, 200, 17, 40, 41, 42, 99, 3, 250, 7, 8, 120, 64, 33, 2]]


def pixels(side: int = 32) -> np.ndarray:
    return np.random.default_rng(0).uniform(-1, 1, (side, side, 3)).astype(np.float32)


def features(directory: Path, layer: int = -1) -> np.ndarray:
    tower = load_tower(directory)
    config = tower.config
    patches = mx.array(patchify(pixels(config.image_size), config.patch_size))[None]
    return np.array(tower(patches, position_table(tower, (config.grid, config.grid))[None], layer=layer))


def hf_features(directory: Path) -> Any:
    import torch
    from transformers import SiglipVisionModel

    model = SiglipVisionModel.from_pretrained(directory, dtype=torch.float32).eval()
    image = torch.from_numpy(pixels(model.config.image_size)).permute(2, 0, 1)[None]
    with torch.no_grad():
        return model(image, output_hidden_states=True)


def logits(directory: Path) -> np.ndarray:
    return np.array(load_model(directory)(mx.array(IDS)))


def hf_logits(directory: Path) -> np.ndarray:
    import torch
    from transformers import LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(directory, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(torch.tensor(IDS)).logits.numpy()


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Largest error against the largest value of the reference."""
    return float(np.abs(a - b).max() / max(1.0, np.abs(b).max()))
