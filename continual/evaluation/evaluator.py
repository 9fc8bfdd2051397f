"""The gate that evaluates: the merge as it would be is asked about, and the merge in force on the same rows, before
anything is committed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from continual.config.evaluating import EvaluationSettings
from continual.engine.resources import Opinion
from continual.engine.staging import without_folds
from continual.errors import Misconfigured, Refuse, Retry
from continual.evaluation.askers import AskedMerge, Asker, Files
from continual.evaluation.scores import mean
from continual.evaluation.verdict import Answers, Drop, Verdict, decide
from continual.state import State
from continual.state.parts import Evaluated
from continual.tuning.command import CommandFailed

_BASE = "base"


class Evaluator:
    """Asks about the merge with a candidate in it, with more rows where they do not tell. Keeps what was said of the
    merge in force and of the base, so that each is asked once in a process. Not thread-safe: one fold at a time."""

    def __init__(self, settings: EvaluationSettings, asker: Asker, merge_of: Callable[[State], AskedMerge]) -> None:
        self._settings = settings
        self._asked = merge_of
        self._ask = asker
        self._known: dict[tuple[str, int], Answers | None] = {}
        self._files: Files = ()
        self._looks = list(looks(settings)) if asker.grows else [settings.first_rows]

    def __call__(self, trial: State, now: State, name: str) -> Opinion:
        """What was found of the merge of `trial`, which is that of `now` with the candidate `name`. Raises Refuse:
        `evaluation` where it fails, or cannot be asked; `unclear` where all the rows do not tell. Raises Retry where
        the environment got in the way, Misconfigured where the merge that is in force cannot be asked."""
        generation = _merge_of(now)
        self._forget_all_but(generation)
        past = [one for fold in now.ledger.folds() if (one := fold.entry.numbers.evaluated) is not None]
        for rows in self._looks:
            before = self._said(now, generation, rows, "the merge in force")
            base = self._of_base(now, before, generation, rows)
            after = self._of_trial(trial, name, rows, first=before is None)
            if before is not None and _counts(before) != _counts(after):  # of other rows than it was asked by once
                del self._known[generation, rows]
                before = self._said(now, generation, rows, "the merge in force")
            if not {*self._files}.issuperset(self._ask.asked_by()):
                raise Retry(f"{name}: what the evaluation asks by was changed while it was asked; it is asked again")
            found = decide(after, before, base, self._settings, len(self._looks), past)
            if found.word != "inconclusive" or not _more(after, rows):
                break
        if found.failed:
            raise self._refuse("evaluation", f"{name}: the merge with it fails: {_said(found.failed)}")
        said = f"{name}: {_said(found.unclear)}: its rows do not tell whether that is chance" if found.unclear else None
        if said is not None and self._settings.inconclusive != "fold":
            reason = "unclear" if self._settings.inconclusive == "hold" else "evaluation"
            raise self._refuse(reason, f"{said}; give it more rows, or set evaluation.inconclusive = fold")
        self._known[_merge_of(trial), rows] = after
        return Opinion(_record(found, after, before, base), said)

    def _of_trial(self, trial: State, name: str, rows: int, *, first: bool) -> Answers:
        """What is said of the merge with the candidate in it. `first`: nothing else was asked before, so that it is not
        known whose fault it is where nothing is said."""
        try:
            found = self._ask(self._asked(trial), f"the merge with {name}", rows)
        except CommandFailed as error:
            if first:
                raise
            raise self._refuse("evaluation", f"{name}: {error}") from None
        assert found is not None, "a merge with a fold is exported"
        return found

    def _of_base(self, now: State, before: Answers | None, generation: str, rows: int) -> Answers | None:
        """What is said of the base, where a limit goes by that. Raises Misconfigured where it cannot be asked."""
        if self._settings.max_drop_base is None:
            return None
        found = before if generation == _BASE else self._said(without_folds(now), _BASE, rows, "the base")
        if found is None:
            raise Misconfigured("evaluation.max_drop_base: the base is in no folder of this machine: name it by --base")
        return found

    def _said(self, state: State, generation: str, rows: int, what: str) -> Answers | None:
        if (generation, rows) not in self._known:
            called = "the base" if generation == _BASE else what
            self._known[generation, rows] = self._ask(self._asked(state), called, rows)
        return self._known[generation, rows]

    def _forget_all_but(self, generation: str) -> None:
        """Forgets what was said of other merges, and all of it where it was said by other files."""
        files = self._ask.asked_by()
        if not {*self._files}.issuperset(files):
            self._known = {}
        self._files = files
        self._known = {key: value for key, value in self._known.items() if key[0] in (generation, _BASE)}

    def _refuse(self, reason: str, message: str) -> Refuse:
        """A refusal that stands while the limits and the rows are what they are."""
        refusal = Refuse(reason, message)
        refusal.settings = self._settings.values
        return refusal


def _merge_of(state: State) -> str:
    """A word for the merge of a state and how it is read."""
    if not state.ledger.folds():
        return _BASE
    model = state.ledger.model
    return f"{None if model is None else model.seq} {state.ledger.head.generation}"


def looks(settings: EvaluationSettings) -> Sequence[int]:
    """How many rows of each task are asked, one time after the other: twice as many each time."""
    found = [min(settings.first_rows, settings.max_rows)]
    while found[-1] < settings.max_rows:
        found.append(min(2 * found[-1], settings.max_rows))
    return found


def _counts(answers: Answers) -> Mapping[str, int | None]:
    """How many rows each metric has."""
    return {name: len(value) if isinstance(value, tuple) else None for name, value in answers.metrics.items()}


def _more(after: Answers, rows: int) -> bool:
    """Whether a task may have more rows than were asked."""
    return any(isinstance(value, tuple) and len(value) >= rows for value in after.metrics.values())


def _said(drops: Sequence[Drop]) -> str:
    return ", ".join(map(str, drops))


def _record(found: Verdict, after: Answers, before: Answers | None, base: Answers | None) -> Evaluated:
    errors = {drop.name: drop.error for drop in found.drops if drop.error is not None and drop.beside != "the base"}
    return Evaluated(
        after=_means(after),
        before=None if before is None else _means(before),
        base=None if base is None else _means(base),
        errors=errors or None,
        rows=max((drop.rows for drop in found.drops), default=0) or None,
        verdict=found.word,
    )


def _means(answers: Answers) -> Mapping[str, float]:
    return {key: mean(value) for key, value in answers.metrics.items()}
