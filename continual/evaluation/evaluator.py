"""The gate that evaluates: the merge as it would be is exported and a command is asked about it, and about the merge in
force, before anything is committed."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path

from continual.config.settings import EvaluationSettings
from continual.errors import Misconfigured, Refuse
from continual.evaluation.scores import Drop, Metric, compare, mean, parse
from continual.state import State
from continual.state.parts import Evaluated
from continual.tuning.command import Command, last_line

Export = Callable[[State, Path], None]
"""Writes the merge of a state, which may be on trial, as a model directory."""


class Evaluator:
    """Asks the command of the settings about the merge with a candidate in it. Keeps what it said of the merge in
    force, by its generation, so that this is asked once in a process. Not thread-safe: one fold at a time.

    `base` finds the directory of the base, which the first fold is compared with; None where it is in no folder.
    """

    def __init__(self, settings: EvaluationSettings, export: Export, base: Callable[[], Path | None]) -> None:
        self._settings = settings
        self._export = export
        self._base = base
        self._known: tuple[str | None, dict[str, Metric]] | None = None

    def __call__(self, trial: State, now: State, name: str) -> Evaluated:
        """What was found of the merge of `trial`, which is that of `now` with the candidate `name`. Raises Refuse:
        `evaluation` where a metric falls by more than it may, or the command fails on it; `unclear` where that may be
        chance. Raises Retry where the command took too long or was killed, Misconfigured where it fails on the merge
        that is in force."""
        before = self._before(now)
        try:
            after = self._asked(trial, f"the merge with {name}")
        except Misconfigured as error:
            if before is None:
                raise
            raise Refuse("evaluation", f"{name}: {error}") from None
        if before is not None:
            wanted = self._settings
            found = compare(before, after, wanted.max_drop, lower=wanted.lower, sigmas=wanted.sigmas)
            if found.worse:
                raise Refuse("evaluation", f"{name}: {_said(found.worse)}; {_allowed(wanted)}")
            if found.unclear and wanted.unclear == "refuse":
                raise Refuse(
                    "unclear",
                    f"{name}: {_said(found.unclear)}, which may be chance; {_allowed(wanted)}; give the command more "
                    "rows, or set evaluation.unclear = fold",
                )
        self._known = trial.ledger.head.generation, after
        return Evaluated(
            after={key: mean(value) for key, value in after.items()},
            before=None if before is None else {key: mean(value) for key, value in before.items()},
        )

    def _before(self, now: State) -> dict[str, Metric] | None:
        generation = now.ledger.head.generation
        if self._known is None or self._known[0] != generation:
            if now.ledger.folds():
                self._known = generation, self._asked(now, "the merge in force")
            elif (base := self._base()) is not None:
                self._known = generation, self._run(base, "the base")
            else:
                return None
        return self._known[1]

    def _asked(self, state: State, what: str) -> dict[str, Metric]:
        with tempfile.TemporaryDirectory(prefix="continual-evaluation-", dir=self._settings.directory) as place:
            model = Path(place) / "model"
            self._export(state, model)
            return self._run(model, what)

    def _run(self, model: Path, what: str) -> dict[str, Metric]:
        command = Command(self._settings.command, timeout=self._settings.timeout)
        with tempfile.TemporaryDirectory(prefix="continual-evaluation-") as logs:
            line = last_line(command, model, Path(logs), what)
        try:
            return parse(line)
        except ValueError as error:
            raise Misconfigured(f"evaluation of {what}: {error}") from None


def _said(drops: tuple[Drop, ...]) -> str:
    """Each metric that fell, for people."""
    told = [
        f"{one.name} is missing"
        if one.drop == float("inf")
        else f"{one.name} is worse by {one.drop:.4g}" + (f" ± {one.error:.2g}" if one.error else "")
        for one in drops
    ]
    return "the merge with it is worse than the one in force: " + ", ".join(told)


def _allowed(settings: EvaluationSettings) -> str:
    return f"evaluation.max_drop = {settings.max_drop:g}"
