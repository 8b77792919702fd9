"""Efficient-Large-Model/Llama-3-VILA1.5-8b: three checkpoints in sub-folders, joined by a 2 x 2 down-sampling MLP."""

from __future__ import annotations

from mlx_llama3v.config import ModelConfig, ProjectorConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import LAYOUTS
from mlx_llama3v.tensors import read_json
from mlx_llama3v.weights.family import SQUASH, Family, Source, decoder_config, image_config, tower_config


def configure(source: Source) -> ModelConfig:
    """Everything that the configurations of the three parts decide. Raises CheckpointError for what is another model.

    Later VILAs have projectors with the same tensors that take the patches in another order.
    """
    llm, tower, projector = (
        read_json(source.directory / part / "config.json") for part in ("llm", "vision_tower", "mm_projector")
    )
    kind = projector.get("mm_projector_type") or source.config.get("mm_projector_type") or "mlp_downsample"
    shape = source.config.get("image_aspect_ratio") or "resize"
    for key, found, known in (("mm_projector_type", kind, "mlp_downsample"), ("image_aspect_ratio", shape, "resize")):
        if found != known:
            raise CheckpointError(f"{source.directory}: {key} is {found!r}; expected {known}, as VILA 1.5 8B has it.")
    text = decoder_config(llm, tied=not source.has(r"^llm/lm_head\."))
    vision = tower_config(source, tower.get("vision_config", tower))
    return ModelConfig(
        vision_config=vision,
        text_config=text,
        projector_config=ProjectorConfig(
            kind="downsample",
            in_dim=vision.hidden_size,
            out_dim=text["hidden_size"],
            hidden_dim=text["hidden_size"],
            num_heads=vision.num_attention_heads,
            pool=1,
            layer_norm_eps=1e-5,
        ),
        tiling=SQUASH,
        image=image_config(source, fallback=True),
        vision_feature_layer=int(source.config.get("mm_vision_select_layer", -2)),
        prompt_layout=LAYOUTS["vila"],
    )


FAMILY = Family(
    name="vila",
    title="VILA 1.5 with Llama-3",
    detect=lambda source: source.has(r"^mm_projector/layers\.4\.weight$")
    and source.has(r"^llm/")
    and source.has(r"^vision_tower/"),
    configure=configure,
    rules=(
        (r"llm/(model|lm_head)\.", r"language_model.\1."),
        (r"vision_tower/(?:vision_model\.)?", "vision_tower."),
        (r"mm_projector/layers\.1\.", "projector.body.norm."),
        (r"mm_projector/layers\.2\.", "projector.body.linear_1."),
        (r"mm_projector/layers\.4\.", "projector.body.linear_2."),
    ),
)
