"""SigLIP in MLX: the vision tower, the text tower, and the pair with its sigmoid score (Zhai et al. 2023).

The tower takes patches, not pixels: a slice is a list of flattened patches with one position vector each, so
slices of any shape batch together, padded and masked. Attribute names follow Hugging Face's keys; `sanitize`
brings every released layout of the weights to them. SigLIP 2 at fixed resolution is the same network.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import lru_cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_llama3v.config import Grid, SiglipTextConfig, VisionConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.kernels import affine, attend, gelu_tanh
from mlx_llama3v.lanes import cut

_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    "gelu_pytorch_tanh": gelu_tanh,  # every released SigLIP; nn.gelu_fast_approx is another function
    "gelu": nn.gelu,
}


def _activation(name: str) -> Callable[[mx.array], mx.array]:
    if name not in _ACTIVATIONS:
        raise CheckpointError(f"hidden_act is {name!r}, expected one of {', '.join(_ACTIVATIONS)}.")
    return _ACTIVATIONS[name]


class Linear(nn.Linear):
    def __call__(self, x: mx.array) -> mx.array:
        return affine(x, self.weight, self.bias)


class Attention(nn.Module):
    def __init__(self, dims: int, heads: int):
        super().__init__()
        if dims % heads:
            raise CheckpointError(
                f"a SigLIP tower {dims} wide cannot have {heads} heads; expected num_attention_heads in config.json "
                "(left out, it is 12, as in transformers)."
            )
        self.heads = heads
        self.q_proj = Linear(dims, dims)
        self.k_proj = Linear(dims, dims)
        self.v_proj = Linear(dims, dims)
        self.out_proj = Linear(dims, dims)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, mask))


class MLP(nn.Module):
    def __init__(self, config: VisionConfig | SiglipTextConfig):
        super().__init__()
        self.activation = _activation(config.hidden_act)
        self.fc1 = Linear(config.hidden_size, config.intermediate_size)
        self.fc2 = Linear(config.intermediate_size, config.hidden_size)

    def __call__(self, x: mx.array) -> mx.array:
        return self.fc2(self.activation(self.fc1(x)))


class Block(nn.Module):
    def __init__(self, config: VisionConfig | SiglipTextConfig):
        super().__init__()
        self.layer_norm1 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.self_attn = Attention(config.hidden_size, config.num_attention_heads)
        self.layer_norm2 = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        x = cut(x + self.self_attn(self.layer_norm1(x), mask))
        return cut(x + self.mlp(self.layer_norm2(x)))


class Encoder(nn.Module):
    def __init__(self, config: VisionConfig | SiglipTextConfig):
        super().__init__()
        self.layers = [Block(config) for _ in range(config.num_hidden_layers)]

    def __call__(self, x: mx.array, mask: mx.array | None = None, layer: int = -1) -> mx.array:
        """`hidden_states[layer]` in Hugging Face's counting: 0 is the input, -1 the last block's output."""
        count = len(self.layers)
        if not -count - 1 <= layer <= count:
            raise CheckpointError(f"layer {layer} was asked of a tower with hidden states 0 to {count}.")
        for block in self.layers[: layer % (count + 1)]:
            x = block(x, mask)
        return x


class PoolingAttention(nn.Module):
    """torch's nn.MultiheadAttention with its fused projection: rows of q, k and v in one matrix."""

    def __init__(self, dims: int, heads: int):
        super().__init__()
        self.heads = heads
        bound = math.sqrt(1 / dims)
        self.in_proj_weight = mx.random.uniform(-bound, bound, (3 * dims, dims))
        self.in_proj_bias = mx.zeros((3 * dims,))
        self.out_proj = Linear(dims, dims)

    def __call__(self, query: mx.array, x: mx.array, mask: mx.array | None) -> mx.array:
        D = x.shape[-1]
        weight, bias = self.in_proj_weight, self.in_proj_bias
        q = query @ weight[:D].T + bias[:D]
        k, v = mx.split(x @ weight[D:].T + bias[D:], 2, axis=-1)
        return self.out_proj(attend(q, k, v, self.heads, mask))


class PoolingHead(nn.Module):
    """One learned query reads the whole slice ("MAP" head); it has no residual from the query."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.probe = mx.random.normal((1, 1, config.hidden_size))
        self.attention = PoolingAttention(config.hidden_size, config.num_attention_heads)
        self.layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.mlp = MLP(config)

    def __call__(self, x: mx.array, mask: mx.array | None = None) -> mx.array:
        """[S, P, D] -> [S, D]."""
        probe = mx.broadcast_to(self.probe, (x.shape[0], *self.probe.shape[1:]))
        x = self.attention(probe, x, mask)
        return (x + self.mlp(self.layernorm(x)))[:, 0]


class PatchEmbeddings(nn.Module):
    def __init__(self, config: VisionConfig):
        super().__init__()
        patch = config.patch_size**2 * config.num_channels
        self.patch_embedding = Linear(patch, config.hidden_size)
        self.position_embedding = nn.Embedding(config.grid**2, config.hidden_size)


class VisionTower(nn.Module):
    """SigLIP's image encoder over patches; see `position_table` for the positions of a slice."""

    def __init__(self, config: VisionConfig):
        super().__init__()
        self.config = config
        self.embeddings = PatchEmbeddings(config)
        self.encoder = Encoder(config)
        self.post_layernorm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        if config.vision_use_head:
            self.head = PoolingHead(config)

    def __call__(
        self, patches: mx.array, positions: mx.array, mask: mx.array | None = None, layer: int = -1
    ) -> mx.array:
        """`hidden_states[layer]` as Hugging Face counts them: [S, P, D], before `post_layernorm`.

        patches [S, P, p*p*3] in the order of `encode.patchify`; positions [S, P, D]; mask [S, P] bool, False
        on padding, whose outputs mean nothing. Blocks after `layer` are not run.
        """
        dtype = self.post_layernorm.weight.dtype
        x = self.embeddings.patch_embedding(patches.astype(dtype)) + positions.astype(dtype)
        return self.encoder(x, mask, layer)

    def last_hidden_state(
        self, patches: mx.array, positions: mx.array, mask: mx.array | None = None, layer: int = -1
    ) -> mx.array:
        """`post_layernorm` of the call's result: [S, P, D]; what MiniCPM-V and the pooling head read."""
        return self.post_layernorm(self(patches, positions, mask, layer))

    def pooled(self, patches: mx.array, positions: mx.array, mask: mx.array | None = None) -> mx.array:
        """One vector a slice, [S, D], for `SiglipModel.logits`. Raises CheckpointError without a head."""
        if not self.config.vision_use_head:
            raise CheckpointError("this vision tower has no pooling head (vision_use_head is false).")
        return self.head(self.last_hidden_state(patches, positions, mask), mask)


class TextEmbeddings(nn.Module):
    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.token_embedding = nn.Embedding(config.vocab_size, config.hidden_size)
        self.position_embedding = nn.Embedding(config.max_position_embeddings, config.hidden_size)


class TextTower(nn.Module):
    """SigLIP's text encoder. It reads the last position and attends to padding: pad to the full length."""

    def __init__(self, config: SiglipTextConfig):
        super().__init__()
        self.config = config
        self.embeddings = TextEmbeddings(config)
        self.encoder = Encoder(config)
        self.final_layer_norm = nn.LayerNorm(config.hidden_size, eps=config.layer_norm_eps)
        self.head = Linear(config.hidden_size, config.projection_size or config.hidden_size)

    def __call__(self, ids: mx.array) -> mx.array:
        """ids [B, T], padded to `max_position_embeddings` as in training -> [B, projection_size]."""
        x = self.embeddings.token_embedding(ids)
        x = x + self.embeddings.position_embedding.weight[: ids.shape[1]]
        x = self.final_layer_norm(self.encoder(x))
        return self.head(x[:, -1])


class SiglipModel(nn.Module):
    """Both towers and the two scalars that turn their cosine into the logit of "text fits image"."""

    def __init__(self, vision: VisionConfig, text: SiglipTextConfig):
        super().__init__()
        self.vision_model = VisionTower(vision)
        self.text_model = TextTower(text)
        self.logit_scale = mx.zeros((1,))
        self.logit_bias = mx.zeros((1,))

    def logits(self, image_embeds: mx.array, text_embeds: mx.array) -> mx.array:
        """Pooled images [I, D] and texts [T, D], not normalised -> logits [I, T]; `mx.sigmoid` of them, not
        softmax, is the probability of each pair."""
        images = image_embeds / mx.linalg.norm(image_embeds, axis=-1, keepdims=True)
        texts = text_embeds / mx.linalg.norm(text_embeds, axis=-1, keepdims=True)
        return (images @ texts.T) * mx.exp(self.logit_scale) + self.logit_bias


def sigmoid_loss(logits_per_text: mx.array, labels: mx.array | None = None) -> mx.array:
    """SigLIP's pairwise loss: each (text, image) pair is a yes/no question of its own.

    logits_per_text [T, I] (the transpose of `SiglipModel.logits`); labels [T, I] are 1 for pairs that belong
    together, -1 for those that do not, 0 for those that nobody knows (no loss); by default the diagonal belongs
    together. Summed over all pairs, divided by the number of images.
    """
    texts, images = logits_per_text.shape
    labels = 2 * mx.eye(texts, images) - 1 if labels is None else labels
    return -(nn.log_sigmoid(labels * logits_per_text) * mx.abs(labels)).sum() / images


def position_table(tower: VisionTower, grid: Grid) -> mx.array:
    """Position vectors of a slice of `grid` patches, [h*w, D] in reading order.

    The native square is the table itself; any other grid resamples it bicubically, equal to transformers'
    `interpolate_pos_encoding=True` (torch's interpolate: align_corners=False, no antialiasing).
    """
    table, native = tower.embeddings.position_embedding.weight, tower.config.grid
    if grid == (native, native):
        return table
    h, w = grid
    down, across = mx.array(_bicubic(h, native)), mx.array(_bicubic(w, native))
    rows = down @ table.astype(mx.float32).reshape(native, -1)  # [h, native * D]
    cells = across @ rows.reshape(h, native, -1)  # [h, w, D]
    return cells.reshape(h * w, -1).astype(table.dtype)


@lru_cache(maxsize=512)
def _bicubic(out: int, size: int) -> np.ndarray:
    """Matrix [out, size] of cubic resampling in one dimension, a = -0.75 and borders repeated as in torch."""
    a = -0.75
    at = (np.arange(out) + 0.5) * size / out - 0.5
    first = np.floor(at).astype(int)
    matrix = np.zeros((out, size))
    for tap in (-1, 0, 1, 2):
        d = np.abs(at - (first + tap))
        near = (a + 2) * d**3 - (a + 3) * d**2 + 1
        far = a * d**3 - 5 * a * d**2 + 8 * a * d - 4 * a
        weight = np.where(d <= 1, near, far)
        np.add.at(matrix, (np.arange(out), np.clip(first + tap, 0, size - 1)), weight)
    return matrix.astype(np.float32)


_BARE = ("embeddings.", "encoder.", "post_layernorm.", "head.")


def sanitize(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """Weights of any SigLIP checkpoint under `SiglipModel`'s names; idempotent.

    Takes the three layouts of transformers: a full model, and a vision tower with or without `vision_model.`.
    The patch convolution (torch's [D, 3, p, p] or MLX's [D, p, p, 3]) becomes a matrix [D, p*p*3];
    `position_ids` buffers of old files are dropped.
    """
    renamed = {}
    for key, value in weights.items():
        if key.endswith("position_ids"):
            continue
        if key.startswith(_BARE):
            key = f"vision_model.{key}"
        if key.endswith("embeddings.patch_embedding.weight") and value.ndim == 4:
            value = value if value.shape[-1] == 3 else value.transpose(0, 2, 3, 1)
            value = value.reshape(value.shape[0], -1)
        renamed[key] = value
    return renamed


def tower_weights(weights: Mapping[str, mx.array]) -> dict[str, mx.array]:
    """The vision tower's part of `sanitize(weights)`, under `VisionTower`'s own names."""
    prefix = "vision_model."
    return {k.removeprefix(prefix): v for k, v in sanitize(weights).items() if k.startswith(prefix)}
