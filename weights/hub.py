"""A model directory with its card, ready for the Hub and sent there: the work of `export --format hub`."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

from mlx_llama3v.checkpoint import load_config
from mlx_llama3v.directory import write_directory
from mlx_llama3v.errors import CheckpointError
from mlx_llama3v.hub import is_repository, reaching, resolve
from mlx_llama3v.tensors import read_tensors, write_text
from mlx_llama3v.version import __version__
from mlx_llama3v.weights.card import RunFacts, model_card
from mlx_llama3v.weights.fuse import fuse
from mlx_llama3v.weights.quantize import measure


def export_hub(
    model_dir: str | Path,
    out_dir: str | Path,
    *,
    repo: str,
    run: str | Path | None = None,
    private: bool = False,
    dry_run: bool = False,
) -> Path:
    """Write a directory that can be shared, with `run` merged in, and upload it to `repo` (owner/name).

    The card names base models, recipe, metrics and licences. `dry_run` writes and does not upload. Returns the absolute
    path of the directory, which stays. Raises CheckpointError, also where the Hub refuses.
    """
    if not is_repository(repo):
        raise CheckpointError(f"repository is {repo!r}; expected owner/name.")
    source, target = resolve(model_dir).resolve(), Path(out_dir).expanduser().resolve()
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} exists; expected a new or empty directory to write to.")
    if run is not None:
        fuse(source, run, target)
    else:
        load_config(source)  # or it is no model directory
        with write_directory(target) as partial:
            shutil.copytree(source, partial, copy_function=_link, dirs_exist_ok=True)
    config = load_config(target)
    parameters, _ = measure(read_tensors(target), config.quantization)
    (target / "README.md").unlink(missing_ok=True)  # it may be one file with the source's
    facts = RunFacts.read(run) if run is not None else None
    write_text(target / "README.md", model_card(config, sum(parameters.values()), name=repo, facts=facts))
    if not dry_run:
        _upload(target, repo, private)
    return target


def _link(source: str, target: str) -> None:
    """The same file under a second name where the disk can do that, else a copy."""
    try:
        os.link(os.path.realpath(source), target)  # the Hub's cache holds links, which end where they are moved
    except OSError:
        shutil.copy2(source, target)


def _upload(folder: Path, repo: str, private: bool) -> None:
    from huggingface_hub import HfApi

    api, again = HfApi(library_name="mlx-llama3v", library_version=__version__), "--private " if private else ""

    def sentence(why: str) -> str:
        hint = f"all is written, so `hf upload {again}{repo} {shlex.quote(str(folder))} .` goes on from here."
        return f"{repo} could not be uploaded ({why.removesuffix('.')}); {hint}"

    with reaching(repo, sentence):
        api.create_repo(repo, private=private, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=folder, commit_message=f"Upload by mlx-llama3v {__version__}")
