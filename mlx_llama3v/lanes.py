"""Independent work side by side on the cores of a CPU.

MLX runs the operations of a CPU stream one after the other, most of them on one core; only matrix products use
more. So work that can be cut (the rows of a batch, batches of slices) goes to lanes: threads, each with a stream of
its own and one BLAS thread. A thread each, because one thread that evaluates two streams does not keep both busy: it
stops handing out operations once a hundred are under way, and those are all of the first lane. The hundred are counted
over all threads: a lane that handed over a whole graph would keep the others waiting for a sixth of the time (measured:
encoding at so400m's width, training steps). So models `cut` their graphs, and a lane evaluates piece by piece.

A GPU has one lane, which is the caller's own thread: its queue is filled from there and kept full by asynchronous
evaluation, and a second one would only take turns with it.

The threads are those of the process, and live as long: MLX has a native thread a stream that outlives the thread it was
made for (0.32), and MKL 12 MB for each that multiplied. With new ones for each window of pictures, `embed` would end
after some 100,000 pictures, when the system had no thread left.
"""

from __future__ import annotations

import atexit
import ctypes
import os
import threading
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import contextmanager
from functools import partial
from queue import SimpleQueue
from typing import Any, TypeVar

import mlx.core as mx

from mlx_llama3v.platform import device_name

T = TypeVar("T")

_MOST = 4
_building = threading.local()  # `ends`, in order, of the pieces of the graph that this thread builds for a lane
# (ask, set) the number of BLAS threads: MKL's and OpenBLAS's functions, where platform.py has loaded one of them.
_THREADS = (
    ("MKL_Get_Max_Threads", "MKL_Set_Num_Threads"),
    ("openblas_get_num_threads", "openblas_set_num_threads"),
)


def default_lanes(items: int) -> int:
    """One lane a core, at most one an item; one on a GPU."""
    return max(1, min(os.cpu_count() or 1, _MOST, items)) if device_name() == "cpu" else 1


def cut(x: mx.array) -> mx.array:
    """`x`; in a graph that a lane builds, a piece ends here, and another where the gradient passes."""
    ends: deque[mx.array] | None = getattr(_building, "ends", None)
    if ends is None:
        return x

    @mx.custom_function
    def same(x: mx.array) -> mx.array:
        return x

    @same.vjp
    def back(x: mx.array, cotangent: mx.array, output: mx.array) -> mx.array:
        ends.append(cotangent)
        return cotangent

    found: Any = same(x)
    ends.append(found)
    return found  # type: ignore[no-any-return]


class _Thread:
    """A thread that does what it is told, in turn, and ends with the process: a daemon, with a stream to give back."""

    def __init__(self, name: str) -> None:
        self._work: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._thread = threading.Thread(target=self._loop, name=name, daemon=True)
        self._thread.start()

    def submit(self, work: Callable[[], T]) -> Future[T]:
        """As an executor's: those threads cannot be asked for anything more when the process ends."""
        running: Future[T] = Future()

        def do() -> None:
            try:
                found = work()
            except BaseException as error:  # it is for whoever asks
                running.set_exception(error)
            else:
                running.set_result(found)

        self._work.put(do)
        return running

    def end(self) -> None:
        """Give the stream back while the thread lives: at exit MLX would abort on it."""
        self.submit(mx.clear_streams)
        self._work.put(None)
        self._thread.join()

    def _loop(self) -> None:
        while (work := self._work.get()) is not None:
            work()
            del work  # and what it holds


_threads: list[_Thread] = []  # of all Lanes
_adding = threading.Lock()


def _first(count: int) -> list[_Thread]:
    """So many of the process's threads; made when they are first wanted."""
    with _adding:
        while len(_threads) < count:
            _threads.append(_Thread(f"lane-{len(_threads)}"))
            atexit.register(_threads[-1].end)
        return _threads[:count]


class Lanes:
    """Made by `lanes`. Arrays that work takes in must be evaluated: MLX's streams belong to their threads."""

    def __init__(self, count: int) -> None:
        self._threads = _first(count) if count > 1 else []
        self._next = 0

    def start(self, make: Callable[[], T]) -> Future[T]:
        """Evaluate the arrays that `make()` returns, on the next lane; the result holds them.

        `make` builds its graph while the caller waits, so graphs that go through one module are built in turn.
        """
        if not self._threads:
            done: Future[T] = Future()
            found = make()
            mx.async_eval(found)
            done.set_result(found)
            return done
        thread = self._threads[self._next % len(self._threads)]
        self._next += 1
        built: Future[None] = Future()
        running = thread.submit(partial(_run, make, built))
        built.result()
        return running

    def close(self) -> None:
        """Wait for what runs."""
        for done in [thread.submit(lambda: None) for thread in self._threads]:
            done.result()


def _run(make: Callable[[], T], built: Future[None]) -> T:
    _building.ends = ends = deque[mx.array]()
    try:
        with mx.stream(mx.default_device()):
            found = make()
    finally:
        _building.ends = None
        built.set_result(None)  # an error is the running work's own
    while ends:
        mx.eval(ends.popleft())
    mx.eval(found)
    return found


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
        for (_, put), threads in zip(found, before, strict=True):
            getattr(process, put)(threads)
