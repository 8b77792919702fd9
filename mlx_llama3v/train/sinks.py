"""Reports to TensorBoard and Weights & Biases through their own libraries, for who has them installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from importlib import import_module
from pathlib import Path
from typing import Any, Protocol

from mlx_llama3v.errors import RunError
from mlx_llama3v.tensors import write_text
from mlx_llama3v.train.report import Evaluation, Progress

_LIBRARIES = {"tensorboard": "tensorboardX", "wandb": "wandb"}
_WANDB_ID = "wandb-id.txt"


class _Sink(Protocol):
    def add(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


def require(names: Iterable[str]) -> None:
    """Raise RunError where the library of one of these is missing."""
    for name in names:
        try:
            import_module(_LIBRARIES[name])
        except ImportError:
            raise RunError(f"report_to {name} needs its library; pip install {_LIBRARIES[name]}.") from None


class Sinks:
    """All that a run reports to."""

    def __init__(self, names: Iterable[str], run_dir: Path, config: dict[str, Any], done: int = 0) -> None:
        """`names` as in TrainConfig.report_to, which `require` has passed; what is reported follows step `done`."""
        kinds: dict[str, Callable[[Path, dict[str, Any], int], _Sink]]
        kinds = {"tensorboard": _TensorBoard, "wandb": _Wandb}
        self._sinks: list[_Sink] = [kinds[name](run_dir, config, done) for name in names]

    def add(self, event: Progress | Evaluation) -> None:
        """Pass the numbers of an event on, at its step."""
        values = {key: float(value) for key, value in asdict(event).items() if isinstance(value, (int, float))}
        step = int(values.pop("step"))
        for sink in self._sinks:
            sink.add(step, values)

    def close(self) -> None:
        """Write what waits."""
        for sink in self._sinks:
            sink.close()


class _TensorBoard:
    """Event files in RUN/tensorboard; a resumed run adds one, which takes back what a killed one did after `done`."""

    def __init__(self, run_dir: Path, config: dict[str, Any], done: int) -> None:
        from tensorboardX import SummaryWriter

        self._writer = SummaryWriter(str(run_dir / "tensorboard"), purge_step=done + 1)

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run, which a resumed one goes on with; WANDB_MODE, WANDB_PROJECT and so on count as usual."""

    def __init__(self, run_dir: Path, config: dict[str, Any], done: int) -> None:
        import wandb

        file = run_dir / _WANDB_ID
        known = file.read_text().strip() if file.is_file() else None
        self._run = wandb.init(dir=str(run_dir), name=run_dir.name, config=config, id=known, resume="allow")
        write_text(file, f"{self._run.id}\n")

    def add(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
