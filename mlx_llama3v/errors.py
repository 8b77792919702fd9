"""The errors that a user can cause and mend: one clear sentence each, naming what was given and expected.

Commands print them without a traceback and exit with status 1; anything else that escapes is a bug.
"""

from __future__ import annotations


class UserError(Exception):
    """Something a user can mend. The message is one sentence that names the file or value and what to do."""


class ImageError(UserError):
    """A picture that cannot be read: broken, not an image, over the pixel limit."""


class CheckpointError(UserError):
    """A model directory or checkpoint that is missing, incomplete, of the wrong kind or shape."""


class DataError(UserError):
    """A data file that cannot be used: bad JSON, an unknown schema, a missing image."""


class StoreError(UserError):
    """An embedding store that is missing, damaged, or was made with another encoder or tiling."""


class DamagedError(StoreError):
    """A shard whose bytes are not what was written: cut short, bits flipped."""

    @property
    def finding(self) -> str:
        """The message without what to do."""
        return str(self.args[0])

    def __str__(self) -> str:
        return f"{self.finding}; run the same `embed` again to make it anew."


class ManifestError(StoreError):
    """A store whose manifest is missing, damaged, or not that of its shards."""


class RunError(UserError):
    """A training run that cannot start or go on: settings that clash, an incomplete checkpoint."""


class ContextError(UserError):
    """A conversation that cannot be answered: too long, an image without visual tokens, no user turn."""


def size(count: float) -> str:
    """Bytes for people: 1.7 GB."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} TB"
