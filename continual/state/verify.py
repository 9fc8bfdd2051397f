"""Checks every byte of a state against its receipt. It reports, and repairs nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterator

from continual.errors import ContinualError
from continual.state.entries import TagEntry
from continual.state.generation import Generation
from continual.state.protocol import tag_stands
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
        findings += _tag(state, tag, seq)
    return findings


def _tag(state: State, tag: str, seq: int) -> Iterator[str]:
    """What is wrong with the file of a tag. It is written after its record: where that is the newest record it may not
    be there yet, and the next writer writes it."""
    newest = state.ledger.head.entry
    in_flight = isinstance(newest, TagEntry) and newest.tag == tag
    try:
        if not tag_stands(state.path, tag, seq) and not in_flight:
            yield (
                f"{state.path / 'tags' / f'{tag}.json'} is not there, or does not name record {seq} as the ledger does"
            )
    except ContinualError as error:
        yield str(error)
