"""Where the time of a fold or an export went, beside the least that this machine takes for the same."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from continual.forecast.machine import Machine
from continual.records import TensorSpec
from continual.rules import Rule
from continual.rules.matrices import sides
from continual.timing.clock import Profile, Spent

_LISTED = 10


@dataclass(frozen=True, slots=True)
class StageSpending:
    """A stage: wall and CPU seconds, summed over threads, and bytes. `floor`: seconds of CPU time, of `fsync` of wall
    time, that this machine takes for them at best; of `compute` those of one float64 product of each matrix, m×n by n×n
    with n its smaller side. None where there is no floor."""

    stage: str
    seconds: float
    cpu_seconds: float
    nbytes: int
    floor: float | None = None

    @property
    def times(self) -> float | None:
        """How often the floor goes into it: its CPU time, of `fsync` its wall time."""
        taken = self.seconds if self.stage == "fsync" else self.cpu_seconds
        return taken / self.floor if self.floor else None


@dataclass(frozen=True, slots=True)
class TensorSpending:
    """A tensor: its shape, wall and CPU seconds on its thread, bytes read and written, and CPU seconds by stage."""

    name: str
    shape: tuple[int, ...]
    seconds: float
    cpu_seconds: float
    nbytes: int
    stages: Mapping[str, float]


@dataclass(frozen=True, slots=True)
class Spending:
    """A fold or an export. `seconds`: wall time from beginning to end; `cpu_seconds`: of the whole process meanwhile.
    `tensors`: those that took most CPU time, of `tensor_count`."""

    seconds: float
    cpu_seconds: float
    threads: int
    stages: tuple[StageSpending, ...]
    tensors: tuple[TensorSpending, ...]
    tensor_count: int
    machine: Machine


def spending(profile: Profile, machine: Machine, specs: Iterable[TensorSpec], rule: Rule) -> Spending:
    """What `profile` has measured of work on the tensors `specs` by `rule`, with the floors of `machine`."""
    shapes = {spec.name: spec for spec in specs}
    stages, tensors = profile.stages, profile.tensors
    stages["fsync"].nbytes = stages["write"].nbytes if stages["fsync"].seconds else 0
    floors = {stage: spent.nbytes / rate for stage, spent in stages.items() if (rate := machine.rate(stage))}
    if rule.read.matrix is not None:
        floors["compute"] = sum(product(shapes[name], rule) for name in tensors if name in shapes) / machine.product
    rows = tuple(
        StageSpending(stage, spent.seconds, spent.cpu_seconds, spent.nbytes, floors.get(stage) or None)
        for stage, spent in stages.items()
    )
    dearest = [
        _tensor(name, shapes[name].shape if name in shapes else (), spent)
        for name, spent in list(tensors.items())[:_LISTED]
    ]
    return Spending(profile.seconds, profile.cpu_seconds, machine.threads, rows, tuple(dearest), len(tensors), machine)


def product(spec: TensorSpec, rule: Rule) -> float:
    """Floating-point operations of one product of a matrix, or of each in a stack, with one of its smaller side."""
    if rule.read.matrix is None or not rule.read.matrix(spec):
        return 0.0
    one, count = (spec.expert, spec.experts) if spec.kind == "stack" else (spec, 1)
    m, n = sides(one)
    return 2.0 * count * m * n * min(m, n)


def _tensor(name: str, shape: tuple[int, ...], stages: Mapping[str, Spent]) -> TensorSpending:
    whole = Spent()
    for spent in stages.values():
        whole.add(spent)
    moved = sum(spent.nbytes for stage, spent in stages.items() if stage in ("read", "write"))
    by_stage = {stage: spent.cpu_seconds for stage, spent in stages.items()}
    return TensorSpending(name, shape, whole.seconds, whole.cpu_seconds, moved, by_stage)
