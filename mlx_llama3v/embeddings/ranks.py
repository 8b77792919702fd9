"""Several processes or machines fill one store (`mlx.launch -n 2 -- llama3v-mlx embed ...`).

Each rank embeds its part of the names into a store of its own, `rank-K-of-N` inside the common one, so that nobody
waits for a lock; at the end rank 0 moves what is there into the common store. Where the machines share no folder, the
parts stay where they were made: copy them together and join them with `store merge`. One process is rank 0 of 1 and
writes to the common store itself.
"""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import mlx.core as mx

from mlx_llama3v.embeddings.codec import Fit
from mlx_llama3v.embeddings.damage import Losses, mend_manifest, set_damaged_aside, set_part_aside
from mlx_llama3v.embeddings.lock import Lock
from mlx_llama3v.embeddings.sample import check_names
from mlx_llama3v.embeddings.store import MANIFEST, Manifest, Store, plain, shard_files
from mlx_llama3v.embeddings.tools import merge
from mlx_llama3v.errors import ManifestError, StoreError
from mlx_llama3v.source import Source


class Ranks:
    """The processes that fill the store `output`.

    Attributes:
        target: the store that this process writes to.
        common: the common store as it was when the work was shared, where `target` is a part of it.
    """

    def __init__(self, output: Path, losses: Losses | None = None) -> None:
        """`losses` takes what is lost to damaged shards."""
        group = mx.distributed.init()
        self.rank, self.size, self._output = group.rank(), group.size(), output
        self._losses = losses or Losses()
        self.common: Store | None = None
        self.target = output if self.size == 1 else output / f"rank-{self.rank}-of-{self.size}"

    def share(self, images: Mapping[str, Source], **wanted: Any) -> dict[str, Source]:
        """This process's part of the pictures: of those that the common store holds, then, in order, of the others.

        `wanted`: settings that the common store must have (Manifest.check), by which a damaged manifest is mended; all
        ranks read the same file and stop alike. Raises StoreError: it has others, or other pictures under these names,
        or as `collect`.
        """
        if wanted and self.rank == 0:
            mend_manifest(self._output, Manifest(**plain(wanted)), self._losses)
        self._wait()
        self._check(wanted)
        if self.size > 1 and self.target.exists():
            Lock(self.target).release()  # what a killed process of this host left there, rank 0's host must believe
        self.collect()  # parts of a run that was killed
        self._check(wanted)  # where there was no common store before
        if self.size == 1:
            return dict(images)
        there, left = list[str](), [*images]
        if (self._output / MANIFEST).exists():
            self.common = have = Store(self._output)
            there, left = [name for name in images if name in have], [name for name in images if name not in have]
            check_names(self._output, [(name, images[name]) for name in there], have.sha_of)
        self._wait()  # nobody writes before all have read
        return {name: images[name] for names in (there, left) for name in names[self.rank :: self.size]}

    def _check(self, wanted: Mapping[str, Any]) -> None:
        if (self._output / MANIFEST).exists():
            Manifest.read(self._output).check(self._output, **wanted)

    def fit(self) -> Fit | None:
        """Of the common store, if it has one: what is added to it is coded in the same way. Raises StoreError."""
        return Store(self._output).fit if (self._output / MANIFEST).exists() else None

    def collect(self) -> None:
        """Move every part into the common store, once all ranks are here. What is damaged is set aside in the latter, a
        part without a good manifest or of other settings as a whole.

        Raises StoreError: a part that a process is still writing to, or the disk refuses.
        """
        self._wait()
        if self.rank == 0:
            if self.size > 1 and (self._output / MANIFEST).exists():  # else a writer is opened on it next
                self._set_aside(self._output)
            for part in sorted(self._output.glob("rank-*-of-*")):
                if shard_files(part) or (part / MANIFEST).exists():
                    try:
                        self._set_aside(part)
                        self._compare(part)
                    except ManifestError as error:
                        set_part_aside(part, error, self._losses)
                        continue
                    merge([part], self._output, move=True, losses=self._losses)
                shutil.rmtree(part, ignore_errors=True)
        self._wait()

    def _set_aside(self, store: Path) -> None:
        """Damaged shards, lest every run ends at them."""
        lock = Lock(store)
        try:
            set_damaged_aside(store, Manifest.read(store), self._losses, self._output)
        finally:
            lock.release()

    def _compare(self, part: Path) -> None:
        """Raises ManifestError: a part that can never be merged, by which a right run must not be stopped."""
        if (self._output / MANIFEST).exists():
            ours, theirs = Manifest.read(self._output), Manifest.read(part)
            wanted = {"fingerprint": ours.fingerprint, "codec": ours.codec, "post": ours.post}
            if what := theirs.differences(wanted):
                raise ManifestError(f"{part} was made with other settings than {self._output}: {what}.")

    def _wait(self) -> None:
        """Until all ranks are here. Raises StoreError where one has ended."""
        if self.size > 1:
            try:
                mx.eval(mx.distributed.all_sum(mx.array(1.0), stream=mx.cpu))
            except RuntimeError as error:
                raise StoreError("another process of this run has ended; look at its message.") from error
