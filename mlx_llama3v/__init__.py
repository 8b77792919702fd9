"""mlx-llama3v: a SigLIP + Llama-3 vision-language model on MLX, from two checkpoints to a conversation.

>>> from mlx_llama3v import load, generate
>>> session = load("my-model", run="runs/sft")
>>> generate(session, "What does the sign say?", images=["sign.jpg"])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mlx_llama3v.platform import prepare as _prepare
from mlx_llama3v.version import __version__

if TYPE_CHECKING:
    from mlx_llama3v.inference import generate, load, stream

_prepare()  # The one import side effect: a BLAS must be loaded before mlx.core, see platform.py.

__all__ = ["__version__", "generate", "load", "stream"]


def __getattr__(name: str) -> Any:
    """Import inference when it is first used: `llama3v-mlx --help` need not wait for mlx-lm."""
    if name in ("generate", "load", "stream"):
        from mlx_llama3v import inference

        return getattr(inference, name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
