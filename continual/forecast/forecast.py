"""What a fold and an export will take on this machine: time by stage, memory and disk, from the shapes of the tensors,
the rule, and a sample that was folded and exported just now."""

from __future__ import annotations

import heapq
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from continual.forecast.machine import Machine
from continual.forecast.sample import ROWS, TABLE, WIDTH, MatrixForm, Sample, WorkSample, whole
from continual.records import TensorSpec
from continual.rules import Rule
from continual.rules.matrices import sides
from continual.timing.clock import STAGES, WAITING, Spent


@dataclass(frozen=True, slots=True)
class Forecast:
    """What a piece of work takes. `seconds`: wall time on a machine that has nothing else to do and the files in
    memory; `cpu_seconds`: of all threads. `stages`: CPU seconds by stage, of `fsync` wall seconds. `read_bytes` and
    `written_bytes`: what is read and written. `memory_bytes`: peak of the process. `disk_bytes`: room on the disk that
    it has to find. `dearest`: the tensors that take most, with their CPU seconds."""

    seconds: float
    cpu_seconds: float
    stages: Mapping[str, float]
    read_bytes: int
    written_bytes: int
    memory_bytes: int
    disk_bytes: int
    dearest: tuple[tuple[str, float], ...]


class Footprint(NamedTuple):
    """Memory of the process at its peak, and what it writes that is new, both in bytes."""

    memory: int
    disk: int


class Law(NamedTuple):
    """CPU seconds of computing a matrix m×n: `element`·mn + `product`·mn·min(m, n)."""

    element: float
    product: float

    def of(self, m: int, n: int) -> float:
        """Of one matrix."""
        return self.element * m * n + self.product * m * n * min(m, n)

    @classmethod
    def fitted(cls, small: tuple[int, int, float], large: tuple[int, int, float]) -> Law:
        """The law that goes through the seconds of two matrices (m, n, seconds), where none of its two terms is below
        zero; else through those of the larger one."""
        (a, p, s), (b, q, t) = ((m * n, m * n * min(m, n), seconds) for m, n, seconds in (small, large))
        determinant = a * q - b * p
        if determinant:
            element, product = (s * q - t * p) / determinant, (a * t - b * s) / determinant
            if element >= 0.0 and product >= 0.0:
                return cls(element, product)
            if product < 0.0:
                return cls(t / b, 0.0)
        return cls(0.0, t / q)


class Costs:
    """What a piece of work takes of this machine, by a sample of it."""

    def __init__(self, sample: Sample, work: WorkSample, made: Rule, machine: Machine) -> None:
        self._made, self._machine, self._work = made, machine, work
        tiny = [stages for name, stages in work.tensors.items() if name.endswith("layernorm.weight")]
        self._fixed = {stage: _median(tiny, stage) for stage in STAGES}
        self._table = work.tensors[TABLE]
        self._forms = sample.forms
        self._laws = {form: self._law(form, sample.sizes) for form in sample.forms}
        self._per_element = {form: self._moved(form, sample.sizes[1]) for form in sample.forms}

    def _law(self, form: MatrixForm, sizes: tuple[int, int]) -> Law:
        shapes, fixed = [form.shape(side) for side in sizes], self._fixed["compute"].cpu_seconds
        small, large = (
            max(0.0, min(self._work.tensors[name]["compute"].cpu_seconds for name in names) - fixed)
            for names in form.names
        )
        return Law.fitted((*shapes[0], small), (*shapes[1], large))

    def _moved(self, form: MatrixForm, side: int) -> dict[str, float]:
        """Bytes by stage of an element of a matrix of this form."""
        m, n = form.shape(side)
        found = self._work.tensors[form.names[1][0]]
        return {stage: (spent.nbytes - self._fixed[stage].nbytes) / (m * n) for stage, spent in found.items()}

    def of(self, spec: TensorSpec) -> dict[str, Spent]:
        """One tensor: CPU seconds and bytes by stage."""
        found = {stage: Spent(0.0, spent.cpu_seconds, spent.nbytes) for stage, spent in self._fixed.items()}
        if not whole(spec, self._made) or not self._forms:
            for stage, spent in self._table.items():
                share = spec.numel / (ROWS * WIDTH)
                found[stage].add(Spent(0.0, share * spent.cpu_seconds, round(share * spent.nbytes)))
            return found
        one = spec.expert if spec.kind == "stack" else spec
        ratio = MatrixForm.of(one).ratio
        form = min(self._forms, key=lambda other: (abs(other.ratio - ratio), abs(other.ratio)))
        for stage, each in self._per_element[form].items():
            nbytes = round(each * spec.numel)
            table = self._table.get(stage, Spent())
            seconds = nbytes * table.cpu_seconds / table.nbytes if table.nbytes else 0.0
            found[stage].add(Spent(0.0, seconds, nbytes))
        found["compute"].cpu_seconds += max(1, spec.experts) * self._laws[form].of(*sides(one))
        return found

    def forecast(self, specs: Sequence[TensorSpec], room: Footprint, opening: float) -> Forecast:
        """The work on tensors of these specs, after `opening` CPU seconds that the command takes to begin."""
        each = {spec.name: self.of(spec) for spec in specs}
        stages = {stage: Spent() for stage in STAGES}
        for found in each.values():
            for stage, spent in found.items():
                stages[stage].add(spent)
        seconds = {stage: spent.cpu_seconds for stage, spent in stages.items()}
        main = {stage: spent.cpu_seconds for stage, spent in self._work.main.items() if stage != WAITING}
        main["open"] = main.get("open", 0.0) + opening
        main["fsync"] = 0.0
        for stage, one in main.items():
            seconds[stage] += one
        written = stages["write"].nbytes
        seconds["fsync"] = self._synced(written, len(specs))
        tasks = [sum(spent.cpu_seconds for spent in found.values()) for found in each.values()]
        wall = sum(main.values()) + seconds["fsync"] + spread(tasks, self._machine.threads)
        dearest = sorted(zip(each, tasks, strict=True), key=lambda row: -row[1])[:5]
        return Forecast(
            wall,
            sum(taken for stage, taken in seconds.items() if stage != "fsync"),
            {stage: taken for stage, taken in seconds.items() if taken},
            stages["read"].nbytes,
            written,
            room.memory,
            room.disk,
            tuple(dearest),
        )

    def _synced(self, nbytes: int, tensors: int) -> float:
        """Wall seconds of syncing so many bytes of so many tensors."""
        sampled = sum(spent.nbytes for stages in self._work.tensors.values() if (spent := stages.get("write")))
        taken = self._work.main.get("fsync", Spent()).seconds - sampled / self._machine.fsync
        return nbytes / self._machine.fsync + max(0.0, taken) / len(self._work.tensors) * tensors


def _median(found: Sequence[Mapping[str, Spent]], stage: str) -> Spent:
    """What a tensor of no size takes."""
    rows = [stages.get(stage, Spent()) for stages in found]
    seconds = statistics.median(row.cpu_seconds for row in rows)
    return Spent(0.0, seconds, round(statistics.median(row.nbytes for row in rows)))


def spread(tasks: Sequence[float], threads: int) -> float:
    """Wall seconds of tasks that are handed out in turn to so many threads."""
    ends = [0.0] * max(1, threads)
    for seconds in tasks:
        heapq.heapreplace(ends, ends[0] + seconds)
    return max(ends)
