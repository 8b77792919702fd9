"""Independent work side by side on the cores of a CPU.

MLX runs the operations of a CPU stream one after the other, most of them on one core; only matrix products use
more. So work that can be cut (the rows of a batch, batches of slices) goes to lanes: threads, each with a stream of
its own and one BLAS thread. A thread each, because one thread that evaluates two streams does not keep both busy: it
stops handing out operations once a hundred are under way, and those are all of the first lane. For the same reason
work should come in pieces of some tens of operations: the hundred are counted over all threads, and a lane that handed
over its whole graph at once would keep the others idle for a sixth of the time (measured, a tower of so400m's width).

A GPU has one lane, which is the caller's own thread: its queue is filled from there and kept full by asynchronous
evaluation, and a second one would only take turns with it.
"""

from __future__ import annotations

import ctypes
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from threading import Lock
from typing import TypeVar

import mlx.core as mx

from mlx_llama3v.platform import device_name

T = TypeVar("T")

_MOST = 4
# (ask, set) the number of BLAS threads: MKL's and OpenBLAS's functions, where platform.py has loaded one of them.
_THREADS = (
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
)
# Frees what MKL holds for each thread that ever multiplied there: 12 MB that outlive the thread (measured), which lost
# 24 MB of every window of pictures that `embed` encoded.
_FREE = "MKL_Free_Buffers"


def default_lanes(items: int) -> int:
    """One lane a core, at most one an item; one on a GPU."""
    return max(1, min(os.cpu_count() or 1, _MOST, items)) if device_name() == "cpu" else 1


class Lanes:
    """Made by `lanes`. Arrays that work takes in must be evaluated: MLX's streams belong to their threads."""

    def __init__(self, count: int) -> None:
        self._threads = [ThreadPoolExecutor(1, f"lane-{n}") for n in range(count)] if count > 1 else []
        self._next = 0
        self._building = Lock()

    def start(self, make: Callable[[], Iterable[T]]) -> Future[T]:
        """Evaluate the arrays that `make()` yields, piece by piece, on the next lane; the result is the last piece.

        Graphs are built in turn, a piece at a time, so that they may go through one module.
        """
        if not self._threads:
            done: Future[T] = Future()
            found = deque(make(), maxlen=1).pop()
            mx.async_eval(found)
            done.set_result(found)
            return done
        thread = self._threads[self._next % len(self._threads)]
        self._next += 1
        return thread.submit(_run, make, self._building)

    def close(self) -> None:
        """Wait for what runs, and give the streams back while their threads live: at exit MLX would abort on them."""
        for thread in self._threads:
            thread.submit(mx.clear_streams)
            thread.shutdown()


def _run(make: Callable[[], Iterable[T]], building: Lock) -> T:
    with mx.stream(mx.default_device()):
        pieces = iter(make())
        found: list[T] = []
        while True:
            with building:
                piece = [*islice(pieces, 1)]
            if not piece:
                return found[0]
            mx.eval(piece)
            found = piece


@contextmanager
def lanes(count: int) -> Iterator[Lanes]:
    """`count` lanes; while there are several, each has one BLAS thread."""
    if count == 1:
        yield Lanes(1)
        return
    process = ctypes.CDLL(None)
    found = [pair for pair in _THREADS if hasattr(process, pair[0])]
    before = [getattr(process, ask)() for ask, _ in found]
    for _, put in found:
        getattr(process, put)(1)
    made = Lanes(count)
    try:
        yield made
    finally:
        made.close()
        if hasattr(process, _FREE):
            getattr(process, _FREE)()
        for (_, put), threads in zip(found, before, strict=True):
            getattr(process, put)(threads)
