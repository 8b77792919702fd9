"""Training runs that are killed over twenty times end with the bytes and the metrics of those that were not."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path
from typing import Any

from mlx_llama3v.embeddings.store import Store
from tests.forked import start
from tests.test_resume import outcome, spoiled
from tests.tiny_run import make_store, run, settings

KILLS = 6
KINDS: dict[str, tuple[str, dict[str, Any]]] = {
    "lora": ("sft", {"lora_dropout": 0.2}),
    "dora": ("sft", {"tune": "dora", "grad_accumulation_steps": 2, "val_split": 0.2, "steps_per_eval": 3}),
    "full": ("sft", {"tune": "full", "on_nan": "skip", "steps_per_report": 3, "batch_size": 2}),
    "pretrain": ("pretrain", {"lanes": 2, "val_split": 0.2, "steps_per_eval": 2}),
}


def go_on(kind: str, directory: Path, store: Path) -> None:
    """What is killed: every second step writes a checkpoint. The loss of one row is no number."""
    stage, over = KINDS[kind]
    with spoiled("row-7" if "on_nan" in over else ""):
        run(settings(stage, iters=20, keep=50, **over), Store(store), directory, resume=True)


def test_killed_twenty_times_and_more(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    writing = sum(killed(kind, store, tmp_path / kind) for kind in KINDS)
    assert writing > 0, "no kill fell into the writing of a checkpoint"


def killed(kind: str, store: Store, path: Path) -> int:
    """Kill and resume one kind of run, and compare what it ends with; how many checkpoints were cut by the kills."""
    for name in ("warm", "whole"):
        began = time.monotonic()
        go_on(kind, path / name, store.path)
        seconds = time.monotonic() - began
    chance, kills, writing, ended = random.Random(kind), 0, 0, 0
    cut = path / "cut"
    while kills < KILLS and ended < 3 * KILLS:
        process = start(go_on, kind, cut, store.path)
        if kills % 2:  # while a checkpoint is being written
            until = time.monotonic() + 2 * seconds
            while process.is_alive() and time.monotonic() < until and not any(cut.glob("checkpoints/.step-*")):
                time.sleep(0.0005)
        else:
            time.sleep(chance.uniform(0, 0.6 * seconds))
        process.kill()
        process.join(60)
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            writing += any(cut.glob("checkpoints/.step-*"))
        else:  # it was through: nothing was left to be killed at
            assert process.exitcode == 0 and outcome(cut) == outcome(path / "whole")
            ended += 1
            seconds *= 0.8  # measured while the machine was busier: kill earlier
            shutil.rmtree(cut)
    process = start(go_on, kind, cut, store.path)
    process.join(120)
    assert process.exitcode == 0 and outcome(cut) == outcome(path / "whole")
    assert kills == KILLS, (kills, ended)
    return writing
