"""What a training step will hold in memory, before it starts.

What is kept is counted: the weights as they lie, what learns with its gradient and AdamW's two means in float32, the
arrays that each block keeps for its backward pass (or its input alone, where blocks are recomputed), what the
projector keeps. What comes and goes on top of it, in the block at work or at the head, is several times as many
arrays as are needed at once, since MLX hands out operations, with memory for their results, well before they run:
those factors are measured, on a CPU (benchmarks/memory.py: of 50 steps of small models 49 within 10%; one, with blocks
recomputed, took 18% more than was reckoned). The quarter of the memory that stays free is for that, too.
"""

from __future__ import annotations

import os
from dataclasses import dataclass, replace

import mlx.core as mx

from mlx_llama3v.errors import RunError, size


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
    adapted: bool  # the decoder's linear layers learn: their inputs are kept
    rows: int
    length: int  # padded tokens of a row
    width: int  # bytes of an activation: 4 float32, 2 bfloat16
    recompute: bool  # a block keeps its input alone
    chunk: int  # bytes of logits at once
    targets: int  # positions of a row that have a target, at most
    patches: int = 0  # bytes of embeddings of a row
    projector: int = 0  # bytes a row that the projector keeps for its backward pass
    lanes: int = 1  # parts of the batch that are computed side by side
    sums: int = 1  # sums of gradients that are held at once: 2 where batches are added up


@dataclass(frozen=True)
class Memory:
    """Bytes of a job, by what they are for."""

    weights: int
    learning: int  # gradients and AdamW's means
    activations: int
    patches: int

    @property
    def total(self) -> int:
        """All of it: the peak."""
        return self.weights + self.learning + self.activations + self.patches


_STATES, _SCORES, _MIDDLE = 15.5, 3.3, (8.0, 14.0)  # arrays on top in a block; adapted layers add to the mlp's
_LOGITS, _LOGITS_MORE, _LOGITS_MOST = 3.6, 1.25, 4  # on top at the head: of the first chunk, of each up to the 4th


def training_memory(job: TrainJob) -> Memory:
    """What a step of `job` holds at its peak: in the last block's backward pass, or at the head before it."""
    d = job.decoder
    tokens = job.rows * job.length * job.width
    states, middle, scores = tokens * d.hidden, tokens * d.intermediate, job.rows * d.heads * job.length**2 * job.width
    q, kv = tokens * d.heads * d.head_dim, tokens * d.kv_heads * d.head_dim
    # The input of both norms, queries, keys and values, probabilities; gate, its sigmoid, their product, and up.
    block = 2 * states + q + 2 * kv + scores + 4 * middle
    if job.adapted:  # what goes into each linear layer
        block += 2 * states + q + middle
    kept, others = (states, d.layers * states) if job.recompute else (block, (d.layers - 1) * block)
    in_block = _STATES * states + _SCORES * scores + _MIDDLE[job.adapted] * middle
    logits = 4 * job.rows * job.targets * d.vocab / job.lanes
    chunks = min(logits, _LOGITS_MOST * job.chunk)
    at_head = job.lanes * (_LOGITS * min(logits, job.chunk) + _LOGITS_MORE * chunks)
    return Memory(
        weights=job.weights,
        learning=4 * (2 + job.sums) * job.learned,
        activations=round(max(others + in_block, d.layers * kept + at_head)) + job.rows * job.projector,
        patches=_PATCHES * job.rows * job.patches,
    )


_SHARE = 0.75  # of the memory: the rest is for the system, for what else runs, and for what is reckoned too low
_PATCHES = 4  # the batch at work, as codes and numbers, and two that are read ahead


def memory_limit() -> int:
    """Bytes of memory of this machine: the GPU's (all of it, on a Mac), or the system's where MLX computes on a CPU."""
    if mx.default_device().type == mx.DeviceType.gpu:
        info = mx.device_info()
        for key in ("memory_size", "total_memory", "max_recommended_working_set_size"):
            if info.get(key):
                return int(info[key])
    return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")


def largest_batch(job: TrainJob, limit: int, most: int = 256) -> int:
    """The largest number of rows, a power of two up to `most`, that fits three quarters of `limit` bytes.

    Raises RunError where not even one row does.
    """
    rows = 1
    if training_memory(replace(job, rows=1)).total > _SHARE * limit:
        need = training_memory(replace(job, rows=1)).total
        raise RunError(
            f"one row of {job.length} tokens needs about {size(need)} of the {size(limit)} here; use "
            "--grad-checkpoint, a smaller --max-seq-length, or a model that was converted with -q."
        )
    while 2 * rows <= most and training_memory(replace(job, rows=2 * rows)).total <= _SHARE * limit:
        rows *= 2
    return rows
