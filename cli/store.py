"""`llama3v-mlx store`: look after an embedding store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.embeddings.store import Store

app = typer.Typer(no_args_is_help=True, help="Look after an embedding store.")


def register(parent: typer.Typer) -> None:
    parent.add_typer(app, name="store")


Path_ = Annotated[Path, typer.Argument(metavar="STORE", help="Embedding store (from `embed`).", show_default=False)]
Json = Annotated[bool, typer.Option("--json", help="Print JSON and nothing else.")]


@app.command()
def info(store: Path_, json: Json = False) -> None:
    """What a store holds and what made it.

    Example: `llama3v-mlx store info my-store --json`
    """
    values = Store(store).info()
    if json:
        show.as_json(values)
        return
    sizes = {"bytes": show.size(values["bytes"])}
    plain = {key: value for key, value in values.items() if not isinstance(value, (dict, list))}
    show.table(str(store), ["", ""], [[key, str(sizes.get(key, value))] for key, value in plain.items()])


@app.command()
def verify(store: Path_) -> None:
    """Read every shard and compare its checksum.

    Example: `llama3v-mlx store verify my-store`
    """
    opened = Store(store)
    opened.verify()
    show.out.print(f"{store}: {len(opened.names)} images in {opened.info()['shards']} shards, all whole.")
