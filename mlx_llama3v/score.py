"""Zero-shot scoring: SigLIP's probability that a text fits a picture (a sigmoid a pair, no softmax)."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mlx.core as mx
import numpy as np

from mlx_llama3v.checkpoint import Siglip
from mlx_llama3v.config import TilingConfig
from mlx_llama3v.vision.encode import normalised, patchify
from mlx_llama3v.vision.image import cut, open_image
from mlx_llama3v.vision.siglip import position_table
from mlx_llama3v.vision.tiling import plan


def probabilities(siglip: Siglip, images: Sequence[str | Path | bytes], texts: Sequence[str]) -> np.ndarray:
    """[I, T] probabilities in 0..1. Pictures are squashed to the native square, as SigLIP was trained.

    Raises ImageError for a picture that cannot be read.
    """
    tower = siglip.model.vision_model
    text_embeds = siglip.model.text_model(mx.array(siglip.tokenizer(texts)))
    positions = position_table(tower, (siglip.vision.grid, siglip.vision.grid))[None]
    rows = []
    for source in images:
        picture = open_image(source, siglip.image.max_pixels)
        square = plan(*picture.size, siglip.vision, TilingConfig(mode="squash"))
        pixels = cut(picture, square, siglip.image)[0]
        patches = normalised(mx.array(patchify(pixels, siglip.vision.patch_size)), siglip.image)
        pooled = tower.pooled(patches[None], positions)
        # In float32: a float16 sigmoid is 0 below a logit of -17, where most false statements are.
        logits = siglip.model.logits(pooled.astype(mx.float32), text_embeds.astype(mx.float32))
        rows.append(np.array(mx.sigmoid(logits))[0])
    return np.stack(rows)
