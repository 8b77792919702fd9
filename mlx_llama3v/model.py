"""Llama3V: the projector, mlx-lm's Llama, and the merge of their vectors. No tokenizer, no I/O.

The merge is a gather and a select (`mx.take` + `mx.where`): it batches, compiles and differentiates, while
`x[:, positions] = ...` mixes the rows of a batch and has no gradient in MLX 0.32. The decoder never gets a
padding mask, which would replace the causal one: pad rows at the end.
"""

from __future__ import annotations

from collections.abc import Container, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llama3v.compat import LlamaArgs, LlamaModel
from mlx_llama3v.config import ModelConfig, llama_config
from mlx_llama3v.lanes import cut
from mlx_llama3v.projector import Projector


class Llama3V(nn.Module):
    """A Llama decoder that takes visual tokens; `config` says what it is made of."""

    def __init__(self, config: ModelConfig) -> None:
        super().__init__()
        self.config = config
        self.projector = Projector(config.projector_config)
        self.language_model = LlamaModel(LlamaArgs.from_dict(llama_config(config.text_config)))

    @property
    def layers(self) -> list[nn.Module]:
        """The decoder's blocks (where mlx-lm looks for LoRA targets)."""
        return self.language_model.layers

    def make_cache(self) -> list[Any]:
        """An empty KV cache, one entry a block."""
        return self.language_model.make_cache()

    def embed(
        self,
        ids: mx.array,
        source: mx.array | None = None,
        patches: mx.array | None = None,
        grid: mx.array | None = None,
        num_tokens: int = 0,
    ) -> mx.array:
        """ids and source [B, L], patches [S, P, D_v], grid [S, 2] -> the decoder's input vectors [B, L, D].

        `source` is 0 for the id's own embedding, 1..8 for a marker, 9 + n for entry n of the batch's
        projected visual tokens, flattened to [S * num_tokens, D]. Without a source all is text.
        """
        text = self.language_model.model.embed_tokens(ids)
        if source is None:
            return text
        table = self.projector.markers.astype(text.dtype)
        if patches is not None and grid is not None:
            if self.config.projector_config.kind == "stored":
                visual = patches[:, :num_tokens].astype(text.dtype)
            else:
                visual = self.projector(patches.astype(text.dtype), grid, num_tokens)
            table = mx.concatenate([table, visual.reshape(-1, table.shape[-1])])
        other = mx.take(table, mx.maximum(source - 1, 0), axis=0)
        return mx.where((source > 0)[..., None], other, text)

    def hidden(
        self, inputs: mx.array, cache: list[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """ids [B, L], or vectors [B, L, D] in their place -> states after the final norm [B, L, D]."""
        return self.language_model.model(inputs, cache, input_embeddings)

    def train_hidden(
        self, vectors: mx.array, picks: mx.array, segments: mx.array | None = None, *, recompute: bool = False
    ) -> mx.array:
        """As `hidden` without a cache, for training: vectors [B, L, D] -> states [N, D] of the positions picked.

        picks [N] int32: flat positions b * L + i. The last block's MLP sees these alone: nothing reads the others.
        segments [B, L] int32: positions see those of their own segment alone. Rotary positions go on through all
        segments: attention depends on their differences only. `recompute`: a block keeps its input, and computes the
        rest again in the backward pass; not with dropout.
        """
        mask: Any = "causal"
        if segments is not None:
            order = mx.arange(segments.shape[1])
            mask = (segments[:, None, :, None] == segments[:, None, None, :]) & (order[:, None] >= order[None])
        *blocks, last = self.layers
        for layer in blocks:
            if recompute:
                vectors = cut(_recomputed(layer, vectors, mask))
            else:
                vectors = cut(vectors + layer.self_attn(layer.input_layernorm(vectors), mask, None))
                vectors = cut(vectors + layer.mlp(layer.post_attention_layernorm(vectors)))
        vectors = vectors + last.self_attn(last.input_layernorm(vectors), mask, None)
        states = mx.take(vectors.reshape(-1, vectors.shape[-1]), picks, axis=0)
        states = states + last.mlp(last.post_attention_layernorm(states))
        return self.language_model.model.norm(states)

    @property
    def vocab_size(self) -> int:
        """V."""
        return int(self.language_model.args.vocab_size)

    @property
    def head(self) -> nn.Module:
        """What makes logits: lm_head, or the embedding where they are tied."""
        tied = self.language_model.args.tie_word_embeddings
        return self.language_model.model.embed_tokens if tied else self.language_model.lm_head

    def logits(self, hidden: mx.array) -> mx.array:
        """States [..., D] -> logits [..., V]; give it only the rows that are needed."""
        if self.language_model.args.tie_word_embeddings:
            return self.language_model.model.embed_tokens.as_linear(hidden)
        return self.language_model.lm_head(hidden)

    def __call__(
        self, inputs: mx.array, cache: list[Any] | None = None, input_embeddings: mx.array | None = None
    ) -> mx.array:
        """ids [B, L], or vectors [B, L, D] in their place -> logits [B, L, V]; mlx-lm's own signature."""
        return self.logits(self.hidden(inputs, cache, input_embeddings))

    def sanitize(self, weights: dict[str, mx.array]) -> dict[str, mx.array]:
        """Drop what Llama files may carry and no module has: rotary tables, and the head where it is tied."""
        tied = self.language_model.args.tie_word_embeddings
        unused = ("language_model.lm_head.",) if tied else ()
        return {
            name: value
            for name, value in weights.items()
            if not name.endswith("rotary_emb.inv_freq") and not name.startswith(unused)
        }


def _recomputed(layer: nn.Module, vectors: mx.array, mask: Any) -> mx.array:
    """layer(vectors, mask) that is computed again for its gradient.

    Again, but not before the gradient of what follows is there, and its own gradients before those of what it follows:
    left alone, MLX (0.32, `mx.checkpoint`, too) computes all blocks again first, and saves little.

    It must not be random: MLX would draw other dropout masks the second time (its random state cannot be set).
    """
    learned: dict[str, mx.array] = dict(tree_flatten(layer.trainable_parameters()))

    def call(inputs: list[mx.array]) -> mx.array:
        layer.update(tree_unflatten(list(zip(learned, inputs[1:], strict=True))))
        return layer(inputs[0], mask)

    block = mx.custom_function(call)

    @block.vjp
    def back(inputs: list[mx.array], cotangent: mx.array, output: mx.array) -> list[Any]:
        again = mx.depends(inputs, [cotangent])
        _, (first, *others) = mx.vjp(lambda *values: call(list(values)), again, [cotangent])
        return [mx.depends(first, others) if others else first, *others]

    found: Any = block([vectors, *learned.values()])
    return found


def layer_setting(setting: Mapping[str, Any], name: str) -> dict[str, Any]:
    """Bits, group size and mode of one layer: the entry under its name, else the one for all."""
    base = {key: setting[key] for key in ("group_size", "bits")} | {"mode": setting.get("mode", "affine")}
    return {**base, **setting.get(name, {})}


def quantize_layers(
    module: nn.Module,
    setting: Mapping[str, Any],
    *,
    prefix: str = "",
    only: str = "",
    stored: Container[str] | None = None,
) -> None:
    """Quantize linear layers and embeddings in place, as `ModelConfig.quantization` says.

    `prefix` is what stands before the module's names in a model directory; `only` names that begin so are taken;
    `stored`: tensor names of a quantized checkpoint, only layers that have scales there are converted. Layers whose
    width is no multiple of the group are left.
    """

    def wanted(path: str, layer: nn.Module) -> bool | dict[str, Any]:
        if not path.startswith(only) or not hasattr(layer, "to_quantized"):
            return False
        own = layer_setting(setting, prefix + path)
        if layer.weight.shape[-1] % own["group_size"] or (
            stored is not None and f"{prefix}{path}.scales" not in stored
        ):
            return False
        return own

    nn.quantize(module, class_predicate=wanted)


def dequantized(weights: Mapping[str, mx.array], setting: Mapping[str, Any]) -> dict[str, mx.array]:
    """Tensors of a quantized checkpoint with each packed layer as the float32 matrix that it stands for; lazy."""
    plain = {}
    for name, value in weights.items():
        layer, _, part = name.rpartition(".")
        scales, biases = weights.get(f"{layer}.scales"), weights.get(f"{layer}.biases")
        if scales is None or part not in ("weight", "scales", "biases"):
            plain[name] = value
        elif part == "weight":
            if biases is not None:  # else the scales are exponents, of 4-bit floats
                scales, biases = scales.astype(mx.float32), biases.astype(mx.float32)
            plain[name] = mx.dequantize(value, scales, biases, **layer_setting(setting, layer), dtype=mx.float32)
    return plain


def quantize_decoder(
    model: Llama3V, *, bits: int = 4, group_size: int = 64, mode: str = "affine", stored: Container[str] | None = None
) -> dict[str, Any]:
    """Quantize the decoder alike throughout, in place; returns what `ModelConfig.quantization` keeps."""
    setting = {"group_size": group_size, "bits": bits, "mode": mode}
    quantize_layers(model, setting, only="language_model.", stored=stored)
    return setting
