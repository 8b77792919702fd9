"""Batches: what a row is survives being put beside other rows, and sizes repeat."""

from __future__ import annotations

import hashlib
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import mlx.core as mx
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mlx_llama3v.config import Encoded, ModelConfig, ProjectorConfig, SliceLayout, TilingConfig, VisionConfig
from mlx_llama3v.data.batches import LENGTHS, Batch, collate, order, padded
from mlx_llama3v.data.llava import read_records
from mlx_llama3v.data.records import Record
from mlx_llama3v.data.rows import Row, RowLayout, build_rows
from mlx_llama3v.embeddings.store import Store
from mlx_llama3v.embeddings.tools import merge
from mlx_llama3v.embeddings.writer import StoreWriter
from mlx_llama3v.errors import ContextError, DataError, StoreError
from mlx_llama3v.projector import pack
from mlx_llama3v.text.prompt import FIRST_VISUAL, Message, render
from mlx_llama3v.train.memory import rows_of_use
from mlx_llama3v.vision.image import image_size
from mlx_llama3v.vision.tiling import plan
from tests.kit import KIT, needs_kit
from tests.tiny_model import D_VISION, tiny_config, tiny_model, tiny_tokens

LAYOUTS = {
    "small": SliceLayout((2, 3)),
    "split": SliceLayout((3, 2), 2, 2, (2, 4)),
    "wide": SliceLayout((5, 7)),  # 12 or 35 tokens, padded to 12 or 40
    "square": SliceLayout((14, 14)),  # the tower's native grid
}
CONFIG = replace(tiny_config(), vision_config=VisionConfig(D_VISION, image_size=224, patch_size=16))
TOKENS = tiny_tokens()


@pytest.fixture(scope="module")
def store(tmp_path_factory: pytest.TempPathFactory) -> Store:
    path = tmp_path_factory.mktemp("store")
    with StoreWriter(path, {}) as writer:
        for seed, (name, layout) in enumerate(LAYOUTS.items()):
            values = np.random.default_rng(seed).standard_normal((layout.patches, D_VISION))
            writer.add(name, hashlib.sha256(name.encode()).hexdigest(), Encoded(layout, values.astype(np.float32)))
        writer.fail("bad", "it is broken")
    return Store(path)


def chat(name: str, *images: str, text: str = "What is it?", answer: str = "A cat.") -> Record:
    question = Message("user", text, tuple(range(len(images))))
    return Record(name, images, (question, Message("assistant", answer)))


TWO_TURNS = Record(
    "turns",
    ("small", "wide"),
    (
        Message("system", "Be brief."),
        Message("user", "First?", (1,)),
        Message("assistant", "Yes, the first one."),
        Message("user", "And this?", (0,)),
        Message("assistant", "No."),
    ),
)
RECORDS = (
    chat("a", "small"),
    chat("text"),
    chat("b", "split", "wide", answer="A dog and a bird."),
    TWO_TURNS,
)


def rows_of(store: Store, *records: Record, config: ModelConfig = CONFIG, stage: str = "sft") -> list[Row]:
    rows, problems = build_rows(records, RowLayout(store, TOKENS, config.projector_config, stage, 1000))
    assert not problems, problems
    return [*rows]


def array(values: mx.array | None) -> np.ndarray:
    assert values is not None
    return np.array(values)


def test_a_record_that_cannot_be_trained_on_is_a_problem(store: Store) -> None:
    records = [
        chat("good", "small"),
        chat("gone", "nowhere"),
        chat("bad", "small", "bad"),
        chat("mute", answer=" "),
        Record("asked", (), (Message("user", "What?"),)),
        chat("good2"),
    ]
    rows, problems = build_rows(records, RowLayout(store, TOKENS, CONFIG.projector_config, "sft", 1000))
    assert [row.id for row in rows] == ["good", "good2"]
    assert [problem.where for problem in problems] == [
        "record gone",
        "record bad",
        "record mute",
        "record asked",
    ]
    assert problems[0].reason == "its picture 'nowhere' is not in the store: not embedded"
    assert problems[1].reason == "its picture 'bad' is not in the store: it is broken"


def test_rows_over_the_limit_are_reported_not_cut(store: Store) -> None:
    lengths = {row.id: len(row) for row in rows_of(store, *RECORDS)}
    limit = lengths["a"]
    assert lengths["b"] > limit and lengths["turns"] > limit
    rows, problems = build_rows(RECORDS, RowLayout(store, TOKENS, CONFIG.projector_config, "sft", limit))
    assert {row.id: len(row) for row in rows} == {name: n for name, n in lengths.items() if n <= limit}
    assert str(problems[0]) == (f"record b: it has {lengths['b']} tokens, more than the longest allowed ({limit})")


def test_only_stage_pretrain_knows_bare_captions(store: Store) -> None:
    caption, asked = chat("c", "small", text=""), chat("q", "small")
    as_caption, as_question = rows_of(store, caption, asked, stage="pretrain")
    assert as_caption.rendered.ids[-1] == TOKENS.end_of_text
    assert as_question.rendered.ids[-1] == TOKENS.eot
    assert [row.rendered.ids[-1] for row in rows_of(store, caption, asked)] == [TOKENS.eot] * 2
    assert len(rows_of(store, caption)[0]) > len(as_caption)


def test_another_width_than_the_projector_takes_is_refused(store: Store) -> None:
    with pytest.raises(StoreError, match="width 12, the projector takes 1152"):
        build_rows(RECORDS, RowLayout(store, TOKENS, ProjectorConfig(), "sft", 1000))


def test_every_row_survives_collation(store: Store) -> None:
    rows = rows_of(store, *RECORDS)
    batch = collate(rows, store, CONFIG)
    ids, targets, supervised = array(batch.ids), array(batch.targets), array(batch.supervised)
    assert batch.lengths == tuple(map(len, rows)) and batch.row_ids == ("a", "text", "b", "turns")
    for i, row in enumerate(rows):
        n, rendered = len(row), row.rendered
        assert ids[i, :n].tolist() == rendered.ids.tolist() and not ids[i, n:].any()
        learned = np.flatnonzero(rendered.supervised)
        assert np.flatnonzero(supervised[i]).tolist() == (learned - 1).tolist()
        assert targets[i, supervised[i]].tolist() == rendered.ids[learned].tolist()
        said = [m.text for m in RECORDS[i].messages if m.role == "assistant"]
        assert TOKENS.decode(targets[i, supervised[i]]) == "".join(said)
        plain = rendered.source < FIRST_VISUAL
        source = array(batch.source)[i]
        assert source[:n][plain].tolist() == rendered.source[plain].tolist() and not source[n:].any()


def test_picks_are_the_supervised_positions(store: Store) -> None:
    batch = collate(rows_of(store, *RECORDS), store, CONFIG)
    picks, supervised = array(batch.picks), array(batch.supervised).reshape(-1)
    count = supervised.sum()
    assert picks[:count].tolist() == np.flatnonzero(supervised).tolist()
    assert len(picks) % 8 == 0 and not supervised[picks[count:]].any()


@pytest.mark.parametrize("kind", ["attention", "linear"])
def test_every_visual_token_finds_its_slice(store: Store, kind: str) -> None:
    """Follow source -> (slice, token) -> the stored patch, past all padding."""
    config = tiny_config(kind)
    rows = rows_of(store, *RECORDS, config=config)
    batch = collate(rows, store, config)
    source, grid, patches = array(batch.source), array(batch.grid), array(batch.patches)
    count, used = config.projector_config.num_tokens, set()
    for i, row in enumerate(rows):
        entries = source[i][source[i] >= FIRST_VISUAL] - FIRST_VISUAL
        owed = []  # the row's (grid, patches), in the order of its turns
        for message in next(r for r in RECORDS if r.id == row.id).messages:
            for index in message.images:
                layout, values = store.read(row.images[index])
                ends = np.cumsum([h * w for h, w in layout.grids])
                owed += zip(layout.grids, np.split(values, ends[:-1]), strict=True)
        assert len(entries) == sum(count(g) for g, _ in owed)
        for slice_grid, values in owed:
            mine, entries = entries[: count(slice_grid)], entries[count(slice_grid) :]
            (s,) = set(mine // batch.num_tokens)
            used.add(int(s))
            assert (mine % batch.num_tokens).tolist() == list(range(len(mine)))
            assert tuple(grid[s]) == slice_grid
            np.testing.assert_array_equal(patches[s, : len(values)], values.astype(np.float32))
            assert not patches[s, len(values) :].any()
    assert used == set(range(9)) and grid[9:].tolist() == [[1, 1]] * (len(grid) - 9)
    assert batch.num_tokens <= patches.shape[1]  # what linear and mlp cut their tokens from


@pytest.mark.parametrize("kind", ["attention", "linear", "mlp"])
def test_a_row_means_the_same_in_a_batch_and_alone(store: Store, kind: str) -> None:
    model = tiny_model(kind)
    rows = rows_of(store, *RECORDS, config=model.config)

    def logits(batch: Batch) -> np.ndarray:
        vectors = model.embed(batch.ids, batch.source, batch.patches, batch.grid, batch.num_tokens)
        return np.array(model(batch.ids, input_embeddings=vectors))

    together = logits(collate(rows, store, model.config))
    for i, row in enumerate(rows):
        packed = pack([[store.read(name) for name in row.images]], model.config.projector_config)
        source = row.rendered.source.copy()
        visual = source >= FIRST_VISUAL
        ids = mx.array(row.rendered.ids[None])
        if packed is None:
            vectors = model.embed(ids)
        else:
            source[visual] = FIRST_VISUAL + packed.tables[0][source[visual] - FIRST_VISUAL]
            visuals = mx.array(packed.patches), mx.array(packed.grid), packed.num_tokens
            vectors = model.embed(ids, mx.array(source[None]), *visuals)
        alone = np.array(model(ids, input_embeddings=vectors))[0]
        np.testing.assert_allclose(together[i, : len(row)], alone, rtol=2e-4, atol=2e-4 * np.abs(alone).max())
        other = together[(i + 1) % len(rows), : len(row)]
        assert np.abs(other - alone[: len(other)]).max() > 0.1 * np.abs(alone).max()  # the test can fail


def test_rows_without_pictures_make_a_batch_without_patches(store: Store) -> None:
    batch = collate(rows_of(store, chat("x"), chat("y")), store, CONFIG)
    assert batch.patches is None and batch.grid is None and batch.num_tokens == 0
    assert not array(batch.source).any()


def test_native_slices_are_not_padded(store: Store) -> None:
    batch = collate(rows_of(store, chat("a", "square"), chat("b", "square")), store, CONFIG)
    assert batch.patches is not None and batch.patches.shape == (2, 196, D_VISION)
    assert batch.num_tokens == 49


def test_padding_is_measured(store: Store) -> None:
    rows = rows_of(store, *RECORDS)
    batch = collate(rows, store, CONFIG)
    size = batch.ids.shape[0] * batch.ids.shape[1]
    assert batch.padding == pytest.approx(1 - sum(map(len, rows)) / size)
    assert 0 < batch.padding < 1


def test_sizes_are_few(store: Store) -> None:
    assert [padded(n) for n in (1, 5, 7, 8, 9, 13, 17, 33)] == [1, 5, 7, 8, 10, 14, 20, 40]
    assert {padded(n, 32, steps=8) % 32 for n in range(1, 3000)} == {0}
    assert len({padded(n, 32, steps=8) for n in range(1, 2049)}) <= 32
    assert (padded(100, most=100), padded(101, most=100), padded(90, most=100)) == (100, 112, 96)
    for n in range(1, 3000):
        assert n <= padded(n) <= n * 1.25 and n <= padded(n, 32, steps=8) <= max(n * 1.125, n + 31)


lengths_of = st.lists(st.integers(1, 900), max_size=300)


@settings(max_examples=60, deadline=None)
@given(lengths_of, st.integers(1, 9), st.integers(0, 2**32), st.integers(0, 5))
def test_every_row_once_an_epoch(lengths: list[int], batch_size: int, seed: int, epoch: int) -> None:
    batches = order(lengths, batch_size, seed, epoch)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    assert all(0 < len(batch) <= batch_size for batch in batches)
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert batches == order(lengths, batch_size, seed, epoch)


def test_the_order_follows_seed_and_epoch_and_buckets_by_length() -> None:
    lengths = np.random.default_rng(0).integers(20, 900, 2000).tolist()

    def waste(batches: list[list[int]]) -> float:
        area = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
        return 1 - sum(lengths) / area

    first, other_epoch, other_seed = order(lengths, 8, 1, 0), order(lengths, 8, 1, 1), order(lengths, 8, 2, 0)
    assert first != other_epoch != other_seed != first
    unsorted = [list(range(i, i + 8)) for i in range(0, 2000, 8)]
    assert waste(first) < 0.03 < 0.3 < waste(unsorted)
    middles = [float(np.median([lengths[i] for i in batch])) for batch in first]
    assert abs(np.corrcoef(middles, range(len(middles)))[0, 1]) < 0.2  # not from short to long
    assert {frozenset(batch) for batch in first} != {frozenset(batch) for batch in other_epoch}


@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_codes_become_embeddings(codec: str, tmp_path: Path) -> None:
    """Pictures of two shards, each with channels of its own, in one batch."""
    for part, scale in (("a", 1.0), ("b", 9.0)):
        with StoreWriter(tmp_path / part, {}, codec) as writer:
            for seed, (name, layout) in enumerate(LAYOUTS.items()):
                values = scale * np.random.default_rng(seed).standard_normal((layout.patches, D_VISION))
                sha = hashlib.sha256((part + name).encode()).hexdigest()
                writer.add(part + name, sha, Encoded(layout, values.astype(np.float32)))
    merge([tmp_path / "a", tmp_path / "b"], tmp_path / "both")
    both = Store(tmp_path / "both")
    names = [part + name for name in LAYOUTS for part in "ab"]
    batch = collate(rows_of(both, chat("all", *names)), both, CONFIG)
    patches, grid = array(batch.patches), array(batch.grid)
    number = 0
    for name in names:
        layout, stored = both.read(name)
        for wanted in np.split(stored, np.cumsum([h * w for h, w in layout.grids])[:-1]):
            assert len(wanted) == grid[number].prod()
            np.testing.assert_array_equal(patches[number, : len(wanted)], wanted)
            number += 1


@needs_kit
@pytest.mark.parametrize("compiled", [False, True])
def test_little_is_padded_on_the_kits_records(compiled: bool) -> None:
    """All its LLaVA records ten times over, as so400m/14-384 would split their pictures: 5% at most, in few shapes.

    In batches of 8 rows, the default, which `--batch-size 0` does not exceed here, and smaller ones.
    """
    vision, step = VisionConfig(1152, 4304, 27, 16, image_size=384, patch_size=14), 8 if compiled else 4
    lengths: list[int] = []
    for file in sorted((KIT / "llava").rglob("*.json*")):
        with suppress(DataError):
            for record in read_records(file).records:
                layouts = [kit_layout(file, name, vision) for name in record.images]
                with suppress(DataError, ContextError):
                    lengths.append(len(render(record.messages, layouts, tiny_tokens(), ProjectorConfig())))
    assert len(lengths) > 90 and max(lengths) > 4 * min(lengths)
    lengths = lengths * 10
    assert rows_of_use(cast(Any, [range(length) for length in lengths])) == 8
    for batch_size in (1, 2, 4, 8):
        batches = order(lengths, batch_size, 0, 0)
        sizes = [(len(b), padded(max(lengths[i] for i in b), step, steps=LENGTHS)) for b in batches]
        share = 1 - sum(lengths) / sum(rows * size for rows, size in sizes)
        assert share <= 0.05 and len({size for _, size in sizes}) <= 40, batch_size


def kit_layout(file: Path, name: str, vision: VisionConfig) -> SliceLayout:
    """How a record's picture would be split, where its file is there; else as an ordinary photo."""
    found = next((path for path in file.parent.rglob(Path(name).name) if path.is_file()), None)
    return plan(*(image_size(found, 10**9) if found else (640, 480)), vision, TilingConfig(max_slices=6)).layout
