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
from collections.abc import Sequence
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


# The linear layers of a block, by name within it, and what goes into each: layers that share one share what is kept.
INPUTS = {
    "self_attn.q_proj": "states",
    "self_attn.k_proj": "states",
    "self_attn.v_proj": "states",
    "self_attn.o_proj": "heads",
    "mlp.gate_proj": "hidden",
    "mlp.up_proj": "hidden",
    "mlp.down_proj": "middle",
}


@dataclass(frozen=True)
class Learning:
    """Which of the decoder's linear layers learn, and how."""

    blocks: int  # counted from the last
    layers: tuple[str, ...] = tuple(INPUTS)  # of such a block, by name
    dora: bool = False
    dropout: bool = False
    quantized: bool = False  # the frozen weights are packed: DoRA unpacks and keeps them


@dataclass(frozen=True)
class TrainJob:
    """One forward and backward pass, and what lies beside it."""

    decoder: Decoder
    weights: int  # bytes of all weights
    learned: int  # numbers that learn
    updated: int  # of those, whose new values are made before the first old ones are let go
    decoder_learns: Learning | None  # the inputs of these layers are kept
    reached: int  # blocks, from the last, that a gradient goes through
    rows: int
    length: int  # padded tokens of a row
    width: int  # bytes of an activation: 4 float32, 2 bfloat16
    recompute: bool  # a block keeps its input alone
    chunk: int  # bytes of logits at once
    targets: int  # positions of a row that have a target, at most
    patches: int = 0  # bytes of embeddings a row: of the batch at work and of those read ahead
    projector: int = 0  # bytes a row that the projector keeps for its backward pass
    projecting: int = 0  # bytes a row that come and go while the projector is at work
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
# recomputed goes forward and back in one piece; with adapters there is more to that, and more again with DoRA.
_MLP, _ATTENTION = (5.0, 10.7), (2.8, 11.3)
_MLP_AGAIN, _ATTENTION_AGAIN = ((5.3, 20.9), (8.0, 25.4)), (_ATTENTION, (4.8, 13.3))
_DORA = (3.0, 0.0), (0.0, 0.0)
_DORA_AGAIN = (4.0, 4.0), (1.0, 4.0)
_AGAIN_16 = (1.6, 3.5)  # more in 16 bits, where neither gate nor up learns
_LOGITS, _LOGITS_16 = 3.4, 4.25  # of a chunk at the head, in float32: the fused kernels of a GPU want fewer


def training_memory(job: TrainJob) -> Memory:
    """What a step of `job` holds at its peak: at the head, or in a block's MLP or attention on the way back."""
    d, learns = job.decoder, job.decoder_learns
    states = job.rows * job.length * job.width * d.hidden
    learning = min(learns.blocks, d.layers) if learns else 0
    attention, mlp = _kept(job, learns)  # of the last block; that block is never recomputed
    others = max(0, learning - 1)
    before = others * (attention + mlp) + (job.reached - 1 - others) * sum(_kept(job, None))
    if learns and learning == job.reached > 1:
        before -= _idle(job, learns)
    if job.recompute:
        before = (job.reached - 1) * states
    share = job.targets / job.length  # of the last block's MLP
    logits = min(4 * job.rows * job.targets * d.vocab / job.lanes, job.chunk)
    in_mlp, in_attention = _on_top(job, learns, recompute=False)
    peaks = [
        before + attention + share * mlp + job.lanes * (_LOGITS_16 if job.width == 2 else _LOGITS) * logits,
        before + attention + share * (mlp + in_mlp),
        before + attention + in_attention,
    ]
    if job.reached > 1:
        other = learns if learning > 1 else None
        attention, mlp = _kept(job, other)
        block = before - states + attention if job.recompute else before - mlp
        # With DoRA a good part of the way back is not gone in the lowest one.
        whole = job.reached > 2 or not (job.recompute and other and other.dora)
        in_mlp, in_attention = _on_top(job, other if whole else None, recompute=job.recompute)
        peaks += [block + mlp + in_mlp, block + in_attention]
    held = 4 * (2 + job.sums) * job.learned
    projector = job.rows * job.projector
    # AdamW's update has gradients and means, and makes new weights and means beside the old ones.
    update = 4 * (3 * job.learned + 3 * job.updated) - held
    return Memory(
        weights=job.weights,
        learning=held,
        activations=max(update, round(max(peaks)) + projector, job.rows * job.projecting + projector),
        patches=job.rows * job.patches,
    )


def _idle(job: TrainJob, learns: Learning) -> int:
    """Bytes that the lowest block need not keep, since nothing below what learns there wants a gradient."""
    attention, mlp = _kept(job, None)
    if any(name.startswith("self_attn.") for name in learns.layers):
        return 0
    return attention + mlp * (learns.layers == ("mlp.down_proj",))


def _on_top(job: TrainJob, learns: Learning | None, *, recompute: bool) -> tuple[float, float]:
    """Bytes that come and go while the MLP of a block, and its attention, are at work on the way back."""
    d, names, dora = job.decoder, learns.layers if learns else (), learns is not None and learns.dora
    wide = not {"mlp.gate_proj", "mlp.up_proj"}.isdisjoint(names)
    mlp = _MLP_AGAIN[wide] if recompute else _MLP
    if recompute and not wide and job.width == 2:
        mlp = mlp[0] + _AGAIN_16[0], mlp[1] + _AGAIN_16[1]
    attention = _ATTENTION_AGAIN[any(name.startswith("self_attn.") for name in names)] if recompute else _ATTENTION
    more = (_DORA_AGAIN if recompute else _DORA) if dora else ((0.0, 0.0), (0.0, 0.0))
    width = job.width if recompute or not dora else 4  # DoRA is no 16-bit arithmetic
    tokens, scores = job.rows * job.length, job.rows * d.heads * job.length**2
    # A matrix in float32 whose rows' norms are taken.
    norms = job.lanes * 4 * max(inputs * outputs for inputs, outputs in linear(d).values()) if dora else 0

    def peak(plain: tuple[float, float], of_dora: tuple[float, float], wide: int) -> float:
        states = tokens * d.hidden
        own = 4 * (of_dora[0] * wide + of_dora[1] * states) + norms
        return width * (plain[0] * wide + plain[1] * states) + own

    return peak(mlp, more[0], tokens * d.intermediate), peak(attention, more[1], scores)


def _kept(job: TrainJob, learns: Learning | None) -> tuple[int, int]:
    """Bytes that attention and MLP of a block, whose linear layers are those that learn, keep for their gradient."""
    d = job.decoder
    tokens = job.rows * job.length * job.width
    states, middle = tokens * d.hidden, tokens * d.intermediate
    q, kv = tokens * d.heads * d.head_dim, tokens * d.kv_heads * d.head_dim
    # The norm's input; queries, keys and values before and after rotation and transposition; probabilities.
    attention = states + q + 4 * kv + job.rows * d.heads * job.length**2 * job.width
    mlp = states + 4 * middle  # the norm's input; gate, its sigmoid, their product, and up
    if job.width == 2:  # rotated in float32
        attention += q + kv
    if learns is not None:
        attention, mlp = attention + _learned(job, learns, "self_attn."), mlp + _learned(job, learns, "mlp.")
    return attention, mlp


def _learned(job: TrainJob, learns: Learning, half: str) -> int:
    """Bytes that linear layers of one half of a block keep because they learn: what goes in, once for all that take it.

    With dropout each has its own, and the mask. DoRA keeps what comes out, to scale it, and unpacked weights, and in a
    16-bit decoder it takes float32.
    """
    tokens, shared, total = job.rows * job.length, set(), 0
    for name, (inputs, outputs) in linear(job.decoder).items():
        if not name.startswith(half) or name not in learns.layers:
            continue
        number = 4 if learns.dora else job.width
        if learns.dropout:
            total += tokens * inputs * (number + job.width)
        elif number != job.width or INPUTS[name] not in shared:
            total += tokens * inputs * number
            shared.add(INPUTS[name])
        if learns.dora:
            total += tokens * outputs * job.width
            total += job.lanes * inputs * outputs * job.width * learns.quantized
    return total


def linear(d: Decoder) -> dict[str, tuple[int, int]]:
    """Inputs and outputs of a block's linear layers, by name."""
    q, kv = d.heads * d.head_dim, d.kv_heads * d.head_dim
    attention = ((d.hidden, q), (d.hidden, kv), (d.hidden, kv), (q, d.hidden))
    mlp = ((d.hidden, d.intermediate), (d.hidden, d.intermediate), (d.intermediate, d.hidden))
    return dict(zip(INPUTS, attention + mlp, strict=True))


_AT_ONCE = 56  # arrays that MLX hands out new ones for before the first is done, on a CPU: counted for 21 to 147


def at_once(sizes: Sequence[int]) -> int:
    """Numbers whose update is under way at once, at most, of arrays of those sizes that are updated in that order."""
    return max(sum(sizes[start : start + _AT_ONCE]) for start in range(max(1, len(sizes) - _AT_ONCE + 1)))


_SHARE = 0.75  # of the memory: the rest is for the system, for what else runs, and for what is reckoned too low


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
