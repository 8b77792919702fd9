"""Projectors of finished models that make fewer tokens than patches: MiniCPM-V's resampler and VILA's 2x2 shuffle.

Parameters are float32; products run in the dtype of the input, as in projector.py. Padding is masked, so no slice's
result depends on its neighbours.
"""

from __future__ import annotations

import math

import mlx.core as mx
import mlx.nn as nn

from mlx_llama3v.config import ProjectorConfig


def _linear(x: mx.array, weight: mx.array, bias: mx.array) -> mx.array:
    return mx.addmm(bias.astype(x.dtype), x, weight.T.astype(x.dtype))


def _norm(x: mx.array, layer: nn.LayerNorm) -> mx.array:
    return mx.fast.layer_norm(x, layer.weight.astype(x.dtype), layer.bias.astype(x.dtype), layer.eps)


class Attention(nn.Module):
    """torch's nn.MultiheadAttention: q, k and v in one matrix."""

    def __init__(self, width: int) -> None:
        super().__init__()
        bound = math.sqrt(1 / width)
        self.in_proj_weight = mx.random.uniform(-bound, bound, (3 * width, width))
        self.in_proj_bias = mx.zeros((3 * width,))
        self.out_proj = nn.Linear(width, width)


class Resampler(nn.Module):
    """`queries` learned vectors read a slice's patches by cross-attention; keys carry 2-D sin-cos positions.

    Heads are 128 wide where the width allows, else `num_heads` says how many. `proj` is applied from the right, as
    MiniCPM-V stores it.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        width = config.out_dim
        self._heads = config.num_heads
        self.query = mx.random.normal((config.queries, width), scale=0.02)
        self.kv_proj = nn.Linear(config.in_dim, width, bias=False)
        self.attn = Attention(width)
        self.ln_q = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ln_kv = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.ln_post = nn.LayerNorm(width, eps=config.layer_norm_eps)
        self.proj = mx.random.normal((width, width), scale=width**-0.5)

    def __call__(self, patches: mx.array, grid: mx.array, num_tokens: int) -> mx.array:
        """See Projector."""
        S, P, _ = patches.shape
        width, dtype = self.query.shape[1], patches.dtype
        height, columns = mx.maximum(grid[:, :1], 1), mx.maximum(grid[:, 1:], 1)
        index = mx.arange(P, dtype=mx.int32)[None]
        kv = _norm(patches @ self.kv_proj.weight.T.astype(dtype), self.ln_kv)
        key = kv + _positions(index // columns, index % columns, width).astype(dtype)
        query = _norm(self.query.astype(dtype), self.ln_q)
        weight, bias = self.attn.in_proj_weight, self.attn.in_proj_bias
        parts = [slice(n * width, (n + 1) * width) for n in range(3)]
        q, k, v = (
            _linear(x, weight[at], bias[at]).reshape(-1, x.shape[-2], self._heads, width // self._heads)
            for x, at in zip((query, key, kv), parts, strict=True)
        )
        q = mx.broadcast_to(q, (S, *q.shape[1:]))
        q, k, v = (x.transpose(0, 2, 1, 3) for x in (q, k, v))
        mask = (index < height * columns)[:, None, None]
        x = mx.fast.scaled_dot_product_attention(q, k, v, scale=(width // self._heads) ** -0.5, mask=mask)
        x = x.transpose(0, 2, 1, 3).reshape(S, -1, width)
        x = _linear(x, self.attn.out_proj.weight, self.attn.out_proj.bias)
        return _norm(x, self.ln_post) @ self.proj.astype(dtype)


def _positions(rows: mx.array, cols: mx.array, width: int) -> mx.array:
    """MAE's 2-D sin-cos, columns in the first half: rows and cols [S, P] -> [S, P, width]."""
    quarter = width // 4
    omega = mx.exp(mx.arange(quarter) * (-math.log(10000.0) / quarter))

    def along(at: mx.array) -> mx.array:
        angles = at[..., None].astype(mx.float32) * omega
        return mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=-1)

    return mx.concatenate([along(cols), along(rows)], axis=-1)


class Downsample(nn.Module):
    """VILA's mlp_downsample: 2 x 2 patches side by side, norm, two linear maps with erf GELU between.

    Its token grid is transposed (columns outside, rows inside), and an odd grid gets a row and a column of zeros.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(4 * config.in_dim, eps=config.layer_norm_eps)
        self.linear_1 = nn.Linear(4 * config.in_dim, config.out_dim)
        self.linear_2 = nn.Linear(config.out_dim, config.out_dim)

    def __call__(self, patches: mx.array, grid: mx.array, num_tokens: int) -> mx.array:
        """See Projector."""
        height, width = grid[:, :1], grid[:, 1:]
        token = mx.arange(num_tokens, dtype=mx.int32)[None]
        blocks = mx.maximum((height + 1) // 2, 1)
        col, row = 2 * (token // blocks), 2 * (token % blocks)
        found = [
            self._at(patches, row + r, col + c, height, width) for r in (0, 1) for c in (0, 1)
        ]  # (r0,c0), (r0,c1), (r1,c0), (r1,c1)
        x = _norm(mx.concatenate(found, axis=-1), self.norm)
        x = nn.gelu(_linear(x, self.linear_1.weight, self.linear_1.bias))
        return _linear(x, self.linear_2.weight, self.linear_2.bias)

    @staticmethod
    def _at(patches: mx.array, row: mx.array, col: mx.array, height: mx.array, width: mx.array) -> mx.array:
        inside = (row < height) & (col < width)
        index = mx.where(inside, row * width + col, 0)
        values = mx.take_along_axis(patches, index[..., None], axis=1)
        return mx.where(inside[..., None], values, 0)
