"""Lanes: threads that keep the cores of a CPU busy, and leave things as they were."""

from __future__ import annotations

import ctypes
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llama3v.lanes import Lanes, cut, default_lanes, lanes
from mlx_llama3v.train.config import TrainConfig


def _row(number: int, seen: list[str]) -> mx.array:
    seen.append(threading.current_thread().name)
    return (mx.arange(4) + number).sum()


@pytest.mark.parametrize("count", [1, 2, 3])
def test_results_are_those_of_their_work(count: int) -> None:
    seen: list[str] = []
    with lanes(count) as side:
        running = [side.start(partial(_row, n, seen)) for n in range(7)]
        assert [int(work.result().item()) for work in running] == [6 + 4 * n for n in range(7)]
    assert len(set(seen)) == count
    assert (threading.current_thread().name in seen) == (count == 1)


def test_graphs_are_built_in_turn() -> None:
    """The next `make` begins when the one before is through, so that they may share a module."""
    inside, most = 0, 0

    def make() -> mx.array:
        nonlocal inside, most
        inside += 1
        most = max(most, inside)
        found = mx.ones((64, 64)) @ mx.ones((64, 64))
        inside -= 1
        return found

    with lanes(3) as side:
        running = [side.start(make) for _ in range(30)]
        assert all(float(work.result()[0, 0].item()) == 64 for work in running)
    assert most == 1


def test_a_graph_is_evaluated_in_the_pieces_it_was_cut_into(monkeypatch: pytest.MonkeyPatch) -> None:
    def gradient(joint: Callable[[mx.array], mx.array]) -> mx.array:
        def loss(x: mx.array) -> mx.array:
            for _ in range(3):
                x = joint(x * x)
            return x.sum()

        return mx.grad(loss)(mx.array([0.5, 2.0]))

    whole = gradient(lambda x: x).tolist()
    x = mx.ones(2)
    assert cut(x) is x and gradient(cut).tolist() == whole
    seen: list[list[float]] = []
    evaluate = mx.eval

    def watch(piece: mx.array) -> None:
        evaluate(piece)
        seen.append(piece.tolist())

    monkeypatch.setattr(mx, "eval", watch)
    with lanes(2) as side:
        assert side.start(partial(gradient, cut)).result().tolist() == whole
    forward, backward = seen[:3], seen[3:-1]
    assert forward == [[0.5**2, 2.0**2], [0.5**4, 2.0**4], [0.5**8, 2.0**8]]
    assert backward == [[1, 1], [2 * 0.5**4, 2 * 2.0**4], [4 * 0.5**6, 4 * 2.0**6]]
    assert seen[-1] == whole


def test_pieces_are_evaluated_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    met, evaluate = threading.Barrier(2, timeout=20), mx.eval

    def together(piece: mx.array) -> None:
        met.wait()
        evaluate(piece)

    monkeypatch.setattr(mx, "eval", together)
    with lanes(2) as side:
        running = [side.start(lambda: cut(mx.ones(8)) + cut(mx.ones(8))) for _ in range(2)]
        assert [work.result().tolist() for work in running] == [[2] * 8] * 2


def test_an_error_reaches_who_asks() -> None:
    def broken() -> mx.array:
        raise ValueError("no such row")

    with lanes(2) as side:
        running = side.start(broken)
        with pytest.raises(ValueError, match="no such row"):
            running.result()
        assert int(side.start(partial(_row, 1, [])).result().item()) == 10


def test_each_has_one_blas_thread() -> None:
    process = ctypes.CDLL(None)
    if not hasattr(process, "MKL_Get_Max_Threads"):
        pytest.skip("MKL is not in use")
    before = process.MKL_Get_Max_Threads()
    with lanes(2) as side:
        assert isinstance(side, Lanes) and process.MKL_Get_Max_Threads() == 1
    assert process.MKL_Get_Max_Threads() == before


def test_how_many() -> None:
    assert default_lanes(1) == 1 and 1 <= default_lanes(2) <= 2 and default_lanes(100) >= 1
    assert TrainConfig(compile=True, lanes=3).resolved().lanes == 1
    # MLX's random state belongs to a thread: dropout would not follow the seed in lanes.
    assert TrainConfig(compile=False, lanes=2, stage="sft", lora_dropout=0.1).resolved().lanes == 1
    assert TrainConfig(compile=False, lanes=2).resolved().lanes == 2


def test_a_process_that_used_them_ends_well() -> None:
    code = (
        "import mlx_llama3v, mlx.core as mx\n"
        "from mlx_llama3v.lanes import lanes\n"
        "for _ in range(2):\n"
        "    with lanes(2) as side:\n"
        "        for work in [side.start(lambda: mx.ones((99, 99)) @ mx.ones((99, 99))) for _ in range(9)]:\n"
        "            work.result()\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", code], stderr=subprocess.PIPE) for _ in range(4)]
    assert [(p.communicate()[1], p.returncode) for p in processes] == [(b"", 0)] * 4


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads its memory from Linux's /proc")
def test_lanes_that_ended_hold_no_memory_and_no_threads() -> None:
    """`embed` opens lanes for every window, and a native thread of MLX outlives the one that it was made for."""
    code = (
        "from pathlib import Path\n"
        "import mlx_llama3v\n"
        "import mlx.core as mx\n"
        "from mlx_llama3v.lanes import lanes\n"
        "def held():\n"
        "    status = Path('/proc/self/status').read_text()\n"
        "    memory, threads = (int(status.split(key)[1].split()[0]) for key in ('VmRSS:', 'Threads:'))\n"
        "    return memory >> 10, threads\n"
        "x = mx.ones((1024, 1024))\n"
        "mx.eval(x)\n"
        "for turn in range(25):\n"
        "    if turn == 5:\n"
        "        before = held()\n"
        "    with lanes(2) as side:\n"
        "        for work in [side.start(lambda: x @ x) for _ in range(4)]:\n"
        "            work.result()\n"
        "print(*(now - then for now, then in zip(held(), before)))\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    memory, threads = map(int, done.stdout.split())
    assert memory < 40 and not threads, f"{memory} MB and {threads} threads more after 20 times two lanes"
