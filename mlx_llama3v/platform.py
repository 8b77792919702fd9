"""Device, dtype and BLAS policy: the one place where machines differ.

Why: on Linux the `mlx[cpu]` wheel resolves `cblas_*` to reference BLAS (about 2 GFLOP/s in float32 on two
cores). A BLAS loaded into the global symbol table *before* `mlx.core` wins the symbol look-up, and MKL or
OpenBLAS is fifty times faster. So `prepare()` runs when the package is imported, before any `import mlx`.
On macOS nothing is loaded: MLX uses Accelerate and Metal there.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import os
import shutil
import sys
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

# Debian's and Fedora's names for OpenBLAS; MKL is looked for in the environment that runs us.
_OPENBLAS = ("libopenblas.so.0", "libopenblasp.so.0", "libopenblas.so")


def _mkl_candidates() -> list[Path]:
    """libmkl_rt of the `mkl` wheel, which installs into <prefix>/lib: beside python3.X/site-packages, not into it.

    Every site-packages that Python searches counts: of the environment, of the user, of one that is borrowed from.
    """
    searched = [Path(entry).parents[1] for entry in sys.path if entry.endswith("site-packages")]
    roots = [Path(sys.prefix) / "lib", *searched, Path(sys.base_prefix) / "lib", Path.home() / ".local" / "lib"]
    return [path for root in dict.fromkeys(roots) for path in sorted(root.glob("libmkl_rt.so*"), reverse=True)]


def without_torch() -> None:
    """Keep PyTorch out of this process: `import torch` fails from here on, unless it was imported before.

    For processes that are ours from start to end. transformers, which mlx-lm imports, would import PyTorch wherever it
    is installed; that takes longer than all else that a command needs, and nothing here computes with it.
    """
    sys.modules.setdefault("torch", None)  # type: ignore[arg-type]


@lru_cache(maxsize=1)
def load_blas() -> str:
    """Load a fast BLAS globally, once. Returns a name for `doctor`: 'mkl', 'openblas', 'reference' or 'accelerate'.

    `LLAMA3V_BLAS=none` leaves MLX with the BLAS it was linked to; `LLAMA3V_BLAS=/path/to/lib.so` loads that one.
    """
    if sys.platform != "linux":
        return "accelerate"
    wanted = os.environ.get("LLAMA3V_BLAS", "")
    if wanted == "none":
        return "reference"
    if "mlx.core" in sys.modules:
        return "unknown (mlx was imported before mlx_llama3v)"
    candidates: list[tuple[str, str]] = [(wanted, wanted)] if wanted else []
    if not wanted:
        candidates += [("mkl", str(path)) for path in _mkl_candidates()]
        candidates += [("openblas", name) for name in _OPENBLAS]
    for name, path in candidates:
        if name == "mkl":
            # libgomp's threads spin 300,000 times by default; beside another busy process that is tens of seconds
            # lost on small products. 20,000 costs nothing on an idle machine (measured: embedding, 19.6 s, 19.2 s).
            os.environ.setdefault("GOMP_SPINCOUNT", "20000")
            # Two OpenMP run-times in one process may deadlock; MKL's GNU layer shares libgomp with everyone else.
            os.environ.setdefault("MKL_THREADING_LAYER", "GNU" if _has_libgomp() else "SEQUENTIAL")
        try:
            ctypes.CDLL(path, mode=ctypes.RTLD_GLOBAL)
        except OSError:
            continue
        return name
    return "reference"


def _has_libgomp() -> bool:
    try:
        ctypes.CDLL("libgomp.so.1", mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def _keep_freed_memory() -> None:
    """Let glibc keep what MLX frees: its CPU back end allocates anew for every operation, and without this each array
    of some megabytes is mapped, zeroed by the kernel and unmapped again (a training step: half of the system time,
    3-12% of all of it). Metal and CUDA have MLX's own cache.

    In two arenas: glibc would give every thread one, up to eight a core, and each keeps what it freed. `embed` held
    1.2 GB after 60 pictures so, and 0.6 GB with two arenas at the same rate."""
    if sys.platform != "linux":
        return
    with suppress(OSError, AttributeError):  # musl has no mallopt
        mallopt = ctypes.CDLL(None).mallopt
        # M_MMAP_THRESHOLD, M_TRIM_THRESHOLD, M_TOP_PAD, M_ARENA_MAX
        for parameter, value in ((-3, 32 << 20), (-1, 1 << 30), (-2, 64 << 20), (-8, 2)):
            mallopt(parameter, value)


def prepare() -> None:
    """Everything that must happen before `mlx.core` is imported. Idempotent and silent."""
    load_blas()
    _keep_freed_memory()
    # `mx.compile` on the CPU back end calls a C++ compiler; without one MLX must not try.
    if sys.platform == "linux" and not (shutil.which("g++") or shutil.which("c++")):
        os.environ.setdefault("MLX_DISABLE_COMPILE", "1")


def device_name() -> str:
    """'metal', 'cuda' or 'cpu': the device MLX computes on."""
    import mlx.core as mx

    if mx.default_device().type == mx.DeviceType.cpu:
        return "cpu"
    return "metal" if mx.metal.is_available() else "cuda"


def wire_memory() -> None:
    """On Metal keep this process's arrays resident, up to what macOS recommends, as mlx-lm does: a model that nearly
    fills the memory is slow where the system pages parts of it out between two tokens. Before macOS 15 MLX ignores it.
    """
    import mlx.core as mx

    if device_name() == "metal":
        mx.set_wired_limit(int(mx.device_info()["max_recommended_working_set_size"]))


def default_dtype() -> Any:
    """float32 on CPU, where 16-bit products run at 1-2 GFLOP/s; bfloat16 on Metal and CUDA."""
    import mlx.core as mx

    return mx.float32 if device_name() == "cpu" else mx.bfloat16


def peak_memory() -> int:
    """Bytes of memory that this process held at most."""
    with suppress(OSError, ValueError, IndexError):  # Linux; getrusage there starts with the parent's peak
        status = Path("/proc/self/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def machine() -> dict[str, str]:
    """What a benchmark, a run and `doctor` write down about where they ran."""
    import platform as python_platform
    from importlib.metadata import PackageNotFoundError, version

    def installed(name: str) -> str:
        try:
            return version(name)
        except PackageNotFoundError:
            return "absent"

    return {
        "device": device_name(),
        "blas": load_blas(),
        "cores": str(os.cpu_count()),
        "machine": python_platform.machine(),
        "system": python_platform.platform(),
        "python": python_platform.python_version(),
        "mlx": installed("mlx"),
        "mlx_lm": installed("mlx-lm"),
        "mlx_llama3v": installed("mlx-llama3v"),
    }
