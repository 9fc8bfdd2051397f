"""The newest of a state's records of releases, of canaries, and of calls of hooks that went well, found without
reading any record twice: a daemon asks for them at each publication, and whoever was never told of one would be looked
for in all."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import TypeVar

from continual.state.entries import CanaryEntry, HookEntry, ReleaseEntry
from continual.state.format import Commit

K = TypeVar("K")
V = TypeVar("V")


class Publications:
    """Of the records in `log`, which may grow. What is asked for is looked for from the newest record on, as far back
    as is needed; the next question goes on from there. From any thread."""

    def __init__(self, log: Sequence[Commit]) -> None:
        self._log = log
        self._looked = range(len(log), len(log))  # the records that were looked at
        self._releases: dict[tuple[str, str], ReleaseEntry] = {}
        self._calls: dict[tuple[str | None, int, str], HookEntry] = {}
        self._verdicts: dict[str | None, CanaryEntry] = {}
        self._lock = threading.Lock()

    def release(self, repo: str, branch: str) -> ReleaseEntry | None:
        """The newest record of a release to this branch; None if there is none. Raises Damaged and Retry where a record
        cannot be read."""
        return self._found(self._releases, (repo, branch))

    def call(self, view: str | None, number: int, target: str) -> HookEntry | None:
        """The record of the last call that went well of a hook, by its number among the settings and what it calls,
        after a publication of a view, or (None) of the merge. Raises as `release`."""
        return self._found(self._calls, (view, number, target))

    def verdict(self, view: str | None) -> CanaryEntry | None:
        """The newest record of what became of a canary of a view, or (None) of the merge. Raises as `release`."""
        return self._found(self._verdicts, view)

    def _found(self, table: dict[K, V], key: K) -> V | None:
        with self._lock:
            for seq in range(self._looked.stop, len(self._log)):
                self._note(seq, newer=True)
                self._looked = range(self._looked.start, seq + 1)
            while key not in table and self._looked.start > 0:
                seq = self._looked.start - 1
                self._note(seq, newer=False)
                self._looked = range(seq, self._looked.stop)
            return table.get(key)

    def _note(self, seq: int, *, newer: bool) -> None:
        """Takes a record into its table, unless that has a newer one."""
        commit = self._log[seq]
        entry = commit.entry if commit.kind == "publish" else None
        if isinstance(entry, ReleaseEntry):
            where = entry.repo, entry.branch
            if newer or where not in self._releases:
                self._releases[where] = entry
        elif isinstance(entry, HookEntry) and entry.hook.ok:
            whom = entry.view, entry.hook.number, entry.hook.target
            if newer or whom not in self._calls:
                self._calls[whom] = entry
        elif isinstance(entry, CanaryEntry) and (newer or entry.view not in self._verdicts):
            self._verdicts[entry.view] = entry
