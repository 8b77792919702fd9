"""Files beside the weights of an exported LlavaForConditionalGeneration: configuration, processor, chat template."""

from __future__ import annotations

import json
from typing import Any

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.layout import PromptLayout
from mlx_llama3v.text.tokens import Tokens


def llava_config(config: ModelConfig, image_id: int, *, dtype: str, tie: bool, act: str) -> dict[str, Any]:
    """config.json as transformers, vLLM and llama.cpp's converters read it; `act` "linear" is transformers' alone."""
    vision, strategy = config.vision_config, _strategy(config)
    text = {
        **config.text_config,
        "architectures": ["LlamaForCausalLM"],
        "tie_word_embeddings": tie,
        "dtype": dtype,
        "eos_token_id": list(config.eos_token_ids) or config.text_config.get("eos_token_id"),
    }
    return {
        "architectures": ["LlavaForConditionalGeneration"],
        "model_type": "llava",
        "image_token_index": image_id,
        "image_token_id": image_id,
        "image_seq_length": vision.grid**2 - config.projector_config.skip,
        "projector_hidden_act": act,
        "multimodal_projector_bias": True,
        "vision_feature_layer": config.vision_feature_layer,
        "vision_feature_select_strategy": strategy,
        "tie_word_embeddings": tie,
        "dtype": dtype,
        "vision_config": {
            "model_type": "siglip_vision_model",
            "hidden_size": vision.hidden_size,
            "intermediate_size": vision.intermediate_size,
            "num_hidden_layers": vision.num_hidden_layers,
            "num_attention_heads": vision.num_attention_heads,
            "num_channels": vision.num_channels,
            "image_size": vision.image_size,
            "patch_size": vision.patch_size,
            "hidden_act": vision.hidden_act,
            "layer_norm_eps": vision.layer_norm_eps,
            "vision_use_head": False,  # a missing flag makes vLLM pool all patches to one
        },
        "text_config": text,
    }


def processor_files(config: ModelConfig, image_token: str) -> dict[str, str]:
    """processor_config.json (transformers 5 reads all from it) and preprocessor_config.json (before that)."""
    side, image = config.vision_config.image_size, config.image
    pixels = {
        "image_processor_type": "SiglipImageProcessor",
        "do_convert_rgb": True,
        "do_resize": True,
        "do_rescale": True,
        "do_normalize": True,
        "size": {"height": side, "width": side},
        "resample": image.resample,
        "rescale_factor": image.rescale_factor,
        "image_mean": list(image.image_mean),
        "image_std": list(image.image_std),
    }
    processor = {
        "processor_class": "LlavaProcessor",
        "image_processor": pixels,
        "image_token": image_token,
        "patch_size": config.vision_config.patch_size,
        "vision_feature_select_strategy": _strategy(config),
        "num_additional_image_tokens": 0,
    }
    return {
        "processor_config.json": _json(processor),
        "preprocessor_config.json": _json({**pixels, "processor_class": "LlavaProcessor"}),
    }


def _strategy(config: ModelConfig) -> str:
    return "default" if config.projector_config.skip else "full"


def _json(values: dict[str, Any]) -> str:
    return json.dumps(values, indent=2) + "\n"


_MACROS = """\
{%- macro words(content) -%}
{%- if content is string -%}{{- content | trim -}}
{%- else -%}{%- for part in content if part['type'] == 'text' -%}{{- part['text'] | trim -}}{%- endfor -%}{%- endif -%}
{%- endmacro -%}
{%- macro pictures(content) -%}
{%- if content is not string -%}{%- for part in content if part['type'] == 'image' -%}{{- PICTURE -}}{%- endfor -%}
{%- endif -%}
{%- endmacro -%}
"""
_TURNS = """\
{{- START -}}
{%- if messages[0]['role'] != 'system' -%}{{- DEFAULT -}}{%- endif -%}
{%- for message in messages -%}
{%- if message['role'] == 'user' -%}{{- USER -}}
{%- elif message['role'] == 'assistant' -%}{{- ANSWER -}}
{%- else -%}{{- SYSTEM -}}{%- endif -%}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- HEADER -}}{%- endif -%}
"""


# llama.cpp puts a marker of its own, <__media__> or <__media_(random)__>, into the text where a picture was.
_MARKED = """\
{%- macro words(content) -%}
{%- set found = namespace(text='') -%}
{%- for piece in content.split('__>') -%}{%- set found.text = found.text + piece.split('<__media')[0] -%}{%- endfor -%}
{{- found.text | trim -}}
{%- endmacro -%}
{%- macro pictures(content) -%}
{%- for piece in content.split('__>') if '<__media' in piece -%}{{- PICTURE -}}{%- endfor -%}
{%- endmacro -%}
"""
_MARK = "{mark}"
_MARK_FOUND = "'<__media' + piece.split('<__media')[1] + '__>'"


def chat_template(layout: PromptLayout, tokens: Tokens, image_token: str | None) -> str:
    """A Jinja template that writes what `render` does, one slice a picture, for content in parts or as a string.

    Without an `image_token` it is llama.cpp's: content is a string that has a marker where a picture stands.
    """
    opened = closed = ""  # around the text of a turn with a picture
    if layout.markers:
        layout, opened, closed = _spelled(tokens)

    def quoted(text: str) -> str:
        return json.dumps(text, ensure_ascii=False)

    def filled(template: str, **values: str) -> str:
        """A Jinja expression: `template` with its {names} replaced by expressions."""
        parts = [quoted(template)]
        for name, value in values.items():
            parts = [piece for part in parts for piece in _insert(part, name, value)]
        return " + ".join(part for part in parts if part != '""') or '""'

    picture = layout.picture.replace("{slices}", "").replace("{overview}", layout.overview)
    picture = picture.replace("{visual}", _MARK if image_token is None else image_token)
    content = {"text": "words(message['content'])"}
    shown = "pictures(message['content'])"
    user, asked = layout.user, dict(content)
    if opened:
        user = user.replace("{text}", "{opened}{text}{closed}")
        asked |= {
            "opened": f"({quoted(opened)} if {shown} else '')",
            "closed": f"({quoted(closed)} if {shown} else '')",
        }
    default = "" if layout.default_system is None else layout.system.replace("{text}", layout.default_system)
    values = {
        "PICTURE": filled(picture, n="loop.index ~ ''", mark=_MARK_FOUND),
        "START": quoted(layout.start),
        "DEFAULT": quoted(default),
        "USER": filled(user, images=shown, **asked),
        "ANSWER": filled(layout.assistant + layout.answer + layout.end, **content),
        "SYSTEM": filled(layout.system, **content),
        "HEADER": quoted(layout.assistant),
    }
    text = (_MARKED if image_token is None else _MACROS) + _TURNS
    for name, value in values.items():
        text = text.replace("{{- " + name + " -}}", "{{- " + value + " -}}")
    return text


def _insert(part: str, name: str, value: str) -> list[str]:
    """A quoted piece, cut at {name}; expressions are left alone."""
    if not part.startswith('"'):
        return [part]
    pieces = json.loads(part).split("{" + name + "}")
    found = [json.dumps(pieces[0], ensure_ascii=False)]
    for piece in pieces[1:]:
        found += [value, json.dumps(piece, ensure_ascii=False)]
    return found


def _spelled(tokens: Tokens) -> tuple[PromptLayout, str, str]:
    """Our own joint sequence, its markers as the reserved tokens whose ids they have; and <text> and </text>."""
    image, image_end, text, text_end = (tokens.decode([i], special=True) for i in tokens.marker_ids[:4])
    layout = PromptLayout(picture="{overview}{slices}", overview=f"{image}{{visual}}{image_end}")
    return layout, text, text_end
