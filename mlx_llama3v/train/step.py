"""One training step: gradients of a batch (summed, so that batches add up), then one update."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import mlx.core as mx
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map

from mlx_llama3v.data.batches import Batch
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import device_name
from mlx_llama3v.train.loss import loss_sum, weights
from mlx_llama3v.train.optim import mean_and_clip, mean_norm, set_rates


class Step:
    """Gradient and update of what `model` has unfrozen."""

    def __init__(
        self,
        model: Llama3V,
        optimizer: Optimizer,
        clip: float = 0.0,
        compiled: bool = True,
        recompute: bool = False,
        dtype: mx.Dtype = mx.float32,
    ) -> None:
        """`clip`: the largest global norm, 0 for none; `dtype`: see `Trainable`. The optimizer must be initialised."""
        self._model, self._optimizer, self._clip, self._recompute = model, optimizer, clip, recompute
        self._dtype = dtype
        names = dict(tree_flatten(model.trainable_parameters()))
        self._inputs_learn = any(n.startswith("projector.") or "embed_tokens" in n for n in names)
        self._gradients, self._apply = self._sum_gradients, self._update
        if compiled:
            self._gradients = mx.compile(self._sum_gradients, [model.state, mx.random.state], mx.random.state)
        # On a CPU AdamW is a dozen passes over each weight, on one core; one loop of them all takes a quarter of that.
        if compiled or device_name() == "cpu":
            state = [model.state, optimizer.state]
            self._apply = mx.compile(self._update, state, state)

    def gradients(self, batch: Batch) -> tuple[mx.array, mx.array, Any]:
        """Lazy (summed loss, number of targets, summed gradients) of one batch."""
        return self._gradients(*arrays(batch))

    def nothing(self) -> tuple[mx.array, mx.array, Any]:
        """What a rank without rows adds."""
        return mx.array(0.0), mx.array(0.0), tree_map(mx.zeros_like, self._model.trainable_parameters())

    def norm(self, gradients: Any, count: mx.array) -> mx.array:
        """Global norm (lazy) of gradients summed over `count` targets, of their mean."""
        return mean_norm(gradients, count)

    def update(self, gradients: Any, count: mx.array, norm: mx.array, rate: float, projector_rate: float = 0.0) -> None:
        """One optimizer step (lazy) with gradients summed over `count` targets, whose mean has that norm."""
        set_rates(self._optimizer, rate, projector_rate)
        self._apply(gradients, count, norm)

    @contextmanager
    def rounded(self) -> Iterator[None]:
        """Within, the model holds what learns as a step computes with it: an evaluation there sees the same numbers."""
        learned = self._model.trainable_parameters()
        self._model.update(self._rounded(learned))
        try:
            yield
        finally:
            self._model.update(learned)

    def _sum_gradients(
        self, targets: mx.array, supervised: mx.array, picks: mx.array, segments: mx.array | None, *inputs: Any
    ) -> tuple[mx.array, mx.array, Any]:
        model = self._model
        learned = model.trainable_parameters()
        # Frozen inputs are made outside the transformation: no gradient can flow there, and fused attention,
        # which MLX gives up inside one, stays.
        frozen = None if self._inputs_learn else model.embed(*inputs)

        def loss(parameters: Any) -> mx.array:
            model.update(self._rounded(parameters))
            vectors = model.embed(*inputs) if frozen is None else frozen
            return loss_sum(model, vectors, targets, supervised, picks, segments, recompute=self._recompute)

        value, gradients = mx.value_and_grad(loss)(learned)
        model.update(learned)  # the transformation left its own placeholders there
        return value, weights(supervised, picks).sum(), gradients

    def _rounded(self, parameters: Any) -> Any:
        """`parameters`, those of the decoder in the type that it computes in; gradients come back in float32."""
        decoder = tree_map(lambda value: value.astype(self._dtype), parameters.get("language_model", {}))
        return {**parameters, "language_model": decoder}

    def _update(self, gradients: Any, count: mx.array, norm: mx.array) -> mx.array:
        self._optimizer.update(self._model, mean_and_clip(gradients, count, norm, self._clip))
        return norm


def arrays(batch: Batch) -> tuple[Any, ...]:
    """What a step takes of a batch, in order; a compiled function takes no dataclass."""
    return (
        *(batch.targets, batch.supervised, batch.picks, batch.segments),
        *(batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens),
    )


def add(left: Any, right: Any) -> Any:
    """Sum of two gradient trees."""
    return tree_map(mx.add, left, right)
