"""What is known of one candidate of the pool, and why it is or is not in the merged model: read from the ledger."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple

from continual.errors import Misconfigured
from continual.state import Commit, State


class Why(NamedTuple):
    """What is known of a candidate: its `fate` now, with the reason and a message; `since`, when it was first seen; and
    what each round said of it (`rounds`), oldest first.

    What a round said is the row of its record (`fates.MemberFate.body`), and `record`, `time` and `objective` of the
    round, how many `members` it had, and how many of these scored `better`.
    """

    key: str
    name: str
    origin: str
    fate: str
    reason: str
    message: str
    since: str
    rounds: Sequence[Mapping[str, object]]


def explain(state: State, word: str) -> Why:
    """Tells of the candidate that `word` names: a name, a path or a key, the newest that there is. Raises Misconfigured
    where the ledger knows none."""
    words = (word, str(Path(word).absolute()))
    seen = [commit for commit in (*state.ledger.log, *state.ledger.folds()) if _names(words, commit)]
    if not seen:
        raise Misconfigured(
            f"{word}: no candidate of this name, path or key was ever seen; see 'continual pool' and 'continual log'"
        )
    newest = seen[-1].entry.candidate or {}
    key = newest["key"]
    since = next(
        c.time for c in state.ledger.log if (c.entry.candidate or {}).get("key") == key or c.seq == seen[-1].seq
    )
    fate, reason, message = _fate(state, key, newest["name"])
    return Why(key, newest["name"], newest["origin"], fate, reason, message, since, list(_rounds(state, key)))


def _names(words: tuple[str, str], commit: Commit) -> bool:
    """Whether the words, a name or key and a path, name the candidate of a record."""
    candidate = commit.entry.candidate
    return candidate is not None and (words[0] in (candidate["name"], candidate["key"]) or candidate["origin"] in words)


def _rounds(state: State, key: str) -> Iterator[Mapping[str, object]]:
    """What each round said of the candidate."""
    for commit in state.ledger.log:
        numbers = commit.entry.numbers or {}
        if commit.entry.kind != "select" or "scores" not in numbers:
            continue
        scores = [row["score"] for row in numbers["scores"] if row["score"] is not None]
        for row in numbers["scores"]:
            if row["key"] == key:
                yield {
                    **row,
                    "record": commit.seq,
                    "time": commit.time,
                    "objective": numbers["objective"],
                    "members": len(numbers["scores"]),
                    "better": None if row["score"] is None else sum(score < row["score"] for score in scores),
                }


def _fate(state: State, key: str, name: str) -> tuple[str, str, str]:
    """The fate of a candidate now, the reason, and a message."""
    waiting = state.ledger.pool.get(key)
    if waiting is not None and waiting.last:
        return "deferred", waiting.last["reason"], waiting.last["message"]
    if waiting is not None:
        return "deferred", "waiting", waiting.commit.entry.message or "waits for its first round"
    settled = state.ledger.fate(key)
    if settled is None:
        return "open", "retry", f"{name}: is looked at again when it is seen next"
    entry = settled.entry
    return entry.fate or "", entry.reason or "", entry.message or f"{name}: {entry.fate} as record {settled.seq}"
