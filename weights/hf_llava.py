"""Hugging Face's LlavaForConditionalGeneration with a SigLIP tower and a Llama decoder, in its three key layouts.

Released by transformers 4.3x (`language_model.model.`), 4.52 (`model.language_model.`) and 5 (no `vision_model.`);
TIGER-Lab/Mantis-8B-siglip-llama3 is one, with a prompt of its own.
"""

from __future__ import annotations

import mlx.core as mx

from mlx_llama3v.checkpoint import image_processor
from mlx_llama3v.config import ModelConfig, TilingConfig, llama_config
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import LAYOUTS, PromptLayout
from mlx_llama3v.text.tokens import load_tokenizer
from mlx_llama3v.weights.chat_template import read_layout
from mlx_llama3v.weights.family import SQUASH, Family, Source, image_config, mlp_projector, tower_config

_MANTIS_IMAGE_ID = 128256
_MANTIS_PAD = "<|pad|>"


def configure(source: Source) -> ModelConfig:
    """Everything that config.json decides. Raises CheckpointError for what the model cannot do."""
    values, where = source.config, source.directory
    layer = values.get("vision_feature_layer", -2)
    if not isinstance(layer, int):
        raise CheckpointError(f"{where}: vision_feature_layer is {layer!r}; expected one layer, not several.")
    strategy = values.get("vision_feature_select_strategy", "default")
    if strategy not in ("default", "full"):
        raise CheckpointError(f"{where}: vision_feature_select_strategy is {strategy!r}; expected default or full.")
    act = values.get("projector_hidden_act", "gelu")
    if act != "gelu":
        raise CheckpointError(f"{where}: projector_hidden_act is {act!r}; expected gelu.")
    tower = values.get("vision_config", {}).get("model_type", "siglip_vision_model")
    if tower not in ("siglip_vision_model", "siglip"):
        raise CheckpointError(
            f"{where} sees through a tower of type {tower!r}; expected a SigLIP or SigLIP 2 of a fixed resolution "
            "(siglip_vision_model), or such a tower and a Llama with --vision and --llm."
        )
    text = llama_config({k: v for k, v in values.get("text_config", {}).items() if k not in ("dtype", "torch_dtype")})
    text["tie_word_embeddings"] |= not source.has(r"lm_head\.")
    vision = tower_config(source, values.get("vision_config", {}))
    return ModelConfig(
        vision_config=vision,
        text_config=text,
        projector_config=mlp_projector(vision, text, skip=int(strategy == "default")),
        tiling=_tiling(source, vision.image_size),
        image=image_config(source),
        vision_feature_layer=layer,
        prompt_layout=source.layout or _prompt(source),
    )


def _tiling(source: Source, side: int) -> TilingConfig:
    """One square: padded where the processor pads, else squashed. Raises CheckpointError where it cuts some away."""
    values = image_processor(source.directory)
    given = values.get("size") or {}
    size = given if isinstance(given, dict) else {"height": given, "width": given}
    if not {*size.values()} <= {side}:
        raise CheckpointError(
            f"{source.directory}: its processor makes pictures {size}; the tower takes {side} pixels."
        )
    if values.get("do_pad"):
        return TilingConfig("pad", 0)
    if values.get("do_center_crop") or "shortest_edge" in size:
        raise CheckpointError(
            f"{source.directory}: its processor crops pictures; expected one that squashes them to a square (SigLIP's) "
            "or pads them (do_pad)."
        )
    return SQUASH


def _prompt(source: Source) -> PromptLayout:
    index = source.config.get("image_token_index", source.config.get("image_token_id"))
    image = padding = None
    if isinstance(index, int) and (source.directory / "tokenizer.json").is_file():
        tokenizer = load_tokenizer(source.directory)
        image, padding = tokenizer.id_to_token(index), tokenizer.id_to_token(index + 1)
    # The vocabulary ends with <image> and <|pad|>; nothing else says Mantis.
    last = isinstance(index, int) and source.config.get("text_config", {}).get("vocab_size") == index + 2
    if last and (padding == _MANTIS_PAD or (padding is None and index == _MANTIS_IMAGE_ID)):
        return LAYOUTS["mantis"]
    return read_layout(source.directory, image or "<image>") or LAYOUTS["llama3"]


def _missing_biases(source: Source, config: ModelConfig) -> dict[str, mx.array]:
    if source.config.get("multimodal_projector_bias", True):
        return {}
    width = config.projector_config.out_dim
    return {f"projector.body.linear_{n}.bias": mx.zeros((width,)) for n in (1, 2)}


FAMILY = Family(
    name="hf-llava",
    title="Hugging Face LLaVA with a SigLIP tower and a Llama decoder",
    detect=lambda source: source.config.get("model_type") == "llava"
    and source.has(r"multi_modal_projector\.linear_1\."),
    configure=configure,
    rules=(
        (r"(?:model\.)?vision_tower\.(?:vision_model\.)?", "vision_tower."),
        (r"(?:model\.)?multi_modal_projector\.", "projector.body."),
        (r"model\.language_model\.", "language_model.model."),
        (r"language_model\.(model|lm_head)\.", r"language_model.\1."),
        (r"lm_head\.", "language_model.lm_head."),
    ),
    extra=_missing_biases,
)
