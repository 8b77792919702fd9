"""As what embeddings leave the device that made them: as they are, or as the codec's parts.

Codes cost a core 7 ms a slice (int4, so400m); a GPU makes them beside the tower, and a seventh of the bytes leaves it.
On a CPU NumPy is the faster one of the two and works in the writer's thread. Both run the same lines of codec.py: a CPU
stores the same bytes either way, and a GPU that rounds otherwise may be one step beside them (tests/test_codec.py).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import Encoded, SliceLayout
from mlx_llama3v.embeddings.codec import Codec, Parts
from mlx_llama3v.embeddings.store import Coded
from mlx_llama3v.platform import device_name
from mlx_llama3v.vision.encode import Form, as_values

Made = Encoded | Coded  # one picture; the channel parts, which all share, are not among its parts


def choose_form(codec: Codec, channels: Parts | None, before: bool, on_device: bool | None = None) -> Form:
    """What `Encoder.encode_as` takes.

    Args:
        channels: of the codec; None where they are not fitted yet.
        before: whether something is still to be done to embeddings before the codec.
        on_device: whether to code where the tower runs; default: where that is a GPU.
    """
    if on_device is None:
        on_device = device_name() != "cpu"
    if not on_device or before or channels is None:
        return as_values
    own = {name: mx.array(part) for name, part in channels.items()}
    mx.eval(own)  # lanes take no work of another thread over

    def code(values: mx.array) -> dict[str, mx.array]:
        whole = mx.isfinite(values).all(-1, keepdims=True)  # the codec would saturate infinity; NaN shows in its parts
        return codec.encode(mx.where(whole, values, mx.nan), own, mx)

    return code


def gather(layout: SliceLayout, slices: Sequence[Mapping[str, np.ndarray]]) -> Made:
    """One picture of what `Encoder.encode_as` made of its slices."""
    parts = {name: np.concatenate([each[name] for each in slices]) for name in slices[0]}
    return Encoded(layout, parts["values"]) if "values" in parts else Coded(layout, parts)
