"""The model card of a model directory: what it was made from, how it was trained, and how to use it."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.tensors import read_json
from mlx_llama3v.weights.licences import UNKNOWN, licence_of

_HUB_ID = re.compile(r"[\w.-]+/[\w.-]+")
_TAGS = "library_name: mlx\npipeline_tag: image-text-to-text\ntags: [mlx, llama3v]\n"
_FRESH = "The projector is random: it has to be trained (`llama3v-mlx train`) before the model can see."
_FINISHED = "All parts come trained from the source model."
_GIVEN = "All three parts come trained from the sources."
_TRAINED = "The projector and the decoder's changes come from the training run `{run}`."
_METRICS = {
    "loss": "training loss",
    "eval_loss": "held out",
    "eval_shuffled": "held out, with another row's picture",
    "eval_blind": "held out, without pictures",
}
_RECIPE = ("stage", "epochs", "learning_rate", "lora_rank", "max_seq_length", "seed")


@dataclass(frozen=True)
class RunFacts:
    """What a run directory says of itself."""

    config: Mapping[str, Any]
    metrics: Mapping[str, float]  # the last value of each

    @classmethod
    def read(cls, run: str | Path) -> RunFacts:
        """config.json and metrics.jsonl, as far as they are there."""
        folder, metrics = Path(run).expanduser(), {}
        file = folder / "metrics.jsonl"
        for line in file.read_text(encoding="utf-8").splitlines() if file.is_file() else ():
            metrics.update(json.loads(line))
        config = read_json(folder / "config.json") if (folder / "config.json").is_file() else {}
        return cls(config, metrics)


def model_card(config: ModelConfig, parameters: int, *, name: str = "", facts: RunFacts | None = None) -> str:
    """README.md of a model directory with `parameters` parameters in all; `name` is that of its Hub repository."""
    run, whole = config.sources.get("run"), config.sources.get("model")
    bases = base_models(config)
    parts = " and ".join(f"the {part} of `{base}`" for part, base in bases.items())
    bits = f", the decoder quantized to {config.quantization['bits']} bits" if config.quantization else ""
    state = _TRAINED.format(run=run) if run else _FINISHED if whole else _GIVEN if "projector" in bases else _FRESH
    sections = [
        f"# {name.rpartition('/')[2] or whole or ' + '.join(bases.values())}",
        f"A vision-language model for mlx-llama3v: {parts}{bits}, joined by a projector of kind "
        f"`{config.projector_config.kind}`; {parameters:,} parameters.",
        state,
        f"```\nllama3v-mlx chat --model {name or 'DIR'} --image FILE\n```",
        *(_recipe(facts, config) if facts else ()),
        _licences(config),
    ]
    return f"---\n{_front_matter(config)}---\n\n" + "\n\n".join(sections) + "\n"


def base_models(config: ModelConfig) -> dict[str, str]:
    """Part -> the checkpoint that it comes from."""
    whole = config.sources.get("model")
    if whole:
        return {"SigLIP tower, projector and Llama decoder": whole}
    held = config.sources
    given = {"projector": held["projector"]} if "projector" in held else {}
    return {"SigLIP tower": held.get("vision", "?"), **given, "Llama decoder": held.get("llm", "?")}


def _licence(config: ModelConfig, base: str) -> str:
    part = next((part for part in ("vision", "llm") if config.sources.get(part) == base), "")
    return config.sources.get(f"{part}_licence") or licence_of(base)


def _front_matter(config: ModelConfig) -> str:
    """What the Hub reads. The decoder's licence is the stricter of the two and stands for the whole."""
    bases = [base for base in base_models(config).values() if _HUB_ID.fullmatch(base)]
    licence = _licence(config, [*base_models(config).values()][-1])
    named = f"license: {licence if licence != UNKNOWN else 'other'}\n"
    listed = "base_model:\n" + "".join(f"- {base}\n" for base in bases) if bases else ""
    return named + listed + _TAGS


def _recipe(facts: RunFacts, config: ModelConfig) -> list[str]:
    """How it was trained, and how well that went."""
    train, data = facts.config.get("train", {}), facts.config.get("data", {})
    rows = {key: train[key] for key in _RECIPE if train.get(key) is not None}
    if train.get("batch_size"):
        rows |= {"rows a step": train["batch_size"] * train.get("grad_accumulation_steps", 1)}
    rows |= {"steps": facts.config.get("steps"), "rows": data.get("rows"), "rows held out": data.get("held_out")}
    rows |= {"store codec": facts.config.get("store", {}).get("codec")}
    rows |= {"pictures": f"{config.tiling.mode}, at most {config.tiling.max_slices} slices beside the overview"}
    told = [f"| {key.replace('_', ' ')} | {value} |" for key, value in rows.items() if value is not None]
    found = [f"| {title} | {facts.metrics[key]:.4f} |" for key, title in _METRICS.items() if key in facts.metrics]
    sections = ["## Recipe", "\n".join(["| setting | value |", "|---|---|", *told])]
    if found:
        note = (
            "Loss in nats a token at the last step. A model that looks has by far the lowest loss with its own picture."
        )
        sections += ["## Metrics", note, "\n".join(["| loss | value |", "|---|---|", *found])]
    return sections


def _licences(config: ModelConfig) -> str:
    """The licences of the bases, which go with the weights."""
    lines, llama = ["## Licences", "", "The licences of the source models apply to these weights:", ""], ""
    for part, base in base_models(config).items():
        licence = _licence(config, base)
        said = f"`{licence}`" if licence != UNKNOWN else "not stated where it was read: see its owner"
        lines.append(f"- {part}, `{base}`: {said}")
        llama = licence if licence.startswith("llama3") else llama
    if llama:
        lines += ["", "Built with Llama. Its licence asks that the name of a model made from it begins with Llama."]
    return "\n".join(lines)
