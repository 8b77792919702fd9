"""What the server did, in Prometheus' text format."""

from __future__ import annotations

import threading
from collections import Counter

from mlx_llama3v.inference.answer import Answer
from mlx_llama3v.platform import peak_memory

HELP = {
    "requests_total": "Chat requests by HTTP status.",
    "answers_total": "Answers by how they ended.",
    "cancelled_total": "Requests whose client left.",
    "prompt_tokens_total": "Prompt tokens that were prefilled.",
    "cached_tokens_total": "Prompt tokens whose keys and values were reused.",
    "answer_tokens_total": "Tokens of answers.",
    "encode_seconds_total": "Seconds spent on encoding pictures.",
    "first_token_seconds_total": "Seconds from the start of a request to its first token.",
    "waiting": "Requests in the queue.",
    "running": "Answers that are decoded side by side.",
    "prefix_bytes": "Bytes of keys and values kept for later requests.",
    "peak_memory_bytes": "Most memory that the process held.",
}


class Metrics:
    """Counts and levels; safe in threads."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[tuple[str, str]] = Counter()
        self._levels = dict.fromkeys(("waiting", "running", "prefix_bytes"), 0)

    def count(self, name: str, label: str = "", by: float = 1) -> None:
        """Add to `<name>_total`."""
        with self._lock:
            self._counts[f"{name}_total", label] += by  # type: ignore[assignment]

    def gauges(self, **levels: int) -> None:
        """Set levels."""
        with self._lock:
            self._levels.update(levels)

    def answered(self, answer: Answer) -> None:
        """Note a finished answer."""
        self.count("answers", f'finish_reason="{answer.finish_reason}"')
        self.count("prompt_tokens", by=answer.prompt_tokens)
        self.count("cached_tokens", by=answer.cached_tokens)
        self.count("answer_tokens", by=len(answer.tokens))
        self.count("encode_seconds", by=answer.timings.encode)
        self.count("first_token_seconds", by=answer.timings.first_token)

    def text(self) -> str:
        """The page at /metrics."""
        with self._lock:
            values = {(name, ""): float(value) for name, value in self._levels.items()}
            values.update({key: float(value) for key, value in self._counts.items()})
        values["peak_memory_bytes", ""] = float(peak_memory())
        lines: list[str] = []
        for name, about in HELP.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            lines += [f"# HELP llama3v_{name} {about}", f"# TYPE llama3v_{name} {kind}"]
            labels = sorted(label for known, label in values if known == name) or [""]
            for label in labels:
                shown = f"{{{label}}}" if label else ""
                lines.append(f"llama3v_{name}{shown} {values.get((name, label), 0.0):.6g}")
        return "\n".join(lines) + "\n"
