"""Batches of a run: which rows they have, and that they are made ahead of the step that wants them."""

from __future__ import annotations

from collections.abc import Callable
from copy import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from mlx_llama3v.data.rows import RowLayout, build_rows
from mlx_llama3v.train.feed import Feed
from mlx_llama3v.train.report import Window
from mlx_llama3v.train.step import Step
from tests.tiny_model import tiny_model, tiny_tokens
from tests.tiny_run import captions, make_store, run, settings


def test_batches_are_a_function_of_their_number(tmp_path: Path) -> None:
    store = make_store(tmp_path / "store")
    model = tiny_model()
    layout = RowLayout(store, tiny_tokens(), model.config.projector_config, "pretrain", 100)
    rows, _ = build_rows(captions(20), layout)
    config = settings(iters=0, epochs=2, batch_size=5, lanes=2)

    def batches(first: int) -> list[list[tuple[str, ...]]]:
        feed = Feed(rows, store, model.config, config)
        return [[part.row_ids for part in parts] for parts in feed.batches(first)]

    found = batches(0)
    assert [[len(ids) for ids in parts] for parts in found] == [[3, 2]] * 8
    epochs = [[name for parts in half for ids in parts for name in ids] for half in (found[:4], found[4:])]
    assert sorted(epochs[0]) == sorted(epochs[1]) == sorted(row.id for row in rows)
    assert epochs[0] != epochs[1]
    assert batches(3) == found[3:]
    seeds = [
        Feed(rows, store, model.config, replace(config, seed=seed), rank, 2).seed(batch)
        for seed in (0, 1)
        for rank in (0, 1)
        for batch in (0, 1)
    ]
    assert len({*seeds}) == 8 and Feed(rows, store, model.config, config, 0, 2).seed(0) == seeds[0]


@pytest.mark.parametrize("lanes", [1, 2])
def test_the_next_batch_is_read_and_decoded_while_a_step_runs(
    lanes: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its codes go to the device, and become embeddings there, before the results of the step at work are asked for."""
    store, seen = make_store(tmp_path / "store", "int4"), list[str]()
    store.codec = copy(store.codec)

    def told(owner: Any, name: str, word: str, before: Callable[[Any], None] = lambda _: None) -> None:
        function = getattr(owner, name)

        def telling(*given: Any) -> Any:
            before(given[0])
            seen.append(word)
            return function(*given)

        monkeypatch.setattr(owner, name, telling)

    def read(feed: Feed) -> None:
        """Reading is not what is slow."""
        if feed._waiting:
            feed._waiting[0].result(timeout=20)

    told(store.codec, "decode", "decode")
    told(Feed, "decode_next", "next", read)
    told(Step, "gradients", "step")
    told(Window, "see", "result")
    run(settings(iters=4, lanes=lanes, save_every=0, val_split=0), store, tmp_path / "run")
    first, begun, ended = ["decode"] * lanes, ["step"] * lanes + ["next"], ["result"] * lanes
    assert seen == [*first, *[*begun, *first, *ended] * 3, *begun, *ended]
