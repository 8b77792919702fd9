"""A chat completion request, read strictly: what is unknown or unsupported is refused, never ignored.

`Refusal` is every error that a client can cause, in OpenAI's shape.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from mlx_llama3v.errors import UserError
from mlx_llama3v.inference.sampling import Sampling
from mlx_llama3v.server.config import ServeConfig

ROLES = {"system": "system", "developer": "system", "user": "user", "assistant": "assistant"}


class Refusal(UserError):
    """A request that is not answered: its HTTP status and OpenAI's error object."""

    def __init__(self, message: str, param: str | None = None, status: int = 400, code: str | None = None) -> None:
        super().__init__(message)
        self.status, self.param, self.code = status, param, code

    def body(self) -> dict[str, Any]:
        """OpenAI's error shape."""
        kinds = {401: "authentication_error", 429: "rate_limit_error"}
        kind = kinds.get(self.status, "invalid_request_error" if self.status < 500 else "server_error")
        return {"error": {"message": str(self), "type": kind, "param": self.param, "code": self.code}}


@dataclass(frozen=True)
class Shown:
    """One picture of a message."""

    url: str
    whole: bool = False  # detail "low": its overview alone


@dataclass(frozen=True)
class Said:
    """One message."""

    role: str
    text: str
    images: tuple[Shown, ...]


@dataclass(frozen=True)
class ChatRequest:
    """A request that can be answered."""

    messages: tuple[Said, ...]
    sampling: Sampling
    stream: bool
    usage: bool  # send a last chunk with the token counts
    schema: dict[str, Any] | None


def parse_json(body: bytes) -> dict[str, Any]:
    """A JSON object. Raises Refusal."""

    def refuse(name: str) -> None:
        raise ValueError(f"{name} is not JSON")

    try:
        values = json.loads(body, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        raise Refusal(f"the request is not JSON: {str(error) or 'nested too deep'}.") from error
    if not isinstance(values, dict):
        raise Refusal("the request is no JSON object.")
    return values


def parse_chat(values: dict[str, Any], config: ServeConfig, model: str) -> ChatRequest:
    """Check every field. Raises Refusal that names the field."""
    values = {key: value for key, value in values.items() if value is not None}
    if unknown := sorted(values.keys() - FIELDS.keys()):
        raise Refusal(f"{unknown[0]} is not supported.", unknown[0], code="unsupported_parameter")
    for key, check in FIELDS.items():
        if key in values and not check(values[key]):
            raise Refusal(f"{key} has a value that is not supported: {_short(values[key])}.", key)
    if "messages" not in values:
        raise Refusal("messages is missing.", "messages")
    if values.get("model", model) != model:
        raise Refusal(f"there is no model {values['model']!r}; this is {model!r}.", "model", 404, "model_not_found")
    messages = tuple(_message(message, f"messages.{n}") for n, message in enumerate(values["messages"]))
    if not messages or messages[-1].role != "user":
        raise Refusal("the last message is no user's; there is nothing to answer.", "messages")
    count = sum(len(message.images) for message in messages)
    if count > config.max_images:
        raise Refusal(f"the request brings {count} pictures; the limit is {config.max_images}.", "messages")
    options = values.get("stream_options", {})
    if options and not values.get("stream"):
        raise Refusal("stream_options is only for streams.", "stream_options")
    usage = bool(options.get("include_usage"))
    return ChatRequest(messages, _sampling(values, config), bool(values.get("stream")), usage, _schema(values))


def _sampling(values: dict[str, Any], config: ServeConfig) -> Sampling:
    most = values.get("max_completion_tokens", values.get("max_tokens"))
    if most is not None and most > config.server_max_tokens:
        key = "max_completion_tokens" if "max_completion_tokens" in values else "max_tokens"
        raise Refusal(f"{key} is {most}; the limit is {config.server_max_tokens}.", key)
    stop = values.get("stop", ())
    try:
        return Sampling(
            max_tokens=most or min(1024, config.server_max_tokens),
            temp=float(values.get("temperature", 0.0)),
            top_p=float(values.get("top_p", 1.0)),
            top_k=values.get("top_k", 0),
            min_p=float(values.get("min_p", 0.0)),
            repetition_penalty=values.get("repetition_penalty"),
            seed=values.get("seed"),
            stop=(stop,) if isinstance(stop, str) else tuple(stop),
        )
    except UserError as error:
        raise Refusal(str(error)) from error


def _schema(values: dict[str, Any]) -> dict[str, Any] | None:
    wanted = values.get("response_format", {"type": "text"})
    if wanted["type"] == "text":
        return None
    if wanted["type"] == "json_object":
        return {"type": "object"}
    inner = wanted.get("json_schema")
    if not isinstance(inner, dict) or not isinstance(inner.get("schema"), dict):
        raise Refusal("response_format.json_schema.schema is missing.", "response_format")
    schema: dict[str, Any] = inner["schema"]
    return schema


def _message(value: Any, where: str) -> Said:
    if not isinstance(value, dict):
        raise Refusal(f"{where} is no object.", where)
    value = {key: item for key, item in value.items() if item is not None}
    if unknown := sorted(value.keys() - {"role", "content", "name", "refusal", "annotations", "tool_calls"}):
        raise Refusal(f"{where}.{unknown[0]} is not supported.", f"{where}.{unknown[0]}")
    if value.get("tool_calls"):
        raise Refusal("tool calls are not supported.", f"{where}.tool_calls")
    role = value.get("role")
    if not isinstance(role, str) or role not in ROLES:
        raise Refusal(f"{where}.role is {_short(role)}; expected {', '.join(ROLES)}.", f"{where}.role")
    content = value.get("content")
    parts = [{"type": "text", "text": content}] if isinstance(content, str) else content
    if not isinstance(parts, list):
        raise Refusal(f"{where}.content is neither a text nor a list of parts.", f"{where}.content")
    texts: list[str] = []
    images: list[Shown] = []
    for n, part in enumerate(parts):
        _part(part, f"{where}.content.{n}", texts, images)
    if images and ROLES[role] != "user":
        raise Refusal(f"{where} ({role}) brings a picture; only user messages may.", where)
    text = "\n".join(texts)
    if not text.strip() and not images:
        raise Refusal(f"{where} is empty.", f"{where}.content")
    return Said(ROLES[role], text, tuple(images))


def _part(part: Any, where: str, texts: list[str], images: list[Shown]) -> None:
    kind = part.get("type") if isinstance(part, dict) else None
    if kind == "text" and part.keys() <= {"type", "text"} and _text(part.get("text")):
        texts.append(part["text"])
        return
    if kind == "image_url" and part.keys() <= {"type", "image_url"}:
        image = part.get("image_url")
        known = isinstance(image, dict) and image.keys() <= {"url", "detail"}
        if known and _text(image.get("url")) and image.get("detail") in (None, "auto", "low", "high"):
            images.append(Shown(image["url"], image.get("detail") == "low"))
            return
    raise Refusal(f"{where} is neither a text nor an image_url part that can be used.", where)


def _text(value: Any) -> bool:
    """A text that has a UTF-8 form: JSON can spell halves of characters."""
    try:
        return isinstance(value, str) and value.encode() is not None
    except UnicodeEncodeError:
        return False


def _short(value: Any) -> str:
    return ascii(value)[:80]


def _whole(low: int, high: int) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int) and not isinstance(value, bool) and low <= value <= high


def _number(low: float, high: float) -> Callable[[Any], bool]:
    return lambda value: isinstance(value, int | float) and not isinstance(value, bool) and low <= value <= high


def _one_of(*allowed: Any) -> Callable[[Any], bool]:
    return lambda value: any(type(value) is type(item) and value == item for item in allowed)


def _stop(value: Any) -> bool:
    texts = [value] if isinstance(value, str) else value
    return isinstance(texts, list) and len(texts) <= 4 and all(_text(t) and 0 < len(t) <= 200 for t in texts)


def _stream_options(value: Any) -> bool:
    return (
        isinstance(value, dict)
        and value.keys() <= {"include_usage"}
        and all(v in (True, False) for v in value.values())
    )


def _format(value: Any) -> bool:
    kinds = ("text", "json_object", "json_schema")
    return isinstance(value, dict) and value.get("type") in kinds and value.keys() <= {"type", "json_schema"}


# Field -> whether its value can be used. Of what this server cannot do, the values that ask for nothing are taken:
# client libraries send them.
FIELDS: dict[str, Callable[[Any], bool]] = {
    "model": _text,
    "messages": lambda value: isinstance(value, list) and len(value) <= 1000,
    "max_tokens": _whole(1, 2**31),
    "max_completion_tokens": _whole(1, 2**31),
    "temperature": _number(0, 2),
    "top_p": _number(1e-9, 1),
    "top_k": _whole(0, 2**31),
    "min_p": _number(0, 1),
    "repetition_penalty": _number(0.01, 100),
    "seed": _whole(-(2**63), 2**63 - 1),
    "stop": _stop,
    "stream": _one_of(True, False),
    "stream_options": _stream_options,
    "response_format": _format,
    "user": _text,
    "n": _one_of(1),
    "logprobs": _one_of(False),
    "top_logprobs": _one_of(0),
    "logit_bias": _one_of({}),
    "tools": _one_of([]),
    "tool_choice": _one_of("none", "auto"),
    "parallel_tool_calls": _one_of(True, False),
    "modalities": _one_of(["text"]),
    "metadata": _one_of({}),
    "store": _one_of(False),
    "service_tier": _one_of("auto", "default"),
    "frequency_penalty": _one_of(0, 0.0),
    "presence_penalty": _one_of(0, 0.0),
}
