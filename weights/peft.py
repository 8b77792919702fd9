"""The decoder's adapters of a run in PEFT's format, for the Hugging Face decoder: `export --format peft`."""

from __future__ import annotations

import json
from pathlib import Path

import mlx.core as mx

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.directory import write_directory
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.tensors import load_file, read_json, save_safetensors_atomic, write_text

_PREFIX = "base_model.model."


def export_peft(model_dir: str | Path, run: str | Path, out_dir: str | Path) -> Path:
    """Write adapter_config.json and adapter_model.safetensors; returns the absolute path.

    LoRA and DoRA on linear layers. It fits the bare decoder alone; of a model that came as a whole it names no base.
    Raises CheckpointError for a run without adapters or with whole weights.
    """
    folder = Path(run).expanduser()
    if not (folder / "adapters.safetensors").is_file():
        raise CheckpointError(f"{folder} has no adapters.safetensors; expected a run of stage sft with LoRA or DoRA.")
    config = read_json(folder / "adapter_config.json")
    kind = config.get("fine_tune_type", "lora")
    if kind not in ("lora", "dora"):
        raise CheckpointError(f"{folder} tuned all weights ({kind}); PEFT holds adapters: fuse it and export as hf.")
    weights = load_file(folder / "adapters.safetensors")
    tensors, modules, rank = _rename(weights, folder)
    scale, sources = float(config["lora_parameters"]["scale"]), load_config(model_dir).sources
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": "" if "model" in sources else sources.get("llm", ""),
        "r": rank,
        "lora_alpha": scale * rank,  # PEFT multiplies with alpha / r
        "lora_dropout": float(config["lora_parameters"]["dropout"]),
        "use_dora": kind == "dora",
        "bias": "none",
        "fan_in_fan_out": False,
        "inference_mode": True,
        "target_modules": modules,
    }
    with write_directory(out_dir) as partial:
        save_safetensors_atomic(partial / "adapter_model.safetensors", tensors, {"format": "pt"})
        write_text(partial / "adapter_config.json", json.dumps(settings, indent=2) + "\n")
    return Path(out_dir).expanduser().resolve()


def _rename(weights: dict[str, mx.array], where: Path) -> tuple[dict[str, mx.array], list[str], int]:
    """mlx-lm's names and orientation -> PEFT's; also the names of the adapted modules, and the rank."""
    names = {"lora_a": "lora_A.weight", "lora_b": "lora_B.weight", "m": "lora_magnitude_vector.weight"}
    tensors, modules, ranks = {}, set(), set()
    for name, value in weights.items():
        module, _, part = name.removeprefix("language_model.").rpartition(".")
        if part not in names or "embed" in module:
            raise CheckpointError(f"{where}: {name} has no counterpart in PEFT; expected adapters on linear layers.")
        modules.add(module)
        if part == "lora_a":
            ranks.add(value.shape[1])
        # PEFT's matrices are torch's [out, in]
        tensors[f"{_PREFIX}{module}.{names[part]}"] = mx.contiguous(value.T) if value.ndim == 2 else value
    if len(ranks) != 1:
        raise CheckpointError(f"{where} has adapters of ranks {sorted(ranks)}; expected one rank.")
    return tensors, sorted(modules), int(ranks.pop())
