"""Parts of a batch computed side by side on the cores of a CPU.

MLX runs the operations of a CPU stream one after the other, most of them on one core; only matrix products use
more. So a batch is cut into parts, each on a stream of its own with one BLAS thread: about 1.5 times as fast on two
cores (gradients are sums, so the parts add up). A GPU has one lane, the whole batch.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache

import mlx.core as mx

from mlx_llama3v.platform import device_name

_MOST = 4
# (ask, set) the number of BLAS threads: MKL's and OpenBLAS's functions, where platform.py has loaded one of them.
_THREADS = (
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
)


def default_lanes(batch_size: int) -> int:
    """One lane a core, of two rows at least; one on a GPU."""
    return max(1, min(os.cpu_count() or 1, _MOST, batch_size // 2)) if device_name() == "cpu" else 1


@contextmanager
def lanes(count: int) -> Iterator[list[mx.Stream]]:
    """`count` streams; while there are several, each has one BLAS thread."""
    if count == 1:
        yield [mx.default_stream(mx.default_device())]
        return
    process = ctypes.CDLL(None)
    found = [pair for pair in _THREADS if hasattr(process, pair[0])]
    before = [getattr(process, ask)() for ask, _ in found]
    for _, put in found:
        getattr(process, put)(1)
    try:
        yield _streams(count)
    finally:
        for (_, put), threads in zip(found, before, strict=True):
            getattr(process, put)(threads)


@lru_cache
def _streams(count: int) -> list[mx.Stream]:
    """Made once: a stream and its thread are never given back."""
    return [mx.new_stream(mx.default_device()) for _ in range(count)]
