"""BAAI/Bunny-Llama-3-8B-V and Bunny-v1_1-Llama-3-8B-V: tuned SigLIP, MLP, Vicuna prompt; 1.1 sees three scales."""

from __future__ import annotations

from mlx_llama3v.config import ModelConfig, TilingConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.weights.family import Family, Source, decoder_config, image_config, mlp_projector, tower_config


def configure(source: Source) -> ModelConfig:
    """Everything that config.json and the shapes decide. Raises CheckpointError where they disagree."""
    text = decoder_config(source.config, tied=not source.has(r"^lm_head\."))
    vision = tower_config(source)
    width = source.shape(r"mm_projector\.0\.weight$")[1]
    if width not in (vision.hidden_size, 3 * vision.hidden_size):
        raise CheckpointError(
            f"{source.directory}: the projector takes {width} values; expected {vision.hidden_size}, "
            f"or {3 * vision.hidden_size} of three scales."
        )
    scales = width // vision.hidden_size
    aspect = source.config.get("image_aspect_ratio", "pad")
    return ModelConfig(
        vision_config=vision,
        text_config=text,
        projector_config=mlp_projector(vision, text, scales=scales),
        tiling=TilingConfig("pad" if aspect == "pad" else "squash", 0),
        image=image_config(source, fallback=True),
        vision_feature_layer=-2,
        vision_mode="s2" if scales == 3 else "native",
        prompt_layout=LAYOUTS["vicuna"],
    )


FAMILY = Family(
    name="bunny",
    title="Bunny with Llama-3",
    detect=lambda source: source.config.get("model_type") in ("bunny-llama", None)
    and source.has(r"^model\.mm_projector\.0\.weight")
    and source.has(r"^model\.vision_tower\."),
    configure=configure,
    rules=(
        (r"model\.vision_tower\.(?:vision_tower\.)?(?:vision_model\.)?", "vision_tower."),
        (r"model\.mm_projector\.0\.", "projector.body.linear_1."),
        (r"model\.mm_projector\.2\.", "projector.body.linear_2."),
        (r"(model|lm_head)\.", r"language_model.\1."),
    ),
)
