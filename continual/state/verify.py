"""Checks every byte of a state against its receipt. It reports, and repairs nothing."""

from __future__ import annotations

from collections.abc import Callable

from continual.errors import ContinualError
from continual.state import framing
from continual.state.generation import Generation
from continual.state.store import State


def verify(state: State, progress: Callable[[int, int], None] = lambda _done, _total: None) -> list[str]:
    """Checks every byte of the generations and tags that `state` keeps; returns what is wrong, nothing if all is as it
    was written. The log and format.json were checked when the state was opened.

    `progress` is called with the number of arrays checked so far and of all.
    """
    receipts = {c.generation: c.receipts for c in state.ledger.log if c.generation}
    kept = state.generations()
    tagged = {state.ledger.get(seq).generation for seq in state.ledger.tags.values()} - {None}
    findings = [f"generation {missing} is tagged, but missing" for missing in sorted(tagged - set(kept), key=str)]
    arrays = sum(len(slots) for slots in state.format.slots.values())
    total, done = len(kept) * arrays, 0

    def step() -> None:
        nonlocal done
        done += 1
        progress(done, total)

    for name in kept:
        with state.lease(next(c.seq for c in state.ledger.log if c.generation == name)):
            findings += Generation(state.path / "generations" / name, state.format, receipts[name] or "").check(step)
    for tag, seq in state.ledger.tags.items():
        path = state.path / "tags" / f"{tag}.json"
        try:
            body, _ = framing.decode(path)
            if body != {"tag": tag, "seq": seq}:
                findings.append(f"{path} is not what the ledger says: record {seq}")
        except ContinualError as error:
            findings.append(str(error))
    return findings
