"""Checkpoints of a run: complete or absent, rotated, and enough to go on to the same bytes.

`checkpoints/step-NNNNNNN/` holds what learns (`weights.safetensors`), AdamW's state and the random state
(`optimizer.safetensors`), and `state.json`: the step, which with the seed is the position in the data, and
the settings, so that a run cannot go on with others by mistake. A checkpoint is built under a hidden name,
synced and renamed; it is renamed back before it is deleted. So a kill leaves no half of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from hashlib import sha256
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.optimizers import Optimizer
from mlx.utils import tree_flatten, tree_map_with_path

from mlx_llama3v.data.records import Record, records_digest
from mlx_llama3v.durable import sync
from mlx_llama3v.embeddings.store import MANIFEST, Reader
from mlx_llama3v.errors import CheckpointError, RunError
from mlx_llama3v.model import Llama3V
from mlx_llama3v.tensors import (
    digest,
    load_file,
    mismatches,
    parameters,
    read_json,
    save_safetensors_atomic,
    write_text,
)
from mlx_llama3v.text.tokens import Tokens
from mlx_llama3v.train.config import STAGES, TrainConfig
from mlx_llama3v.train.report import METRICS

CHECKPOINTS = "checkpoints"
PROJECTOR = "projector.safetensors"  # in a run that has ended
WEIGHTS, OPTIMIZER, STATE = "weights.safetensors", "optimizer.safetensors", "state.json"
# What may differ between a run and its resumption: the result does not depend on it.
_FREE = ("save_every", "keep", "steps_per_report", "steps_per_eval", "val_rows", "on_nan", "report_to")
DIGESTS = {  # settings of which a checkpoint holds the digest alone
    "rows": "the records that are trained on (of another data file, --val-split, or a store with other pictures)",
    "tokenizer": "the tokenizer",
    "model": "the model",
    "decoder": "the weights of the decoder",
    "embeddings": "the encoder of the store",
    "projector": "the frozen projector",
}
_LOOKED_AT = 64  # numbers of a tensor
_NAME = re.compile(r"step-(\d{7,})")


@dataclass(frozen=True)
class State:
    """Where a run stands. `window` is the unfinished report."""

    step: int  # steps done
    seed: int
    batches: int  # batches done, over all epochs: the position in the data
    settings: dict[str, Any]  # what must be the same to go on
    window: dict[str, float]
    unseen: dict[str, str] = field(default_factory=dict)  # row -> why it was left out when its turn came


def check_place(run_dir: Path) -> None:
    """Raise RunError where a run would write over a model directory, a checkpoint, or into a store."""
    config = run_dir / "config.json"
    if (run_dir / MANIFEST).exists():
        raise RunError(f"{run_dir} is an embedding store; choose another directory for the run.")
    if config.is_file() and "train" not in read_json(config):
        raise RunError(f"{run_dir} holds a model; choose another directory for the run.")


def save(run_dir: Path, state: State, model: nn.Module, optimizer: Optimizer, keep: int) -> Path:
    """Write a checkpoint, then delete all but the newest `keep`. Returns its directory."""
    folder = run_dir / CHECKPOINTS
    folder.mkdir(parents=True, exist_ok=True)
    for leftover in folder.glob(".step-*"):
        shutil.rmtree(leftover)
    final = folder / f"step-{state.step:07d}"
    partial = folder / f".{final.name}.partial"
    partial.mkdir()
    try:
        save_safetensors_atomic(partial / OPTIMIZER, _state(optimizer))
        save_safetensors_atomic(partial / WEIGHTS, dict(tree_flatten(model.trainable_parameters())))
        write_text(partial / STATE, json.dumps(asdict(state), indent=2) + "\n")
        sync(partial)
    except OSError:  # a full disk, which half a checkpoint would keep full
        shutil.rmtree(partial, ignore_errors=True)
        raise
    if final.exists():  # a run that went on from an older checkpoint
        _remove(final)
    os.rename(partial, final)
    sync(folder)
    for old in checkpoints(run_dir)[:-keep]:
        _remove(old)
    return final


def checkpoints(run_dir: Path) -> list[Path]:
    """Complete checkpoints, oldest first. Raises RunError naming one that lacks a file."""
    folder = run_dir / CHECKPOINTS
    names = sorted(folder.iterdir(), key=lambda path: path.name) if folder.is_dir() else []
    found = sorted((path for path in names if _NAME.fullmatch(path.name)), key=_step)
    for path in found:
        missing = [name for name in (WEIGHTS, OPTIMIZER, STATE) if not (path / name).is_file()]
        if missing:
            raise RunError(f"{path} is incomplete: it has no {', '.join(missing)}; delete it to go on.")
    return found


def newest(run_dir: Path, resume: bool) -> Path | None:
    """The checkpoint to go on from; None where a run begins.

    Raises RunError where a run would be overwritten: one that is not to go on, or that ended and left no checkpoint.
    """
    found, metrics = checkpoints(run_dir), run_dir / METRICS
    # Empty where a run ended before its first report: there is nothing to lose.
    if not resume and (found or (metrics.exists() and metrics.stat().st_size)):
        raise RunError(f"{run_dir} holds a run already; go on with it (--resume), or choose another directory.")
    if not found and (run_dir / PROJECTOR).exists():
        raise RunError(
            f"{run_dir} holds a run that has ended, and no checkpoint to go on from; choose another directory."
        )
    return found[-1] if found else None


def read_state(checkpoint: Path) -> State:
    """`state.json` of a checkpoint. Raises RunError naming it when it is damaged."""
    path = checkpoint / STATE
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
        return State(**{one.name: values[one.name] for one in fields(State) if one.name in values})
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise RunError(f"{path} is damaged; delete {checkpoint} to go on from an older one.") from error


def require_same(checkpoint: Path, have: Mapping[str, Any], want: Mapping[str, Any]) -> None:
    """Raise RunError naming every setting, with both values, that differs from the checkpoint's."""
    differ = [key for key in {**have, **want} if have.get(key) != want.get(key)]
    if differ:
        what = "; ".join(_difference(key, have.get(key), want.get(key)) for key in differ)
        raise RunError(f"{checkpoint} was made with other settings: {what}; resume with those, or start anew.")


def settings(
    config: TrainConfig, records: Sequence[Record], tokens: Tokens, model: Llama3V, store: Reader
) -> dict[str, Any]:
    """All that the result of a run depends on and that a resumed one could get wrong; of a fresh `model`."""
    found = {key: value for key, value in config.to_dict().items() if key not in _FREE}
    found["rows"] = records_digest(records)
    found["tokenizer"] = sha256((tokens.to_json() + repr(tokens.layout)).encode()).hexdigest()
    found["model"] = sha256(json.dumps(model.config.to_dict(), sort_keys=True).encode()).hexdigest()
    # The beginning of each tensor: training of any kind changes it, and to hash 16 GB would take a minute.
    decoder = parameters(model.language_model)
    found["decoder"] = digest({name: value.reshape(-1)[:_LOOKED_AT] for name, value in decoder.items()})
    found["embeddings"], found["codec"] = store.manifest.digest, store.codec.name
    if STAGES[config.stage].trains == "decoder":  # frozen, so no checkpoint brings it back
        found["projector"] = digest(parameters(model.projector))
    return found


def _difference(key: str, had: Any, has: Any) -> str:
    if key in DIGESTS:  # a digest tells nobody anything
        return f"{DIGESTS[key]} changed"
    return f"{key} was {had!r} and is {has!r} now"


def restore(checkpoint: Path, model: nn.Module, optimizer: Optimizer) -> None:
    """Set weights, optimizer and random state from a checkpoint. Raises RunError where they do not fit."""
    try:
        weights, state = load_file(checkpoint / WEIGHTS), load_file(checkpoint / OPTIMIZER)
    except CheckpointError as error:
        raise RunError(f"{str(error).rstrip('.')}; delete {checkpoint} to go on from an older one.") from error
    phrases = mismatches(dict(tree_flatten(model.trainable_parameters())), weights)
    phrases += mismatches(_state(optimizer), state)
    if phrases:
        raise RunError(f"{checkpoint} does not fit this model: {'; '.join(phrases)}.")
    model.load_weights(list(weights.items()), strict=False)
    optimizer.state = tree_map_with_path(lambda name, _: state[f"optimizer.{name}"], optimizer.state)
    optimizer.init(model.trainable_parameters())
    high, low = map(int, np.array(state["random"]))
    mx.random.seed(high << 32 | low)  # a seed is the state; it cannot be set in any other way
    mx.eval(model.parameters(), optimizer.state)


def _state(optimizer: Optimizer) -> dict[str, mx.array]:
    """All that a step changes beside the weights."""
    held = dict(tree_flatten(optimizer.state))
    return {**{f"optimizer.{name}": value for name, value in held.items()}, "random": mx.random.state[0]}  # type: ignore[index]


def _step(path: Path) -> int:
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else -1


def _remove(path: Path) -> None:
    """Delete a checkpoint; its name goes first, so that a kill in between leaves no half of one."""
    hidden = path.with_name(f".{path.name}.old")
    os.rename(path, hidden)
    shutil.rmtree(hidden)
