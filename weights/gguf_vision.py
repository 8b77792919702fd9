"""The picture side of a GGUF export: the tower and the MLP as llama.cpp's `mmproj` file ("clip", projector "mlp").

llama.cpp reads `clip.use_gelu` as the tanh form, which is SigLIP's; without it the tower would run with the quick
GELU. The projector's GELU is the tanh form there too, where the model was trained with erf: 5e-4 at the most.
"""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.weights.gguf_file import Entry, fitting, package

_MLP = {"multi_modal_projector.linear_1.": "mm.0.", "multi_modal_projector.linear_2.": "mm.2."}


def check_mmproj(config: ModelConfig, where: Path) -> None:
    """Raise CheckpointError, in one sentence, for a model whose pictures llama.cpp cannot take."""
    kind = config.projector_config.kind
    if kind != "mlp":
        raise CheckpointError(
            f"{where} has a projector of kind {kind}, which has no counterpart in GGUF; mlp has: `convert --projector "
            "mlp`, and train that."
        )
    if config.projector_config.skip:
        raise CheckpointError(
            f"{where} leaves the first patch out (select strategy default), which llama.cpp cannot; "
            "models that read all patches (full) can be exported."
        )
    if config.vision_config.hidden_act != "gelu_pytorch_tanh":
        raise CheckpointError(
            f"{where} has a tower with {config.vision_config.hidden_act}; expected gelu_pytorch_tanh."
        )


def blocks_run(config: ModelConfig) -> int:
    """Blocks of the tower that the features come out of: -2 of 27 layers is the output of block 26."""
    layer, layers = config.vision_feature_layer, config.vision_config.num_hidden_layers
    return layer if layer >= 0 else layers + 1 + layer


def vision_entries(weights: dict[str, mx.array], config: ModelConfig, type: str) -> list[Entry]:
    """Tower and projector (names as in a Hugging Face LLaVA) in 16 bit, or 32 for `type` f32. Consumed when loaded.

    Blocks that are not run are left out, and so is the last norm, which the features precede.
    """
    wide = type if type in ("f32", "bf16") else "f16"
    gguf = package()
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.MMPROJ, config.vision_config.num_hidden_layers)
    entries = []
    for name in sorted(weights):
        theirs = _rename(name, names)
        block = re.match(r"v\.blk\.(\d+)\.", theirs or "")
        if theirs is None or (block and int(block[1]) >= blocks_run(config)):
            continue
        shape = tuple(weights[name].shape)
        kept = "f32" if theirs.startswith("v.position_embd") else fitting(shape, wide)
        if theirs == "v.patch_embd.weight" and kept == "bf16":
            kept = "f16"  # the convolution has no bfloat16 kernel
        entries.append(Entry(theirs, shape, kept, lambda name=name: weights.pop(name)))  # type: ignore[misc]
    return entries


def _rename(name: str, names: Any) -> str | None:
    """GGUF's name; None for what llama.cpp does not read. Raises CheckpointError for an unknown tensor."""
    for theirs, ours in _MLP.items():
        if name.startswith(theirs):
            return ours + name.removeprefix(theirs)
    if ".post_layernorm." in name:
        return None
    found = names.get_name(name, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise CheckpointError(f"{name} has no counterpart in a GGUF picture tower.")
    return str(found)


def describe_vision(writer: Any, config: ModelConfig) -> None:
    """Sizes and constants of the tower."""
    vision = config.vision_config
    writer.add_clip_has_vision_encoder(True)
    writer.add_bool("clip.has_text_encoder", False)
    writer.add_bool("clip.has_llava_projector", True)
    writer.add_clip_projector_type("mlp")
    writer.add_vision_use_gelu(True)
    writer.add_vision_projection_dim(config.hidden_size)
    writer.add_vision_image_size(vision.image_size)
    writer.add_vision_patch_size(vision.patch_size)
    writer.add_vision_embedding_length(vision.hidden_size)
    writer.add_vision_feed_forward_length(vision.intermediate_size)
    writer.add_vision_block_count(blocks_run(config))
    writer.add_vision_head_count(vision.num_attention_heads)
    writer.add_vision_attention_layernorm_eps(vision.layer_norm_eps)
    writer.add_array("clip.vision.feature_layer", [blocks_run(config)])
    writer.add_vision_image_mean(list(config.image.image_mean))
    writer.add_vision_image_std(list(config.image.image_std))
