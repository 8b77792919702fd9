"""From records to batches: lay out, order, collate.

Row lengths follow from the stored slice *shapes*; embeddings are read when a batch is put together. Sizes are
padded to few distinct values, so that a compiled training step is traced a few times and not once a batch.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import ModelConfig, ProjectorConfig, SliceLayout
from mlx_llama3v.data.records import Problem, Record
from mlx_llama3v.embeddings.codec import CHANNEL, Codec
from mlx_llama3v.embeddings.store import Reader
from mlx_llama3v.errors import ContextError, DataError, StoreError
from mlx_llama3v.projector import pad_slices, places
from mlx_llama3v.text.prompt import FIRST_VISUAL, Rendered, render
from mlx_llama3v.text.tokens import Tokens

_WINDOW = 64  # batches that are sorted by length together; larger pads less and shuffles less


@dataclass(frozen=True)
class Row:
    """One training row: laid out, its pictures still in the store."""

    id: str
    rendered: Rendered
    images: tuple[str, ...]
    layouts: tuple[SliceLayout, ...]

    def __len__(self) -> int:
        return len(self.rendered)


@dataclass(frozen=True)
class Batch:
    """Rows padded at the end to one shape. Position i predicts token i + 1, and all of this is so aligned.

    A padded position or slice is harmless, not masked: the decoder is causal, so nothing real sees a padded
    position; no `source` points to a padded slice (grid 1 x 1).
    """

    ids: mx.array  # int32 [B, L]
    source: mx.array  # int32 [B, L]: 0 text, 1..8 marker, 9 + n entry n of the projected [S * num_tokens]
    targets: mx.array  # int32 [B, L]: the id that position i predicts
    supervised: mx.array  # bool [B, L]: whether that id is to be learned
    picks: mx.array  # int32 [N]: flat indices b * L + i of all supervised positions, padded with unsupervised ones
    stored: dict[str, mx.array]  # the codec's parts of all slices [S, P, ...]; empty where no row has a picture
    codec: Codec
    grid: mx.array | None  # int32 [S, 2]
    num_tokens: int  # visual tokens a slice has room for
    lengths: tuple[int, ...]  # of the rows before padding
    row_ids: tuple[str, ...]

    @property
    def patches(self) -> mx.array | None:
        """[S, P, D_v], made from the codes on the device (lazily, by the thread that asks); None without pictures."""
        return self.codec.decode(self.stored, mx) if self.stored else None

    @property
    def padding(self) -> float:
        """Share of the [B, L] positions that are padding."""
        return 1 - sum(self.lengths) / self.ids.size


def build_rows(
    records: Iterable[Record],
    store: Reader,
    tokens: Tokens,
    projector: ProjectorConfig,
    max_length: int,
    stage: str,
) -> tuple[list[Row], list[Problem]]:
    """Lay out every record that can be trained on; the others become Problems.

    In stage "pretrain" a record in which nothing is asked takes the bare caption form; every other record,
    and every record of another stage, is a conversation. A row over `max_length` tokens is left out, never
    cut: a cut could fall into a picture, and would teach answers without their end.
    Raises StoreError when the store's embeddings do not fit the projector.
    """
    if store.width not in (0, projector.in_dim):
        raise StoreError(
            f"{store.path} holds embeddings of width {store.width}, the projector takes {projector.in_dim}."
        )
    rows, problems = [], []
    for record in records:
        try:
            row = _build_row(record, store, tokens, projector, caption=stage == "pretrain" and record.caption)
            if len(row) > max_length:
                raise ContextError(f"it has {len(row)} tokens, more than the longest allowed ({max_length})")
        except (DataError, ContextError) as error:
            problems.append(Problem(f"record {record.id}", str(error).rstrip(".")))
        else:
            rows.append(row)
    return rows, problems


def _build_row(record: Record, store: Reader, tokens: Tokens, projector: ProjectorConfig, *, caption: bool) -> Row:
    for name in record.images:
        if name not in store:
            raise DataError(f"its picture {name!r} is not in the store: {store.failures.get(name, 'not embedded')}")
    layouts = tuple(store.layout(name) for name in record.images)
    rendered = render(record.messages, layouts, tokens, projector, caption=caption)
    return Row(record.id, rendered, record.images, layouts)


def order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as indices of rows: a pure function of its arguments.

    Every row occurs once. Shuffled, then sorted by length within windows of batches, so that a batch pads
    little; then the batches are shuffled. At most one batch has fewer than `batch_size` rows.
    """
    random = np.random.default_rng([seed, epoch])
    shuffled = random.permutation(len(lengths))
    batches = []
    for start in range(0, len(shuffled), batch_size * _WINDOW):
        window = sorted(shuffled[start : start + batch_size * _WINDOW].tolist(), key=lengths.__getitem__)
        batches += [window[i : i + batch_size] for i in range(0, len(window), batch_size)]
    return [batches[i] for i in random.permutation(len(batches))]


def collate(rows: Sequence[Row], store: Reader, config: ModelConfig, pad_to: int = 32) -> Batch:
    """Put rows together, reading their embeddings; L becomes one of few multiples of `pad_to`.

    Computes with NumPy alone, so it may run in a thread beside the training step. Raises StoreError.
    """
    length = padded(max(map(len, rows)), pad_to, steps=8)
    ids, source = np.zeros((2, len(rows), length), np.int32)
    supervised = np.zeros((len(rows), length), np.bool_)
    parts, grid, num_tokens, tables = _slices(rows, store, config)
    for i, row in enumerate(rows):
        rendered, n = row.rendered, len(row)
        ids[i, :n] = rendered.ids
        source[i, :n] = rendered.source
        visual = np.flatnonzero(rendered.source >= FIRST_VISUAL)
        source[i, visual] = FIRST_VISUAL + tables[i][rendered.source[visual] - FIRST_VISUAL]
        supervised[i, : n - 1] = rendered.supervised[1:]
    targets = np.zeros_like(ids)
    targets[:, :-1] = ids[:, 1:]
    picks = np.flatnonzero(supervised)
    room = padded(len(picks), pad_to, steps=4)
    # The last position of a row predicts nothing, so the last of all is never supervised.
    picks = np.pad(picks, (0, room - len(picks)), constant_values=supervised.size - 1)
    return Batch(
        ids=mx.array(ids),
        source=mx.array(source),
        targets=mx.array(targets),
        supervised=mx.array(supervised),
        picks=mx.array(picks.astype(np.int32)),
        stored={name: mx.array(part) for name, part in parts.items()},
        codec=store.codec,
        grid=None if grid is None else mx.array(grid),
        num_tokens=num_tokens,
        lengths=tuple(map(len, rows)),
        row_ids=tuple(row.id for row in rows),
    )


def _slices(
    rows: Sequence[Row], store: Reader, config: ModelConfig
) -> tuple[dict[str, np.ndarray], np.ndarray | None, int, list[np.ndarray]]:
    """The padded codes and grids of a batch, the room a slice has for its tokens, and one table a row that takes the
    row's k-th visual token to its entry of the projected [S * num_tokens]."""
    coded = store.read_batch([name for row in rows for name in row.images])
    if not coded:
        return {}, None, 0, [np.zeros(0, np.int32)] * len(rows)
    found = places([row.layouts for row in rows], config.projector_config)
    native = config.vision_config.grid  # whole slices of this shape are what most stores consist of: never pad them
    S = padded(len(found.grid))
    P = padded(int(found.grid.prod(1).max()), most=native**2)
    num_tokens = padded(found.num_tokens, most=config.projector_config.num_tokens((native, native)))
    layouts = [picture.layout for picture in coded]
    parts = {}
    for name in coded[0].parts:
        values = [picture.parts[name] for picture in coded]
        if name.startswith(CHANNEL):  # one row a shard: slices of a batch may come from several
            each = [value for value, layout in zip(values, layouts, strict=True) for _ in layout.grids]
            parts[name] = np.stack([*each, *each[-1:] * (S - len(each))])
        else:
            parts[name] = pad_slices(values, layouts, S, P)
    grid = np.pad(found.grid, ((0, S - len(found.grid)), (0, 0)), constant_values=1)
    tables = [table // found.num_tokens * num_tokens + table % found.num_tokens for table in found.tables]
    return parts, grid, num_tokens, tables


def padded(size: int, step: int = 1, steps: int = 4, most: int | None = None) -> int:
    """`size` rounded up to one of few values: multiples of `step`, at most `steps` between powers of two.

    So it grows by at most 1 / steps (beyond `step`). A size up to `most` does not pass `most`.
    """
    coarse = max(1, (1 << max(0, size.bit_length() - 1)) // steps)
    unit = -(-coarse // step) * step
    rounded = max(unit, -(-size // unit) * unit)
    return min(rounded, most) if most is not None and size <= most else rounded
