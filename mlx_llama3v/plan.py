"""What a training step will hold in memory, before it starts.

A first estimate: the weights as they lie, what learns with its gradient and AdamW's means in float32, the activations
that the backward pass needs, and the chunk of logits at the head. It is too low: small models on a CPU were measured
(benchmarks/memory.py) at 2 to 3.5 times of it. So a batch is made to fit a quarter of the memory; no number is shown.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_llama3v.errors import RunError


@dataclass(frozen=True)
class Decoder:
    """The sizes of a Llama that count."""

    hidden: int
    layers: int
    intermediate: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int


@dataclass(frozen=True)
class TrainJob:
    """One forward and backward pass, and what lies beside it."""

    decoder: Decoder
    weights: int  # bytes of all weights
    learned: int  # numbers that learn
    adapted: bool  # LoRA on the linear layers: their inputs are kept
    rows: int
    length: int  # padded tokens of a row
    width: int  # bytes of an activation: 4 float32, 2 bfloat16
    recompute: bool  # one block's activations at a time
    fused_attention: bool  # no L x L probabilities are kept
    chunk: int  # bytes of logits at once
    patches: int = 0  # bytes of embeddings of a batch, as the projector takes them


@dataclass(frozen=True)
class Memory:
    """Bytes of a job, by what they are for."""

    weights: int
    learning: int  # gradients and AdamW's means
    activations: int
    head: int
    patches: int

    @property
    def total(self) -> int:
        """All of it: the peak."""
        return self.weights + self.learning + self.activations + self.head + self.patches


def training_memory(job: TrainJob) -> Memory:
    """What a step of `job` holds at its peak."""
    d = job.decoder
    tokens = job.rows * job.length
    block = _block(job) * job.width * tokens
    if not job.fused_attention:  # scores and probabilities of each head
        block += _ATTENTION * job.rows * d.heads * job.length**2 * job.width
    stream = d.hidden * job.width * tokens
    kept = d.layers * stream + block if job.recompute else d.layers * block
    return Memory(
        weights=job.weights,
        learning=_LEARNING * 4 * job.learned,
        activations=round(kept + _STREAMS * stream),
        head=round(_HEAD * job.chunk),
        patches=_PATCHES * job.patches,
    )


_SHARE = 0.25  # of the memory, since the estimate is too low
_ATTENTION = 1.0
_LEARNING = 4  # gradient, its clipped mean, and two means
_STREAMS = 4.0  # states and their gradients on the way through a block
_HEAD = 3.0  # logits, their softmax and gradient
_PATCHES = 4


def _block(job: TrainJob) -> float:
    """Numbers a token that a block keeps for its backward pass."""
    d = job.decoder
    q, kv = d.heads * d.head_dim, 2 * d.kv_heads * d.head_dim
    kept = 2 * d.hidden + 2 * q + kv + 2 * d.intermediate  # streams, q before and after, k and v, gate and up
    if job.adapted:  # what goes into each linear layer
        kept += 2 * d.hidden + q + d.intermediate
    return kept


def memory_limit() -> int:
    """Bytes that training may use on this machine: MLX's own limit on a GPU, the memory of the system on a CPU."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        return int(info.get("max_recommended_working_set_size", info.get("memory_size", 0)))
    import os

    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest_batch(job: TrainJob, limit: int, most: int = 256) -> int:
    """The largest number of rows, a power of two up to `most`, that fits a quarter of `limit` bytes.

    Raises RunError where not even one row does.
    """
    rows = 1
    if training_memory(replace(job, rows=1)).total > _SHARE * limit:
        need = training_memory(replace(job, rows=1)).total / 1e9
        raise RunError(
            f"one row of {job.length} tokens needs about {need:.1f} GB of the {limit / 1e9:.1f} GB here; use "
            "--grad-checkpoint, a smaller --max-seq-length, or a model that was converted with -q."
        )
    while 2 * rows <= most and training_memory(replace(job, rows=2 * rows)).total <= _SHARE * limit:
        rows *= 2
    return rows
