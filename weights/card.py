"""The model card of a converted directory: what it was made from, and how to use it."""

from __future__ import annotations

from mlx_llama3v.config import ModelConfig

_CARD = """---
library_name: mlx
pipeline_tag: image-text-to-text
tags: [mlx, llama3v]
---

# {title}

A vision-language model for mlx-llama3v: {parts}{quantized} and a projector of kind `{kind}`; {parameters:,} parameters.

{state}

```
llama3v-mlx chat --model DIR --image FILE
```

The licences of both source models apply to these weights.
"""
_FRESH = "The projector is random: it has to be trained (`llama3v-mlx train`) before the model can see."
_FINISHED = "All parts come trained from the source model."
_TRAINED = "The projector and the decoder's changes come from the training run `{run}`."


def model_card(config: ModelConfig, parameters: int) -> str:
    """README.md of a model directory with `parameters` parameters in all."""
    run, whole = config.sources.get("run"), config.sources.get("model")
    vision, llm = config.sources["vision"], config.sources["llm"]
    bits = f", quantized to {config.quantization['bits']} bits," if config.quantization else ""
    return _CARD.format(
        title=whole or f"{vision} + {llm}",
        parts=f"`{whole}`, converted: its SigLIP tower, its Llama decoder"
        if whole
        else f"the SigLIP tower of `{vision}`,\nthe Llama decoder of `{llm}`",
        kind=config.projector_config.kind,
        quantized=bits,
        parameters=parameters,
        state=_TRAINED.format(run=run) if run else _FINISHED if whole else _FRESH,
    )
