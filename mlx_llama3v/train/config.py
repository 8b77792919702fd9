"""The settings of a training run, each written once, and the two stages as data.

A stage says how rows are laid out and which part learns; all else is the same for both, so there is one
`train()`. The command line is generated from the fields of TrainConfig.
"""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from mlx_llama3v.data.rows import LONG_ROWS
from mlx_llama3v.errors import RunError
from mlx_llama3v.knob import knob
from mlx_llama3v.lanes import default_lanes
from mlx_llama3v.platform import device_name


@dataclass(frozen=True)
class Stage:
    """What a stage trains and how it lays rows out; the other part stays frozen and byte-identical."""

    name: str
    trains: str  # "projector" (with the markers) or "decoder"
    learning_rate: float  # LLaVA-1.5's, of LoRA where the decoder learns


STAGES = {stage.name: stage for stage in (Stage("pretrain", "projector", 1e-3), Stage("sft", "decoder", 2e-4))}
MOST_ROWS = 256  # of a batch that is fitted to the memory, where no other number is given
FULL_RATE = 2e-5  # LLaVA-1.5's where all of the decoder learns

REPORTERS = ("tensorboard", "wandb")


def _knob(default: Any, text: str, low: float = 0, high: float = math.inf, **metadata: Any) -> Any:
    """A field with its help; numbers lie between `low` and `high`."""
    return knob(default, text, low=low, high=high, **metadata)


@dataclass(frozen=True)
class TrainConfig:
    """Every knob of a run. Raises RunError, naming field and value, for one that makes no sense."""

    stage: str = _knob("pretrain", "pretrain: the projector learns; sft: the decoder.", choices=tuple(STAGES))
    iters: int = _knob(0, "Optimizer steps; 0: as many as the epochs need.")
    epochs: int = _knob(1, "Passes over the data, unless --iters is given.", low=1)
    batch_size: int = _knob(
        8, "Rows in one forward pass, over all ranks; 0: what fits the memory, to about 4096 tokens."
    )
    grad_accumulation_steps: int = _knob(1, "Batches whose gradients make one step.", low=1)
    rows_per_step: int = _knob(0, "Rows of one step, in place of --grad-accumulation-steps: batches are added up.")
    learning_rate: float | None = _knob(
        None, "Peak learning rate [default: 1e-3 in pretrain, 2e-4 in sft, 2e-5 with --tune full]."
    )
    warmup: float = _knob(0.03, "Share of the steps in which the learning rate rises.", high=1)
    min_learning_rate: float = _knob(0.0, "Where the cosine ends, as a share of the peak.", high=1)
    weight_decay: float = _knob(0.0, "AdamW's decoupled weight decay.")
    clip: float = _knob(1.0, "Largest global norm of the gradient; 0: unlimited.")
    max_seq_length: int = _knob(2048, "Tokens of the longest row, within what the decoder takes.", low=2)
    long_rows: str = _knob(
        "drop", "Longer rows: left out, cut behind their last picture and answer, or an error.", choices=LONG_ROWS
    )
    pack: bool = _knob(False, "Several short rows share one sequence; pads less from about 32 rows a batch.")
    seed: int = _knob(0, "Fixes the data order, the fresh weights and the dropout.", high=2**64 - 1)
    tune: str = _knob("lora", "How the decoder learns in stage sft.", choices=("lora", "dora", "full"))
    lora_rank: int = _knob(16, "Rank of the LoRA or DoRA matrices.", low=1)
    lora_scale: float = _knob(2.0, "Factor of the low-rank product (alpha / rank elsewhere).")
    lora_dropout: float = _knob(0.0, "Dropout before the low-rank product.", high=0.95)
    lora_layers: int = _knob(0, "Decoder blocks that learn, counted from the last; 0: all.")
    lora_keys: tuple[str, ...] = _knob((), "Layers of a block that learn (q_proj, ...) [default: all linear].")
    tune_projector: bool = _knob(False, "In stage sft the projector learns, too.")
    projector_learning_rate: float = _knob(2e-5, "Its peak learning rate there.")
    val_split: float = _knob(0.0, "Share of the rows that is held out and evaluated.", high=0.95)
    val_rows: int = _knob(256, "Most rows of one evaluation.", low=1)
    steps_per_eval: int = _knob(0, "Steps between evaluations; 0: only at the end.")
    steps_per_report: int = _knob(10, "Steps between reports.", low=1)
    save_every: int = _knob(200, "Steps between checkpoints; 0: none.")
    keep: int = _knob(2, "Checkpoints that are kept.", low=1)
    on_nan: str = _knob(
        "stop", "A step that is not a number: end the run, or go on without it.", choices=("stop", "skip")
    )
    report_to: tuple[str, ...] = _knob((), "Also report to tensorboard or wandb, which must be installed.")
    grad_checkpoint: bool = _knob(False, "Compute decoder blocks twice to save memory.")
    lanes: int = _knob(0, "Parts of a batch computed side by side [default: cores of a CPU, 1 on a GPU].")
    compile: bool | None = _knob(
        None, "Compile the training step [default: on Metal].", flags=["--compile/--no-compile"]
    )

    def __post_init__(self) -> None:
        for item in fields(self):
            value, low, high = getattr(self, item.name), item.metadata["low"], item.metadata["high"]
            choices = item.metadata.get("choices", (value,))
            if value not in choices:
                raise RunError(f"{item.name} is {value!r}; expected {' or '.join(choices)}.")
            if isinstance(value, (int, float)) and not (low <= value <= high and math.isfinite(value)):
                limit = f"at least {low}" if high == math.inf else f"between {low} and {high}"
                raise RunError(f"{item.name} is {value}; expected {limit}.")
        if strange := [name for name in self.report_to if name not in REPORTERS]:
            raise RunError(f"report_to is {', '.join(strange)}; expected {' or '.join(REPORTERS)}.")
        if self.grad_checkpoint and self.lora_dropout:
            raise RunError("grad_checkpoint computes blocks twice, and lora_dropout would differ; use one of them.")
        if self.tune_projector and STAGES[self.stage].trains == "projector":
            raise RunError("tune_projector is for stage sft; stage pretrain trains nothing but the projector.")

    def resolved(self) -> TrainConfig:
        """The same with the stage's and the device's own defaults filled in: what the run writes down."""
        stage = STAGES[self.stage]
        usual = FULL_RATE if stage.trains == "decoder" and self.tune == "full" else stage.learning_rate
        rate = usual if self.learning_rate is None else self.learning_rate
        # On a CPU nothing is gained but a C++ compiler's run, and fixed shapes cost padding. On CUDA, MLX 0.32 compiles
        # every fused loop in 42 forms at run time: on an H100 a small model's first step had not begun after a minute.
        compiled = device_name() == "metal" if self.compile is None else self.compile
        # Random numbers follow the seed in the caller's own thread alone: dropout keeps to one lane.
        lanes = 1 if compiled or self.lora_dropout else self.lanes or default_lanes(self.batch_size or MOST_ROWS)
        found = replace(self, learning_rate=rate, compile=compiled, lanes=lanes)
        if self.rows_per_step and self.batch_size:  # as many batches as need be, and of those the smallest
            batches = -(-self.rows_per_step // self.batch_size)
            found = replace(found, batch_size=-(-self.rows_per_step // batches), grad_accumulation_steps=batches)
        return found

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready."""
        return {**asdict(self), "lora_keys": list(self.lora_keys), "report_to": list(self.report_to)}
