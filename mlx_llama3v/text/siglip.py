"""SigLIP's own tokenizer, which its text tower was trained with: every text is one full row of ids."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np

from mlx_llama3v.errors import CheckpointError, DataError


class SiglipTokenizer:
    """Texts -> ids [T, length]: lower-cased, cut or padded to the tower's full length, as in training.

    The tower reads the last position and attends to padding, so neither the length nor the padding's side
    is free. Released SigLIP 2 tokenizers leave lower-casing to the caller; for SigLIP 1 it changes nothing.
    """

    def __init__(self, directory: Path | str, length: int) -> None:
        """Read the tokenizer of `directory`. Raises CheckpointError where it is missing or unreadable."""
        from transformers import AutoTokenizer
        from transformers.utils import logging

        directory, self.length = Path(directory), length
        if not any((directory / name).is_file() for name in ("tokenizer.json", "spiece.model", "tokenizer.model")):
            raise CheckpointError(f"{directory} has no SigLIP tokenizer; expected tokenizer.json or spiece.model.")
        level = logging.get_verbosity()
        logging.set_verbosity_error()  # transformers warns about its own default SigLIP config, whatever ours says
        try:
            self._tokenizer = AutoTokenizer.from_pretrained(directory, local_files_only=True)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise CheckpointError(f"the SigLIP tokenizer in {directory} cannot be read: {error}") from error
        finally:
            logging.set_verbosity(level)
        if self._tokenizer.pad_token_id is None:
            raise CheckpointError(f"the SigLIP tokenizer in {directory} has no padding token.")
        self._lower = self._tokenizer.init_kwargs.get("do_lower_case") is not False

    def __call__(self, texts: Sequence[str]) -> np.ndarray:
        """Ids of `texts`, int32 [T, length]. Raises DataError for one that is not valid UTF-8."""
        if broken := [text for text in texts if any("\ud800" <= c <= "\udfff" for c in text)]:
            raise DataError(f"the text {broken[0]!a:.60} is not valid UTF-8; write it anew.")
        rows = self._tokenizer(
            [text.lower() if self._lower else text for text in texts],
            padding="max_length",
            truncation=True,
            max_length=self.length,
            return_attention_mask=False,
        )
        return np.array(rows["input_ids"], np.int32)
