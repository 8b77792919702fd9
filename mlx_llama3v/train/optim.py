"""AdamW in float32, a learning rate that is a pure function of the step, clipping by the global norm."""

from __future__ import annotations

import math
from typing import Any

import mlx.core as mx
from mlx.optimizers import AdamW, MultiOptimizer, Optimizer
from mlx.utils import tree_flatten, tree_map


def learning_rate(step: int, steps: int, peak: float, warmup: float = 0.0, floor: float = 0.0) -> float:
    """Learning rate of `step` (from 0) of `steps`: a linear rise over the share `warmup`, then a cosine.

    The first step learns already, the last of the rise reaches `peak`, the cosine ends at `floor` * `peak`.
    """
    rise = math.ceil(warmup * steps)
    if step < rise:
        return peak * (step + 1) / rise
    done = (step - rise) / max(1, steps - rise)
    return peak * (floor + (1 - floor) * 0.5 * (1 + math.cos(math.pi * min(1.0, done))))


def adamw(weight_decay: float, *, two_rates: bool = False) -> Optimizer:
    """AdamW with the usual bias correction (MLX leaves it out by default); `set_rates` before every step.

    `two_rates`: the projector has a learning rate of its own.
    """

    def one() -> AdamW:
        return AdamW(learning_rate=0.0, betas=[0.9, 0.999], eps=1e-8, weight_decay=weight_decay, bias_correction=True)

    return MultiOptimizer([one(), one()], [lambda name, _: name.startswith("projector.")]) if two_rates else one()


def set_rates(optimizer: Optimizer, rate: float, projector: float) -> None:
    """Learning rates of the next step; that of the projector counts where it has its own."""
    if isinstance(optimizer, MultiOptimizer):
        for one, value in zip(optimizer.optimizers, (projector, rate), strict=True):
            one.learning_rate = value
    else:
        optimizer.learning_rate = rate  # type: ignore[assignment]


def mean_norm(gradients: Any, count: mx.array) -> mx.array:
    """Global norm of summed gradients after division by `count`; 0 where there is no target."""
    squares = [mx.square(g).sum() for g in dict(tree_flatten(gradients)).values()]
    return mx.sqrt(mx.stack(squares).sum()) / mx.maximum(count, 1)


def mean_and_clip(gradients: Any, count: mx.array, norm: mx.array, limit: float) -> Any:
    """Summed gradients -> mean over `count`, clipped to the global norm `limit` (0: not); `norm` is `mean_norm`.

    One factor does both, so that the gradients are read once.
    """
    factor = 1 / mx.maximum(count, 1)
    if limit > 0:
        factor = factor * mx.minimum(1.0, limit / (norm + 1e-6))
    return tree_map(lambda g: g * factor, gradients)
