"""What lies in the repo that a merge is released to: helpers of the tests of releases."""

from __future__ import annotations

import json
from pathlib import Path

import continual
from continual.state.entries import HookEntry, ReleaseEntry
from tests.loopback import Hub

REPO = "me/merge"


def releases(hub: Hub, branch: str = "main") -> list[tuple[int, str]]:
    """(record, sha) of every commit with a `continual.json` of its own, oldest first."""
    found: list[tuple[int, str]] = []
    for commit in reversed(hub.history(REPO, branch)):
        if "continual.json" in commit.files:
            seq = json.loads(commit.files["continual.json"].data)["seq"]
            if not found or found[-1][0] != seq:
                found.append((seq, commit.sha))
    return found


def count(hub: Hub) -> int:
    """Commits of ours: all but the first that a repo is made with."""
    return len([c for c in hub.history(REPO) if "continual.json" in c.files])


def published(state: Path) -> list[int]:
    """How many releases the ledger has, counted from 1."""
    return list(range(1, len(published_records(state)) + 1))


def published_records(state: Path) -> list[int]:
    """The records that were released or told of, as the ledger has it."""
    with continual.open(state) as ours:
        return [c.entry.of for c in ours.state.ledger.log if isinstance(c.entry, ReleaseEntry | HookEntry)]
