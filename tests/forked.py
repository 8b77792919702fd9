"""Real processes that can be killed, forked from a server that has imported everything and computed nothing.

A kill then falls into the work, not into seconds of imports.
"""

from __future__ import annotations

import multiprocessing
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from multiprocessing.synchronize import Event
from typing import Any

_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(
    [
        "tests.without_torch",
        *("mlx_llama3v.stages", "mlx_llama3v.storing", "mlx_llama3v.vision.families", "mlx_llama3v.inference"),
        "mlx_llama3v.weights.vlm",
    ]
)


def start(work: Callable[..., None], *arguments: Any) -> BaseProcess:
    """A process that has begun with `work(*arguments)`, a function of a module."""
    begun = _CONTEXT.Event()
    process = _CONTEXT.Process(target=_begin, args=(begun, work, *arguments))
    process.start()
    assert begun.wait(120)
    return process


def _begin(begun: Event, work: Callable[..., None], *arguments: Any) -> None:
    begun.set()
    work(*arguments)
