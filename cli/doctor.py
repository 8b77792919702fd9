"""`llama3v-mlx doctor`: what this machine computes with, and whether something would make it slow or stop."""

from __future__ import annotations

import os
import shutil
import sys
import time
from typing import Annotated

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.platform import default_dtype, machine


def register(app: typer.Typer) -> None:
    app.command()(doctor)


def doctor(
    json: Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")] = False,
) -> None:
    """Print device, BLAS, versions, the measured product rate, memory and disk, and what to mend.

    Example: `llama3v-mlx doctor`
    """
    facts = machine()
    facts["dtype"] = str(default_dtype()).removeprefix("mlx.core.")
    facts["product rate"] = f"{_product_rate() / 1e9:.0f} GFLOP/s (1024 x 1024)"
    facts["free disk"] = show.size(shutil.disk_usage(".").free)
    facts["memory"] = show.size(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
    advice = _advice(facts)
    if json:
        show.as_json({**facts, "advice": advice})
        return
    show.table("doctor", ["", ""], [[key, value] for key, value in facts.items()])
    for sentence in advice:
        show.out.print(f"- {sentence}")
    if not advice:
        show.out.print("Nothing to mend.")


def _product_rate(side: int = 1024, rounds: int = 10) -> float:
    """FLOP/s of square products in the device's own dtype, best of three."""
    import mlx.core as mx

    a = mx.random.normal((side, side)).astype(default_dtype()) / side**0.5
    mx.eval(a @ a)
    best = float("inf")
    for _ in range(3):
        started, b = time.perf_counter(), a
        for _ in range(rounds):
            b = b @ a
        mx.eval(b)
        best = min(best, time.perf_counter() - started)
    return 2 * side**3 * rounds / best


def _advice(facts: dict[str, str]) -> list[str]:
    found = []
    if facts["blas"].startswith(("reference", "unknown")):
        found.append(
            "MLX computes with reference BLAS, fifty times slower than it could: `pip install mkl` (x86-64) "
            "or `apt-get install libopenblas0-pthread`."
        )
    if sys.platform == "linux" and not (shutil.which("g++") or shutil.which("c++")):
        found.append("No C++ compiler: compiled graphs are off on CPU; `apt-get install g++` brings one.")
    if sys.platform == "darwin" and facts["device"] != "metal":
        found.append("MLX does not see the GPU: use a native arm64 Python on macOS 14 or newer.")
    return found
