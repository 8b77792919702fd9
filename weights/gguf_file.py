"""A GGUF file written as a stream: names and sizes first, then one tensor after the other.

The `gguf` package knows the format and its quantizations; this module keeps no more than one tensor in memory.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.errors import CheckpointError

# What a weight matrix may be stored as; the package quantizes to these (llama.cpp's k-quants it only reads).
TYPES = ("f32", "f16", "bf16", "q8_0", "q5_1", "q5_0", "q4_1", "q4_0")
_ROWS = 1 << 24  # values that are converted at a time


@dataclass(frozen=True)
class Entry:
    """A tensor of the file: its GGUF name, its shape as PyTorch has it, its type, and how to get it."""

    name: str
    shape: tuple[int, ...]
    type: str
    load: Callable[[], mx.array]


def package() -> Any:
    """The `gguf` package. Raises CheckpointError where it is not installed."""
    try:
        import gguf
    except ImportError:
        raise CheckpointError("--format gguf needs the gguf package: pip install 'mlx-llama3v[gguf]'.") from None
    return gguf


def check_type(type: str) -> str:
    """One of TYPES. Raises CheckpointError for another."""
    if type not in TYPES:
        raise CheckpointError(f"GGUF type is {type!r}; expected one of {', '.join(TYPES)}.")
    return type


def fitting(shape: Sequence[int], type: str) -> str:
    """`type` for a matrix whose rows are whole blocks; float16 for one whose rows are not, float32 for vectors."""
    if len(shape) < 2:
        return "f32"
    block, _ = package().GGML_QUANT_SIZES[_kind(type)]
    return type if shape[-1] % block == 0 else "f16"


def write_gguf(path: Path, arch: str, describe: Callable[[Any], None], entries: Sequence[Entry]) -> None:
    """Write `entries` to a new file; `describe` is given the GGUFWriter to add what the file says of itself."""
    gguf = package()
    writer = gguf.GGUFWriter(path, arch)
    describe(writer)
    for entry in entries:
        kind = _kind(entry.type)
        dtype, shape = _stored(entry.shape, kind)
        size = int(np.prod(shape)) * dtype.itemsize
        writer.add_tensor_info(entry.name, shape, dtype, size, kind if dtype == np.uint8 else None)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for entry in entries:
        writer.write_tensor_data(_encoded(entry))
    writer.close()


def _kind(type: str) -> Any:
    return package().GGMLQuantizationType[type.upper()]


def _stored(shape: tuple[int, ...], kind: Any) -> tuple[np.dtype, tuple[int, ...]]:
    """How the writer wants a tensor: plain floats as they are, all else as bytes."""
    gguf = package()
    plain = {gguf.GGMLQuantizationType.F32: np.float32, gguf.GGMLQuantizationType.F16: np.float16}
    if kind in plain:
        return np.dtype(plain[kind]), shape
    return np.dtype(np.uint8), tuple(gguf.quant_shape_to_byte_shape(shape, kind))


def _encoded(entry: Entry) -> np.ndarray:
    """The tensor as the file holds it, converted a few rows at a time."""
    kind, value = _kind(entry.type), entry.load()
    dtype, shape = _stored(entry.shape, kind)
    rows = value.reshape(-1, entry.shape[-1]) if entry.shape else value.reshape(1, 1)
    step = max(1, _ROWS // rows.shape[1])
    found = []
    for start in range(0, rows.shape[0], step):
        part = np.array(rows[start : start + step].astype(mx.float32))
        found.append(package().quants.quantize(part, kind) if dtype == np.uint8 else part.astype(dtype))
    return np.concatenate(found).reshape(shape)
