"""One training step, compiled: gradients of a batch (summed, so that batches add up), then one update."""

from __future__ import annotations

from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map

from mlx_llama3v.data.batches import Batch
from mlx_llama3v.model import Llama3V
from mlx_llama3v.train.loss import loss_sum, weights
from mlx_llama3v.train.optim import mean_and_clip


class Step:
    """Gradient and update of what `model` has unfrozen."""

    def __init__(self, model: Llama3V, optimizer: Optimizer, clip: float = 0.0, compiled: bool = True) -> None:
        """`clip`: the largest global norm, 0 for none. The optimizer must be initialised."""
        self._model, self._optimizer, self._clip = model, optimizer, clip
        names = dict(tree_flatten(model.trainable_parameters()))
        self._inputs_learn = any(n.startswith("projector.") or "embed_tokens" in n for n in names)
        self._gradients, self._apply = self._sum_gradients, self._update
        if compiled:
            state = [model.state, optimizer.state]
            self._gradients = mx.compile(self._sum_gradients, [model.state, mx.random.state], mx.random.state)
            self._apply = mx.compile(self._update, state, state)

    def gradients(self, batch: Batch) -> tuple[mx.array, mx.array, Any]:
        """Lazy (summed loss, number of targets, summed gradients) of one batch."""
        return self._gradients(*arrays(batch))

    def update(self, gradients: Any, count: mx.array, learning_rate: float) -> mx.array:
        """One optimizer step with gradients summed over `count` targets; the norm of their mean (lazy)."""
        self._optimizer.learning_rate = learning_rate  # type: ignore[assignment]
        return self._apply(gradients, count)

    def _sum_gradients(
        self, ids: mx.array, targets: mx.array, supervised: mx.array, picks: mx.array, *inputs: Any
    ) -> tuple[mx.array, mx.array, Any]:
        model = self._model
        learned = model.trainable_parameters()
        # Frozen inputs are made outside the transformation: no gradient can flow there, and fused attention,
        # which MLX gives up inside one, stays.
        frozen = None if self._inputs_learn else model.embed(ids, *inputs)

        def loss(parameters: Any) -> mx.array:
            model.update(parameters)
            vectors = model.embed(ids, *inputs) if frozen is None else frozen
            return loss_sum(model, ids, vectors, targets, supervised, picks)

        value, gradients = mx.value_and_grad(loss)(learned)
        model.update(learned)  # the transformation left its own placeholders there
        return value, weights(supervised, picks).sum(), gradients

    def _update(self, gradients: Any, count: mx.array) -> mx.array:
        gradients, norm = mean_and_clip(gradients, count, self._clip)
        self._optimizer.update(self._model, gradients)
        return norm


def arrays(batch: Batch) -> tuple[Any, ...]:
    """What a step takes of a batch, in order; a compiled function takes no dataclass."""
    return (
        *(batch.ids, batch.targets, batch.supervised, batch.picks),
        *(batch.source, batch.patches, batch.grid, batch.num_tokens),
    )


def add(left: Any, right: Any) -> Any:
    """Sum of two gradient trees."""
    return tree_map(mx.add, left, right)
