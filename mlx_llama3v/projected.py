"""The projector's output instead of its input in the store: in stage sft the projector is frozen.

Visual tokens are fewer than patches (729 -> 81 for so400m/14-384 with the default projector), if wider; and a
training step then has no projector to run. Such a store serves one projector, which its manifest names.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import Encoded, ProjectorConfig, SliceLayout
from mlx_llama3v.errors import StoreError
from mlx_llama3v.projector import Projector, pack
from mlx_llama3v.tensors import digest, parameters
from mlx_llama3v.vision.pool import pool_picture, pooled_layout

_KINDS = ("attention", "linear", "mlp")  # one visual token a patch, or one a square of patches


class Projected:
    """`post` of a StoreWriter: pooling, where asked for, and a frozen projector."""

    def __init__(self, projector: Projector, config: ProjectorConfig, pool: int = 1) -> None:
        if config.kind not in _KINDS or config.num_tokens((4, 4)) != (-(-4 // shrinks_by(config))) ** 2:
            raise StoreError(f"the output of a {config.kind} projector has no form in a store; embed without it.")
        self._projector, self._config, self._pool = projector, config, pool

    def describe(self) -> dict[str, Any]:
        """See Post."""
        pool = {"pool": self._pool} if self._pool > 1 else {}
        return {**pool, "projector": projector_digest(self._projector)}

    def layout(self, layout: SliceLayout) -> SliceLayout:
        """See Post: a patch for every visual token."""
        return pooled_layout(pooled_layout(layout, self._pool), shrinks_by(self._config))

    def __call__(self, encoded: Encoded) -> Encoded:
        """[layout.patches, D_v] -> [tokens, D_llm], in a layout whose patches are the visual tokens."""
        layout = self.layout(encoded.layout)
        encoded = pool_picture(encoded, self._pool)
        packed = pack([[encoded]], self._config)
        assert packed is not None  # a picture has at least one slice
        tokens = self._projector(mx.array(packed.patches), mx.array(packed.grid), packed.num_tokens)
        rows = np.array(tokens.astype(mx.float32)).reshape(-1, tokens.shape[-1])[packed.tables[0]]
        return Encoded(layout, rows)


def shrinks_by(config: ProjectorConfig) -> int:
    """Patches along a side for which the projector gives one visual token."""
    return config.pool if config.kind == "attention" else 1


def projector_digest(projector: Projector) -> str:
    """Identity of a projector's weights."""
    return digest(parameters(projector))


def stored_config(config: ProjectorConfig) -> ProjectorConfig:
    """What a model reads such a store with: every stored row is a visual token."""
    return replace(config, kind="stored", in_dim=config.out_dim)
