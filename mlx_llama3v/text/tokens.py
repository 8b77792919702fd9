"""The Llama-3 tokenizer as this project needs it: user text can never become a control token.

Built on `tokenizers`, not on transformers' wrapper: that one adds a second <|begin_of_text|>, cleans up
spaces when it decodes and turns a typed "<|eot_id|>" into the real one. Here only code adds control tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from functools import cached_property
from pathlib import Path

from tokenizers import Tokenizer

from mlx_llama3v.config import MARKERS
from mlx_llama3v.errors import CheckpointError, DataError
from mlx_llama3v.layout import LAYOUTS, PromptLayout

BOS, END_OF_TEXT, EOT = "<|begin_of_text|>", "<|end_of_text|>", "<|eot_id|>"
START_HEADER, END_HEADER = "<|start_header_id|>", "<|end_header_id|>"
_RESERVED = re.compile(r"<\|reserved_special_token_\d+\|>")
_PLACEHOLDERS = ("<image>", "<unk>")  # where special: stand for visual tokens in the prompts of finished models
_UNFINISHED = "\ufffd"  # what the byte-level decoder puts where a UTF-8 character is incomplete


def load_tokenizer(directory: Path | str) -> Tokenizer:
    """Read `tokenizer.json` of a checkpoint. Raises CheckpointError where it is missing or unreadable."""
    path = Path(directory) / "tokenizer.json"
    if not path.is_file():
        raise CheckpointError(f"{path} is missing; a Llama-3 checkpoint has it beside its weights.")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust library raises plain Exception
        raise CheckpointError(f"{path} is not a tokenizer file: {error}") from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer


def reserved_ids(tokenizer: Tokenizer) -> list[int]:
    """Ids of the tokens named <|reserved_special_token_N|>, ascending."""
    added = tokenizer.get_added_tokens_decoder().items()
    return sorted(token_id for token_id, token in added if _RESERVED.fullmatch(token.content))


def reserved_marker_ids(tokenizer: Tokenizer) -> tuple[int, ...]:
    """Ids for MARKERS: the eight highest ids named <|reserved_special_token_N|>, ascending.

    By id, since the map from id to reserved name differs between Llama 3.0 and 3.1.
    Raises CheckpointError where fewer than eight exist.
    """
    reserved = reserved_ids(tokenizer)
    if len(reserved) < len(MARKERS):
        raise CheckpointError(
            f"the tokenizer has {len(reserved)} <|reserved_special_token_N|> tokens; "
            f"expected a Llama-3 tokenizer with at least {len(MARKERS)}."
        )
    return tuple(reserved[-len(MARKERS) :])


class Tokens:
    """Text <-> ids, plus the ids that only code may insert.

    Attributes: `bos`, `eot`, `end_of_text`; `marker_ids` in MARKERS order; `stop`, what ends an answer.
    """

    def __init__(
        self,
        tokenizer: Tokenizer,
        marker_ids: Sequence[int] = (),
        eos_token_ids: Iterable[int] = (),
        layout: PromptLayout = LAYOUTS["llama3v"],
    ) -> None:
        """Wrap `tokenizer`. Raises CheckpointError for one that lacks Llama-3's control tokens."""
        names = (BOS, END_OF_TEXT, EOT, START_HEADER, END_HEADER)
        found = {name: tokenizer.token_to_id(name) for name in names}
        ids = [token_id for token_id in found.values() if token_id is not None]
        if len(ids) < len(names):
            missing = ", ".join(name for name, token_id in found.items() if token_id is None)
            raise CheckpointError(f"the tokenizer has no {missing}; expected a Llama-3 tokenizer.")
        self._tokenizer, self.layout = tokenizer, layout
        tokenizer.encode_special_tokens = True  # spell special tokens out when they occur in text
        self.bos, self.end_of_text, self.eot, self._start_header, self._end_header = ids
        self.marker_ids = tuple(marker_ids) or reserved_marker_ids(tokenizer)
        if len(set(self.marker_ids)) != len(MARKERS):
            raise CheckpointError(f"marker_ids is {list(self.marker_ids)}; expected {len(MARKERS)} different ids.")
        ends = {piece for piece in self.pieces(layout.end) if isinstance(piece, int)}
        self.stop = frozenset(eos_token_ids) | {self.eot, self.end_of_text} | ends
        self._unsaid: dict[int, tuple[int, ...]] = {}
        self._refuse_injection(ids)

    @classmethod
    def load(
        cls,
        directory: Path | str,
        marker_ids: Sequence[int] = (),
        eos_token_ids: Iterable[int] = (),
        layout: PromptLayout = LAYOUTS["llama3v"],
    ) -> Tokens:
        """The tokenizer of a model directory; `marker_ids` default to the top of the reserved range."""
        return cls(load_tokenizer(directory), marker_ids, eos_token_ids, layout)

    def _refuse_injection(self, ids: Sequence[int]) -> None:
        """A file that lists control tokens or markers as words would let user text produce them."""
        for token_id in (*ids, *self.marker_ids):
            name = self._tokenizer.id_to_token(token_id)
            if name is None:
                raise CheckpointError(f"the tokenizer has no token {token_id}, which marker_ids names.")
            if token_id in self.encode(name):
                raise CheckpointError(f"tokenizer.json lists {name!r} as ordinary text; expected a special token.")

    @property
    def size(self) -> int:
        """Number of ids, special tokens included."""
        return int(self._tokenizer.get_vocab_size(with_added_tokens=True))

    def encode(self, text: str) -> list[int]:
        """Ids of plain text: no <|begin_of_text|>, and what looks like a control token stays plain text.

        Raises DataError for half a character, as a terminal's or a file's bytes that are no UTF-8 leave it.
        """
        try:
            return list(self._tokenizer.encode(text, add_special_tokens=False).ids)
        except TypeError as error:
            raise DataError(f"the text {text!a:.60} is not valid UTF-8; write it anew.") from error

    def pieces(self, text: str) -> list[int | str]:
        """`text` of a prompt layout, cut at the special tokens it spells: their ids, and plain text between."""
        found = re.split(self._special, text)
        return [self._specials.get(piece, piece) for piece in found if piece]

    def unsaid(self, vocabulary: int) -> tuple[int, ...]:
        """Ids below `vocabulary` that may stand in a prompt, or nowhere, but never in an answer.

        The markers; placeholders of pictures (`<image>`, the layout's own, MiniCPM's `<unk>`); special tokens appended
        behind Llama-3's; ids that the tokenizer does not have, to which a vocabulary was padded. Not what ends an
        answer, and not what other control tokens a model may have learned to write.
        """
        if vocabulary in self._unsaid:
            return self._unsaid[vocabulary]
        layout = self.layout
        spelled = "".join((layout.picture, layout.overview, layout.slices, layout.tile, layout.col, layout.row))
        named = {*self.pieces(spelled), *(self._specials.get(name) for name in _PLACEHOLDERS)}
        last = max(reserved_ids(self._tokenizer), default=vocabulary)
        appended = {i for i in self._specials.values() if i > last}
        padding = {i for i in range(self.size, vocabulary) if self._tokenizer.id_to_token(i) is None}
        found = {*self.marker_ids, *appended, *padding, *(i for i in named if isinstance(i, int))}
        self._unsaid[vocabulary] = tuple(sorted(i for i in found - self.stop if i < vocabulary))
        return self._unsaid[vocabulary]

    @cached_property
    def _specials(self) -> dict[str, int]:
        added = self._tokenizer.get_added_tokens_decoder().items()
        return {token.content: token_id for token_id, token in added if token.special}

    @cached_property
    def _special(self) -> re.Pattern[str]:
        longest_first = sorted(self._specials, key=len, reverse=True)
        return re.compile("(" + "|".join(map(re.escape, longest_first)) + ")")

    def decode(self, ids: Iterable[int], *, special: bool = False) -> str:
        """Text of `ids`; special tokens are left out unless `special`."""
        return str(self._tokenizer.decode([int(i) for i in ids], skip_special_tokens=not special))

    def to_json(self) -> str:
        """The tokenizer as `tokenizer.json` has it, for libraries that need its words."""
        return str(self._tokenizer.to_str())

    def header(self, role: str) -> list[int]:
        """<|start_header_id|>role<|end_header_id|> and the blank line after it."""
        return [self._start_header, *self.encode(role), self._end_header, *self.encode("\n\n")]

    def detokenizer(self) -> Detokenizer:
        """A fresh streaming decoder."""
        return Detokenizer(self)


class Detokenizer:
    """Decodes one id at a time and holds unfinished characters back."""

    def __init__(self, tokens: Tokens) -> None:
        self._tokens = tokens
        self._pending: list[int] = []

    def add(self, token_id: int) -> str:
        """The text that `token_id` completes; "" while a multi-byte character is unfinished."""
        self._pending.append(token_id)
        text = self._tokens.decode(self._pending)
        if text.endswith(_UNFINISHED):
            return ""
        self._pending.clear()
        return text

    def finish(self) -> str:
        """What is left when no more ids come."""
        text = self._tokens.decode(self._pending)
        self._pending.clear()
        return text
