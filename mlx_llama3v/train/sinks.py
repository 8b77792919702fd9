"""Reports to TensorBoard and Weights & Biases through their own libraries, for who has them installed."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol

from mlx_llama3v.errors import RunError
from mlx_llama3v.train.report import Evaluation, Progress


class _Sink(Protocol):
    def add(self, step: int, values: dict[str, float]) -> None: ...
    def close(self) -> None: ...


class Sinks:
    """All that a run reports to."""

    def __init__(self, names: Iterable[str], run_dir: Path, config: dict[str, Any]) -> None:
        """`names` as in TrainConfig.report_to. Raises RunError where a library is missing."""
        kinds: dict[str, Callable[[Path, dict[str, Any]], _Sink]] = {"tensorboard": _TensorBoard, "wandb": _Wandb}
        self._sinks: list[_Sink] = [kinds[name](run_dir, config) for name in names]

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
    """Event files in RUN/tensorboard; a resumed run adds one."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            from tensorboardX import SummaryWriter
        except ImportError:
            raise RunError(
                "report_to tensorboard needs a library that writes its files; pip install tensorboardX."
            ) from None
        self._writer = SummaryWriter(str(run_dir / "tensorboard"))

    def add(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self) -> None:
        self._writer.close()


class _Wandb:
    """One W&B run, which a resumed one goes on with; WANDB_MODE, WANDB_PROJECT and so on count as usual."""

    def __init__(self, run_dir: Path, config: dict[str, Any]) -> None:
        try:
            import wandb
        except ImportError:
            raise RunError("report_to wandb needs its library; pip install wandb.") from None
        self._run = wandb.init(dir=str(run_dir), name=run_dir.name, config=config, resume="allow")

    def add(self, step: int, values: dict[str, float]) -> None:
        self._run.log(values, step=step)

    def close(self) -> None:
        self._run.finish()
