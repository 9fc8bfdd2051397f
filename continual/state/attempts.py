"""What other processes write into a transaction. Each try to do a piece of work has a directory of its own, beside the
generation; the process that has the transaction takes from it what it was told of, by renaming.

So whatever another try at the same work still writes, on a machine that was believed to be dead, it writes to files
that nobody takes; once the transaction has ended it finds no directory to write in. What a killed transaction left is
an orphan like any other.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass
from typing import NamedTuple

from continual.errors import Misconfigured, Retry
from continual.state.draft import ArrayWritten, Draft
from continual.state.durable import environment
from continual.state.format import Format
from continual.state.generation import Generation
from continual.state.layout import Location
from continual.state.writing import Writing
from continual.stores import Where

SUFFIX = ".attempts"
"""What the directory of the attempts at a generation has behind the generation's name."""


class Written(NamedTuple):
    """What an attempt, whose directory has the name `attempt`, wrote of some tensors."""

    attempt: str
    arrays: Mapping[Location, ArrayWritten]


@dataclass(frozen=True)
class Handed:
    """What another process needs to write into a transaction, as plain data. `directory`: where attempts have theirs;
    `before`: the generation that the transaction begins on, by its directory and the CRC of its receipts."""

    form: Format
    directory: Where
    before: tuple[Where, str] | None

    def __reduce__(self) -> tuple[object, ...]:
        """For another process, whose working directory is another."""
        before = None if self.before is None else (self.before[0].absolute(), self.before[1])
        return Handed, (self.form, self.directory.absolute(), before)

    def generation(self) -> Generation | None:
        """The generation before, as this process sees it. Raises Retry where it is not there, Damaged."""
        if self.before is None:
            return None
        found = Generation(self.before[0], self.form, self.before[1])
        try:
            found.load()
        except Misconfigured:
            raise _not_there(self.before[0]) from None
        return found


class Attempt(Writing):
    """Writes tensors for a transaction of another process; `before` is what `handed.generation` gave. Raises Retry
    where the transaction has ended, or where its directory is not seen from here."""

    def __init__(self, handed: Handed, before: Generation | None) -> None:
        self.name = secrets.token_hex(8)
        super().__init__(Draft(handed.directory / self.name, handed.form, before), handed.form, before)
        with environment(f"cannot write in {handed.directory}"):
            if not handed.directory.is_dir():
                raise _not_there(handed.directory)
            self._draft.begin_apart()

    def taken(self) -> Written:
        """What was written since this was last asked."""
        return Written(self.name, self._draft.taken())

    def sync(self) -> None:
        """fsync of all that was written. Raises Retry, and Halt if an fsync failed."""
        with environment(f"cannot write in {self._draft.directory}"):
            self._draft.sync_apart()


def _not_there(directory: Where) -> Retry:
    return Retry(
        f"{directory} is not there on this machine: the fold has ended, or the state is not in a folder that all "
        "machines share; nothing was settled"
    )
