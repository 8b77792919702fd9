"""The server's own description of its API; test generators and client builders read it."""

from __future__ import annotations

from typing import Any

from mlx_llama3v.version import __version__

_TEXT = {"type": "string"}
_PART = {
    "oneOf": [
        {
            "type": "object",
            "required": ["type", "text"],
            "properties": {"type": {"const": "text"}, "text": _TEXT},
            "additionalProperties": False,
        },
        {
            "type": "object",
            "required": ["type", "image_url"],
            "properties": {
                "type": {"const": "image_url"},
                "image_url": {
                    "type": "object",
                    "required": ["url"],
                    "properties": {"url": _TEXT, "detail": {"enum": ["auto", "low", "high"]}},
                    "additionalProperties": False,
                },
            },
            "additionalProperties": False,
        },
    ]
}
_MESSAGE = {
    "type": "object",
    "required": ["role", "content"],
    "properties": {
        "role": {"enum": ["system", "developer", "user", "assistant"]},
        "content": {"oneOf": [_TEXT, {"type": "array", "items": _PART}]},
        "name": _TEXT,
    },
    "additionalProperties": False,
}
_CHAT: dict[str, Any] = {
    "type": "object",
    "required": ["messages"],
    "properties": {
        "messages": {"type": "array", "items": _MESSAGE, "minItems": 1, "maxItems": 1000},
        "max_tokens": {"type": "integer", "minimum": 1},
        "max_completion_tokens": {"type": "integer", "minimum": 1},
        "temperature": {"type": "number", "minimum": 0, "maximum": 2},
        "top_p": {"type": "number", "exclusiveMinimum": 0, "maximum": 1},
        "top_k": {"type": "integer", "minimum": 0},
        "min_p": {"type": "number", "minimum": 0, "maximum": 1},
        "repetition_penalty": {"type": "number", "minimum": 0.01, "maximum": 100},
        "seed": {"type": "integer"},
        "stop": {"oneOf": [_TEXT, {"type": "array", "items": _TEXT, "maxItems": 4}]},
        "stream": {"type": "boolean"},
        "stream_options": {"type": "object", "properties": {"include_usage": {"type": "boolean"}}},
        "response_format": {"type": "object", "properties": {"type": _TEXT, "json_schema": {"type": "object"}}},
        "user": _TEXT,
        "n": {"const": 1},
        "logprobs": {"const": False},
        "top_logprobs": {"const": 0},
        "logit_bias": {"const": {}},
        "tools": {"const": []},
        "tool_choice": {"enum": ["none", "auto"]},
        "parallel_tool_calls": {"type": "boolean"},
        "modalities": {"const": ["text"]},
        "metadata": {"const": {}},
        "store": {"const": False},
        "service_tier": {"enum": ["auto", "default"]},
        "frequency_penalty": {"const": 0},
        "presence_penalty": {"const": 0},
    },
    "additionalProperties": False,
}


def openapi(model: str) -> dict[str, Any]:
    """OpenAPI 3.1 of the routes."""

    def answer(about: str) -> dict[str, Any]:
        return {"responses": {"200": {"description": about}, "default": {"description": "OpenAI's error object"}}}

    def body(schema: dict[str, Any]) -> dict[str, Any]:
        return {"requestBody": {"required": True, "content": {"application/json": {"schema": schema}}}}

    chat = {**_CHAT, "properties": {"model": {"const": model}, **_CHAT["properties"]}}
    slices = {"type": "object", "required": ["image"], "properties": {"image": _TEXT}, "additionalProperties": False}
    return {
        "openapi": "3.1.0",
        "info": {"title": f"mlx-llama3v: {model}", "version": __version__},
        "paths": {
            "/v1/chat/completions": {"post": {**body(chat), **answer("The answer, or its stream")}},
            "/v1/models": {"get": answer("The one model")},
            "/health": {"get": answer("The server is up")},
            "/metrics": {"get": answer("Prometheus' text format")},
            "/page/slices": {"post": {**body(slices), **answer("How a picture is split")}},
        },
    }
