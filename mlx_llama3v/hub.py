"""The Hugging Face Hub: checkpoints by id, from its cache or fetched, and what its client raises as one sentence."""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from mlx_llama3v.directory import LEGAL_FILES, TOKENIZER_FILES
from mlx_llama3v.errors import CheckpointError

_WANTED = ["*.safetensors", "*.json", "*.model", "README.md", *TOKENIZER_FILES, *LEGAL_FILES]
_ELSEWHERE = ["original/*", "onnx/*", "openvino/*", "gguf/*", "checkpoint*/*", "runs/*"]
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def is_repository(name: str) -> bool:
    """Whether that could be a Hub id: owner/name."""
    return _REPOSITORY.fullmatch(name) is not None


def resolve(path_or_repo: str | Path, offline: bool = False) -> Path:
    """The directory of a checkpoint: an existing local path wins, else the Hub's cache, else the Hub.

    `offline` or HF_HUB_OFFLINE=1 never touches the network. Only safetensors, JSON, tokenizer and licence
    files and the README are fetched. Raises CheckpointError.
    """
    path, name = Path(path_or_repo).expanduser(), str(path_or_repo)
    if path.is_dir():
        return path
    if path.exists():
        raise CheckpointError(f"{path} is a file; expected a checkpoint directory or a Hub id (owner/name).")
    if not is_repository(name):
        raise CheckpointError(f"{name} is neither an existing directory nor a Hub id (owner/name).")
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import LocalEntryNotFoundError

    offline = offline or os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE")
    with reaching(name, lambda why: f"{name} is not a directory and cannot be fetched: {why}"):
        try:
            return Path(
                snapshot_download(name, allow_patterns=_WANTED, ignore_patterns=_ELSEWHERE, local_files_only=offline)
            )
        except LocalEntryNotFoundError as error:
            # Another program fetched less than we would (no README, say); whoever reads them names what is missing.
            if part := getattr(error, "snapshot_path", None):
                return Path(part)
            why = "offline mode is on" if offline else "the Hub cannot be reached"
            raise CheckpointError(f"{name} is not a directory, not in the Hub's cache, and {why}.") from error


@contextmanager
def reaching(repo: str, sentence: Callable[[str], str]) -> Iterator[None]:
    """Around calls of the Hub's client: whatever it raises becomes a CheckpointError, `sentence(why)`."""
    try:
        yield
    except CheckpointError:
        raise
    except Exception as error:  # its own errors, and those of whichever HTTP library it stands on
        raise CheckpointError(sentence(_why(error, repo))) from error


def _why(error: Exception, repo: str) -> str:
    """What a person can do about it, else the first line of what the client says."""
    from huggingface_hub.errors import GatedRepoError, RepositoryNotFoundError

    if isinstance(error, GatedRepoError):
        return f"it is gated; accept its licence at https://huggingface.co/{repo} and log in with `hf auth login`."
    if isinstance(error, RepositoryNotFoundError):
        return "it does not exist on the Hub, or it is private; check the name, or log in with `hf auth login`."
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)
