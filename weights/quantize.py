"""Group quantization at conversion (`-q`): the settings, mixed recipes, and what became of each layer."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from mlx_llama3v.config import VisionConfig
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.knob import knob
from mlx_llama3v.model import Llama3V, layer_setting, quantize_layers
from mlx_llama3v.tensors import parameters
from mlx_llama3v.vision.siglip import VisionTower

# mlx-lm's mixed recipes: (bits, bits of the layers that suffer most). Those are the values and the way down of the
# first and the last eighth of the blocks and of every third between, and the head.
RECIPES = {"mixed_2_6": (2, 6), "mixed_3_4": (3, 4), "mixed_3_6": (3, 6), "mixed_4_6": (4, 6)}
BITS, GROUPS = (2, 3, 4, 5, 6, 8), (32, 64, 128)  # what MLX has kernels for
_DECODER, _TOWER = "language_model.", "vision_tower."


def _listed(values: tuple[int, ...]) -> str:
    """(2, 3, 4) -> "2, 3 or 4"."""
    return f"{', '.join(map(str, values[:-1]))} or {values[-1]}"


@dataclass(frozen=True)
class QuantConfig:
    """How the decoder is quantized, and the tower where `tower`; the rest has 16 bit (see `stored`)."""

    bits: int = knob(4, f"Bits per weight: {_listed(BITS)}.", flags=["--q-bits"])
    group_size: int | None = knob(
        None, "Weights that share a scale; default 64, mxfp4: 32.", flags=["--q-group-size"]
    )  # always a number once made
    # mxfp4: 4-bit floats in groups of 32 with a shared exponent
    mode: str = knob("affine", "affine or mxfp4.", flags=["--q-mode"])
    # A recipe's own bits count then.
    recipe: str | None = knob(None, f"Mixed bits: {', '.join(RECIPES)}.", flags=["--quant-predicate"])
    tower: bool = knob(False, "Quantize the blocks of the tower, too.", flags=["--q-vision"])

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_size", self.group_size or (32 if self.mode == "mxfp4" else 64))
        if self.recipe is not None and (self.recipe not in RECIPES or self.mode != "affine"):
            known = ", ".join(RECIPES)
            raise CheckpointError(f"quantization recipe is {self.recipe!r} ({self.mode}); expected affine and {known}.")
        if self.mode == "mxfp4":
            if (self.bits, self.group_size) != (4, 32):
                raise CheckpointError(
                    f"mxfp4 has 4 bits in groups of 32; {self.bits} bits in groups of {self.group_size} were asked for."
                )
            return
        if self.mode != "affine":
            raise CheckpointError(f"quantization mode is {self.mode!r}; expected affine or mxfp4.")
        if self.bits not in BITS or self.group_size not in GROUPS:
            raise CheckpointError(
                f"cannot quantize to {self.bits} bits in groups of {self.group_size}; "
                f"MLX has {_listed(BITS)} bits in groups of {_listed(GROUPS)}."
            )

    def setting(self, layers: int, tied: bool = False) -> dict[str, Any]:
        """What config.json keeps for a decoder of `layers` blocks: one setting, and that of each layer that differs.

        Where the embedding is the head, too (`tied`), it has the head's bits.
        """
        base = {"group_size": self.group_size, "bits": self.bits, "mode": self.mode}
        if self.recipe is None:
            return base
        low, high = RECIPES[self.recipe]
        more = {**base, "bits": high}
        sensitive = [f"{_DECODER}{'model.embed_tokens' if tied else 'lm_head'}"]
        for n in range(layers):
            if n < layers // 8 or n >= 7 * layers // 8 or (n - layers // 8) % 3 == 2:
                block = f"{_DECODER}model.layers.{n}."
                sensitive += [f"{block}self_attn.v_proj", f"{block}mlp.down_proj"]
        return {**base, "bits": low, **dict.fromkeys(sensitive, more)}


@dataclass(frozen=True)
class LayerReport:
    """One layer that could be quantized; `bits` is None where its width is no multiple of the group."""

    name: str
    bits: int | None
    bytes: int


def quantize_model(model: Llama3V, setting: Mapping[str, Any]) -> tuple[LayerReport, ...]:
    """Quantize the decoder in place. Raises CheckpointError where no layer can be."""
    names = [name for name, module in model.named_modules() if hasattr(module, "to_quantized")]
    quantize_layers(model, setting, only=_DECODER)
    modules = dict(model.named_modules())
    layers = []
    for name in sorted(name for name in names if name.startswith(_DECODER)):
        held = parameters(modules[name])
        size = sum(value.nbytes for value in held.values())
        layers.append(LayerReport(name, layer_setting(setting, name)["bits"] if "scales" in held else None, size))
    if all(layer.bits is None for layer in layers):
        group = setting["group_size"]
        raise CheckpointError(
            f"no layer of the decoder can be quantized: no width is a multiple of --q-group-size {group}."
        )
    return tuple(layers)


def quantize_tower(
    weights: Mapping[str, mx.array], vision: VisionConfig, setting: Mapping[str, Any]
) -> tuple[dict[str, mx.array], tuple[LayerReport, ...]]:
    """The blocks of a tower (names as in a model directory) quantized; all else of `weights` stays."""
    tower = VisionTower(vision)
    held = {name: value for name, value in weights.items() if name.startswith(_TOWER)}
    tower.load_weights([(name.removeprefix(_TOWER), value) for name, value in held.items()])
    names = [n for n, m in tower.named_modules() if n.startswith("encoder.") and hasattr(m, "to_quantized")]
    quantize_layers(tower, setting, prefix=_TOWER, only="encoder.")
    modules, layers = dict(tower.named_modules()), []
    for name in sorted(names):
        found = parameters(modules[name])
        size = sum(value.nbytes for value in found.values())
        layers.append(LayerReport(_TOWER + name, setting["bits"] if "scales" in found else None, size))
    rest = {name: value for name, value in weights.items() if name not in held}
    return {**rest, **{_TOWER + name: value for name, value in parameters(tower).items()}}, tuple(layers)


def measure(
    weights: Mapping[str, mx.array], quantization: Mapping[str, Any] | None
) -> tuple[dict[str, int], dict[str, int]]:
    """Parameters and bytes of each part, from shapes alone: packed weights count as what they stand for."""
    counts: dict[str, int] = {}
    sizes: dict[str, int] = {}
    for name, value in weights.items():
        part = "text_tower" if name.startswith("logit_") else name.partition(".")[0]
        sizes[part] = sizes.get(part, 0) + value.nbytes
        if quantization and value.dtype == mx.uint32:
            bits = layer_setting(quantization, re.sub(r"\.weight$", "", name))["bits"]
            counts[part] = counts.get(part, 0) + value.size * 32 // bits
        elif not name.endswith((".scales", ".biases")):
            counts[part] = counts.get(part, 0) + value.size
    return counts, sizes
