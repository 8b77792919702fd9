"""qresearch/llama-3-vision-alpha-hf: an unchanged SigLIP and Llama-3-Instruct with an MLP between, in one file.

The names of the released file could not be seen; they are matched by their ends, whatever stands before. For the first
release, a projector alone, see projector_file.py.
"""

from __future__ import annotations

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.weights.family import (
    SQUASH,
    Family,
    Source,
    decoder_config,
    image_config,
    mlp_projector,
    tower_config,
)

_PROJECTOR = r"(?:.*\.)?mm_projector\.(?:model\.)?"


def configure(source: Source) -> ModelConfig:
    """Everything that config.json and the shapes decide."""
    text = decoder_config({**source.config, **source.config.get("text_config", {})}, not source.has(r"lm_head\."))
    vision = tower_config(source, source.config.get("vision_config"))
    return ModelConfig(
        vision_config=vision,
        text_config=text,
        projector_config=mlp_projector(vision, text),
        tiling=SQUASH,
        image=image_config(source, fallback=True),
        vision_feature_layer=-2,
        prompt_layout=LAYOUTS["vision-alpha"],
    )


FAMILY = Family(
    name="vision-alpha",
    title="llama-3-vision-alpha-hf",
    detect=lambda source: source.has(rf"^{_PROJECTOR}0\.weight$")
    and source.has(r"^text_model\.")
    and source.has(r"^vision_model\."),
    configure=configure,
    rules=(
        (rf"{_PROJECTOR}0\.", "projector.body.linear_1."),
        (rf"{_PROJECTOR}2\.", "projector.body.linear_2."),
        (r"vision_model\.(?:vision_model\.)?", "vision_tower."),
        (r"text_model\.(model|lm_head)\.", r"language_model.\1."),
    ),
)
