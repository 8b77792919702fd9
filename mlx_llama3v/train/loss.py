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
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llama3v.lanes import cut
from mlx_llama3v.model import Llama3V
from mlx_llama3v.platform import device_name

CHUNK_BYTES = 16 << 20  # of float32 logits
GPU_CHUNKS = 4  # a GPU wants more rows in a product


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
    if gradient:
        return _with_gradient(model, states, wanted, weight)
    total = mx.array(0.0)
    for rows in _chunks(model, len(picks)):
        chunk = mx.depends(states[rows], total)
        total = total + _cross_entropy(model, chunk, wanted[rows], weight[rows])
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
    logits = model.logits(states)
    # On a CPU it is several operations, and they would sum in 16 bits.
    losses = mx.fast.cross_entropy(logits if _fused() else logits.astype(mx.float32), targets)
    return (losses * weight).sum()


def _fused() -> bool:
    """Whether MLX has a kernel here that makes cross entropy of logits as they are, summing in float32."""
    return device_name() != "cpu"


def _chunks(model: Llama3V, count: int) -> list[slice]:
    """Rows that go through the head together."""
    rows = max(1, chunk_bytes() // (4 * model.vocab_size))
    return [slice(start, min(start + rows, count)) for start in range(0, count, rows)]


def _with_gradient(model: Llama3V, states: mx.array, targets: mx.array, weight: mx.array) -> mx.array:
    """The sum of all chunks. Each chunk's gradient is made beside its value, and before the next one begins.

    So no logits are computed twice, those of one chunk are held at a time (MLX would begin with all of them), and
    the head's own gradient, where it learns, is one running sum.
    """
    learned: dict[str, mx.array] = dict(tree_flatten(model.head.trainable_parameters()))

    @mx.custom_function
    def run(states: mx.array, *values: mx.array) -> tuple[mx.array, ...]:
        total, found, sums = mx.array(0.0), list[mx.array](), [mx.zeros_like(value) for value in values]
        for rows in _chunks(model, len(targets)):
            chunk = mx.depends(states[rows], [total, *found[-1:]])
            head = dict(zip(learned, values, strict=True))
            value, of_states, of_head = _value_and_gradient(model, head, chunk, targets[rows], weight[rows])
            total, sums = total + value, [a + b for a, b in zip(sums, of_head, strict=True)]
            found.append(cut(mx.depends(of_states, [total, *sums])))
        return total, mx.concatenate(found), *sums

    @run.vjp
    def back(inputs: Any, cotangents: Any, outputs: Any) -> Any:
        found = [value * cotangents[0].astype(value.dtype) for value in outputs[1:]]
        return tuple(found) if learned else found[0]

    found: Any = run(states, *learned.values())
    return found[0]


def _value_and_gradient(
    model: Llama3V, learned: dict[str, mx.array], states: mx.array, targets: mx.array, weight: mx.array
) -> tuple[mx.array, mx.array, list[mx.array]]:
    """One chunk's sum, and its gradients for `states` and for what the head has `learned`.

    Fused on Metal and CUDA (MLX 0.32.4): 16-bit logits are never copied to float32, and their gradient takes their
    place. On a CPU MLX takes two exponentials a logit. There one softmax p serves both: logsumexp is max(logits) -
    log(max(p)), and p less 1 at the target is the gradient. That is three arrays of logits at the peak in place of
    four, and 1.4 times as fast.
    """

    def logits(states: mx.array, *values: mx.array) -> mx.array:
        model.head.update(tree_unflatten(list(zip(learned, values, strict=True))))
        return model.logits(states)

    inputs = [states, *learned.values()]
    found = logits(*inputs)
    if _fused():
        (losses,), (gradient,) = mx.vjp(lambda scores: mx.fast.cross_entropy(scores, targets), [found], [weight])
    else:
        scores, where = found.astype(mx.float32), targets[:, None]
        p = mx.softmax(scores, axis=-1)
        losses = scores.max(-1) - mx.log(p.max(-1)) - mx.take_along_axis(scores, where, -1)[:, 0]
        wanted = (mx.take_along_axis(p, where, -1) - 1) * weight[:, None]
        gradient = mx.put_along_axis(p * weight[:, None], where, wanted, -1).astype(found.dtype)
    _, (of_states, *of_head) = mx.vjp(logits, inputs, [gradient])
    return (losses * weight).sum(), of_states, of_head
