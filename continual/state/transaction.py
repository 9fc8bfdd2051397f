"""A fold being written: a new generation beside the old one, which becomes the one in force by its commit or is
dropped."""

from __future__ import annotations

import math
import secrets
import threading
from collections.abc import Callable, Mapping
from types import MappingProxyType, TracebackType

from continual.errors import Retry
from continual.state import storing
from continual.state.attempts import SUFFIX, Handed, Written
from continual.state.draft import Draft
from continual.state.durable import environment
from continual.state.format import Format
from continual.state.generation import Generation
from continual.state.writing import Writing
from continual.stores import Where

MARGIN = 16 << 20
"""Bytes that a fold needs besides its generation: records, metadata, what the file system takes for itself."""


class Transaction(Writing):
    """Writes one generation, in `root`; `State.begin` makes it and `State.commit` ends it. A context manager: leaving
    it without a commit drops what was written.

    `before` is the generation that the fold starts from (None: zeros), `in_force` the id of the one that was in force
    when it began. Threads may share a transaction, as long as each tensor is one thread's.
    """

    def __init__(
        self,
        root: Where,
        form: Format,
        before: Generation | None,
        in_force: str | None,
        on_step: Callable[[str], None],
    ) -> None:
        self.id = secrets.token_hex(8)
        self.directory = root / self.id
        super().__init__(Draft(self.directory, form, before), form, before)
        self.in_force = in_force
        self._on_step = on_step
        self._squares: dict[str, float] = {}
        self._ranks: dict[str, int] = {}
        self._lock = threading.Lock()
        self._done = False
        self._written: Generation | None = None
        try:
            with environment("cannot begin a fold"):
                self._draft.begin()
        except BaseException:
            self.abandon()
            raise

    def __enter__(self) -> Transaction:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._done:
            self.abandon()

    def abandon(self) -> None:
        """Drops what was written."""
        self._done = True
        self._end_attempts()
        self._draft.end()
        storing.drop_tree(self.directory)

    def hand_out(self) -> Handed:
        """What other processes need to write parts of this. Raises Retry."""
        with environment("cannot begin a fold"):
            storing.open_directory(self._attempts)
        before = self._before
        return Handed(self._form, self._attempts, None if before is None else (before.directory, before.checksum))

    def take_over(self, written: Written) -> None:
        """Takes what another process wrote: it counts as written here. Raises Retry where its files are not there."""
        with environment("cannot take what another process wrote: is the state in a folder that all machines share?"):
            self._draft.take_over(self._attempts / written.attempt, written.arrays)

    @property
    def _attempts(self) -> Where:
        return self.directory.with_name(f"{self.id}{SUFFIX}")

    def _end_attempts(self) -> None:
        """Nothing more is taken from others, and who still writes finds no directory."""
        storing.drop_tree(storing.stem(self._attempts))

    def committed(self) -> None:
        """`State` says that a record names what was written: it is not dropped any more."""
        self._done = True
        self._draft.end()

    def measured(self, squares: Mapping[str, float], ranks: Mapping[str, int] = MappingProxyType({})) -> None:
        """What the next fold finds as `square` and `rank` of tensors, by name. What is not finite is not kept."""
        with self._lock:
            self._squares.update({name: square for name, square in squares.items() if math.isfinite(square)})
            self._ranks.update(ranks)

    def seal(self) -> Generation:
        """Ends writing without a commit: the generation can be what another transaction begins on, and no record will
        name it. It stays until `abandon`."""
        generation = self._receipted()
        self._end_attempts()
        self._done = True
        return generation

    def written(self) -> Generation:
        """What was written so far, to be read; nothing more may be written. A commit can follow, or `abandon`."""
        self._written = self._receipted()
        return self._written

    def sync(self) -> Generation:
        """Ends writing: what was written is a whole generation on disk, with its receipts, that no record names yet.

        Raises Retry if the disk got in the way, Halt if an fsync failed.
        """
        generation = self._receipted()
        self._end_attempts()
        with environment(f"cannot commit {self.directory}"):
            self._draft.sync(self._on_step)
        generation.synced = True
        return generation

    def _receipted(self) -> Generation:
        if self._written is not None:
            return self._written
        with environment(f"cannot write {self.directory}"):
            return self._draft.receipted(self._squares, self._ranks)


def room(directory: Where, nbytes: int, what: str = "a fold") -> None:
    """Raises Retry if the disk has no room for `nbytes`, which `what` needs beside what is there."""
    with environment("cannot look at the disk"):
        free = storing.free(directory)
    need = nbytes + MARGIN
    if free is not None and free < need:
        raise Retry(
            f"{directory}: {free / 1e9:.2f} GB free, {what} needs {need / 1e9:.2f} GB: free some space; "
            "nothing was settled"
        )
