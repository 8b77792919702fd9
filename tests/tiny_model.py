"""A random Llama3V small enough for every test, with weights large enough that differences show."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_map

from mlx_llama3v.config import Encoded, ModelConfig, ProjectorConfig, SliceLayout, VisionConfig, llama_config
from mlx_llama3v.model import Llama3V
from mlx_llama3v.projector import Projector
from mlx_llama3v.text.tokens import Tokens
from tests.hf_llama import LLAMA3_SCALING, tiny_tokenizer

D_VISION = 12
VISION = VisionConfig(D_VISION, 16, num_hidden_layers=1, num_attention_heads=2, image_size=32, patch_size=8)
PLAIN = SliceLayout((2, 3))
SPLIT = SliceLayout((3, 2), rows=2, cols=2, tile=(2, 4))


def tiny_config(kind: str = "attention", **text: Any) -> ModelConfig:
    """Two layers, width 32, the tiny tokenizer's vocabulary; keywords go to the Llama config."""
    llama = {
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": tiny_tokenizer().get_vocab_size(),
        "rope_theta": 10000.0,
        "rope_scaling": LLAMA3_SCALING,
        "max_position_embeddings": 400,
        **text,
    }
    projector = ProjectorConfig(kind, D_VISION, llama["hidden_size"], hidden_dim=16, num_heads=2, pool=2)
    return ModelConfig(VISION, llama_config(llama), projector)


def awake(projector: Projector) -> Projector:
    """Give the zero matrices of fresh blocks random values: a block that is the identity hides its faults."""

    def filled(w: mx.array) -> mx.array:
        if w.ndim == 2 and not mx.any(w).item():
            return mx.random.uniform(-1, 1, w.shape) * w.shape[1] ** -0.5
        return w

    projector.update(tree_map(filled, projector.parameters()))
    return projector


def tiny_model(kind: str = "attention", *, seed: int = 0, scale: float = 2.0, **text: Any) -> Llama3V:
    """A model of `tiny_config` with all weights enlarged by `scale`, markers to unit size."""
    mx.random.seed(seed)
    model = Llama3V(tiny_config(kind, **text))
    awake(model.projector)
    model.update(tree_map(lambda w: w * scale if w.ndim > 1 else w, model.parameters()))
    embedding = model.language_model.model.embed_tokens
    embedding.weight = mx.random.normal(embedding.weight.shape)
    model.projector.markers = mx.random.normal(model.projector.markers.shape)
    model.eval()
    mx.eval(model.parameters())
    return model


def tiny_tokens() -> Tokens:
    """Tokens over the tiny tokenizer."""
    return Tokens(tiny_tokenizer())


def picture(layout: SliceLayout = PLAIN, seed: int = 0) -> Encoded:
    """Random embeddings of a picture."""
    values = np.random.default_rng(seed).normal(size=(layout.patches, D_VISION))
    return Encoded(layout, values.astype(np.float32))
