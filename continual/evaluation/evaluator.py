"""The gate that evaluates: the merge as it would be is exported and a command is asked about it, and about the merge in
force, before anything is committed."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from continual.config.settings import EvaluationSettings
from continual.errors import Misconfigured, Refuse
from continual.evaluation.scores import Drop, Metric, compare, mean, parse
from continual.outside import few
from continual.state import State
from continual.state.durable import environment
from continual.state.parts import Evaluated
from continual.tuning.choosing import scratch_directory
from continual.tuning.command import Command, CommandFailed, last_line

Export = Callable[[State, Path], None]
"""Writes the merge of a state, which may be on trial, as a model directory."""


class Evaluator:
    """Asks the command of the settings about the merge with a candidate in it. Keeps what it said of the merge in
    force, so that this is asked once in a process, until the merge is another or is read otherwise. Not thread-safe:
    one fold at a time.

    `base` finds the directory of the base, which the first fold is compared with; None where it is in no folder. Once
    `stop` is set the command is ended.
    """

    def __init__(
        self, settings: EvaluationSettings, export: Export, base: Callable[[], Path | None], stop: threading.Event
    ) -> None:
        """Raises Misconfigured for a command that does not name the model."""
        self._command = Command(settings.command, timeout=settings.timeout)
        self._settings = settings
        self._export = export
        self._base = base
        self._stop = stop
        self._known: tuple[object, dict[str, Metric]] | None = None

    def __call__(self, trial: State, now: State, name: str) -> Evaluated:
        """What was found of the merge of `trial`, which is that of `now` with the candidate `name`. Raises Refuse:
        `evaluation` where a metric falls by more than it may, or the command fails on it; `unclear` where that may be
        chance. Raises Retry where the command took too long or was killed, or the disk got in the way, Abandoned,
        Misconfigured where it fails on the merge that is in force."""
        before = self._before(now)
        if before is not None:
            self._check_lower(before)
        try:
            after = self._asked(trial, f"the merge with {name}")
        except CommandFailed as error:
            if before is None:
                raise
            raise self._refusal("evaluation", f"{name}: {error}") from None
        if before is not None:
            wanted = self._settings
            found = compare(before, after, wanted.max_drop, lower=wanted.lower, sigmas=wanted.sigmas)
            if found.worse:
                raise self._refusal(
                    "evaluation", f"{name}: {_said(found.worse)}; {_allowed(wanted)}", "max_drop", "lower"
                )
            if found.unclear and wanted.unclear == "refuse":
                raise self._refusal(
                    "unclear",
                    f"{name}: {_said(found.unclear)}, which may be chance; {_allowed(wanted)}; give the command more "
                    "rows, or set evaluation.unclear = fold",
                    "max_drop",
                    "lower",
                    "sigmas",
                    "unclear",
                )
        else:
            self._check_lower(after)
        self._known = _read_at(trial), after
        return Evaluated(
            after={key: mean(value) for key, value in after.items()},
            before=None if before is None else {key: mean(value) for key, value in before.items()},
        )

    def _check_lower(self, metrics: Mapping[str, Metric]) -> None:
        """Raises Misconfigured where less is said to be better of a metric that there is not: it may be another's
        name."""
        unknown = [one for one in self._settings.lower if one not in metrics]
        if unknown:
            raise Misconfigured(
                f"evaluation.lower: the command prints no metric {', '.join(unknown)}; it prints {few(metrics)}"
            )

    def _refusal(self, reason: str, message: str, *by: str) -> Refuse:
        """A refusal that stands as long as the command and the settings `by` have these values."""
        found, values = Refuse(reason, message), self._settings.model_dump(mode="json")
        found.settings = {f"evaluation.{name}": values[name] for name in ("command", *by)}
        return found

    def _before(self, now: State) -> dict[str, Metric] | None:
        read = _read_at(now)
        if self._known is None or self._known[0] != read:
            if now.ledger.folds():
                self._known = read, self._asked(now, "the merge in force")
            elif (base := self._base()) is not None:
                with self._scratch() as place:
                    self._known = read, self._run(base, place, "the base")
            else:
                return None
        return self._known[1]

    def _asked(self, state: State, what: str) -> dict[str, Metric]:
        with self._scratch() as place:
            self._export(state, place / "model")
            return self._run(place / "model", place, what)

    @contextmanager
    def _scratch(self) -> Iterator[Path]:
        """Where the model and what the command prints are; gone afterwards. Raises Retry, Misconfigured."""
        directory = self._settings.directory
        if directory is not None and not directory.is_dir():
            raise Misconfigured(f"evaluation.directory = {directory}: no such directory; make it, or name another")
        with environment("cannot evaluate"), scratch_directory(directory) as place:
            yield place

    def _run(self, model: Path, logs: Path, what: str) -> dict[str, Metric]:
        asked = f"evaluation.command, asked about {what}"
        line = last_line(self._command, model, logs, asked, self._stop)
        try:
            return parse(line)
        except ValueError as error:
            raise CommandFailed(f"{asked}: {error}") from None


def _read_at(state: State) -> object:
    """What tells the merge in force from any other, also from one that is only read otherwise."""
    model = state.ledger.model
    return None if model is None else model.seq, state.ledger.head.generation


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
