"""From a question to an answer: conversations that keep their KV cache, and many answers at a time.

`session.py` is one conversation, `batch.py` rows that are decoded together, `prefixes.py` keys and values
that later requests may reuse; `sampling.py` chooses tokens and `answer.py` decides when an answer has ended.
"""

from __future__ import annotations

from mlx_llama3v.inference.answer import Answer, Piece, Timings
from mlx_llama3v.inference.batch import Request, batch_generate
from mlx_llama3v.inference.loading import generate, load, stream
from mlx_llama3v.inference.rows import embed_rows
from mlx_llama3v.inference.sampling import Sampling
from mlx_llama3v.inference.session import Memory, Picture, Session, Turn

__all__ = [
    "Answer",
    "Memory",
    "Picture",
    "Piece",
    "Request",
    "Sampling",
    "Session",
    "Timings",
    "Turn",
    "batch_generate",
    "embed_rows",
    "generate",
    "load",
    "stream",
]
