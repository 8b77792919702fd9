"""Where machines differ: which BLAS is loaded, what stays in memory."""

from __future__ import annotations

import sys
from pathlib import Path

import mlx.core as mx
import pytest

from mlx_llama3v import platform


def test_mkl_is_found_in_every_environment_that_python_searches(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    packages = tmp_path / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    library = tmp_path / "lib" / "libmkl_rt.so.3"
    library.touch()
    assert library not in platform._mkl_candidates()
    monkeypatch.setattr(sys, "path", [*sys.path, str(packages)])
    assert library in platform._mkl_candidates()


def test_memory_is_wired_on_metal_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    wired: list[int] = []
    monkeypatch.setattr(mx, "set_wired_limit", wired.append)
    monkeypatch.setattr(mx, "device_info", lambda: {"max_recommended_working_set_size": 12 << 30})
    for device in ("cpu", "cuda", "metal"):
        monkeypatch.setattr(platform, "device_name", lambda device=device: device)
        platform.wire_memory()
    assert wired == [12 << 30]
