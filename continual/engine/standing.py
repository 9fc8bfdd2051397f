"""Which refusals still stand: one that a setting can lift does so only while that setting has the value by which it was
made, and until somebody asks for another look.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping

from continual import gates
from continual.config import Settings
from continual.errors import Misconfigured
from continual.gates import Gates
from continual.records import Candidate
from continual.state import Commit, State
from continual.state.entries import RefuseEntry, RetryEntry
from continual.state.ledger import Ledger, kept_out

_DROPPED = "dropped"
"""The reason of a refusal with which a person took a candidate off the list of what is kept out."""
Values = Mapping[str, object]
"""The value of each setting of the gates, by its whole name (`Gates.values`)."""


def stands(commit: Commit, now: Values) -> bool:
    """Whether what settled a candidate settles it still. A record of an earlier version does not say by which settings
    a refusal went: it stands until somebody asks for another look (`continual retry`)."""
    entry = commit.entry
    return not isinstance(entry, RefuseEntry) or all(
        name in now and now[name] == value for name, value in (entry.settings or {}).items()
    )


def settled(ledger: Ledger, key: str, now: Values) -> Commit | None:
    """The record that settled the candidate `key`, where it stands; None where it is to be looked at."""
    known = ledger.fate(key)
    return known if known is not None and stands(known, now) else None


class Standing:
    """What is settled in a state, by the settings that are in force when it is asked. From any thread."""

    def __init__(self, state: State, settings: Callable[[], Settings]) -> None:
        self._state = state
        self._settings = settings
        self._made: tuple[Settings, Gates] | None = None

    @property
    def gates(self) -> Gates:
        """The gates that the settings name now. Raises Misconfigured."""
        settings = self._settings()
        made = self._made
        if made is None or made[0] is not settings:
            made = self._made = settings, gates.make(settings)
        return made[1]

    def is_settled(self, key: str) -> bool:
        """Whether the candidate `key` need not be looked at: it waits in the pool, or its fate is settled and that
        stands."""
        ledger = self._state.ledger
        return ledger.is_settled(key) and ((known := ledger.fate(key)) is None or stands(known, self.gates.values))

    def reopened(self) -> list[Candidate]:
        """The candidates that were refused by settings which have other values now, oldest first. Of those from one
        place only the newest counts: what came before it has been replaced. Those that were given by hand are left to
        whoever gave them."""
        ledger, now = self._state.ledger, self.gates.values
        stale = [refusal for refusal in ledger.refusals if not stands(refusal, now)]
        if not stale:
            return []
        newest = {commit.origin: commit.key for commit in ledger.log if commit.key is not None}
        found: dict[str, Candidate] = {}
        for refusal in stale:
            candidate = refusal.entry.candidate
            if candidate is None or candidate.source == "hand" or newest.get(candidate.origin) != candidate.key:
                continue
            if ledger.fate(candidate.key) is refusal:
                found[candidate.key] = candidate
        return list(found.values())

    def quarantine(self) -> list[Commit]:
        """The refusals in force, oldest first: of each candidate that is kept out, the record that says why. Of those
        from one place only the newest counts, and none whose place has a model in the merge."""
        ledger = self._state.ledger
        newest = {commit.origin: commit.key for commit in ledger.log if commit.key is not None}
        return [
            refusal
            for refusal in ledger.refusals
            if newest.get(refusal.origin) == refusal.key
            and ledger.fate(str(refusal.key)) is refusal
            and refusal.entry.reason != _DROPPED
        ]

    def drops(self, word: str, because: str | None = None, by: str | None = None) -> list[RefuseEntry]:
        """What is to be recorded so that the candidates that `word` names are on the list no more. They stay out,
        whatever the settings say, until a `retry`. Raises Misconfigured if it names none that is on it."""
        listed = {commit.key for commit in self.quarantine()}
        found = [
            (commit, commit.entry.candidate)
            for commit in kept_out(self._state.ledger, word)
            if commit.key in listed and commit.entry.candidate is not None
        ]
        if not found:
            raise Misconfigured(
                f"{word}: nothing of this name, path, key or record number is kept out; see 'continual quarantine'"
            )
        why = f": {because}" if because else ""
        return [
            RefuseEntry(
                candidate=candidate,
                reason=_DROPPED,
                message=f"dropped after record {commit.seq} ({commit.entry.reason}) by {by or 'nobody named'}{why}",
            )
            for commit, candidate in found
        ]

    def retries(self, word: str, because: str | None = None, by: str | None = None) -> list[RetryEntry]:
        """What is to be recorded so that the candidates that `word` names are looked at again; with `because`, so that
        they are folded in spite of doubts, as `by` says. Raises Misconfigured if it names none that is settled and not
        in the merge."""
        found = kept_out(self._state.ledger, word)
        if not found:
            raise Misconfigured(
                f"{word}: no refused or rolled-back candidate of this name, path, key or record number; "
                "see 'continual log'"
            )
        said = f", accepted by {by or 'nobody named'}: {because}" if because else ""
        return [
            RetryEntry(
                candidate=commit.entry.candidate,
                message=f"after record {commit.seq}{said}",
                because=because,
                by=by if because else None,
            )
            for commit in found
            if commit.entry.candidate is not None
        ]
