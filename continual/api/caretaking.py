"""Looking after the files of a state, whatever is merged in it: checking them, repairing what is damaged, backups."""

from __future__ import annotations

from typing import NamedTuple

from continual.executors.contract import Progress, silent
from continual.state import Commit, State, opening, strays
from continual.state import backup as backing
from continual.state import repair as repairing
from continual.state import verify as verifying
from continual.state.backup import BackupReport, Wish
from continual.state.damage import RepairPlan
from continual.state.strays import Stray
from continual.stores import Where, where


def verify(state: str | Where = "state", *, progress: Progress = silent) -> Verified:
    """Reads every file of a state, and says what is not as it was written and what does not belong to it. Raises
    Misconfigured where there is no state, Damaged where it cannot be opened."""
    with opening.way_out():
        opened = State.open(where(state))
    with opened as found:
        findings = verifying.verify(found, lambda done, total: progress("verify", done, total))
        return Verified(tuple(findings), tuple(strays.strays(found.path, found.format, found.ledger)))


def look_repair(state: str | Where = "state", *, progress: Progress = silent) -> RepairPlan:
    """Says what is damaged in a state, and what following the rest would lose. Raises Misconfigured where there is no
    state, Busy where a process writes to it, Damaged where nothing in it can be followed."""
    return repairing.look(where(state), lambda done, total: progress("look", done, total))


def repair(state: str | Where, plan: RepairPlan, *, progress: Progress = silent) -> Commit | None:
    """Does what `look_repair` said, and returns the record of it; None where nothing is damaged. Raises Misconfigured
    where the state is not as it was then, Busy, Damaged, Retry and Halt."""
    return repairing.repair(where(state), plan, lambda done, total: progress("look", done, total))


def backup(
    state: str | Where, directory: str | Where, wish: Wish | None = None, *, progress: Progress = silent
) -> BackupReport:
    """Makes a backup of a state in `directory`, or brings the one that is there up to date; or a clone, as `wish` says.
    A daemon may write to the state meanwhile.

    Raises Misconfigured where `directory` holds something else, Busy where another process writes there, Damaged where
    the state or the backup is damaged, Retry and Halt. What was in the backup before is not touched then.
    """
    return backing.backup(where(state), where(directory), wish or Wish(), progress)


class Verified(NamedTuple):
    """What `verify` found: what is not as it was written, and what belongs to no part of the format."""

    findings: tuple[str, ...]
    strays: tuple[Stray, ...]
