"""A training run that is killed twenty times ends with the bytes and the metrics of one that was not."""

from __future__ import annotations

import random
import shutil
import signal
import time
from pathlib import Path

from mlx_llama3v.embeddings.store import Store
from tests.forked import start
from tests.test_resume import outcome
from tests.tiny_run import long_settings, make_store, run

KILLS = 20


def go_on(directory: Path, store: Path) -> None:
    """What is killed: every second step writes a checkpoint."""
    run(long_settings(), Store(store), directory, resume=True)


def test_killed_twenty_times(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    for name in ("warm", "whole"):
        began = time.monotonic()
        run(long_settings(), store, tmp_path / name)
        seconds = time.monotonic() - began
    chance, kills, writing, ended = random.Random(0), 0, 0, 0
    cut = tmp_path / "cut"
    while kills < KILLS and ended < 3 * KILLS:
        process = start(go_on, cut, store.path)
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
            assert process.exitcode == 0 and outcome(cut) == outcome(tmp_path / "whole")
            ended += 1
            seconds *= 0.8  # measured while the machine was busier: kill earlier
            shutil.rmtree(cut)
    process = start(go_on, cut, store.path)
    process.join(120)
    assert process.exitcode == 0 and outcome(cut) == outcome(tmp_path / "whole")
    assert kills == KILLS and writing > 0, (kills, writing, ended)
