"""Where machines differ: which BLAS is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

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
