"""Ctrl-C that ends the work at hand at its next good moment."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType


@contextmanager
def interruptible(said: Callable[[], None] = lambda: None) -> Iterator[Callable[[], bool]]:
    """Yields whether Ctrl-C was pressed; `said` is called when it is. A second one interrupts at once.

    Raised wherever Python happens to be, the first one could be lost (in a callback) or fall between two layers.
    """
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked.is_set
        return

    def ask(number: int, frame: FrameType | None) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()
        said()

    before = signal.signal(signal.SIGINT, ask)
    try:
        yield asked.is_set
    finally:
        signal.signal(signal.SIGINT, before)
