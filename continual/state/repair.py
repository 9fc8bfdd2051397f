"""The way out of a damaged state: what is still whole, what following it would lose, and doing that.

`look` reads and says; `repair` does what `look` said and nothing else. A damaged file is never mended: it is moved to
a directory `.repaired-TIME` in the state, and nothing is deleted. Killed at any step, both can be repeated: what a
killed repair moved is found in that directory, and is part of what the next one says (FORMAT.md).
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable

from continual.errors import Misconfigured
from continual.outside import counted
from continual.state import lock, opening, protocol, storing
from continual.state.damage import Inspection, RepairPlan
from continual.state.durable import environment
from continual.state.entries import RepairEntry
from continual.state.format import Commit
from continual.state.protocol import Held, Journal, OnStep
from continual.state.store import State
from continual.state.strays import ASIDE
from continual.state.verify import OnPart
from continual.stores import Where

_MOST = 1000
"""Lines of what was lost that the record keeps; the old files say the rest."""


def look(path: Where, progress: OnPart) -> RepairPlan:
    """Says what is damaged in the state in `path` and what can be done. A part, for `progress`, is an array.

    Raises Misconfigured where there is no state, Busy where a process writes to it, Damaged where nothing can be done:
    then a file has to come from a backup.
    """
    _check(path)
    with contextlib.ExitStack() as stack:
        with contextlib.suppress(Misconfigured):  # a read-only state can be looked at, and nobody writes to it
            stack.callback(lock.take(path).close)
        return _inspected(path, progress).plan


def repair(path: Where, plan: RepairPlan, progress: OnPart, on_step: OnStep | None = None) -> Commit | None:
    """Does what `plan` says, and returns the record of it; None where nothing is damaged.

    Raises Misconfigured where the state is not any more what it was when the plan was made, Busy, Damaged, Retry and
    Halt. It can be repeated after a kill.
    """
    _check(path)
    held = lock.take(path)
    try:
        found = _inspected(path, progress)
        if found.plan != plan:
            raise Misconfigured(f"{path} is not as it was when you were told what a repair does: look at it again")
        if not plan.findings:
            return None
        with environment("cannot repair the state"):
            aside = found.unfinished or _new_aside(path)
            _move(path, aside, plan, held.must_hold)
            journal = Journal(path, found.ledger, on_step or _silent, held)
            commit = _record(journal, aside, found)
            State.open(path).close()
            return commit
    finally:
        held.close()


def _inspected(path: Where, progress: OnPart) -> Inspection:
    with environment(f"cannot look at the state {path}"):
        return Inspection(path, progress)


def _move(path: Where, aside: Where, plan: RepairPlan, may: Callable[[], None]) -> None:
    """Moves the old files away and makes the directories of a state. `may` is asked before each, and raises Halt where
    another process may write by now."""
    touched = {path, aside}
    for name in opening.DIRECTORIES:
        (path / name).mkdir(exist_ok=True)
    for name in plan.aside:
        source, target = path / name, aside / name
        target.parent.mkdir(exist_ok=True)
        may()
        while target.exists():  # of an earlier try
            target = target.with_name(f"{target.name}.again")
        storing.rename(source, target)
        touched |= {source.parent, target.parent}
    if (path / "HEAD").exists() and not (aside / "HEAD").exists():  # it is replaced in one step, by the record
        storing.replace(aside / "HEAD", (path / "HEAD").read_bytes())
    for directory in sorted(touched, key=str):
        storing.sync(directory)


def _record(journal: Journal, aside: Where, found: Inspection) -> Commit:
    """Writes the tags, then the record, which puts the merge in force."""
    plan, target = found.plan, found.ledger.get(found.plan.to)
    for tag in plan.tag_files:
        protocol.write_tag(journal.path, tag, found.ledger.tags[tag])
    more = len(plan.lost) - _MOST
    entry = RepairEntry(
        to=plan.to,
        undone=len(plan.undone),
        lost=(*plan.lost[:_MOST], *([f"and {more} more"] if more > 0 else [])),
        tags=plan.tags,
        generations=plan.generations,
        inputs=plan.inputs or None,
        aside=aside.name,
        message=f"to record {plan.to}: {counted(len(plan.lost), 'record')} lost, "
        f"{counted(len(plan.undone), 'fold')} undone; the old files are in {aside.name}",
    )
    return journal.append(entry, Held(target.generation, target.receipts))


def _check(path: Where) -> None:
    """Raises Misconfigured where there is no state, nor what is left of one."""
    if (path / opening.PARTIAL).exists() and not (path / "HEAD").exists():
        opening.read_format(path)
    if not (path / "format.json").exists() and opening.unfinished(path):
        raise Misconfigured(f"no state in {path}: make one with 'continual init BASE --state {path}'")


def _new_aside(path: Where) -> Where:
    """Makes the directory for the old files."""
    name = ASIDE + time.strftime("%Y%m%dT%H%M%SZ", time.gmtime())
    aside = next(p for n in range(1000) if not (p := path / (f"{name}-{n}" if n else name)).exists())
    aside.mkdir()
    return aside


def _silent(_step: str) -> None:
    pass
