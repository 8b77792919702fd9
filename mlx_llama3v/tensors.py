"""Tensors on disk: safetensors files found, read lazily, checked all at once, and written atomically.

Nothing is read before it is used: `mx.load` maps names to lazy arrays, shapes are compared on those, and
`write_shards` evaluates one tensor after the other. So a conversion needs the memory of one output file, not
that of the model. Pickles (.bin, .pth) are never opened.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Iterable, Mapping
from hashlib import sha256
from pathlib import Path
from shlex import quote
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from mlx_llama3v.durable import sync
from mlx_llama3v.errors import CheckpointError

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 5 << 30
PICKLES = (".bin", ".pth", ".pt", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object. Raises CheckpointError where the file is missing, broken or something else."""
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path} is missing; the directory is not a whole checkpoint.") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} cannot be read as JSON: {error}.") from error
    if not isinstance(values, dict):
        raise CheckpointError(f"{path} holds a {type(values).__name__}, expected a JSON object.")
    return values


def weight_files(directory: Path) -> list[Path]:
    """The safetensors files of a checkpoint: those its index names, else model.safetensors, else all.

    Raises CheckpointError where a named file is missing, where there are only pickles, or no weights at all.
    """
    if (directory / INDEX).is_file():
        named = read_json(directory / INDEX).get("weight_map")
        if not isinstance(named, dict):
            raise CheckpointError(f"{directory / INDEX} has no weight_map; expected a file for each tensor.")
        files = [directory / name for name in sorted(set(named.values()))]
        missing = [file.name for file in files if not file.is_file()]
        if missing:
            raise CheckpointError(f"{directory}: {INDEX} names {', '.join(missing)}, which is not there.")
        return files
    if (directory / "model.safetensors").is_file():
        return [directory / "model.safetensors"]
    if files := sorted(directory.glob("*.safetensors")):
        return files
    pickles = sorted(file.name for file in directory.iterdir() if file.suffix in PICKLES)
    if pickles:
        raise CheckpointError(
            f"{directory} has its weights only in {', '.join(pickles)}; expected safetensors: "
            + pickle_refusal(directory / pickles[0])
        )
    raise CheckpointError(f"{directory} has no *.safetensors file; expected a checkpoint with weights.")


def pickle_refusal(path: Path) -> str:
    """Why a pickle is not opened, and the line with which its owner makes a safetensors file of it."""
    code = (
        "import sys, torch, safetensors.torch as s; "
        's.save_file({k: v.contiguous().clone() for k, v in torch.load(sys.argv[1], map_location="cpu", '
        "weights_only=True).items()}, sys.argv[2])"
    )
    return (
        f"{path} is a pickle, which can run code as it is read, and is not opened; if you trust it, convert it once "
        f"where torch and safetensors are installed, then use the new file: python -c '{code}' "
        f"{quote(str(path))} {quote(str(path.with_suffix('.safetensors')))}"
    )


def load_file(path: Path) -> dict[str, mx.array]:
    """Lazy tensors of one file. Raises CheckpointError where it is missing, cut short or not safetensors."""
    if not path.is_file():
        raise CheckpointError(f"{path} is missing.")
    try:
        return mx.load(str(path), format="safetensors")  # type: ignore[return-value]
    except (RuntimeError, ValueError) as error:
        raise CheckpointError(
            f"{path} is not a whole safetensors file (an interrupted download or copy?): {error}"
        ) from error


def read_tensors(directory: Path, prefixes: tuple[str, ...] = ("",)) -> dict[str, mx.array]:
    """Lazy tensors of a checkpoint whose names start with one of `prefixes`, sorted by name."""
    found: dict[str, mx.array] = {}
    for file in weight_files(directory):
        tensors = {name: value for name, value in load_file(file).items() if name.startswith(prefixes)}
        if twice := sorted(found.keys() & tensors.keys()):
            raise CheckpointError(f"{file} repeats {', '.join(twice)} of another file of the same checkpoint.")
        found.update(tensors)
    return dict(sorted(found.items()))


def parameters(module: nn.Module) -> dict[str, mx.array]:
    """All parameters of a module under their dotted names."""
    return dict(tree_flatten(module.parameters()))


_NAMED = 12  # tensors that an error names


def mismatches(expected: Mapping[str, mx.array], found: Mapping[str, mx.array], prefix: str = "") -> list[str]:
    """What keeps `found` from being loaded as `expected`, one phrase a tensor, none where all is well.

    `prefix` is put before the names of `expected`, so that phrases name tensors as the file does.
    """
    wanted = {prefix + name: value for name, value in expected.items()}
    phrases = [f"missing {name}" for name in sorted(wanted.keys() - found.keys())]
    phrases += [f"unexpected {name}" for name in sorted(found.keys() - wanted.keys())]
    for name in sorted(wanted.keys() & found.keys()):
        want, got = wanted[name], found[name]
        if want.shape != got.shape:
            phrases.append(f"{name} is {list(got.shape)}, expected {list(want.shape)}")
        elif mx.issubdtype(want.dtype, mx.floating) != mx.issubdtype(got.dtype, mx.floating):
            phrases.append(f"{name} is {got.dtype}, expected {want.dtype}")
    return phrases


def refuse(phrases: Iterable[str], where: Path | str) -> None:
    """Raise one CheckpointError that names the mismatches, the first of very many; silent where there is none."""
    found = [*phrases]
    if found:
        more = f"; and {len(found) - _NAMED} more" if len(found) > _NAMED else ""
        raise CheckpointError(f"{where}: the weights do not fit the configuration: {'; '.join(found[:_NAMED])}{more}.")


def load_into(module: nn.Module, weights: Mapping[str, mx.array], where: Path | str, prefix: str = "") -> None:
    """Set every parameter of `module` from `weights`, named `prefix` + parameter; strict, all or nothing."""
    refuse(mismatches(parameters(module), weights, prefix), where)
    module.load_weights([(name.removeprefix(prefix), value) for name, value in weights.items()])


def save_safetensors_atomic(
    path: Path | str, tensors: Mapping[str, mx.array], metadata: Mapping[str, str] | None = None
) -> None:
    """Write one file, complete or absent: to a temporary name beside it, fsync, rename, fsync. Raises OSError."""
    path = Path(path)
    partial = path.with_name(f".{path.stem}.partial.safetensors")  # mx insists on the suffix
    try:
        try:
            mx.save_safetensors(str(partial), dict(tensors), {"format": "mlx", **(metadata or {})})
        except RuntimeError as error:  # MLX does not say why it cannot write
            full = shutil.disk_usage(path.parent).free < sum(value.nbytes for value in tensors.values())
            why = errno.ENOSPC if full else errno.EIO
            raise OSError(why, os.strerror(why), str(path)) from error
        sync(partial)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    sync(path.parent)


def write_shards(
    directory: Path,
    tensors: Iterable[tuple[str, mx.array]],
    shard_bytes: int = SHARD_BYTES,
    progress: Callable[[int], None] | None = None,
) -> None:
    """Write a stream of tensors as model*.safetensors and their index, in an existing directory.

    A file is closed before it would exceed `shard_bytes`, and its tensors are let go. `progress` is
    told the bytes evaluated so far.
    """
    shards: list[list[str]] = []
    total = 0
    pending: dict[str, mx.array] = {}

    def close_shard() -> None:
        save_safetensors_atomic(directory / f"part-{len(shards):05d}.safetensors", pending)
        shards.append(list(pending))
        pending.clear()

    for name, value in tensors:
        if pending and sum(held.nbytes for held in pending.values()) + value.nbytes > shard_bytes:
            close_shard()
        mx.eval(value)
        pending[name] = value
        total += value.nbytes
        if progress:
            progress(total)
    close_shard()
    weight_map: dict[str, str] = {}
    for index, names in enumerate(shards):  # the number of files, which is in their names, is known only now
        file = f"model-{index + 1:05d}-of-{len(shards):05d}.safetensors" if len(shards) > 1 else "model.safetensors"
        os.replace(directory / f"part-{index:05d}.safetensors", directory / file)
        weight_map.update(dict.fromkeys(names, file))
    values = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
    write_text(directory / INDEX, json.dumps(values, indent=2) + "\n")


def write_text(path: Path, text: str) -> None:
    """Write a text file, complete or as it was. Raises OSError."""
    partial = path.with_name(f".{path.name}.partial")
    partial.write_text(text, encoding="utf-8")
    sync(partial)
    os.replace(partial, path)
    sync(path.parent)


MARKS = "marks"  # their name in a store's fingerprint
_MARKED = 64


def marks(tensors: Mapping[str, mx.array]) -> str:
    """Some numbers by which weights are known again, in whatever type they are stored; "" where there are none.

    They are of norms and biases, which no quantization and no LoRA touches; lazy tensors are read for these alone.
    """
    vectors = [value for _, value in sorted(tensors.items()) if value.ndim == 1]
    places = np.unique(np.linspace(0, len(vectors) - 1, _MARKED).astype(int)) if vectors else ()
    return " ".join(f"{vectors[place][vectors[place].size // 2].item():.5g}" for place in places)


def same_marks(left: Any, right: str) -> bool:
    """Whether both may be of the same weights: equal but for the rounding to 16 bits, or one of them unknown.

    `left` comes out of a JSON file: what is no marks is unknown.
    """
    try:
        a, b = (np.array(text.split(), np.float64) for text in (left, right))
    except (AttributeError, ValueError):
        return True
    if not a.size or not b.size:
        return True
    return len(a) == len(b) and bool(np.allclose(a, b, rtol=2**-7, atol=1e-6, equal_nan=True))


def digest(tensors: Mapping[str, mx.array]) -> str:
    """SHA-256 of names and float32 values, whatever their order."""
    found = sha256()
    for name, value in sorted(tensors.items()):
        found.update(name.encode() + np.array(value.astype(mx.float32)).tobytes())
    return found.hexdigest()
