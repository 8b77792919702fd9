"""The settings of a training run, each written once, and the two stages as data.

A stage says how rows are laid out and which part learns; everything else is the same for both, so there is one
`train()`. The command line is generated from the fields of TrainConfig.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field, replace
from typing import Any

from mlx_llama3v.errors import RunError


@dataclass(frozen=True)
class Stage:
    """What a stage trains and how it lays rows out; the other part stays frozen and byte-identical."""

    name: str
    trains: str  # "projector" (with the markers) or "decoder"
    learning_rate: float  # LLaVA-1.5's


STAGES = {
    stage.name: stage for stage in (Stage("pretrain", "projector", 1e-3), Stage("sft", "decoder", 2e-4))
}
TUNE = ("lora", "dora", "full")


def _knob(default: Any, text: str, **metadata: Any) -> Any:
    return field(default=default, metadata={"help": text, **metadata})


@dataclass(frozen=True)
class TrainConfig:
    """Every knob of a run. Raises RunError, naming field and value, for one that makes no sense."""

    stage: str = _knob("pretrain", "pretrain: the projector learns; sft: the decoder does.", choices=tuple(STAGES))
    iters: int = _knob(0, "Optimizer steps; 0: as many as the epochs need.")
    epochs: int = _knob(1, "Passes over the data, unless --iters is given.")
    batch_size: int = _knob(8, "Rows in one forward pass.")
    grad_accumulation_steps: int = _knob(1, "Batches whose gradients make one step.")
    learning_rate: float | None = _knob(None, "Peak learning rate [default: 1e-3 in pretrain, 2e-4 in sft].")
    warmup: float = _knob(0.03, "Share of the steps in which the learning rate rises.")
    min_learning_rate: float = _knob(0.0, "Where the cosine ends, as a share of the peak.")
    weight_decay: float = _knob(0.0, "AdamW's decoupled weight decay.")
    clip: float = _knob(1.0, "Largest global norm of the gradient; 0: unlimited.")
    max_seq_length: int = _knob(2048, "Longer rows are left out and counted.")
    seed: int = _knob(0, "Fixes the data order, the fresh weights and the dropout.")
    tune: str = _knob("lora", "How the decoder learns in stage sft.", choices=TUNE)
    lora_rank: int = _knob(16, "Rank of the LoRA or DoRA matrices.")
    lora_scale: float = _knob(2.0, "Factor of the low-rank product (alpha / rank elsewhere).")
    lora_dropout: float = _knob(0.0, "Dropout before the low-rank product.")
    lora_layers: int = _knob(0, "Decoder blocks that learn, counted from the last; 0: all.")
    lora_keys: tuple[str, ...] = _knob((), "Layers of a block that learn (q_proj, ...) [default: every linear one].")
    val_split: float = _knob(0.0, "Share of the rows that is held out and evaluated.")
    val_rows: int = _knob(256, "Most rows of one evaluation.")
    steps_per_eval: int = _knob(0, "Steps between evaluations; 0: only at the end.")
    steps_per_report: int = _knob(10, "Steps between reports.")
    save_every: int = _knob(200, "Steps between checkpoints; 0: none.")
    keep: int = _knob(2, "Checkpoints that are kept.")
    compile: bool = _knob(True, "Compile the training step.")

    def __post_init__(self) -> None:
        for name, allowed in (("stage", tuple(STAGES)), ("tune", TUNE)):
            if getattr(self, name) not in allowed:
                raise RunError(f"{name} is {getattr(self, name)!r}; expected {' or '.join(allowed)}.")
        counts = ("batch_size", "grad_accumulation_steps", "max_seq_length", "lora_rank", "val_rows",
                  "steps_per_report", "keep")  # fmt: skip
        self._require(counts, 1, float("inf"))
        self._require(("iters", "steps_per_eval", "save_every", "lora_layers", "seed"), 0, float("inf"))
        self._require(("weight_decay", "clip", "lora_scale"), 0, float("inf"))
        self._require(("warmup", "min_learning_rate"), 0, 1)
        self._require(("val_split", "lora_dropout"), 0, 0.95)
        if not self.iters:
            self._require(("epochs",), 1, float("inf"))
        if self.learning_rate is not None and not 0 < self.learning_rate < float("inf"):
            raise RunError(f"learning_rate is {self.learning_rate}; expected a number above 0.")

    def _require(self, names: tuple[str, ...], low: float, high: float) -> None:
        for name in names:
            if not low <= getattr(self, name) <= high:
                limit = f"at least {low}" if high == float("inf") else f"between {low} and {high}"
                raise RunError(f"{name} is {getattr(self, name)}; expected {limit}.")

    def resolved(self) -> TrainConfig:
        """The same with the stage's own defaults filled in: what the run writes down."""
        if self.learning_rate is not None:
            return self
        return replace(self, learning_rate=STAGES[self.stage].learning_rate)

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {key: list(value) if isinstance(value, tuple) else value for key, value in asdict(self).items()}

    def lora_parameters(self) -> dict[str, Any]:
        """mlx-lm's `lora_parameters`, without the layer keys."""
        return {"rank": self.lora_rank, "scale": self.lora_scale, "dropout": self.lora_dropout}
