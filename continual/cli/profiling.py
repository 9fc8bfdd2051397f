"""`--profile`: where the time of a command went, for people and for machines."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import TYPE_CHECKING, Annotated

import typer

from continual.cli import console
from continual.texts import figure, jsonable, size
from continual.timing import clock

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.forecast.spending import Spending
    from continual.timing.clock import Profile

Profiled = Annotated[
    bool, typer.Option("--profile", help="Say where the time went, by stage and tensor, beside this machine's floors.")
]
"""The flag of commands that fold and read."""
_SHOWN = ("read", "hash", "checksum", "compute", "write")


@contextlib.contextmanager
def profiled(wanted: bool) -> Iterator[Profile | None]:
    """Takes the time of what is done within, where that is wanted."""
    if not wanted:
        yield None
        return
    with clock.profiled() as profile:
        yield profile


def spending(profile: Profile | None, merge: Merge) -> Spending | None:
    """The same, beside what this machine can do, which takes a second to measure; None where nobody asked."""
    if profile is None:
        return None
    from continual.forecast import machine
    from continual.forecast import spending as spent

    with console.spinner("measuring this machine"):
        found = machine.measure(machine.beside(merge.settings.state), merge.executor.workers)
    return spent.spending(profile, found, merge.state.format.tensors, merge.rule)


def with_more(body: object, key: str, more: object) -> object:
    """An answer for machines, a JSON object, that has `more` under `key` where there is any."""
    shown = jsonable(body)
    assert isinstance(shown, dict)
    return shown if more is None else {**shown, key: jsonable(more)}


def told(found: Spending | None) -> None:
    """A profile for people, if there is one."""
    if found is None:
        return
    threads = f"{found.threads} threads, whose times are added up" if found.threads > 1 else "one thread"
    console.say("")
    console.say(f"{found.seconds:.2f} s, of which the CPU {found.cpu_seconds:.2f} s; {threads}")
    console.table(
        ("stage", "seconds", "CPU", "bytes", "floor", "times the floor"),
        [
            (
                row.stage,
                f"{row.seconds:.3f}",
                f"{row.cpu_seconds:.3f}",
                size(row.nbytes) if row.nbytes else "",
                figure(row.floor, ".3f"),
                figure(row.times, ".1f"),
            )
            for row in found.stages
        ],
    )
    on = found.machine
    console.say(
        f"floors of this machine, of CPU time but for fsync: read {size(on.read)}/s (out of memory), "
        f"hash {size(on.hash)}/s, checksum {size(on.checksum)}/s, write {size(on.write)}/s, fsync {size(on.fsync)}/s, "
        f"products of float64 matrices {on.product / 1e9:.3g} GFLOP/s; of compute: one product of each matrix with one "
        "of its smaller side"
    )
    console.table(
        ("tensor", "shape", "seconds", "CPU", "bytes", *_SHOWN),
        [
            (
                row.name,
                "×".join(map(str, row.shape)),
                f"{row.seconds:.3f}",
                f"{row.cpu_seconds:.3f}",
                size(row.nbytes),
                *(f"{row.stages.get(stage, 0.0):.3f}" for stage in _SHOWN),
            )
            for row in found.tensors
        ],
    )
    if found.tensor_count > len(found.tensors):
        console.say(f"the dearest of {found.tensor_count} tensors; CPU seconds by stage")
