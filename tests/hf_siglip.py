"""Tiny random SigLIP checkpoints as transformers writes them: the other side of every parity test.

Fresh weights are too small to tell one activation or mask from another, so they are enlarged: an error
anywhere then reaches the output.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any


def make_siglip(
    directory: Path,
    *,
    image_size: int = 32,
    patch_size: int = 8,
    hidden: int = 32,
    layers: int = 3,
    heads: int = 4,
    full: bool = True,
    seed: int = 0,
    **over: Any,
) -> Path:
    """Write a random SiglipModel (a SiglipVisionModel with `full=False`) and its preprocessor_config.json.

    `over` goes into both tower configs (`intermediate_size`, `vision_use_head`, ...), except `resample`,
    which is the processor's. Returns `directory`.
    """
    import torch
    from transformers import SiglipConfig, SiglipModel, SiglipVisionConfig, SiglipVisionModel

    resample = over.pop("resample", 3)
    shared = {
        "hidden_size": hidden,
        "intermediate_size": 2 * hidden + 3,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        **over,
    }
    vision = {**shared, "image_size": image_size, "patch_size": patch_size}
    torch.manual_seed(seed)
    if full:
        text = {**shared, "vocab_size": 64, "max_position_embeddings": 8, "projection_size": hidden}
        text |= {"pad_token_id": 1, "bos_token_id": 2, "eos_token_id": 1}
        model = SiglipModel(SiglipConfig(text_config=text, vision_config=vision))
    else:
        model = SiglipVisionModel(SiglipVisionConfig(**vision))
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            gain = 1.5 if parameter.ndim >= 2 else 1.0
            parameter.copy_(gain * parameter + 0.1 * torch.randn_like(parameter))
            if name.endswith("logit_bias"):
                parameter.fill_(-1.5)
    model.eval().save_pretrained(directory)
    processor = {
        "image_processor_type": "SiglipImageProcessor",
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "do_convert_rgb": True,
        "size": {"height": image_size, "width": image_size},
        "resample": resample,
        "rescale_factor": 1 / 255,
        "image_mean": [0.5, 0.5, 0.5],
        "image_std": [0.5, 0.5, 0.5],
    }
    (directory / "preprocessor_config.json").write_text(json.dumps(processor, indent=2))
    return directory
