"""To which records a state can go back, and what going back to one would undo and let expire. Nothing is changed
here."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from continual.state import retention
from continual.state.durable import environment
from continual.state.format import Commit, FoldCommit
from continual.state.store import State


@dataclass(frozen=True, slots=True)
class GoingBack:
    """What `rollback` to a record would do: the folds that it undoes, oldest first; the generations that expire with
    it, and the records that can then no longer be gone back to."""

    to: int
    undone: tuple[FoldCommit, ...]
    expires: tuple[str, ...]
    lost: tuple[int, ...]


def look(state: State, seq: int, keep: int, nbytes: int | None = None) -> GoingBack:
    """What going back to record `seq` would do, where `keep` generations, of at most `nbytes`, are kept besides the
    tagged ones. Raises Misconfigured if there is no such record or its generation has expired, Retry where the disk
    gets in the way."""
    target = state.ledger.get(seq)
    state.generation_of(target)
    with environment(f"cannot look at what expires in {state.path}"):
        expires = tuple(
            retention.expired(state.path, state.ledger, retention.Keep(keep, nbytes), then=target.generation)
        )
    return GoingBack(
        seq,
        tuple(state.ledger.undone(seq)),
        expires,
        tuple(commit.seq for commit in state.ledger.log if commit.generation in expires),
    )


def reachable(state: State) -> frozenset[str | None]:
    """The generations that a rollback can put in force again; None stands for the merge of no model."""
    return frozenset({None, *state.generations()})


def marked(commit: Commit, generations: Iterable[str | None]) -> Mapping[str, bool]:
    """What the record is shown with: whether the state can still go back to it."""
    return {"back": commit.generation in generations}


def runs(seqs: Iterable[int]) -> tuple[tuple[int, int], ...]:
    """Numbers in rising order as their first and last of each row without a gap."""
    found: list[tuple[int, int]] = []
    for seq in seqs:
        if found and found[-1][1] == seq - 1:
            found[-1] = (found[-1][0], seq)
        else:
            found.append((seq, seq))
    return tuple(found)


def records(state: State) -> tuple[tuple[int, int], ...]:
    """The records that the state can go back to, as the first and the last of each row of them."""
    generations = reachable(state)
    return runs(commit.seq for commit in state.ledger.log if commit.generation in generations)
