"""What is left after a run: the state as readers and the next writer see it, compared with a run that nobody
disturbed."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import NamedTuple

import pytest

from continual.errors import Misconfigured
from continual.state import State
from continual.state.verify import verify
from tests.campaigns.faults.steps.commands import Step, World


class Moment(NamedTuple):
    """What a state is at a record: the bits of its accumulators, the models in it, who waits, how it is read, and the
    tags."""

    bits: str
    folds: tuple[str, ...]
    pool: tuple[str, ...]
    fates: tuple[tuple[str, str | None], ...]
    read: str
    tags: tuple[tuple[str, int], ...]


class Facts(NamedTuple):
    """A state: its records, without what differs from run to run, and what it is now."""

    records: tuple[tuple[str, str | None, str | None, str | None], ...]
    now: Moment


def facts(state: State) -> Facts:
    """What there is to compare of an open state."""
    ledger = state.ledger
    bits = hashlib.sha256()
    for name, slots in sorted(state.format.slots.items()):
        for slot in sorted(slots):
            bits.update(state.read(name, slot).tobytes())
    records = tuple(
        (c.entry.kind, c.entry.fate, c.entry.reason, c.entry.candidate.key if c.entry.candidate else None)
        for c in ledger.log
    )
    keys = sorted({key for *_, key in records if key is not None})
    fates = tuple((key, fate.entry.fate if (fate := ledger.fate(key)) else None) for key in keys)
    now = Moment(
        bits.hexdigest(),
        tuple(c.entry.candidate.key for c in ledger.folds()),
        tuple(ledger.pool),
        fates,
        str(ledger.read_options(ledger.head.seq)),
        tuple(sorted(ledger.tags.items())),
    )
    return Facts(records, now)


def look(world: World) -> Facts | None:
    """Opens what a run left, as a reader and then as a writer, and verifies it both times; None where there is no
    state. Raises AssertionError."""
    if not (world.state / "format.json").exists():
        with pytest.raises(Misconfigured, match="make one"):
            State.open(world.state)
        return None
    with State.open(world.state) as state:
        assert verify(state) == []
        seen = facts(state)
    with State.open(world.state, write=True) as state:
        assert facts(state) == seen, "a writer sees another state than a reader"
    with State.open(world.state) as state:
        assert verify(state) == []
        assert state.adopted == (), "the writer did not acknowledge what it adopted"
        named = {c.generation for c in state.ledger.log}
        assert {p.name for p in (world.state / "generations").iterdir()} <= named, "an orphan survived the open"
        assert {f.name for f in (world.state / "tags").iterdir()} == {f"{tag}.json" for tag in state.ledger.tags}
    hidden = [p for p in world.state.rglob(".*") if p.name.endswith(".tmp")]
    assert [p for p in hidden if world.state / "staging" not in p.parents] == []
    return seen


def written(world: World, step: Step) -> dict[str, str]:
    """What a command wrote beside the state: the files' digests, those aside that say when."""
    place = world.work / (step.outside or "")
    if step.outside is None:
        return {}
    found = {}
    for path in sorted(place.rglob("*")):
        name = str(path.relative_to(place))
        if path.is_symlink():
            found[name] = f"-> {Path(path.readlink()).name}"
        elif path.is_file() and path.name not in ("continual.json",):
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest()
    return found
