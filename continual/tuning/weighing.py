"""The weights of the models of a state of adapters, chosen by what the merge is worth: candidates are read with other
weights and evaluated, one group of models after the other, and the best is recorded. Nothing is folded."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from continual.engine.block_reading import BlockReading
from continual.engine.engine import Engine
from continual.engine.reading import Reading
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.executors.contract import Progress
from continual.rules import ReadOptions
from continual.state.transaction import room
from continual.tuning import choosing, command, scoring, slopes
from continual.tuning.descent import Here, descend
from continual.tuning.search import LEAST, Axis, Trial, climb

MOST = 64.0
"""No weight is made more than so many times larger or smaller."""
_VISIT = 3
"""Evaluations of one group before the next has its turn."""


@dataclass(frozen=True, slots=True)
class Weighing:
    """What to try: so many candidates, over one factor for the weights of each of the `groups`, which are words that
    name models as those of a view; by default every model is a group of its own. `rule` reads, by default the one in
    force. `work` is the directory for scratch files; `dry_run` records nothing.

    Raises Misconfigured for a `work` that is no directory, Retry."""

    candidates: int = 20
    groups: tuple[tuple[str, ...], ...] = ()
    work: str | Path | None = None
    dry_run: bool = False
    rule: str | None = None

    def __post_init__(self) -> None:
        choosing.check_work(self.work)


def weigh(
    engine: Engine,
    reading: Reading,
    evaluation: choosing.Evaluation,
    wanted: Weighing,
    progress: Progress,
    told: choosing.Told | None = None,
) -> choosing.Tuned:
    """Finds with which weights what `reading` reads is worth most, and records it.

    Raises Misconfigured where models cannot be weighed or the evaluation cannot be used, Retry where the environment
    got in the way or the state moved on meanwhile; then nothing is recorded.
    """
    started = time.perf_counter()
    if not isinstance(reading, BlockReading):
        raise Misconfigured(
            f"{reading.state.path} keeps a merge of whole tensors, whose models were weighed as they were folded: only "
            "a state made with 'continual init --adapters' can be read with other weights"
        )
    groups = _groups(reading, wanted.groups)
    is_command = isinstance(evaluation, command.Command)
    downhill = not is_command and slopes.is_sum(reading)
    least = LEAST if downhill else 1 + 2 * len(groups)
    if wanted.candidates < least:
        raise Misconfigured(
            f"candidates = {wanted.candidates}: {len(groups)} weights take at least {least}; name more, or fewer "
            "groups of models"
        )
    lower = isinstance(evaluation, command.Command) and evaluation.lower
    start = _weights(reading)

    def options(factors: Sequence[float]) -> ReadOptions:
        found = dict(start)
        for group, factor in zip(groups, factors, strict=True):
            found |= {key: float(f"{start[key] * factor:.6g}") for key in group}
        return replace(reading.options, weights=tuple(sorted(found.items())))

    def made(read: ReadOptions) -> Reading:
        return BlockReading(engine.state, engine.rule, reading.commit.seq, ReadView(), read)

    with (
        choosing.scratch_directory(wanted.work) as work,
        choosing.evaluator(engine, evaluation, work, progress) as evaluate,
    ):
        if is_command:
            room(work, engine.base.checkpoint.nbytes, "tuning")
        kept = evaluation.told() if isinstance(evaluation, command.Command) else scoring.told(evaluation)
        worth = choosing.counted(made, evaluate, wanted.candidates, engine.executor, progress, told)
        if downhill:
            assert isinstance(evaluate, scoring.OnRows)
            way = _Downhill(reading, groups, evaluate, lambda factors: worth(options(factors)))
            descend(way, len(groups), wanted.candidates, MOST)
            trials = list(way.trials.items())
        else:
            trials = _search(lambda factors: worth(options(factors)), len(groups), wanted.candidates, lower=lower)
    found = [Trial(options(factors), -score if lower else score) for factors, score in trials]
    seconds = time.perf_counter() - started
    return choosing.settled(engine, reading, choosing.Found(found, kept, lower, seconds), dry_run=wanted.dry_run)


class _Downhill:
    """What factors for the groups are worth on calibration rows, and which way the loss falls there."""

    def __init__(
        self,
        reading: BlockReading,
        groups: Sequence[Sequence[str]],
        rows: scoring.OnRows,
        worth: Callable[[Sequence[float]], float],
    ) -> None:
        by_key = {key: number for number, key in _keys(reading).items()}
        self._start, self._rows, self._worth = dict(reading.chosen), rows, worth
        self._groups = [[by_key[key] for key in group] for group in groups]
        self._slopes = slopes.Slopes(reading, self._groups, rows.executor)
        self.trials: dict[tuple[float, ...], float] = {}

    def __call__(self, factors: tuple[float, ...]) -> Here:
        """Raises Misconfigured for a score that is no finite number."""
        self.trials[factors] = _finite(self._worth(factors))
        weights = dict(self._start)
        for group, factor in zip(self._groups, factors, strict=True):
            weights |= {number: self._start[number] * factor for number in group}
        loss = self._rows.objective.backward()
        found = self._slopes.at(weights, self._rows.held)
        self._rows.objective.model.zero_grad(set_to_none=True)
        return Here(loss, found)


def _finite(score: float) -> float:
    if not math.isfinite(score):
        raise Misconfigured(f"a score is {score}; an evaluation has to end in a finite number")
    return score


def _keys(reading: BlockReading) -> dict[int, str]:
    """The key of each model, by its number among the blocks."""
    found = {}
    for fold in reading.state.ledger.folds(at=reading.commit.seq):
        assert fold.entry.numbers.block is not None, "a fold of a state of adapters"
        found[fold.entry.numbers.block] = fold.entry.candidate.key
    return found


def _weights(reading: BlockReading) -> dict[str, float]:
    """The weight that each model is read with now, by its key."""
    keys = _keys(reading)
    return {keys[number]: weight for number, weight in reading.chosen.items()}


def _groups(reading: BlockReading, named: Sequence[Sequence[str]]) -> list[list[str]]:
    """The keys of the models of each group. Raises Misconfigured where there are none, one is in two, or the rule reads
    every model with weight 1."""
    if not reading.chosen:
        raise Misconfigured(f"{reading.state.path}: nothing is folded yet, so there is nothing to weigh")
    if reading.rule.laws.rounds:
        raise Misconfigured(
            f"{reading.rule.name} has the weights that rounds found: name another rule with --rule, as task-arithmetic"
        )
    if not reading.rule.laws.weighted:
        raise Misconfigured(f"{reading.rule.name} reads every model with weight 1: name another rule with --rule")
    if not named:
        return [[key] for key in _weights(reading)]
    folds = reading.state.ledger.folds(at=reading.commit.seq)
    found: list[list[str]] = []
    for words in named:
        keys = ReadView(only=tuple(words)).kept(folds)
        twice = next((fold for fold in folds for group in found if fold.entry.candidate.key in keys & set(group)), None)
        if twice is not None:
            raise Misconfigured(f"group {','.join(words)}: {twice.entry.candidate.name} is in another group already")
        found.append(sorted(keys))
    return found


def _search(
    evaluate: Callable[[Sequence[float]], float], count: int, candidates: int, *, lower: bool
) -> list[tuple[tuple[float, ...], float]]:
    """At most `candidates` trials of `count` factors, the first of them all 1, and the score of each. None is tried
    twice. Raises Misconfigured for a score that is no finite number."""
    trials: dict[tuple[float, ...], float] = {}

    def score(factors: tuple[float, ...]) -> float:
        if factors not in trials:
            trials[factors] = _finite(evaluate(factors))
        return -trials[factors] if lower else trials[factors]

    def left() -> int:
        return candidates - len(trials)

    top = (1.0,) * count
    best = score(top)
    for round_ in range(candidates):
        before = len(trials)
        for index in range(count):
            climbing = _visit(top[index], best, 2.0 ** (1.0 / (1 + round_)), min(_VISIT, left()))
            value = next(climbing, None)
            while value is not None and left():
                factors = (*top[:index], value, *top[index + 1 :])
                found = score(factors)
                value = _sent(climbing, found)
                if found > best:
                    top, best = factors, found
        if len(trials) == before or not left():
            break
    return list(trials.items())


def _visit(now: float, score: float, ratio: float, count: int) -> Generator[float, float, None]:
    """At most `count` values of one factor, around the one it has."""
    axis = Axis(1.0 / MOST, MOST, near=now, geometric=True)
    return climb(axis, [float(f"{now * ratio:.6g}"), float(f"{now / ratio:.6g}")], {now: score}, count)


def _sent(climbing: Generator[float, float, None], score: float) -> float | None:
    try:
        return climbing.send(score)
    except StopIteration:
        return None
