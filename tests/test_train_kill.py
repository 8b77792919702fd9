"""Training runs that are killed over twenty times end with the bytes and the metrics of those that were not."""

from __future__ import annotations

import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from mlx_llama3v.embeddings.store import Store
from tests.forked import start
from tests.ranks import LAUNCH, ROOT, launch, launching
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


_RANK = """
import os, sys
from pathlib import Path
from tests.test_train_kill import go_on
Path(sys.argv[1] + os.environ["MLX_RANK"]).write_text(str(os.getpid()))
go_on("lora", Path(sys.argv[1]), Path(sys.argv[2]))
"""


@pytest.mark.skipif(not LAUNCH.exists(), reason="mlx.launch is not installed")
def test_all_ranks_are_killed_at_once(tmp_path: Path) -> None:
    """As when the power fails: of two machines neither can end in order."""
    store, whole, cut = make_store(tmp_path / "store").path, tmp_path / "whole", tmp_path / "cut"
    done = launch(sys.executable, "-c", _RANK, str(whole), str(store))
    assert done.returncode == 0, done
    for wanted in (0, 8):  # the step after which the kill falls, beside what is under way then
        command = launching(sys.executable, "-c", _RANK, str(cut), str(store))
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.STDOUT, cwd=ROOT) as running:
            until = time.monotonic() + 60
            while not any(cut.glob(f"checkpoints/*{wanted:04}") if wanted else cut.glob("config.json")):
                assert running.poll() is None and time.monotonic() < until
                time.sleep(0.001)
            for rank in "01":
                os.kill(int(tmp_path.joinpath(f"cut{rank}").read_text()), signal.SIGKILL)
        assert not (cut / "adapters.safetensors").exists()
    done = launch(sys.executable, "-c", _RANK, str(cut), str(store))
    assert done.returncode == 0 and outcome(cut) == outcome(whole), done


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
