"""A knob is written once: a dataclass field with its default, its type and one line of help; options are made of it."""

from __future__ import annotations

from dataclasses import field
from typing import Any


def knob(default: Any, text: str, **more: Any) -> Any:
    """A field with its help. `more`: what `cli/options.py` reads beside it (flags, choices, min)."""
    return field(default=default, metadata={"help": text, **more})
