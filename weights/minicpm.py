"""openbmb/MiniCPM-Llama3-V-2_5, and mustafaaljadery/llama3v, which has its tensors under other names.

A SigLIP with a table for 980 px, read after its last norm; a resampler of 96 queries; slices of about 448 x 448.
"""

from __future__ import annotations

from math import isqrt

from mlx_llama3v.config import ModelConfig, ProjectorConfig, TilingConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.weights.family import Family, Source, decoder_config, image_config, tower_config

_HEAD = 128  # width of a head of the resampler


def configure(source: Source) -> ModelConfig:
    """Everything that config.json and the shapes decide. Raises CheckpointError for a width without whole heads."""
    text = decoder_config(source.config, tied=not source.has(r"^llm\.lm_head\."))
    vision = tower_config(source, source.config.get("vision_config"))
    grid = isqrt(source.shape(r"position_embedding\.weight$")[0])
    queries, width = source.shape(r"(?:resampler|projection)\.query$")
    if width % _HEAD or grid != vision.grid:
        raise CheckpointError(
            f"{source.directory}: a resampler {width} wide on {grid} x {grid} positions; "
            f"expected a multiple of {_HEAD} and {vision.grid} x {vision.grid}."
        )
    slices = source.config.get("slice_config") or {}
    return ModelConfig(
        vision_config=vision,
        text_config=text,
        projector_config=ProjectorConfig(
            kind="resampler",
            in_dim=vision.hidden_size,
            out_dim=width,
            hidden_dim=width,
            num_heads=width // _HEAD,
            pool=1,
            queries=queries,
        ),
        tiling=TilingConfig(
            "minicpm", int(slices.get("max_slice_nums", 9)) if source.config.get("slice_mode", True) else 0
        ),
        image=image_config(source, fallback=True),
        vision_feature_layer=-2 if source.config.get("drop_vision_last_layer") else -1,
        vision_feature_norm=True,
        vision_mode="strip",
        prompt_layout=LAYOUTS["minicpm"],
    )


def _detect(source: Source) -> bool:
    kind, version = source.config.get("model_type"), str(source.config.get("version", "2.5"))
    if kind not in ("llama3v", "minicpmv", None) or (kind == "minicpmv" and version != "2.5"):
        return False
    return (
        source.has(r"^(?:vpm|vison)\.") and source.has(r"^(?:resampler|projection)\.query$") and source.has(r"^llm\.")
    )


FAMILY = Family(
    name="minicpm-v-2.5",
    title="MiniCPM-Llama3-V-2.5 and llama3v",
    detect=_detect,
    configure=configure,
    rules=(
        (r"(?:vpm|vison)\.", "vision_tower."),
        (r"(?:resampler|projection)\.", "projector.body."),
        (r"llm\.", "language_model."),
    ),
    skip=(r"\.pos_embed$",),  # a buffer: the positions are computed
)
