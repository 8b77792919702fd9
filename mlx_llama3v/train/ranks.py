"""What the processes of `mlx.launch` tell each other."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten

from mlx_llama3v.errors import RunError


def all_sum(tree: Any, group: mx.distributed.Group) -> Any:
    """Sum of the trees of all ranks: one message. On the CPU: a GPU must not wait for a slow neighbour."""
    if group.size() == 1:
        return tree
    flat: dict[str, mx.array] = dict(tree_flatten(tree))
    joined = mx.concatenate([value.astype(mx.float32).reshape(-1) for value in flat.values()])
    joined = mx.distributed.all_sum(joined, group=group, stream=mx.cpu)
    parts, start = list[tuple[str, mx.array]](), 0
    for name, value in flat.items():
        parts.append((name, joined[start : start + value.size].reshape(value.shape)))
        start += value.size
    return tree_unflatten(parts)


def gather(words: Sequence[str], group: mx.distributed.Group) -> list[str]:
    """The words of all ranks, in their order; every rank must call this."""
    text = json.dumps(list(words)).encode()
    sizes = mx.zeros(group.size())
    sizes[group.rank()] = len(text)
    table = np.zeros((group.size(), int(mx.max(all_sum([sizes], group)[0]))), np.float32)
    table[group.rank(), : len(text)] = np.frombuffer(text, np.uint8)
    rows = np.array(all_sum([mx.array(table)], group)[0]).astype(np.uint8)
    return [word for row in rows for word in json.loads(row.tobytes().rstrip(b"\0"))]


def require_agreement(group: mx.distributed.Group, run_dir: Path, done: int, settings: Mapping[str, Any]) -> None:
    """Raises RunError, on every rank, where one would train otherwise: each may have a disk and a memory of its own."""
    same = json.dumps({key: value for key, value in settings.items() if key != "lanes"}, sort_keys=True)
    short = int(sha256(same.encode()).hexdigest()[:6], 16)  # exact in float32
    table = mx.zeros((group.size(), 3))
    table[group.rank()] = mx.array([done, settings["batch_size"], short], mx.float32)
    first, *others = np.array(all_sum([table], group)[0]).astype(int).tolist()
    for rank, found in enumerate(others, 1):
        if found[0] != first[0]:
            raise RunError(
                f"rank 0 begins after step {first[0]}, rank {rank} after step {found[0]}; copy the checkpoints of "
                f"{run_dir} to the machine that lacks them."
            )
        if found != first:
            raise RunError(
                f"rank {rank} would train otherwise than rank 0 (batches of {found[1]} and of {first[1]} rows); give "
                "both the same model, data, store, options and --batch-size."
            )
