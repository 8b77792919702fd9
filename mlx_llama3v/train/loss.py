"""Cross entropy as a sum and a count, over the supervised positions only, a chunk of them at a time.

Only positions that have a target reach the head: for 1024 positions with 128 answer tokens, and Llama-3's
128256 ids, that is 66 MB of float32 logits in place of 525. The collator picks them (`Batch.picks`), padded
to one of few sizes so that a step compiles; what was padded weighs nothing. Of those, so many go through the head
at once that their logits take CHUNK_BYTES; no chunk's logits are kept for the backward pass.

A sum is returned, never a mean: micro-batches add up, and one division at the end gives every token the same
weight, wherever it stood.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import device_name

CHUNK_BYTES = 16 << 20  # of float32 logits
GPU_CHUNKS = 8  # a GPU wants more rows in a product


def loss_sum(
    model: Llama3V,
    vectors: mx.array,
    targets: mx.array,
    supervised: mx.array,
    picks: mx.array,
    segments: mx.array | None = None,
    *,
    recompute: bool = False,
    gradient: bool = True,
) -> mx.array:
    """Summed cross entropy (nats) of the supervised positions of one batch, a float32 scalar.

    targets [B, L] int32, supervised [B, L] bool, picks [N] int32 and segments [B, L] int32 are a Batch's; vectors
    [B, L, D] stand for the ids in the decoder. `recompute`: see Llama3V.train_hidden. Without `gradient` only the
    value is right, and cheaper.
    """
    states = model.train_hidden(vectors, picks, segments, recompute=recompute)
    wanted = _pick(targets.reshape(-1), picks)
    weight = weights(supervised, picks)
    rows = max(1, chunk_bytes() // (4 * model.vocab_size))
    total = mx.array(0.0)
    for start in range(0, len(picks), rows):
        chunk = tuple(part[start : start + rows] for part in (states, wanted, weight))
        if not gradient:
            total = total + _cross_entropy(model, *chunk)
        elif _head_learns(model):
            total = total + _recomputed(model, *chunk)
        else:
            total = total + _with_gradient(model, *chunk)
    return total


def chunk_bytes() -> int:
    """Bytes of logits that go through the head at once on this device."""
    return CHUNK_BYTES if device_name() == "cpu" else GPU_CHUNKS * CHUNK_BYTES


def weights(supervised: mx.array, picks: mx.array) -> mx.array:
    """1 for every pick that has a target, 0 for padding: float32 [N]. Their sum is the count."""
    return _pick(supervised.reshape(-1), picks).astype(mx.float32)


def _pick(values: mx.array, picks: mx.array) -> mx.array:
    return mx.take(values, picks, axis=0)


def _cross_entropy(model: Llama3V, states: mx.array, targets: mx.array, weight: mx.array) -> mx.array:
    """states [n, D], targets and weight [n] -> the weighted sum, float32."""
    losses = nn.losses.cross_entropy(model.logits(states).astype(mx.float32), targets)
    return (losses * weight).sum()


def _with_gradient(model: Llama3V, states: mx.array, targets: mx.array, weight: mx.array) -> mx.array:
    """The same where the head is frozen: the gradient is made beside the value, so nothing is computed twice.

    The second term is zero, and its gradient for `states` is what was found.
    """
    fixed = mx.stop_gradient(states)
    value, gradient = mx.value_and_grad(lambda x: _cross_entropy(model, x, targets, weight))(fixed)
    return mx.stop_gradient(value) + ((states - fixed) * mx.stop_gradient(gradient)).astype(mx.float32).sum()


def _recomputed(model: Llama3V, states: mx.array, targets: mx.array, weight: mx.array) -> mx.array:
    """The same where the head learns: its logits are computed again in the backward pass."""
    head = model.head

    @mx.checkpoint
    def call(parameters: Any, states: mx.array) -> mx.array:
        head.update(parameters)
        return _cross_entropy(model, states, targets, weight)

    return call(head.trainable_parameters(), states)


def _head_learns(model: Llama3V) -> bool:
    return bool(tree_flatten(model.head.trainable_parameters()))
