"""Answers that keep to a JSON schema, by llguidance (extra `[serve]`)."""

from __future__ import annotations

import json
from functools import lru_cache
from typing import Any

import mlx.core as mx
import numpy as np

from mlx_llama3v.errors import ContextError
from mlx_llama3v.text.tokens import Tokens


class Grammar:
    """What may come next in one answer."""

    def __init__(self, tokens: Tokens, schema: dict[str, Any], vocabulary: int) -> None:
        """`vocabulary`: width of the logits. Raises ContextError for a schema that cannot be kept to."""
        try:
            from llguidance import LLMatcher
        except ImportError as error:
            raise ContextError("a JSON schema needs llguidance; install mlx-llama3v[serve].") from error
        tokenizer = _tokenizer(tokens, vocabulary)
        try:
            grammar = LLMatcher.grammar_from_json_schema(json.dumps(schema))
            self._matcher = LLMatcher(tokenizer, grammar)
            self._matcher.compute_bitmask()  # some problems show only now
            problem = self._matcher.get_error()
        except Exception as error:  # the Rust library raises ValueError and RuntimeError
            raise ContextError(f"the JSON schema cannot be used: {_line(error)}.") from error
        if problem:
            raise ContextError(f"the JSON schema cannot be used: {_line(problem)}.")
        self._vocabulary = vocabulary

    def __call__(self, logits: mx.array) -> mx.array:
        """Logits [1, V] of what the schema allows next."""
        packed = np.frombuffer(self._matcher.compute_bitmask(), np.uint8)
        allowed = np.unpackbits(packed, bitorder="little")[: self._vocabulary].astype(bool)
        return mx.where(mx.array(allowed)[None], logits, mx.array(-mx.inf, logits.dtype))

    def take(self, token: int) -> None:
        """The answer goes on with `token`."""
        self._matcher.consume_token(token)


@lru_cache(maxsize=2)
def _tokenizer(tokens: Tokens, vocabulary: int) -> Any:
    from llguidance import LLTokenizer

    return LLTokenizer(tokens.to_json(), n_vocab=vocabulary, eos_token=tokens.eot)


def _line(error: object) -> str:
    return " ".join(str(error).split())[:200].rstrip(".")
