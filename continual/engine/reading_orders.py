"""A reading as orders have it: what another process needs to read the same, and how long it is, measured by orders.
What reading is, reading.py says.
"""

from __future__ import annotations

import secrets
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, NamedTuple

from continual.engine.spool import SharedSpool
from continual.engine.views import ReadView
from continual.errors import Retry
from continual.executors.contract import Executor, Task
from continual.executors.orders import WorkJob, WorkPiece
from continual.records import TensorSpec
from continual.rules import ReadOptions, ScaleFactors, rule_of
from continual.state import State
from continual.stores import Where


@dataclass(frozen=True)
class SentReading:
    """A reading as plain data: of which kind, of the state in a directory, at the record with this number and CRC, by
    the rule and the options that it was made with; `factors` and `parts` (of a state of adapters) as far as they are
    settled; `device`: where matrices are computed; `spool`: what is kept of it that was made already."""

    kind: type[Any]
    state: Where
    commit: tuple[int, str]
    rule: tuple[str, Mapping[str, object]]
    options: ReadOptions | None
    view: ReadView
    factors: ScaleFactors | None
    parts: tuple[float, float] | None = None
    device: str = "cpu"
    spool: SharedSpool | None = None

    @classmethod
    def of(cls, reading: Any) -> SentReading | None:
        """Of a `Reading`; None where it reads what no record names, or a file of this process."""
        if not (reading.stored and reading.commit.crc):
            return None
        rule, commit = (reading.made.name, dict(reading.made.options)), (reading.commit.seq, reading.commit.crc)
        parts = None if reading.state.format.form is None else reading.merged.parts
        known = reading.settled_factors
        state = reading.state.path.absolute()  # another process has another working directory
        spool = reading.spool if isinstance(reading.spool, SharedSpool) else None
        return cls(type(reading), state, commit, rule, reading.asked, reading.view, known, parts, spool=spool)

    def open(self) -> Any:
        """Opens the state and reads it so; whoever asked closes its `state`. Raises Misconfigured, Damaged, Retry."""
        state = State.open(self.state)
        try:
            if not self.commit[0] < len(state.ledger.log) or state.ledger.get(self.commit[0]).crc != self.commit[1]:
                raise Retry(
                    f"{self.state}: this machine sees another record {self.commit[0]} than the one that is to be read: "
                    "is the state in a folder that all machines share?"
                )
            found = self._made(state)
        except BaseException:
            state.close()
            raise
        found.device, found.settled_factors, found.spool = self.device, self.factors, self.spool
        return found

    def _made(self, state: State) -> Any:
        rule, seq = rule_of(*self.rule), self.commit[0]
        if state.format.form is None:
            found = self.kind(state, rule, seq, self.options)
            found.view = self.view
            return found
        found = self.kind(state, rule, seq, self.view, self.options)
        found.merged.parts = self.parts
        return found


class TensorMeasured(NamedTuple):
    """‖X‖² of a tensor, and the hash of X where it was kept in a spool."""

    square: float
    kept: str | None


@dataclass(frozen=True)
class MeasureJob(WorkJob[TensorMeasured]):
    """How long X of tensors is."""

    reading: SentReading

    def open(self) -> Measuring:
        """Opens the state."""
        return Measuring(self.reading.open())


class Measuring:
    """Measures tensors for another process."""

    def __init__(self, reading: Any) -> None:
        self._reading = reading
        self._specs = {spec.name: spec for spec in reading.state.format.tensors}

    def work(self, names: Sequence[str]) -> list[TensorMeasured]:
        """As `Reading.square`."""
        spool = self._reading.spool
        squares = [self._reading.square(self._specs[name], None) for name in names]
        kept = [None if spool is None else spool.kept.get(name) for name in names]
        return [TensorMeasured(*one) for one in zip(squares, kept, strict=True)]

    def close(self) -> None:
        """Closes the state."""
        self._reading.state.close()


def squares_of(
    reading: Any, specs: Sequence[TensorSpec], executor: Executor, seen: object
) -> Iterator[tuple[str, float]]:
    """`Reading.square` of each of these tensors, as it comes; `seen` is given X, where it is not None. Raises as
    `Reading.measure`."""
    tasks = [
        Task(spec.name, reading.need(spec), partial(reading.square, spec, seen), reads=4 * spec.numel) for spec in specs
    ]
    if seen is not None or (sent := sent_to(reading, executor)) is None:
        yield from executor.map(tasks)
        return
    job = MeasureJob(secrets.token_hex(8), sent)
    for name, (square, kept) in executor.map([task._replace(run=WorkPiece(job, task.name)) for task in tasks]):
        if kept is not None:
            reading.spool.kept[name] = kept
        yield name, square


def sent_to(reading: Any, executor: Executor) -> SentReading | None:
    """A reading for the processes of an executor; None where none of them can read it."""
    if executor.elsewhere is None or (sent := SentReading.of(reading)) is None:
        return None
    return replace(sent, device=executor.elsewhere)
