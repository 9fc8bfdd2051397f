"""What is known of one candidate of the pool, and why it is or is not in the merge: read from the ledger."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from continual.errors import Misconfigured
from continual.state import State


class Why(NamedTuple):
    """`fate` now, with its reason and message; `since` when it was first seen; `rounds`: what each round said of it,
    oldest first, with the record of the round (`record`), its `objective`, and how many members it had (`members`) of
    which so many scored better (`better`)."""

    key: str
    name: str
    origin: str
    fate: str
    reason: str
    message: str
    since: str
    rounds: Sequence[Mapping[str, Any]]


def why(state: State, word: str) -> Why:
    """Of the candidate that `word` names: a name, path or key, the newest of them. Raises Misconfigured if the ledger
    knows none."""
    place = str(Path(word).absolute())
    seen = [
        c
        for c in state.ledger.log
        if (e := c.entry.candidate) and (word in (e["name"], e["key"]) or e["origin"] in (word, place))
    ]
    seen += [
        fold
        for fold in state.ledger.folds()
        if (e := fold.entry.candidate) and (word in (e["name"], e["key"]) or e["origin"] in (word, place))
    ]
    if not seen:
        raise Misconfigured(
            f"{word}: no candidate of this name, path or key was ever seen; see 'continual pool' and 'continual log'"
        )
    newest = seen[-1].entry.candidate or {}
    key = newest["key"]
    rounds = []
    for commit in state.ledger.log:
        numbers = commit.entry.numbers or {}
        if commit.entry.kind != "select" or "scores" not in numbers:
            continue
        scores = [row["score"] for row in numbers["scores"] if row["score"] is not None]
        for row in numbers["scores"]:
            if row["key"] == key:
                better = sum(score < row["score"] for score in scores) if row["score"] is not None else None
                more = {
                    "record": commit.seq,
                    "time": commit.time,
                    "objective": numbers["objective"],
                    "members": len(numbers["scores"]),
                    "better": better,
                }
                rounds.append({**row, **more})
    waiting, settled = state.ledger.pool.get(key), state.ledger.fate(key)
    if waiting is not None:
        last = waiting.last or {
            "reason": "waiting",
            "message": waiting.commit.entry.message or "waits for its first round",
        }
        fate, reason, message = "deferred", last["reason"], last["message"]
    elif settled is not None:
        entry = settled.entry
        fate, reason, message = (
            entry.fate or "",
            entry.reason or "",
            entry.message or f"{newest['name']}: {entry.fate} as record {settled.seq}",
        )
    else:
        fate, reason, message = "open", "retry", f"{newest['name']}: is looked at again when it is seen next"
    since = next(
        c.time
        for c in state.ledger.log
        if (c.entry.candidate or {}).get("key") == key or c is seen[-1] or c.seq == seen[-1].seq
    )
    return Why(key, newest["name"], newest["origin"], fate, reason, message, since, rounds)
