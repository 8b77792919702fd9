"""Two real processes of mlx.launch, on ports that nobody has."""

from __future__ import annotations

import random
import socket
import subprocess
import sys
from contextlib import ExitStack
from pathlib import Path

LAUNCH = Path(sys.executable).with_name("mlx.launch")
ROOT = Path(__file__).resolve().parents[1]


def launch(*command: str) -> subprocess.CompletedProcess[str]:
    """`command` on two ranks, run from the repository's root."""
    return subprocess.run(launching(*command), capture_output=True, text=True, timeout=120, cwd=ROOT)


def launching(*command: str) -> list[str]:
    """What `launch` runs."""
    options = ["-n", "2", "--backend", "ring", "--starting-port", str(_free_ports(2)), "--"]
    return [str(LAUNCH), *options, *command]


def _free_ports(count: int) -> int:
    """The first of `count` ports in a row; below those that systems give to outgoing connections."""
    while True:
        first = random.randrange(20000, 30000)
        try:
            with ExitStack() as stack:
                for port in range(first, first + count):
                    stack.enter_context(socket.socket()).bind(("127.0.0.1", port))
        except OSError:
            continue
        return first
