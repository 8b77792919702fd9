"""From SigLIP's patch embeddings to the decoder's width: the part that stage 1 trains.

`attention` (default): linear in, 2-D positions, two pre-norm self-attention blocks over one slice's patches,
spatial average pooling, norm, linear out. `linear` and `mlp` are LLaVA's and LLaVA-1.5's. All share one
interface and keep every shape static, so that a training step compiles; slices of different grids share a
batch, padded at the end, and no slice's result depends on its padding or its neighbours.

Parameters are float32; products run in the dtype of the input.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from mlx_llama3v.config import MARKERS, Encoded, ProjectorConfig, SliceLayout
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.kernels import affine, attend
from mlx_llama3v.lanes import cut
from mlx_llama3v.resampler import Downsample, Resampler
from mlx_llama3v.text.prompt import FIRST_VISUAL

# Where the gain of the attention projector's last norm starts. LLaVA's projectors take SigLIP's states as they are, an
# order of magnitude larger than a norm's output, and Adam moves a weight by its rate whatever comes in: behind a gain
# of 1 `linear_out` learned that much slower, and when a run began to see hung on its seed (benchmarks/projectors.py).
_GAIN = 8.0


class Linear(nn.Linear):
    """float32 parameters, computing in the input's dtype."""

    def __call__(self, x: mx.array) -> mx.array:
        return affine(x, self.weight.astype(x.dtype), self.bias.astype(x.dtype))


class LayerNorm(nn.LayerNorm):
    """float32 parameters, computing in the input's dtype."""

    def __call__(self, x: mx.array) -> mx.array:
        return mx.fast.layer_norm(x, self.weight.astype(x.dtype), self.bias.astype(x.dtype), self.eps)


class Block(nn.Module):
    """Pre-norm self-attention over the patches of one slice, then an MLP of four times the width.

    The MLP's activation is a squared ReLU (So et al. 2021): on MLX's CPU back end erf takes twenty nanoseconds an
    element, a hundred times a product, and GELU with its gradient was a large part of a training step.
    """

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        width = config.hidden_dim
        self.num_heads = config.num_heads
        self.norm1 = LayerNorm(width, eps=config.layer_norm_eps)
        self.q_proj = Linear(width, width)
        self.k_proj = Linear(width, width)
        self.v_proj = Linear(width, width)
        self.out_proj = Linear(width, width)
        self.norm2 = LayerNorm(width, eps=config.layer_norm_eps)
        self.fc1 = Linear(width, 4 * width)
        self.fc2 = Linear(4 * width, width)
        # A block starts as the identity, so that the projector starts as a linear one and learns as fast.
        for layer in (self.out_proj, self.fc2):
            layer.weight, layer.bias = mx.zeros_like(layer.weight), mx.zeros_like(layer.bias)

    def __call__(self, x: mx.array, mask: mx.array) -> mx.array:
        """[S, P, H] and a bool mask over patches [S, P] -> [S, P, H]."""
        y = self.norm1(x)
        y = attend(self.q_proj(y), self.k_proj(y), self.v_proj(y), self.num_heads, mask)
        x = cut(x + self.out_proj(y))
        return cut(x + self.fc2(nn.relu2(self.fc1(self.norm2(x)))))


class AttentionProjector(nn.Module):
    """Self-attention over a slice, then `pool` x `pool` average pooling (729 patches -> 81 tokens)."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        if config.hidden_dim % 4 or config.hidden_dim % config.num_heads:
            raise CheckpointError(
                f"projector_config: hidden_dim is {config.hidden_dim} with {config.num_heads} heads; "
                "expected a multiple of 4 and of the heads."
            )
        self.pool = config.pool
        self.linear_in = Linear(config.in_dim, config.hidden_dim)
        self.blocks = [Block(config) for _ in range(config.num_layers)]
        self.norm = LayerNorm(config.hidden_dim, eps=config.layer_norm_eps)
        self.norm.weight = _GAIN * self.norm.weight
        self.linear_out = Linear(config.hidden_dim, config.out_dim)

    def __call__(self, patches: mx.array, grid: mx.array, num_tokens: int) -> mx.array:
        rows, cols, valid = patch_positions(grid, patches.shape[1])
        x = self.linear_in(patches)
        x = x + sincos_positions(rows, cols, x.shape[-1]).astype(x.dtype)
        for block in self.blocks:
            x = block(x, valid)
        window = rows // self.pool * -(-grid[:, 1:] // self.pool) + cols // self.pool
        x = average(x, window, valid, num_tokens)
        return self.linear_out(self.norm(x))


class LinearProjector(nn.Module):
    """One linear map a patch (LLaVA)."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.linear = Linear(config.in_dim, config.out_dim)
        self._skip = config.skip

    def __call__(self, patches: mx.array, grid: mx.array, num_tokens: int) -> mx.array:
        return self.linear(patches[:, self._skip : self._skip + num_tokens])


class MLPProjector(nn.Module):
    """Two linear maps with exact (erf) GELU between (LLaVA-1.5, Bunny)."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        self.linear_1 = Linear(config.in_dim, config.out_dim)
        self.linear_2 = Linear(config.out_dim, config.out_dim)
        self._skip = config.skip

    def __call__(self, patches: mx.array, grid: mx.array, num_tokens: int) -> mx.array:
        return self.linear_2(nn.gelu(self.linear_1(patches[:, self._skip : self._skip + num_tokens])))


_KINDS = {
    "attention": AttentionProjector,
    "linear": LinearProjector,
    "mlp": MLPProjector,
    "resampler": Resampler,
    "downsample": Downsample,
}


class Projector(nn.Module):
    """A projector of the configured kind, and the vectors of the eight MARKERS (`markers` [8, out_dim])."""

    def __init__(self, config: ProjectorConfig) -> None:
        super().__init__()
        if config.kind not in _KINDS:
            raise CheckpointError(f"projector kind is {config.kind!r}; expected one of {', '.join(_KINDS)}.")
        self.markers = mx.random.normal((len(MARKERS), config.out_dim), scale=0.02)
        self.body = _KINDS[config.kind](config)

    def __call__(self, patches: mx.array, grid: mx.array, num_tokens: int) -> mx.array:
        """patches [S, P, in_dim], padded at the end, grid [S, 2] int32 -> [S, num_tokens, out_dim].

        `grid` is (rows, columns) of each slice; `num_tokens` is the most visual tokens of any slice in
        the batch (`ProjectorConfig.num_tokens`); what follows a slice's own tokens must not be read.
        """
        return self.body(patches, grid, num_tokens)


def patch_positions(grid: mx.array, length: int) -> tuple[mx.array, mx.array, mx.array]:
    """grid [S, 2] -> row and column of each of `length` patches [S, P] int32, and which exist [S, P] bool.

    A slice of no patches (padding of a batch) counts as one of one patch: a softmax over nothing may be NaN,
    and NaN times a zero gradient would reach every weight.
    """
    height, width = mx.maximum(grid[:, :1], 1), mx.maximum(grid[:, 1:], 1)
    index = mx.arange(length, dtype=mx.int32)[None]
    return index // width, index % width, index < height * width


def sincos_positions(rows: mx.array, cols: mx.array, width: int) -> mx.array:
    """Fixed 2-D sin-cos positions (MAE's): rows and cols [S, P] -> [S, P, width], rows in the first half."""
    quarter = width // 4
    frequencies = mx.exp(mx.arange(quarter) * (-math.log(10000.0) / quarter))
    angles = mx.arange(rows.shape[1])[:, None] * frequencies
    table = mx.concatenate([mx.sin(angles), mx.cos(angles)], axis=1)  # no row or column exceeds P patches
    last = rows.shape[1] - 1
    return mx.concatenate([table[mx.minimum(rows, last)], table[mx.minimum(cols, last)]], axis=-1)


def average(x: mx.array, window: mx.array, valid: mx.array, num_tokens: int) -> mx.array:
    """Mean over the valid patches of each window: x [S, P, H], window [S, P] -> [S, num_tokens, H].

    As a product with a matrix, since the windows differ from slice to slice while shapes must not.
    """
    member = (window[:, None] == mx.arange(num_tokens)[:, None]) & valid[:, None]  # [S, T, P]
    weights = member.astype(x.dtype)
    return (weights @ x) / mx.maximum(weights.sum(-1, keepdims=True), 1)


class Places(NamedTuple):
    """Where the slices of a batch of rows, one after the other, put their visual tokens."""

    grid: np.ndarray  # int32 [S, 2]
    num_tokens: int  # room that each slice has
    tables: list[np.ndarray]  # one a row: where its k-th visual token lies in the flat [S * num_tokens]


class Slices(NamedTuple):
    """The slices of a batch of rows, as the projector takes them (see `pack`)."""

    patches: np.ndarray  # float32 [S, P, D_v], zero padded
    grid: np.ndarray  # int32 [S, 2]
    num_tokens: int
    tables: list[np.ndarray]  # see Places

    def place(self, row: int, source: np.ndarray) -> np.ndarray:
        """`Rendered.source` of batch row `row` -> what `Llama3V.embed` takes: the batch's visual tokens."""
        placed = source.copy()
        visual = source >= FIRST_VISUAL
        placed[visual] = FIRST_VISUAL + self.tables[row][source[visual] - FIRST_VISUAL]
        return placed


def pack(rows: Sequence[Sequence[Encoded]], config: ProjectorConfig) -> Slices | None:
    """Put the pictures of every row into one padded batch of slices; None where no row has a picture."""
    pictures = [picture for row in rows for picture in row]
    if not pictures:
        return None
    found = places([[picture.layout for picture in row] for row in rows], config)
    layouts = [picture.layout for picture in pictures]
    longest = int(found.grid.prod(1).max())
    values = [picture.patches.astype(np.float32, copy=False) for picture in pictures]
    return Slices(pad_slices(values, layouts, len(found.grid), longest), *found)


def places(rows: Sequence[Sequence[SliceLayout]], config: ProjectorConfig) -> Places:
    """Where the pictures of every row put their visual tokens; there is at least one picture."""
    grids = [grid for layouts in rows for layout in layouts for grid in layout.grids]
    counts = [config.num_tokens(grid) for grid in grids]
    num_tokens = max(counts)
    tables, first = [], 0
    for layouts in rows:
        last = first + sum(len(layout.grids) for layout in layouts)
        spans = [np.arange(counts[s]) + s * num_tokens for s in range(first, last)]
        tables.append(np.concatenate([np.zeros(0, np.int64), *spans]).astype(np.int32))
        first = last
    return Places(np.array(grids, np.int32), num_tokens, tables)


def pad_slices(values: Sequence[np.ndarray], layouts: Sequence[SliceLayout], S: int, P: int) -> np.ndarray:
    """Rows of pictures, slice after slice ([layout.patches, C] each) -> [S, P, C], zero padded, of their own dtype."""
    padded = np.zeros((S, P, *values[0].shape[1:]), values[0].dtype)
    s = 0
    for rows, layout in zip(values, layouts, strict=True):
        start = 0
        for h, w in layout.grids:
            padded[s, : h * w] = rows[start : start + h * w]
            s, start = s + 1, start + h * w
    return padded
