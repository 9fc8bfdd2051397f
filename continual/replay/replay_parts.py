"""The other states whose models a ledger has from a `combine`: each has to be there, or a backup of it, and is built
again up to the record that was combined. Nothing is built here."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from continual.errors import Misconfigured
from continual.replay.replay_steps import NeededModel, ReplayPlan, plan_of
from continual.state import Commit, State
from continual.state.entries import CombineEntry
from continual.state.ledger import Ledger
from continual.stores import Where


@dataclass(frozen=True, slots=True)
class ReplayTree:
    """A state to build again (`source`) in `directory`, by `plan`; and those that were combined into it, by the record
    that did it."""

    source: State
    directory: Where
    plan: ReplayPlan
    parts: Mapping[int, ReplayTree]

    def models(self) -> dict[str, NeededModel]:
        """All models that are read, by key: of the parts, and of the state itself."""
        found: dict[str, NeededModel] = {}
        for part in self.parts.values():
            found |= part.models()
        return found | dict(self.plan.models)

    def left_out(self) -> Iterator[str]:
        """What is not built again, in words; of a part with the record that brought it."""
        yield from self.plan.left_out
        for seq, part in self.parts.items():
            yield from (f"of what record {seq} brought: {said}" for said in part.left_out())

    def records(self) -> int:
        """How many records are made."""
        return len(self.plan.steps) + sum(part.records() for part in self.parts.values())


def tree_of(source: State, directory: Where, known: Mapping[str, State]) -> ReplayTree:
    """What building `source` again in `directory` takes. `known`: the other states that may be in it, by their ids.
    Raises Misconfigured naming the record that cannot be made again, and the state that it needs."""
    plan = plan_of(source)
    directory = directory.resolve()  # '.' has no name that another could be put beside
    parts = {}
    for commit in plan.brought:
        part = _as_it_was(commit, known)
        parts[commit.seq] = tree_of(part, directory.with_name(f"{directory.name}-{commit.seq}"), known)
    return ReplayTree(source, directory, plan, parts)


def _as_it_was(commit: Commit, known: Mapping[str, State]) -> State:
    """The state that a record combined, up to its record of then, to be read. Raises Misconfigured."""
    entry = commit.of_kind(CombineEntry)
    other = known.get(entry.of)
    if other is None:
        raise Misconfigured(
            f"record {commit.seq} brought the models of another state ({entry.of}; {entry.message}), whose ledger this "
            "one does not have: name it, or a backup of it, by --with"
        )
    if other.ledger.head.seq < entry.seq:
        raise Misconfigured(
            f"{other.path} has records up to {other.ledger.head.seq}, and record {commit.seq} brought its models of "
            f"record {entry.seq}: name the state itself, or a later backup"
        )
    ledger = Ledger()
    for one in other.ledger.log[: entry.seq + 1]:
        ledger.add(one)
    found = State(other.path, other.format, ledger, None, lambda _: None)
    if [fold.entry.digest for fold in ledger.folds()] != [fold.digest for fold in entry.folds]:
        raise Misconfigured(
            f"{other.path} has other models at record {entry.seq} than record {commit.seq} brought: it is not that "
            "state, but has its id"
        )
    return found
