"""mlx-llama3v: a SigLIP + Llama-3 vision-language model on MLX, from two checkpoints to a conversation.

>>> from mlx_llama3v import load, generate
>>> session = load("my-model")
>>> generate(session, "What does the sign say?", images=["sign.jpg"])
"""

from mlx_llama3v.platform import prepare as _prepare
from mlx_llama3v.version import __version__

_prepare()  # The one import side effect: a BLAS must be loaded before mlx.core, see platform.py.

__all__ = ["__version__"]
