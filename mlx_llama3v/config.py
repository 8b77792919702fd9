"""Every setting that travels with a model, as frozen dataclasses; a knob is written once, here.

`from_dict` is lenient for foreign `config.json` files (unknown keys are dropped, Hugging Face's defaults fill
the gaps) and strict for our own (`ModelConfig.from_dict` names an unknown key).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any, NamedTuple

import numpy as np

from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.layout import LAYOUTS, PromptLayout, named_layout

# The markers of the joint sequence (DESIGN 6), in the order of the projector's `markers` rows.
MARKERS = ("<image>", "</image>", "<text>", "</text>", "<slices>", "</slices>", "<col>", "<row>")

Grid = tuple[int, int]  # (rows, columns) of patches


def known(cls: type, values: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of `values` that are fields of dataclass `cls` (the lenient reading)."""
    names = {f.name for f in fields(cls)}
    return {key: value for key, value in values.items() if key in names and value is not None}


def strict(cls: type, values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """`values`, or a CheckpointError that names the keys which `cls` does not know."""
    unknown = sorted(set(values) - {f.name for f in fields(cls)})
    if unknown:
        raise CheckpointError(f"{where}: unknown setting {', '.join(unknown)}; this version does not know it.")
    return dict(values)


@dataclass(frozen=True)
class VisionConfig:
    """SigLIP's vision tower (Zhai et al. 2023); the defaults are base-patch16-224, as in transformers."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    vision_use_head: bool = True

    @property
    def grid(self) -> int:
        """Patches along one side of the native square image (27 for so400m/14-384: the rest is cut off)."""
        return self.image_size // self.patch_size


@dataclass(frozen=True)
class SiglipTextConfig:
    """SigLIP's text tower; `projection_size` is the width of the shared space (default: hidden_size)."""

    vocab_size: int = 32000
    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    max_position_embeddings: int = 64
    layer_norm_eps: float = 1e-6
    hidden_act: str = "gelu_pytorch_tanh"
    projection_size: int | None = None


@dataclass(frozen=True)
class ImageConfig:
    """Pixel preprocessing, read from the checkpoint's own (pre)processor config, never assumed."""

    resample: int = 3  # Pillow's number: 3 bicubic (SigLIP 1), 2 bilinear (SigLIP 2)
    rescale_factor: float = 1 / 255
    image_mean: tuple[float, ...] = (0.5, 0.5, 0.5)
    image_std: tuple[float, ...] = (0.5, 0.5, 0.5)
    max_pixels: int = 178_956_970  # larger pictures are refused before they are decoded (Pillow's bomb limit)


@dataclass(frozen=True)
class TilingConfig:
    """How a picture becomes slices: LLaVA-UHD adaptive splitting, or one squashed square as SigLIP was trained."""

    mode: str = "uhd"  # "uhd": keep the aspect ratio, split large pictures; "squash": one native square
    max_slices: int = 6  # slices beside the overview; 0 switches splitting off


@dataclass(frozen=True)
class SliceLayout:
    """Shapes of one picture's slices, all that the text side may know of it.

    `overview` and `tile` are patch grids (rows, columns); `rows` x `cols` tiles follow the overview in
    reading order (0 x 0 where the picture was not split).
    """

    overview: Grid
    rows: int = 0
    cols: int = 0
    tile: Grid = (0, 0)

    @property
    def grids(self) -> tuple[Grid, ...]:
        """Patch grid of every slice, overview first."""
        return (self.overview, *(self.tile,) * (self.rows * self.cols))

    @property
    def patches(self) -> int:
        """Patch embeddings of the whole picture."""
        return sum(h * w for h, w in self.grids)


class Encoded(NamedTuple):
    """One picture's patch embeddings, slice after slice in `layout.grids` order: what the store holds."""

    layout: SliceLayout
    patches: np.ndarray  # [layout.patches, D_vision]


@dataclass(frozen=True)
class ProjectorConfig:
    """From patch embeddings to the decoder's width; see projector.py."""

    kind: str = "attention"  # attention | linear | mlp | resampler | downsample; "stored": a store of its output
    in_dim: int = 1152
    out_dim: int = 4096
    hidden_dim: int = 1152  # width of the two self-attention blocks; the mlp's hidden width is out_dim
    num_heads: int = 16
    num_layers: int = 2
    pool: int = 3  # spatial average pooling of the attention projector; 1 for linear and mlp
    layer_norm_eps: float = 1e-6
    skip: int = 0  # patches left out at a slice's start (linear and mlp; LLaVA's select strategy "default")
    queries: int = 0  # of the resampler: its visual tokens a slice

    def num_tokens(self, grid: Grid) -> int:
        """Visual tokens of one slice of `grid` patches: it follows from the shape alone."""
        h, w = grid
        if self.kind == "resampler":
            return self.queries
        if self.kind == "downsample":
            return -(-h // 2) * -(-w // 2)
        if self.kind != "attention":
            return h * w - self.skip
        return -(-h // self.pool) * -(-w // self.pool)


@dataclass(frozen=True)
class ModelConfig:
    """`config.json` of a model directory: everything but the weights and the tokenizer."""

    vision_config: VisionConfig
    text_config: dict[str, Any]  # Llama's own config.json, rope in both spellings (see checkpoint traps 1 and 2)
    projector_config: ProjectorConfig
    tiling: TilingConfig = field(default_factory=TilingConfig)
    image: ImageConfig = field(default_factory=ImageConfig)
    vision_feature_layer: int = -1  # index into hidden_states: -1 is the last block's output, before post_layernorm
    patch_pool: int = 1  # mean over N x N patches before the projector (`embed --pool`)
    marker_ids: tuple[int, ...] = ()  # ids that stand for MARKERS in a sequence; their vectors are projector rows
    eos_token_ids: tuple[int, ...] = ()
    siglip_text_config: SiglipTextConfig | None = None  # present where the text tower was kept (for classify)
    vision_feature_norm: bool = False  # the features are taken after `post_layernorm` (MiniCPM-V)
    vision_mode: str = "native"  # how the tower is run: native | strip (MiniCPM-V 2.5) | s2 (Bunny 1.1)
    prompt_layout: PromptLayout = LAYOUTS["llama3v"]
    quantization: dict[str, Any] | None = None
    sources: dict[str, str] = field(default_factory=dict)  # what it was converted from
    model_type: str = "llama3v"

    @property
    def untrained(self) -> bool:
        """Whether the projector is as `convert` drew it: no run, finished model or projector is among the sources."""
        return self.sources.keys().isdisjoint(("run", "model", "projector"))

    @property
    def hidden_size(self) -> int:
        """Width of the decoder."""
        return int(self.text_config["hidden_size"])

    def to_dict(self) -> dict[str, Any]:
        """JSON-ready; absent parts are left out; `quantization` is mirrored as mlx-lm's files do."""
        values = {key: value for key, value in asdict(self).items() if value is not None}
        if self.quantization is not None:
            values["quantization_config"] = self.quantization
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any], where: str = "config.json") -> ModelConfig:
        """The strict reading of our own file. Raises CheckpointError for another model_type or unknown keys."""
        if "train" in values:
            model = f" ({values['model_path']})" if values.get("model_path") else ""
            raise CheckpointError(f"{where} is that of a training run; give its model{model}, and the run with --run.")
        if values.get("model_type") != "llama3v":
            raise CheckpointError(
                f"{where}: model_type is {values.get('model_type')!r}, expected 'llama3v'; "
                "run `llama3v-mlx convert` on it first."
            )
        values = {key: value for key, value in values.items() if key != "quantization_config"}
        parts = strict(cls, values, where)
        missing = [key for key in ("vision_config", "text_config", "projector_config") if key not in parts]
        if missing:
            raise CheckpointError(f"{where}: {', '.join(missing)} is missing; the file is not a whole model config.")
        nested: dict[str, type] = {
            "vision_config": VisionConfig,
            "projector_config": ProjectorConfig,
            "tiling": TilingConfig,
            "image": ImageConfig,
            "siglip_text_config": SiglipTextConfig,
            "prompt_layout": PromptLayout,
        }
        if isinstance(parts.get("prompt_layout"), str):
            parts["prompt_layout"] = asdict(named_layout(parts["prompt_layout"]))
        for key, part in nested.items():
            if key in parts:
                parts[key] = part(**_tuples(strict(part, parts[key], f"{where}: {key}")))
        return cls(**_tuples(parts))


def _tuples(values: Mapping[str, Any]) -> dict[str, Any]:
    """JSON has no tuples; frozen dataclasses hold no lists."""
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def llama_config(values: Mapping[str, Any]) -> dict[str, Any]:
    """A Llama `config.json`, complete and with rope in both spellings.

    transformers 5 writes `rope_parameters` only, older files and mlx-lm read `rope_theta` + `rope_scaling`;
    mlx-lm ties the head when the key is missing, transformers does not. Both are silent killers, so every
    config is completed here. Idempotent. Raises CheckpointError for a model that is not Llama.
    """
    kind = values.get("model_type", "llama")
    if kind != "llama":
        raise CheckpointError(f"the language model is of type {kind!r}; only Llama (3, 3.1, 3.2) is supported.")
    config = {key: value for key, value in values.items() if key not in ("architectures", "transformers_version")}
    rope = dict(values.get("rope_parameters") or {})
    theta = rope.pop("rope_theta", None) or values.get("rope_theta") or 10000.0
    scaling = values.get("rope_scaling") or ({} if rope.get("rope_type", "default") == "default" else rope)
    if scaling and not isinstance(scaling, Mapping):
        raise CheckpointError(f"the language model's rope_scaling is {scaling!r}; expected an object.")
    scaling = dict(scaling) if scaling else None
    if scaling is not None:
        scaling["rope_type"] = scaling.pop("type", scaling.get("rope_type", "default"))
        scaling = {k: v for k, v in scaling.items() if v is not None and k != "rope_theta"}
        _check_rope(scaling)
    config.update(
        model_type="llama",
        rope_theta=float(theta),
        rope_scaling=scaling,
        rope_parameters={"rope_theta": float(theta), **(scaling or {"rope_type": "default"})},
        tie_word_embeddings=bool(values.get("tie_word_embeddings", False)),
        attention_bias=bool(values.get("attention_bias", False)),
        mlp_bias=bool(values.get("mlp_bias", False)),
    )
    defaults: dict[str, Any] = {
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 32,
        "num_attention_heads": 32,
        "vocab_size": 32000,
        "rms_norm_eps": 1e-6,
        "max_position_embeddings": 2048,
    }
    for key, value in defaults.items():
        if config.get(key) is None:
            config[key] = value
    if config.get("num_key_value_heads") is None:
        config["num_key_value_heads"] = config["num_attention_heads"]
    if config.get("head_dim") is None:
        config["head_dim"] = config["hidden_size"] // config["num_attention_heads"]
    return config


_ROPES: dict[str, tuple[str, ...]] = {
    "default": (),
    "linear": ("factor",),
    "llama3": ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"),
}


def _check_rope(scaling: Mapping[str, Any]) -> None:
    """Raises CheckpointError for a scaling that no Llama-3 has, and for one that lacks a number."""
    kind = scaling["rope_type"]
    if kind not in _ROPES:
        raise CheckpointError(f"the language model's rope is scaled by {kind!r}; expected {', '.join(_ROPES)}.")
    if missing := [key for key in _ROPES[kind] if not isinstance(scaling.get(key), int | float)]:
        raise CheckpointError(f"the language model's {kind} rope scaling lacks {', '.join(missing)}.")


def stop_ids(*sources: int | Sequence[int] | None) -> tuple[int, ...]:
    """Stop ids of config.json and generation_config.json in one sorted tuple (either may be an int or a list)."""
    found: set[int] = set()
    for source in sources:
        if source is not None:
            found.update([source] if isinstance(source, int) else source)
    return tuple(sorted(found))
