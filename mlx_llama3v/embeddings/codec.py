"""How patch embeddings are held on disk: a small family of codecs, keyed by name.

The name is part of a store's manifest, so a store is never decoded with another codec than it was written
with. A codec turns float values [N, D] into named parts whose first axis is N: parts of several pictures are
concatenated into one tensor of a shard and any picture can be read alone.

Trained towers have outlier channels, large in spread or in mean; one scale a token would spend its levels on
them. So `int8` and `int4` first normalise every channel with an offset and a scale that are fitted once, to a sample
(sample.py), and written into every shard: those are the parts that begin with "channel." and have one row.
`decode` is written once for NumPy and MLX: training sends codes to the device and dequantizes them there.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from types import ModuleType
from typing import Any, Protocol

import numpy as np

from mlx_llama3v.errors import StoreError

CHANNEL = "channel."  # beginning of the names of parts [1, D] that all pictures of a shard share
_GROUP = 16  # int4: values with one scale
_STEPS = 16  # int4: scales of a group between powers of two
_LIMIT = float(np.finfo(np.float16).max)
_PRIOR_ROWS = 8
_FLOOR = 0.1  # a channel's scale is at least that share of the median: a dead channel must not become an outlier

Parts = Mapping[str, Any]  # of NumPy or MLX arrays


class Codec(Protocol):
    """What the store asks of a codec."""

    name: str
    has_channels: bool  # whether it is fitted to anything

    def fit(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """Values [N, D] -> the channel parts [1, D], which `encode` takes and `decode` finds among its parts."""

    def encode(self, values: Any, channels: Parts, xp: Any = np) -> dict[str, Any]:
        """Float values [..., N, D] -> parts [..., N, x] to be written; `xp` is numpy or mlx.core."""

    def decode(self, parts: Parts, xp: Any = np) -> Any:
        """Parts [..., N, x] and channel parts [..., 1, D] -> values [..., N, D]; `xp` is numpy or mlx.core."""

    def rows(self, width: int) -> dict[str, tuple[type, int]]:
        """Type and columns of every part, for embeddings of `width` values."""

    def row_bytes(self, width: int) -> int:
        """Bytes of one embedding of `width` values (channel parts, one row a shard, not counted)."""


class _Sized:
    """What follows from `rows`; and most have channels."""

    has_channels = True

    def rows(self, width: int) -> dict[str, tuple[type, int]]:
        """See Codec."""
        raise NotImplementedError

    def row_bytes(self, width: int) -> int:
        """See Codec."""
        return sum(np.dtype(dtype).itemsize * columns for dtype, columns in self.rows(width).values())


class Float16(_Sized):
    """Half precision: relative error 2**-11. Values beyond its range (massive activations) saturate."""

    name = "float16"
    has_channels = False

    def fit(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """See Codec: nothing is fitted."""
        return {}

    def encode(self, values: Any, channels: Parts, xp: Any = np) -> dict[str, Any]:
        """See Codec."""
        return {"patches": saturate(values, xp)}

    def decode(self, parts: Parts, xp: Any = np) -> Any:
        """See Codec; float16."""
        return parts["patches"]

    def rows(self, width: int) -> dict[str, tuple[type, int]]:
        """See Codec."""
        return {"patches": (np.float16, width)}


class Int8(_Sized):
    """8 bits a value, a float16 scale a token, over normalised channels: half of float16, error about 0.8%."""

    name = "int8"

    def fit(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """See Codec."""
        return _fit(values)

    def encode(self, values: Any, channels: Parts, xp: Any = np) -> dict[str, Any]:
        """See Codec."""
        normal, scale = _normalise(values, channels, 127, xp)
        return {"codes": xp.clip(xp.round(normal), -127, 127).astype(xp.int8), "scales": scale}

    def decode(self, parts: Parts, xp: Any = np) -> Any:
        """See Codec; float32."""
        codes, scale = parts["codes"].astype(xp.float32), parts["scales"].astype(xp.float32)
        return codes * scale * parts["channel.scale"] + parts["channel.offset"]

    def rows(self, width: int) -> dict[str, tuple[type, int]]:
        """See Codec."""
        return {"codes": (np.int8, width), "scales": (np.float16, 1)}


class Int4(_Sized):
    """4 bits a value and a byte for 16 values' scale, over normalised channels and tokens: 0.282 of float16.

    The byte is a sign and a power of two in sixteenths: the sign lets a group's largest value take the code -8,
    which two's complement has beyond 7. Against groups of 64 with a float16 scale and offset (MLX's layout), which
    are as large, the error is 7.6% instead of 9.0% on normal values.
    """

    name = "int4"

    def fit(self, values: np.ndarray) -> dict[str, np.ndarray]:
        """See Codec."""
        return _fit(values)

    def encode(self, values: Any, channels: Parts, xp: Any = np) -> dict[str, Any]:
        """See Codec; a width that is no multiple of 16 is padded to one."""
        normal, scale = _normalise(values, channels, 1, xp)
        *lead, columns = normal.shape
        groups, table = -(-columns // _GROUP), _table(xp)
        if columns % _GROUP:
            normal = xp.pad(normal, [(0, 0)] * len(lead) + [(0, groups * _GROUP - columns)])
        normal = normal.reshape(*lead, groups, _GROUP)
        # A row [..., groups] for every place in a group: down columns of those all of it is vectorized.
        normal = xp.stack([normal[..., place] for place in range(_GROUP)])
        largest, least = normal.max(0), normal.min(0)
        above = largest >= -least
        step = xp.maximum(xp.where(above, largest, -least) / 8, table[0])
        # Rounded down: saturating the largest value a little costs less than coarser steps for the other 15. Devices
        # differ in the last bits of log2, so it is taken a little too low and the table decides.
        power = xp.clip(xp.floor(xp.log2(step) * _STEPS - 0.01) + 127, 0, 126).astype(xp.uint8)
        power = power + (step >= table[power + 1]).astype(xp.uint8) | (above.astype(xp.uint8) << 7)
        codes = xp.clip(xp.round(normal / table[power]), -8, 7).astype(xp.int8).view(xp.uint8)
        codes = xp.moveaxis(codes[::2] & 15 | codes[1::2] << 4, 0, -1).reshape(*lead, groups * _GROUP // 2)
        return {"codes": codes, "groups": power, "scales": scale}

    def decode(self, parts: Parts, xp: Any = np) -> Any:
        """See Codec; float32."""
        packed, lead = parts["codes"], parts["codes"].shape[:-1]
        groups = parts["groups"].shape[-1]
        codes = xp.stack([packed & 15, packed >> 4], -1).reshape(*lead, groups, _GROUP)
        signed = ((codes ^ 8).astype(xp.float32) - 8) * _table(xp)[parts["groups"]][..., None]
        width = parts["channel.scale"].shape[-1]
        values = signed.reshape(*lead, groups * _GROUP)[..., :width] * parts["scales"].astype(xp.float32)
        return values * parts["channel.scale"] + parts["channel.offset"]

    def rows(self, width: int) -> dict[str, tuple[type, int]]:
        """See Codec."""
        groups = -(-width // _GROUP)
        return {"codes": (np.uint8, groups * _GROUP // 2), "groups": (np.uint8, groups), "scales": (np.float16, 1)}


# Byte -> scale, of values of which the largest of the token is 1: 2**-10.9 .. 2**-3, negative from 128 on.
_GROUP_SCALES = np.exp2((np.arange(128) - 127) / _STEPS).astype(np.float32)
_GROUP_SCALES = np.concatenate([_GROUP_SCALES, -_GROUP_SCALES])


def _table(xp: ModuleType) -> Any:
    return _GROUP_SCALES if xp is np else xp.array(_GROUP_SCALES)


def _fit(values: np.ndarray) -> dict[str, np.ndarray]:
    """Mean and standard deviation of every channel, float32 [1, D]."""
    values = np.clip(values.astype(np.float32), -_LIMIT, _LIMIT)
    offset, scale = values.mean(0, dtype=np.float64), values.std(0, dtype=np.float64)
    # A handful of rows says little of a channel: believe what all of them have in common as if it were more rows.
    trust = len(values) / (len(values) + _PRIOR_ROWS)
    scale = trust * scale + (1 - trust) * np.sqrt((values.astype(np.float64) ** 2).mean())
    scale = np.maximum(scale, _FLOOR * np.median(scale))
    scale[scale < 2.0**-24] = 1  # float16's smallest: a scale of less may be none in float32
    return {"channel.offset": offset[None].astype(np.float32), "channel.scale": scale[None].astype(np.float32)}


def _normalise(values: Any, channels: Parts, largest: int, xp: Any) -> tuple[Any, Any]:
    """Values over channels and tokens, of which the largest of a token is `largest`; and float16 scales [..., N, 1]."""
    clipped = xp.clip(values.astype(xp.float32), -_LIMIT, _LIMIT)
    normal = (clipped - channels["channel.offset"]) / channels["channel.scale"]
    scale = xp.minimum(xp.abs(normal).max(-1, keepdims=True) / largest, _LIMIT).astype(xp.float16)
    # The next float16: never less than what is needed, nor zero where there is something.
    scale = (scale.view(xp.uint16) + (scale < _LIMIT).astype(xp.uint16)).view(xp.float16)
    return normal / scale.astype(xp.float32), scale


def saturate(values: Any, xp: Any = np) -> Any:
    """float16, values beyond its range at its ends."""
    if values.dtype == xp.float16:
        return values
    return xp.clip(values, -_LIMIT, _LIMIT).astype(xp.float16)


# The smallest whose effect on the demo's accuracy cannot be told from none, three seeds (benchmarks/codecs.py).
DEFAULT = "int4"
CODECS: dict[str, Codec] = {codec.name: codec for codec in (Float16(), Int8(), Int4())}


def get_codec(name: str) -> Codec:
    """The codec of that name. Raises StoreError that lists the known ones."""
    if name not in CODECS:
        raise StoreError(f"codec {name!r} is not known; this version has {', '.join(CODECS)}.")
    return CODECS[name]


def width(parts: Parts, channels: Parts) -> int:
    """D of the embeddings of a shard with those parts (anything that has a shape)."""
    value = channels.get("channel.scale", parts.get("patches"))
    return int(value.shape[-1]) if value is not None and value.shape else 0


def misfit(codec: Codec, parts: Parts, channels: Parts) -> str:
    """Name of a part that is not what the codec writes (anything that has a dtype and a shape), or "" ."""
    columns = width(parts, channels)
    expected: dict[str, Any] = {name: (np.dtype(dtype), n) for name, (dtype, n) in codec.rows(columns).items()}
    found = {name: (part.dtype, part.shape[1] if len(part.shape) == 2 else -1) for name, part in parts.items()}
    if codec.has_channels:
        expected |= {f"{CHANNEL}{name}": (np.dtype(np.float32), columns) for name in ("offset", "scale")}
    found |= {name: (value.dtype, value.shape[-1] if value.ndim == 2 else -1) for name, value in channels.items()}
    return next((name for name in {**expected, **found} if expected.get(name) != found.get(name)), "")


def fidelity(values: np.ndarray, decoded: np.ndarray) -> dict[str, float]:
    """How near decoded values [N, D] are: mean cosine of the rows, and relative RMS error."""
    a, b = values.astype(np.float64), decoded.astype(np.float64)
    norms = np.linalg.norm(a, axis=1) * np.linalg.norm(b, axis=1)
    cosine = np.divide((a * b).sum(1), norms, out=np.ones(len(a)), where=norms > 0).mean() if len(a) else 1.0
    error = float(np.sqrt(((a - b) ** 2).sum() / max((a**2).sum(), 1e-300)))
    return {"cosine": round(float(cosine), 7), "relative_error": round(error, 6)}


@dataclass(frozen=True)
class Fit:
    """Channel parts of a codec, and how faithful it is with them."""

    channels: Parts
    fidelity: Mapping[str, float]


def fit_codec(codec: Codec, pictures: Sequence[np.ndarray]) -> Fit:
    """Fit it to embeddings [N, D] of pictures. How faithful it is to others is measured on every fourth of them (in
    turn, so that each serves both ends) with channels fitted to the rest; on a single picture, with its own.
    """
    held: list[np.ndarray] = []
    decoded: list[np.ndarray] = []
    for turn in range(min(4, len(pictures))):
        held += pictures[turn::4]
        rest = [values for i, values in enumerate(pictures) if i % 4 != turn] or pictures
        channels = codec.fit(np.concatenate(rest))
        decoded += [codec.decode({**codec.encode(values, channels), **channels}) for values in pictures[turn::4]]
    return Fit(codec.fit(np.concatenate(pictures)), fidelity(np.concatenate(held), np.concatenate(decoded)))
