"""`llama3v-mlx store`: look after an embedding store."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from mlx_llama3v.cli import show
from mlx_llama3v.embeddings import tools
from mlx_llama3v.embeddings.damage import Losses
from mlx_llama3v.embeddings.store import MANIFEST, Store
from mlx_llama3v.errors import StoreError
from mlx_llama3v.storing import picture_names

app = typer.Typer(no_args_is_help=True, rich_markup_mode=None, help="Look after an embedding store.")


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
    for key in ("fidelity", "post"):
        values[key] = ", ".join(f"{name} {value}" for name, value in values[key].items()) or "-"
    plain = {key: value for key, value in values.items() if not isinstance(value, (dict, list))}
    show.table(str(store), ["", ""], [[key, str(sizes.get(key, value))] for key, value in plain.items()])


@app.command()
def verify(store: Path_) -> None:
    """Read every shard and compare its checksum. Damaged ones are named; the next `embed` makes them anew.

    Example: `llama3v-mlx store verify my-store`
    """
    with show.bar("verify", "shards") as bar:
        found = tools.verify(store, lambda done, total: bar.update(done, total, ""))
    for why in found.values():
        show.warn(why)
    if shards := len(found.keys() - {MANIFEST}):
        raise StoreError(f"{store}: {show.plural(shards, 'shard')} damaged or unreadable; all others are whole.")
    if found:
        raise StoreError(f"{store}: its manifest is not that of its shards, which are whole.")
    opened = Store(store)
    show.out.print(
        f"{store}: {show.plural(len(opened), 'image')} in {show.plural(len(opened.shards), 'shard')}, all whole."
    )


@app.command()
def prune(
    store: Path_,
    keep: Annotated[Path, typer.Option("--keep", help="Data file or folder whose pictures stay.", show_default=False)],
    force: Annotated[
        bool, typer.Option("--force", help="Go by the data even where it cannot be read in full.")
    ] = False,
) -> None:
    """Drop every picture that a data set does not use. Interrupt it at any time; the same command goes on.

    Refused while a part of the data cannot be read (a cut tar, a missing file, a record with a mistake).

    Example: `llama3v-mlx store prune my-store --keep captions.json`
    """
    names = picture_names(keep, partly=force)
    with show.bar("prune", "shards") as bar:
        dropped, freed = tools.prune(store, names, lambda done, total: bar.update(done, total, ""))
    show.out.print(f"{store}: {dropped:,} pictures dropped, {show.size(freed)} freed.")


@app.command()
def merge(
    stores: Annotated[list[Path], typer.Argument(metavar="STORE...", help="Stores to join.", show_default=False)],
    output: Annotated[Path, typer.Option("--output", help="Store to write, or to add to.", show_default=False)],
) -> None:
    """Join stores of one encoder and codec, each picture once. Interrupt it at any time; the same command goes on.

    Example: `llama3v-mlx store merge store-a store-b --output store`
    """
    losses = Losses(show.warn)
    with show.bar("merge", "shards") as bar:
        counts = tools.merge(stores, output, lambda done, total: bar.update(done, total, ""), losses=losses)
    if counts["conflicts"]:
        show.err.print(f"{counts['conflicts']:,} names stand for another picture in a later store; the first counts.")
    merged = Store(output)
    show.lost(output, losses.left(merged))
    info = merged.info()
    show.out.print(
        f"Store: {output} ({info['images']:,} images, {show.size(info['bytes'])}; {counts['images']:,} added, "
        f"{counts['duplicates']:,} were there)"
    )
