"""What is known of one candidate of the pool, and why it is or is not in the merged model: read from the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.state import State
from continual.state.entries import SelectEntry
from continual.state.fields import body_of
from continual.state.parts import MemberFate


class RoundVerdict(NamedTuple):
    """What a round said of a candidate: `record`, `time` and `objective` of the round, how many `members` it had, how
    many of these scored `better` (None where the candidate has no score), and the candidate's `row`."""

    record: int
    time: str
    objective: str
    members: int
    better: int | None
    row: MemberFate

    def body(self) -> dict[str, object]:
        """For machines: the row, and the rest beside it."""
        more = {"record": self.record, "time": self.time, "objective": self.objective, "members": self.members}
        return body_of(self.row) | more | {"better": self.better}


class Why(NamedTuple):
    """What is known of a candidate: its `fate` now, with the reason and a message; `since`, when it was first seen; and
    what each round said of it (`rounds`), oldest first."""

    key: str
    name: str
    origin: str
    fate: str
    reason: str
    message: str
    since: str
    rounds: Sequence[RoundVerdict]

    def body(self) -> dict[str, object]:
        """For machines."""
        return {**self._asdict(), "rounds": [verdict.body() for verdict in self.rounds]}


def explain(state: State, word: str) -> Why:
    """Tells of the candidate that `word` names: a name, a path or a key, the newest that there is. Raises Misconfigured
    where the ledger knows none."""
    commits = (*state.ledger.log, *state.ledger.folds())
    seen = [(c, c.entry.candidate) for c in commits if c.entry.candidate and c.entry.candidate.answers(word)]
    if not seen:
        raise Misconfigured(
            f"{word}: no candidate of this name, path or key was ever seen; see 'continual pool' and 'continual log'"
        )
    commit, newest = seen[-1]
    key = newest.key
    since = next(
        c.time for c in state.ledger.log if c.seq == commit.seq or (c.entry.candidate and c.entry.candidate.key == key)
    )
    fate, reason, message = _fate(state, key, newest.name)
    return Why(key, newest.name, newest.origin, fate, reason, message, since, list(_rounds(state, key)))


def _rounds(state: State, key: str) -> Iterator[RoundVerdict]:
    """What each round said of the candidate."""
    for commit in (c for c in state.ledger.log if c.kind == "select"):
        entry = commit.entry
        if not isinstance(entry, SelectEntry):
            continue
        for row in entry.scores:
            if row.key == key:
                better = _better(entry.scores, row.score)
                yield RoundVerdict(commit.seq, commit.time, entry.objective, len(entry.scores), better, row)


def _better(rows: Sequence[MemberFate], score: float | None) -> int | None:
    """How many of a round's members scored better; a lower score is better."""
    return None if score is None else sum(row.score < score for row in rows if row.score is not None)


def _fate(state: State, key: str, name: str) -> tuple[str, str, str]:
    """The fate of a candidate now, the reason, and a message."""
    waiting = state.ledger.pool.get(key)
    if waiting is not None and waiting.last:
        return "deferred", waiting.last.reason, waiting.last.message
    if waiting is not None:
        return "deferred", "waiting", waiting.commit.entry.message or "waits for its first round"
    settled = state.ledger.fate(key)
    if settled is None:
        return "open", "retry", f"{name}: is looked at again when it is seen next"
    entry = settled.entry
    return entry.fate or "", entry.reason or "", entry.message or f"{name}: {entry.fate} as record {settled.seq}"
