"""Batches of a run: which rows they have, and that they are made ahead of the step that wants them."""

from __future__ import annotations

from copy import copy
from dataclasses import replace
from pathlib import Path
from threading import Semaphore, current_thread, main_thread
from typing import Any

import numpy as np
import pytest

from mlx_llama3v.data.batches import Batch
from mlx_llama3v.data.rows import RowLayout, build_rows
from mlx_llama3v.embeddings.codec import Parts
from mlx_llama3v.train.feed import Feed
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


def test_the_next_batch_is_read_and_decoded_while_a_step_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """No step goes on here before the pictures of the next one are embeddings, which none but the feed can make."""
    store = make_store(tmp_path / "store", "int4")
    decode, store.codec, decoded = store.codec.decode, copy(store.codec), Semaphore(0)

    def decoding(parts: Parts) -> np.ndarray:
        assert current_thread() is not main_thread()
        decoded.release()
        return decode(parts)

    gradients, waiting = Step.gradients, [8, 4, 4, 0]  # pictures: of two batches, then of one more each time

    def stepping(self: Step, batch: Batch) -> Any:
        assert batch.images == 4
        assert all(decoded.acquire(timeout=20) for _ in range(waiting.pop(0)))
        return gradients(self, batch)

    monkeypatch.setattr(store.codec, "decode", decoding)
    monkeypatch.setattr(Step, "gradients", stepping)
    run(settings(iters=4, lanes=1, save_every=0, val_split=0), store, tmp_path / "run")
    assert not waiting
