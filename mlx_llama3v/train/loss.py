"""Cross entropy as a sum and a count, over the supervised positions only.

Only positions that have a target reach the head: for 1024 positions with 128 answer tokens, and Llama-3's
128256 ids, that is 66 MB of float32 logits in place of 525. The collator picks them (`Batch.picks`), padded
to one of few sizes so that a step compiles; what was padded weighs nothing.

A sum is returned, never a mean: micro-batches add up, and one division at the end gives every token the same
weight, wherever it stood.
"""

from __future__ import annotations

import mlx.core as mx
import mlx.nn as nn

from mlx_llama3v.model import Llama3V


def loss_sum(
    model: Llama3V, ids: mx.array, vectors: mx.array, targets: mx.array, supervised: mx.array, picks: mx.array
) -> mx.array:
    """Summed cross entropy (nats) of the supervised positions of one batch, a float32 scalar.

    ids, targets [B, L] int32, supervised [B, L] bool and picks [N] int32 are a Batch's; vectors [B, L, D]
    stand for the ids in the decoder.
    """
    states = model.hidden(ids, input_embeddings=vectors)
    logits = model.logits(_pick(states.reshape(-1, states.shape[-1]), picks))
    losses = nn.losses.cross_entropy(logits.astype(mx.float32), _pick(targets.reshape(-1), picks))
    return (losses * weights(supervised, picks)).sum()


def weights(supervised: mx.array, picks: mx.array) -> mx.array:
    """1 for every pick that has a target, 0 for padding: float32 [N]. Their sum is the count."""
    return _pick(supervised.reshape(-1), picks).astype(mx.float32)


def _pick(values: mx.array, picks: mx.array) -> mx.array:
    return mx.take(values, picks, axis=0)
