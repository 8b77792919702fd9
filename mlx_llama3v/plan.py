"""What a training step will hold in memory, before it starts.

What is kept is counted: the weights as they lie, what learns with its gradient and AdamW's two means in float32, the
arrays that each half of a block keeps for its backward pass (or the block's input alone, where blocks are recomputed),
what the projector keeps. It was checked array by array: a block more costs what the count says, to a few percent. What
comes and goes on top, while one half of a block or one chunk at the head is at work, is more arrays than are needed at
once, since MLX hands out operations, with memory for their results, before they run; these numbers are fitted to
steps of small models on a CPU, where lanes evaluate piece by piece (benchmarks/memory.py, which also prints sizes that
they were not fitted to). A GPU is handed more than a piece at a time: the quarter of the memory that stays free is for
that, too.
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


# Arrays on top: of the middle width and of states in an MLP, of scores and of states in attention. A block that is
# recomputed goes forward and back in one piece; with adapters there is more to that.
_MLP, _ATTENTION = (5.0, 10.7), (2.8, 11.3)
_MLP_AGAIN, _ATTENTION_AGAIN = ((5.3, 20.9), (8.0, 25.4)), (_ATTENTION, (4.8, 13.3))
_LOGITS = 3.4  # of a chunk at the head, in float32, and half of that more beside a 16-bit decoder


def training_memory(job: TrainJob) -> Memory:
    """What a step of `job` holds at its peak: at the head, or in a block's MLP or attention on the way back."""
    d = job.decoder
    tokens = job.rows * job.length * job.width
    states, middle, scores = tokens * d.hidden, tokens * d.intermediate, job.rows * d.heads * job.length**2 * job.width
    attention, mlp = _kept(job)
    share = job.targets / job.length  # of the last block's MLP; that block is never recomputed
    before = (d.layers - 1) * (states if job.recompute else attention + mlp)
    logits = min(4 * job.rows * job.targets * d.vocab / job.lanes, job.chunk)
    peaks = [
        before + attention + share * mlp + job.lanes * (_LOGITS + 0.5 * (job.width == 2)) * logits,
        before + attention + share * (mlp + _MLP[0] * middle + _MLP[1] * states),
        before + attention + _ATTENTION[0] * scores + _ATTENTION[1] * states,
    ]
    if d.layers > 1:
        in_mlp = _MLP_AGAIN[job.adapted] if job.recompute else _MLP
        in_attention = _ATTENTION_AGAIN[job.adapted] if job.recompute else _ATTENTION
        block = (d.layers - 2) * states + attention if job.recompute else before - mlp
        peaks += [
            block + mlp + in_mlp[0] * middle + in_mlp[1] * states,
            block + in_attention[0] * scores + in_attention[1] * states,
        ]
    learning = 4 * (2 + job.sums) * job.learned
    # AdamW's update has gradients and means, and makes new weights and means before it lets go of the old ones.
    update = 4 * (1 + 2 + 3) * job.learned - learning
    return Memory(
        weights=job.weights,
        learning=learning,
        activations=max(update, round(max(peaks)) + job.rows * job.projector),
        patches=_PATCHES * job.rows * job.patches,
    )


def _kept(job: TrainJob) -> tuple[int, int]:
    """Bytes that attention and MLP of a block keep for their gradient."""
    d = job.decoder
    tokens = job.rows * job.length * job.width
    states, middle = tokens * d.hidden, tokens * d.intermediate
    q, kv = tokens * d.heads * d.head_dim, tokens * d.kv_heads * d.head_dim
    # The norm's input; queries, keys and values before and after rotation and transposition; probabilities.
    attention = states + q + 4 * kv + job.rows * d.heads * job.length**2 * job.width
    mlp = states + 4 * middle  # the norm's input; gate, its sigmoid, their product, and up
    if job.adapted:  # what goes into each linear layer
        attention, mlp = attention + states + q, mlp + states + middle
    if job.width == 2:  # rotated in float32
        attention += q + kv
    return attention, mlp


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
