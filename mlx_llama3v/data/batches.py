"""From rows to batches: order, pack, collate.

Row lengths follow from the stored slice *shapes*; embeddings are read when a batch is put together. Sizes are
padded to few distinct values, so that a compiled training step is traced a few times and not once a batch.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import mlx.core as mx
import numpy as np

from mlx_llama3v.config import ModelConfig
from mlx_llama3v.data.rows import Row
from mlx_llama3v.embeddings.codec import CHANNEL, Codec, saturate
from mlx_llama3v.embeddings.store import Reader
from mlx_llama3v.projector import pad_slices, places
from mlx_llama3v.text.prompt import FIRST_VISUAL

LENGTHS = 32  # of a batch between powers of two: 3% of padding at most, and few shapes to compile


@dataclass(frozen=True)
class Batch:
    """Rows padded at the end to one shape. Position i predicts token i + 1, and all of this is so aligned.

    Packed, one of the B sequences holds several rows, one after the other, which `segments` tells apart.
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
    images: int  # pictures of all rows
    segments: mx.array | None = None  # int32 [B, L], where packed: 1, 2, ... the row of a position, 0 padding

    @cached_property
    def patches(self) -> mx.array | None:
        """float16 [S, P, D_v], which the device makes of the codes for the thread that asks first; None without
        pictures."""
        return saturate(self.codec.decode(self.stored, mx), mx) if self.stored else None

    @property
    def padding(self) -> float:
        """Share of the [B, L] positions that are padding."""
        return 1 - sum(self.lengths) / self.ids.size


def order(lengths: Sequence[int], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """The batches of one epoch, as indices of rows: `Order` where all lengths are known."""
    found = Order(len(lengths), batch_size, seed, epoch, lambda rows: [lengths[i] for i in rows])
    return [batch for window in range(found.windows) for batch in found.window(window)]


class Order:
    """The batches of one epoch, as indices of rows: a pure function of its arguments.

    Every row occurs once. Shuffled; then sorted by length within windows of batches, so that a batch pads little;
    then the batches of a window are shuffled. At most one batch, in the last window, has fewer than `batch_size` rows.
    Lengths are asked for a window at a time: a row need not be laid out long before it is read.
    """

    def __init__(
        self,
        rows: int,
        batch_size: int,
        seed: int,
        epoch: int,
        lengths: Callable[[Sequence[int]], Sequence[int]] | None = None,
    ) -> None:
        """`lengths`: of the rows with these indices; None leaves them unsorted."""
        self._seed, self._epoch, self._batch_size, self._lengths = seed, epoch, batch_size, lengths
        self._shuffled = np.random.default_rng([seed, epoch]).permutation(rows)
        # Wider pads less; narrower needs fewer rows before the first step.
        self.per_window = max(8, min(64, 4096 // batch_size))

    @property
    def windows(self) -> int:
        """How many there are."""
        return -(-len(self._shuffled) // (self._batch_size * self.per_window))

    def window(self, number: int) -> list[list[int]]:
        """The batches of one window, `per_window` of them but for the last."""
        size = self._batch_size * self.per_window
        rows = self._shuffled[number * size : (number + 1) * size].tolist()
        if self._lengths is not None:
            lengths = dict(zip(rows, self._lengths(rows), strict=True))
            rows.sort(key=lengths.__getitem__)
        batches = [rows[i : i + self._batch_size] for i in range(0, len(rows), self._batch_size)]
        random = np.random.default_rng([self._seed, self._epoch, number])
        return [batches[i] for i in random.permutation(len(batches))]


def bins(rows: Sequence[Row], most: int) -> list[list[Row]]:
    """Rows put together in few sequences of at most `most` tokens: each, longest first, where it still fits."""
    filled: list[tuple[int, list[Row]]] = []
    for row in sorted(rows, key=len, reverse=True):
        at = next((i for i, (used, _) in enumerate(filled) if used + len(row) <= most), None)
        if at is None:
            filled.append((len(row), [row]))
        else:
            filled[at] = (filled[at][0] + len(row), [*filled[at][1], row])
    return [together for _, together in filled]


def collate(rows: Sequence[Row], store: Reader, config: ModelConfig, pad_to: int = 8, *, packed: bool = False) -> Batch:
    """Put rows together, reading their embeddings; L becomes one of few multiples of `pad_to`.

    `packed`: sequences as long as the longest row take several rows. Computes with NumPy alone, so it may run in a
    thread beside the training step. Raises StoreError.
    """
    length = padded(max(map(len, rows)), pad_to, steps=LENGTHS)
    sequences = bins(rows, length) if packed else [[row] for row in rows]
    rows = [row for sequence in sequences for row in sequence]
    ids, source, segments = np.zeros((3, len(sequences), length), np.int32)
    supervised = np.zeros((len(sequences), length), np.bool_)
    parts, grid, num_tokens, tables = _slices(rows, store, config)
    waiting = iter(tables)
    for i, sequence in enumerate(sequences):
        start = 0
        for number, row in enumerate(sequence, 1):
            rendered, end, table = row.rendered, start + len(row), next(waiting)
            ids[i, start:end] = rendered.ids
            segments[i, start:end] = number
            visual = rendered.source >= FIRST_VISUAL
            source[i, start:end] = rendered.source
            source[i, start:end][visual] = FIRST_VISUAL + table[rendered.source[visual] - FIRST_VISUAL]
            supervised[i, start : end - 1] = rendered.supervised[1:]  # the last position of a row predicts nothing
            start = end
    targets = np.zeros_like(ids)
    targets[:, :-1] = ids[:, 1:]
    picks = np.flatnonzero(supervised)
    room = padded(len(picks), pad_to, steps=4)
    # The last position of all is never supervised.
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
        images=sum(len(row.images) for row in rows),
        segments=mx.array(segments) if packed else None,
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
