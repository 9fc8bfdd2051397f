"""What a round is asked to do: on what it calibrates, how it steps, and when a candidate is given up."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, cast

from continual.config import Settings
from continual.errors import Misconfigured
from continual.objectives.calibration import Dtype, Wanted
from continual.selection.steps import Plan

DAY = 86400.0
UNSUPERVISED = "rounds.unsupervised: entropy in place of labels rewards models that are sure of anything, and diverged where it was tried; use labels if you can"


@dataclass(frozen=True, slots=True)
class Asked:
    """`trial`: at most this share of a task vector is added to the merge to see what it does to held-out rows.
    `sigmas`: a candidate is relevant where that lowers their loss by more than so many standard errors. `stays`: it
    stays where taking it out raises it by more than so many. `patience`: rounds in which one may be judged irrelevant
    before it is refused. `age`: seconds after which one that still waits expires; `most`: of more candidates than this
    the oldest expire. `layers`: Frank-Wolfe weighs each layer of a model by itself. `size`, `wait`: a round is due when
    so many candidates wait that none has judged, or one of them has waited so many seconds."""

    calibration: Wanted
    plan: Plan = field(default_factory=Plan)
    layers: bool = False
    trial: float = 0.3
    sigmas: float = 3.0
    stays: float = 0.0
    patience: int = 3
    age: float = 30 * DAY
    most: int = 1000
    size: int = 8
    wait: float = 3600.0

    def __post_init__(self) -> None:
        for name, value, good, what in (
            ("trial", self.trial, 0 < self.trial <= 1, "above 0 and at most 1"),
            ("sigmas", self.sigmas, self.sigmas >= 0, "at least 0"),
            ("stays", self.stays, 0 <= self.stays <= self.sigmas, "from 0 to sigmas"),
            ("patience", self.patience, self.patience >= 1, "at least 1"),
            ("age", self.age, self.age > 0, "above 0"),
            ("most", self.most, self.most >= 1, "at least 1"),
            ("size", self.size, self.size >= 1, "at least 1"),
            ("wait", self.wait, self.wait >= 0, "at least 0"),
        ):
            if not good:
                raise Misconfigured(f"rounds: {name} = {value}: it has to be {what}")
        if self.layers and self.plan.step in ("pairwise", "soft"):
            raise Misconfigured(
                f"rounds: step = {self.plan.step} weighs whole models; layers goes with hard and corrective"
            )

    def told(self) -> dict[str, Any]:
        """What a record keeps of it: all that the choice depends on."""
        plan = self.plan
        return {
            "trial": self.trial,
            "sigmas": self.sigmas,
            "stays": self.stays,
            "patience": self.patience,
            "step": plan.step,
            "rho": plan.rho,
            "search": plan.search,
            "layers": self.layers,
            "tolerance": plan.tolerance,
            "steps": plan.steps,
            "best": plan.best,
            "active": plan.most,
            "inner": plan.inner,
            "age": self.age,
            "most": self.most,
        }


def asked(settings: Settings) -> Asked:
    """What the settings ask of rounds. Raises Misconfigured naming what is missing or cannot be used."""
    given = settings.rounds
    if settings.objective is None:
        raise Misconfigured(
            "objective: rounds need to know what is good: causal-lm, classification or heads with a file of rows for each task, or module:function"
        )
    wanted = Wanted(
        settings.objective,
        settings.rows,
        settings.heads,
        given.batch,
        given.seed,
        given.held,
        cast(Dtype, given.dtype),
        given.checkpointing,
        given.unsupervised,
    )
    plan = Plan(
        cast(Any, given.step),
        given.rho,
        cast(Any, given.search),
        given.best,
        given.active,
        given.steps,
        given.inner,
        given.tolerance,
    )
    layers = given.step == "corrective" if given.layers is None else given.layers
    return Asked(
        wanted,
        plan,
        layers,
        given.trial,
        given.sigmas,
        given.stays,
        given.patience,
        given.age,
        given.most,
        given.size,
        given.wait,
    )
