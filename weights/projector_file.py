"""A trained projector in a file of its own: LLaVA's mlp or linear one, its tensors matched by the ends of their names.

qresearch/llama-3-vision-alpha ships nothing else: its SigLIP and its Llama-3-Instruct are the released ones. The
published file is a pickle, which is not opened; the refusal has the line that makes a safetensors file of it.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import mlx.core as mx

from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.hub import resolve
from mlx_llama3v.tensors import PICKLES, load_file, pickle_refusal

FRESH = ("attention", "linear", "mlp")  # kinds of projectors that `convert` makes
_BODY = "projector.body."
_ENDS = {  # end of a name -> place in the projector, by kind
    "mlp": ((r"(?:0|linear_1)\.(weight|bias)", r"linear_1.\1"), (r"(?:2|linear_2)\.(weight|bias)", r"linear_2.\1")),
    "linear": ((r"(?:(?:mm_|multi_modal_)?projector|linear|0)?\.?(weight|bias)", r"linear.\1"),),
}


@dataclass(frozen=True)
class ProjectorFile:
    """What such a file holds, under the names of a model directory, in its dtype."""

    path: Path
    kind: str  # mlp or linear
    names: dict[str, str]  # theirs -> ours
    left_over: tuple[str, ...]
    weights: dict[str, mx.array] = field(repr=False)


def is_file_like(projector: str) -> bool:
    """Whether --projector names a file, directory or Hub id rather than a kind."""
    return projector not in FRESH and (Path(projector).suffix != "" or "/" in projector or Path(projector).exists())


def read_projector(path_or_repo: str | Path, offline: bool = False) -> ProjectorFile:
    """Read a projector lazily: a file, or the one in a directory or Hub repository. Raises CheckpointError."""
    path = _find(path_or_repo, offline)
    tensors = load_file(path)
    for kind, ends in _ENDS.items():
        names = {}
        for name in sorted(tensors):
            for end, ours in ends:
                if found := re.fullmatch(rf"(?:.*\.)?{end}", name):
                    names[name] = _BODY + found.expand(ours)
        if len(names) == 2 * len(ends) == len(set(names.values())):
            weights = {ours: tensors[name] for name, ours in names.items()}
            return ProjectorFile(path, kind, names, tuple(sorted(tensors.keys() - names.keys())), weights)
    raise CheckpointError(
        f"{path} holds {', '.join(sorted(tensors)[:8]) or 'nothing'}; expected a linear projector or one of two "
        "layers, its tensors ending in 0.weight, 0.bias, 2.weight, 2.bias or in linear_1 and linear_2."
    )


def _find(path_or_repo: str | Path, offline: bool) -> Path:
    path = Path(path_or_repo).expanduser()
    if path.suffix in PICKLES and (path.is_file() or not path.exists()):
        raise CheckpointError(pickle_refusal(path) if path.is_file() else f"{path} is missing.")
    if path.suffix == ".safetensors" and not path.is_dir():
        return path
    folder = resolve(path_or_repo, offline)
    if files := _projectors(folder, (".safetensors",)):
        return files[0]
    pickles = _projectors(folder, PICKLES)
    if pickles:
        raise CheckpointError(pickle_refusal(pickles[0]))
    raise CheckpointError(
        f"{path_or_repo} has no *projector*.safetensors; expected the projector so (pickles are not fetched: "
        "download a mm_projector.bin by hand and give its path here to learn how it is converted)."
    )


def _projectors(folder: Path, suffixes: tuple[str, ...]) -> list[Path]:
    return sorted(file for file in folder.iterdir() if file.suffix in suffixes and "projector" in file.name)


def refuse_projector_only(folder: Path) -> None:
    """Raise CheckpointError for a `--hf-path` that holds a projector and no model."""
    if (folder / "config.json").is_file() or not (files := _projectors(folder, (".safetensors", *PICKLES))):
        return
    raise CheckpointError(
        f"{folder} holds a projector only ({files[0].name}) and no config.json; expected the two models it joins "
        f"with it: --vision SIGLIP --llm LLAMA --projector {files[0]}."
    )
