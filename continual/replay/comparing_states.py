"""What tells a state that was built again from the one that it is to be: by record, tensor and slot. It only reads."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from functools import partial

from continual.errors import Misconfigured
from continual.executors.contract import Executor, Progress, Task
from continual.outside import counted, few
from continual.state import Commit, State
from continual.state.generation import Generation
from continual.state.software import software


def differing_totals(source: State, commit: Commit, state: State, number: int) -> list[str]:
    """Which totals of the rule are others after a record than after the record `number` of the other state."""
    there, here = (
        dataclasses.asdict(one) for one in (source.ledger.totals_at(commit.seq), state.ledger.totals_at(number))
    )
    return [
        f"record {commit.seq}: {key} is {there[key]!r} there and {here[key]!r} here"
        for key in there
        if there[key] != here[key]
    ]


def differing_receipts(source: State, commit: Commit, state: State, number: int) -> list[str] | None:
    """Which tensors have other checksums after a record; None where the generation of one of the two has expired.
    Raises Damaged."""
    try:
        there, here = source.generation_of(commit), state.generation_of(state.ledger.get(number))
    except Misconfigured:
        return None
    if there is None or here is None:
        return [] if there is here else [f"record {commit.seq}: one of the two holds nothing"]
    names = {name for name in source.format.slots if _chunks(there, name) != _chunks(here, name)}
    return [f"record {commit.seq}: tensor {name}" for name in sorted(names)]


def _chunks(generation: Generation, name: str) -> list[tuple[str, ...] | None]:
    layout = generation.form.layout
    return [generation.receipts.chunks(layout.place(name, slot)) for slot in generation.form.slots[name]]


def differing_values(source: State, state: State, executor: Executor, progress: Progress) -> tuple[int, list[str]]:
    """How many tensors the newest merge has, and which have other bytes; none where that of the source has expired, as
    of a state that was combined and has gone on. Every byte of both is read, and checked against its receipt. Raises
    Damaged."""
    head = source.ledger.head
    try:
        there, here = source.generation_of(head), state.generation_of(state.ledger.head)
    except Misconfigured:
        return 0, []
    names = [name for name, slots in source.format.slots.items() if slots]
    if there is None or here is None:
        return len(names), [] if there is here else [f"record {head.seq}: one of the two holds nothing"]
    need = {name: 2 * sum(slot.nbytes for slot in source.format.slots[name].values()) for name in names}
    tasks = [Task(name, need[name], partial(_same, there, here, name)) for name in names]
    same: dict[str, bool] = {}
    progress("compare", 0, len(tasks))
    for name, equal in executor.map(tasks):
        same[name] = equal
        progress("compare", len(same), len(tasks))
    model = source.ledger.model
    record = head.seq if model is None else model.seq
    return len(names), [f"record {record}: tensor {name}" for name in names if not same[name]]


def _same(there: Generation, here: Generation, name: str) -> bool:
    if not there.has(name) and not here.has(name):
        return True
    slots = there.form.slots[name]
    return all(there.read(name, slot).tobytes() == here.read(name, slot).tobytes() for slot in slots)


def other_software(commits: Sequence[Commit], device: str) -> tuple[str, ...]:
    """The versions and devices of records that are others than here, which can be why bits differ."""
    found: dict[str, list[int]] = {}
    ours = {**software(), "device": device}
    for commit in commits:
        theirs = {**(commit.entry.software or {}), "device": commit.entry.device or device}
        other = [f"{key} {theirs[key]}, here {ours[key]}" for key in ours if theirs.get(key, ours[key]) != ours[key]]
        if other:
            found.setdefault("; ".join(other), []).append(commit.seq)
    return tuple(f"{counted(len(seqs), 'record')} ({few(map(str, seqs))}): {what}" for what, seqs in found.items())
