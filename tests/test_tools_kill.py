"""`store prune` and `store merge`, killed at random moments and run again, end as undisturbed ones do."""

from __future__ import annotations

import random
import signal
import time
from pathlib import Path

import pytest

from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.tools import merge, prune
from tests.forked import start
from tests.test_store import contents, expected, fill

PICTURES, KILLS = 300, 8
KEEP = [f"{n}.jpg" for n in range(0, PICTURES, 3)]
PARTS = {  # of b's shards, most hold a picture of a's: they are copied, not renamed
    "a": [*range(200)],
    "b": [n for new in range(200, PICTURES) for n in ((new, new - 200) if new % 3 == 0 else (new,))],
}


def make(folder: Path) -> None:
    """Shards of four pictures or so."""
    for name, seeds in {"all": [*range(PICTURES)], **PARTS}.items():
        fill(folder / name, seeds, shard_bytes=900)


def work(job: str, folder: Path) -> None:
    """What is killed."""
    if job == "prune":
        prune(folder / "all", KEEP)
    else:
        merge([folder / "a", folder / "b"], folder / "all-new", move=job == "move")


def held(job: str, folder: Path) -> dict[str, object]:
    """What of the pictures is there, wherever."""
    stores = [folder / "all"] if job == "prune" else [folder / name for name in ("a", "b", "all-new")]
    return {name: one for path in stores if (path / "manifest.json").exists() for name, one in contents(path).items()}


@pytest.mark.parametrize("job", ["prune", "merge", "move"])
def test_killed_at_random_and_run_again(job: str, tmp_path: Path) -> None:
    make(tmp_path / "whole")
    began = time.monotonic()
    work(job, tmp_path / "whole")
    seconds = time.monotonic() - began
    everything = expected(range(PICTURES))
    wanted = {name: everything[name] for name in KEEP} if job == "prune" else everything
    folder, chance, kills, cut = tmp_path / "cut-0", random.Random(job), 0, 0
    make(folder)
    for turn in range(8 * KILLS):
        if kills >= KILLS and cut > 1:
            break
        output = folder / ("all" if job == "prune" else "all-new")
        process = start(work, job, folder)
        if job == "move" and turn % 2:  # renames take milliseconds: wait for the first
            until = time.monotonic() + 10
            while process.is_alive() and time.monotonic() < until and not any(output.glob("shard-*")):
                pass
            time.sleep(chance.uniform(0, 0.005))
        else:
            time.sleep(chance.uniform(0, 0.6 * seconds))
        process.kill()
        process.join(60)
        found = held(job, folder)
        assert found.items() >= wanted.items() and found.items() <= everything.items()
        if process.exitcode == -signal.SIGKILL:
            kills += 1
            left = len(Store(output)) if (output / "manifest.json").exists() else 0
            cut += len(KEEP) < left < PICTURES if job == "prune" else 0 < left < PICTURES
        else:  # it was through
            assert process.exitcode == 0
            folder = tmp_path / f"cut-{turn + 1}"
            make(folder)
    work(job, folder)
    output = folder / ("all" if job == "prune" else "all-new")
    assert contents(output) == contents(tmp_path / "whole" / output.name) == wanted
    store = Store(output)
    assert sum(shard.index.pictures for shard in store.shards) == len(wanted), "a picture is there twice"
    assert cut > 1, "no kill fell into the work"
    assert not [*output.glob(".*.tmp")]
