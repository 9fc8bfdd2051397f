"""What a round is to do: on which rows it calibrates, how it steps, when a candidate is given up. Checked here, once;
the values and their defaults are in `config.RoundSettings`."""

from __future__ import annotations

from dataclasses import dataclass

from continual.config import RoundSettings, Settings
from continual.errors import Misconfigured
from continual.objectives.wanted_losses import Wanted
from continual.selection.steps import WHOLE, Stepping
from continual.state.parts import RoundTerms

DAY = 86400.0
"""Seconds."""
UNSUPERVISED = (
    "rounds.unsupervised: entropy in place of labels rewards models that are sure of anything, and diverged where it "
    "was tried; use labels if you can"
)
"""What a user has to know who wants rounds without labels."""


@dataclass(frozen=True, slots=True)
class RoundOptions:
    """The settings of rounds, and what was made of them: the losses that are wanted, how steps are made, and whether
    Frank-Wolfe weighs each layer of a model by itself (`layers`)."""

    settings: RoundSettings
    calibration: Wanted
    stepping: Stepping
    layers: bool

    @classmethod
    def of(cls, settings: RoundSettings, calibration: Wanted) -> RoundOptions:
        """Raises Misconfigured naming a setting that cannot be used."""
        s = settings
        for name, value, fine, allowed in (
            ("trial", s.trial, 0 < s.trial <= 1, "above 0 and at most 1"),
            ("sigmas", s.sigmas, s.sigmas >= 0, "at least 0"),
            ("stays", s.stays, 0 <= s.stays <= s.sigmas, "from 0 to sigmas"),
            ("patience", s.patience, s.patience >= 1, "at least 1"),
            ("age", s.age, s.age > 0, "above 0"),
            ("most", s.most, s.most >= 1, "at least 1"),
            ("size", s.size, s.size >= 1, "at least 1"),
            ("wait", s.wait, s.wait >= 0, "at least 0"),
        ):
            if not fine:
                raise Misconfigured(f"rounds: {name} = {value}: it has to be {allowed}")
        stepping = Stepping.of(settings)
        layers = stepping.step == "corrective" if s.layers is None else s.layers
        if layers and stepping.step in WHOLE:
            raise Misconfigured(
                f"rounds: step = {stepping.step} weighs whole models; layers goes with hard and corrective"
            )
        return cls(settings, calibration, stepping, layers)

    def told(self) -> RoundTerms:
        """What a `round` record keeps: all that the choice depends on. A round that was cut off goes on only where the
        next one has the same."""
        s = self.settings
        return RoundTerms(
            trial=s.trial,
            sigmas=s.sigmas,
            stays=s.stays,
            patience=s.patience,
            step=s.step,
            rho=s.rho,
            search=s.search,
            layers=self.layers,
            tolerance=s.tolerance,
            steps=s.steps,
            best=s.best,
            active=s.active,
            inner=s.inner,
            age=s.age,
            most=s.most,
        )


def options_of(settings: Settings) -> RoundOptions:
    """What the settings want of rounds. Raises Misconfigured naming what is missing or cannot be used."""
    if settings.objective is None:
        raise Misconfigured(
            "objective: rounds need to know what is good: causal-lm, classification or heads with a file of rows for "
            "each task, or module:function"
        )
    calibration = Wanted(settings.objective, settings.rows, settings.heads, settings.rounds)
    return RoundOptions.of(settings.rounds, calibration)
