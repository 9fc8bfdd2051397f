"""Building a state again in a new place, from its ledger, the models that it folded, and the states that were combined
into it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from continual.errors import Misconfigured
from continual.executors.contract import Progress
from continual.replay import Replayed, ReplayTree, rebuild, tree_of
from continual.replay.rebuilding import begin
from continual.replay.replay_sources import FoundModel, find, must_be_there
from continual.state import State, leasing
from continual.stores import Where

if TYPE_CHECKING:
    from continual.api.opened_state import OpenedState


class ReplayFrom(NamedTuple):
    """Where what is read again may be: directories with the models, and the states that were combined (or backups)."""

    models: Sequence[Path] = ()
    states: Sequence[Where] = ()


class ReplayLook(NamedTuple):
    """What a replay would do: how many records it makes, of which so many `folds`; the models that it reads, each with
    its place or why it cannot be used; and what it does not build again."""

    records: int
    folds: int
    models: tuple[FoundModel, ...]
    left_out: tuple[str, ...]


def look_replay(merge: OpenedState, given: ReplayFrom, progress: Progress) -> ReplayLook:
    """Says what a replay would do. Reads every model once, and builds nothing. Raises Misconfigured where the ledger
    has a record that cannot be made again, or a state that was combined is not given."""
    with _known(given.states) as known:
        tree = tree_of(merge.state, Path("again"), known)
        found = find(merge.engine, tree.models(), given.models, progress)
        return ReplayLook(tree.records(), _folds(tree), tuple(found.values()), tuple(tree.left_out()))


def replay(merge: OpenedState, directory: Where, given: ReplayFrom, progress: Progress) -> Replayed:
    """Builds the state of `merge` again in `directory`, each state that was combined into it beside that, and compares.
    Raises Misconfigured before anything is made where a record cannot be made again, a state that was combined is not
    given, or a model is not where it is looked for or holds something else; Refuse, Retry and Halt, after which the
    same call goes on."""
    with leasing.newest(merge.state), _known(given.states) as known:
        tree = tree_of(merge.state, directory, known)
        found = find(merge.engine, tree.models(), given.models, progress)
        must_be_there(found)
        return replace(_built(merge, tree, found, progress), left_out=tuple(tree.left_out()))


def _built(merge: OpenedState, tree: ReplayTree, found: Mapping[str, FoundModel], progress: Progress) -> Replayed:
    """Builds the parts, and then the state of them. What is not equal in a part is said with the record that brought
    it."""
    made = {seq: _built(merge, part, found, progress) for seq, part in tree.parts.items()}
    begin(tree.source, tree.directory)
    settings = merge.settings.model_copy(update={"state": tree.directory})
    with contextlib.ExitStack() as stack:
        parts = {seq: stack.enter_context(State.open(part.directory)) for seq, part in tree.parts.items()}
        again = stack.enter_context(type(merge)(settings, write=True, client=merge.places.client))
        whole = rebuild(tree.source, again.engine, tree.plan, found, parts, progress)
    differs = [f"of what record {seq} brought: {said}" for seq, part in made.items() for said in part.differs]
    return replace(
        whole,
        equal=whole.equal and not differs,
        records=whole.records + sum(part.records for part in made.values()),
        compared=whole.compared + sum(part.compared for part in made.values()),
        differs=(*whole.differs, *differs),
        software=tuple(dict.fromkeys((*whole.software, *(one for part in made.values() for one in part.software)))),
    )


def _folds(tree: ReplayTree) -> int:
    return sum(step.kind == "fold" for step in tree.plan.steps) + sum(map(_folds, tree.parts.values()))


@contextlib.contextmanager
def _known(states: Sequence[Where]) -> Iterator[dict[str, State]]:
    """The states in these directories, by their ids. Raises Misconfigured for two of one id, and as `State.open`."""
    with contextlib.ExitStack() as stack:
        found: dict[str, State] = {}
        for path in states:
            state = stack.enter_context(State.open(path))
            if state.id in found:
                raise Misconfigured(
                    f"{found[state.id].path} and {path} are one state, or copies of one: name one of them"
                )
            found[state.id] = state
        yield found
