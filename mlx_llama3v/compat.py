"""Every import from mlx-lm, in one place: what this package takes from it, and what it must undo.

`import mlx_lm` sets the limits on open files to (2048, 4096): welcome on macOS, where the soft limit starts
at 256, but elsewhere it takes away, for good, what an embedding store of many shards needs. So that one call
is let through only where it raises the limit.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager

import mlx.nn as nn


@contextmanager
def _file_limit_only_raised() -> Iterator[None]:
    if sys.platform == "win32":
        yield
        return
    import resource

    setrlimit = resource.setrlimit

    def raise_only(which: int, limits: tuple[int, int]) -> None:
        soft, hard = resource.getrlimit(which)
        if soft != resource.RLIM_INFINITY and soft < limits[0]:
            setrlimit(which, (limits[0] if hard == resource.RLIM_INFINITY else min(limits[0], hard), hard))

    resource.setrlimit = raise_only
    try:
        yield
    finally:
        resource.setrlimit = setrlimit


with _file_limit_only_raised():
    from mlx_lm.generate import generate_step, maybe_quantize_kv_cache
    from mlx_lm.models.cache import BatchKVCache, KVCache
    from mlx_lm.models.llama import Model as LlamaModel
    from mlx_lm.models.llama import ModelArgs as LlamaArgs
    from mlx_lm.sample_utils import apply_min_p, apply_top_k, apply_top_p, make_logits_processors
    from mlx_lm.tuner.dora import DoRALinear
    from mlx_lm.tuner.lora import LoRALinear
    from mlx_lm.tuner.utils import linear_to_lora_layers
    from mlx_lm.utils import quantize_model


def _dora_from_base(linear: nn.Module, r: int = 8, dropout: float = 0.0, scale: float = 20.0) -> DoRALinear:
    """DoRALinear.from_base; mlx-lm's counts the inputs of a layer of 3, 5 or 6 bits wrongly (as 32 // bits a word)."""
    outputs, inputs = linear.weight.shape
    if isinstance(linear, nn.QuantizedLinear):
        inputs = inputs * 32 // linear.bits
    made = DoRALinear(input_dims=inputs, output_dims=outputs, r=r, dropout=dropout, scale=scale)
    made.set_linear(linear)
    return made


DoRALinear.from_base = staticmethod(_dora_from_base)  # type: ignore[method-assign]  # linear_to_lora_layers calls it

__all__ = [
    "BatchKVCache",
    "DoRALinear",
    "KVCache",
    "LlamaArgs",
    "LlamaModel",
    "LoRALinear",
    "apply_min_p",
    "apply_top_k",
    "apply_top_p",
    "generate_step",
    "linear_to_lora_layers",
    "make_logits_processors",
    "maybe_quantize_kv_cache",
    "quantize_model",
]
