"""Choosing how the merged model is read by what it is worth: X is written once into a scratch file, candidates are
evaluated one after the other, and the best is recorded. Nothing is folded."""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import NamedTuple

from continual.engine.engine import Engine
from continual.engine.reading import Reading
from continual.errors import Misconfigured, Retry
from continual.executors.contract import Executor, Progress
from continual.objectives import builtin
from continual.objectives.parameters import find_parameters
from continual.publish import folder
from continual.records import ObjectiveRecord
from continual.rules import ReadAs, ReadOptions, read_as
from continual.rules.scale import POLICIES, Policy
from continual.state import Commit, State
from continual.state.durable import environment, usable
from continual.state.entries import TuneEntry
from continual.state.parts import CommandEvaluation, RowsEvaluation
from continual.state.transaction import room
from continual.tensors.layouts.in_classes import elsewhere
from continual.tuning import command, record, scoring, scratch
from continual.tuning.search import LEAST, Range, Trial, best, search

Evaluation = command.Command | builtin.Rows
Evaluate = Callable[[Reading], float]
Told = Callable[[ReadOptions, float], None]
"""Called with each candidate and its score when it is done."""


_SCRATCH = ".continual-tune-"


@dataclass(frozen=True, slots=True)
class Tuning:
    """What to try: so many candidates, over the value of `policy` (default: the policy in force) around `around`
    (default: the value as the merged model is read now), and over LiNeS' slope where `lines`. `work` is the directory
    that the scratch file goes to (default: the system's, for temporary files). `dry_run` records nothing. `rule` is the
    rule to read by, one of those that can read the state (default: the one in force).

    Raises Misconfigured naming what cannot be used, Retry where the disk gets in the way.
    """

    candidates: int = 20
    policy: Policy | None = None
    around: float | None = None
    lines: bool = False
    work: str | Path | None = None
    dry_run: bool = False
    rule: str | None = None

    @property
    def scale(self) -> str | None:
        """With another rule: the scale to begin at, where the policy is not the one that it is read by by default."""
        return None if self.rule is None or self.policy is None else {"number": "1"}.get(self.policy, self.policy)

    def __post_init__(self) -> None:
        if self.candidates < LEAST:
            raise Misconfigured(f"candidates = {self.candidates}: a search takes at least {LEAST}")
        if self.policy is not None and self.policy not in POLICIES:
            raise Misconfigured(f"policy = {self.policy}: use one of {', '.join(POLICIES)}")
        check_work(self.work)


def check_work(work: str | Path | None) -> None:
    """Raises Misconfigured where the directory for scratch files is none, Retry where that cannot be seen."""
    if work is not None:
        with usable(f"work = {work}"):
            there = Path(work).is_dir()
        if not there:
            raise Misconfigured(f"work = {work}: no such directory")


@dataclass(frozen=True, slots=True)
class Tuned:
    """What a tuning found: the best way to read the merged model (`read`), its score, and the score of the way that was
    in force (`before`). `entry` is what the record keeps; `commit` the record, None where nothing was recorded."""

    read: ReadOptions
    score: float
    before: float
    entry: TuneEntry
    commit: Commit | None


def tune(
    engine: Engine,
    reading: Reading,
    evaluation: Evaluation,
    tuning: Tuning,
    progress: Progress,
    told: Told | None = None,
) -> Tuned:
    """Finds how the merged model that `reading` reads is worth most, and records it.

    Raises Misconfigured where nothing is folded or the evaluation cannot be used, Retry where the environment got in
    the way or the state moved on meanwhile; then nothing is recorded.
    """
    state = engine.state
    started = time.perf_counter()
    check_folded(state, reading)
    if tuning.policy == "spread":
        blocks = state.format.form is not None
        read_as(engine.rule, reading.options, ReadAs(reading.rule.name, "spread"), blocks=blocks)  # raises
    is_command = isinstance(evaluation, command.Command)
    lower = isinstance(evaluation, command.Command) and evaluation.lower
    with scratch_directory(tuning.work) as work, evaluator(engine, evaluation, work, progress) as evaluate:
        room(work, scratch.nbytes(reading) + (engine.base.checkpoint.nbytes if is_command else 0), "tuning")
        kept = evaluation.told() if isinstance(evaluation, command.Command) else scoring.told(evaluation)
        with scratch.written(reading, work, engine.executor, progress) as made:
            worth = counted(made, evaluate, tuning.candidates, engine.executor, progress, told)
            trials = search(lambda options: -worth(options) if lower else worth(options), range_of(reading, tuning))
    found = Found(trials, kept, lower, time.perf_counter() - started)
    return settled(engine, reading, found, dry_run=tuning.dry_run)


def check_folded(state: State, reading: Reading) -> None:
    """Raises Misconfigured where nothing is folded."""
    if not state.ledger.folds(reading.commit.seq):
        raise Misconfigured(f"{state.path}: nothing is folded yet, so there is nothing to tune; fold a model first")


class Found(NamedTuple):
    """What a search found: its trials, what the record keeps of the evaluation, whether lower scores are better, the
    seconds that it took, and how far what must stay may go, where anything must."""

    trials: Sequence[Trial]
    evaluation: CommandEvaluation | ObjectiveRecord | RowsEvaluation
    lower: bool
    seconds: float
    drift: float | None = None


def counted(
    made: Callable[[ReadOptions], Reading],
    evaluate: Evaluate,
    count: int,
    executor: Executor,
    progress: Progress,
    told: Told | None,
) -> Callable[[ReadOptions], float]:
    """What says the score of the reading that `made` makes of options, and tells of each."""
    done = 0
    progress("tune", 0, count)

    def worth(options: ReadOptions) -> float:
        nonlocal done
        candidate = made(options)
        candidate.settle(executor, progress)
        score = evaluate(candidate)
        done += 1
        progress("tune", done, count)
        if told is not None and math.isfinite(score):
            told(options, score)
        return score

    return worth


def settled(engine: Engine, reading: Reading, found: Found, *, dry_run: bool) -> Tuned:
    """Records the best of what was found, unless `dry_run`. Raises Retry where the merge is another one meanwhile."""
    top = best(found.trials)
    rows = tuple(record.row(trial, lower=found.lower) for trial in found.trials)
    score = record.row(top, lower=found.lower).score
    before = rows[0]
    entry = TuneEntry(
        read=top.options.to_mapping(),
        message=f"scale {top.options}: {score:.6g} against {before.score:.6g} at {before.scale}, "
        f"{len(rows)} candidates",
        trials=rows,
        before=before,
        evaluation=found.evaluation,
        seconds=round(found.seconds, 3),
        folds=len(engine.state.ledger.folds(reading.commit.seq)),
        drift=found.drift,
    )
    commit = None if dry_run else _record(engine, reading, entry)
    return Tuned(top.options, score, before.score, entry, commit)


def range_of(reading: Reading, tuning: Tuning) -> Range:
    """Where to look, once the length of X is known: around what is in force, said in the policy that is tuned where
    that reads the same.

    Raises Misconfigured where no scale makes X longer, and where what is in force is nothing to search around.
    """
    now, size, totals = reading.options, reading.size(), reading.totals
    policy = tuning.policy or now.policy
    read = now.factors(totals, size)
    unit = ReadOptions(policy, 1.0).factors(totals, size)[0]
    if not unit:
        raise Misconfigured(
            f"there is nothing that the scale {policy} would make longer: the merged task vector is zero"
        )
    most = math.inf  # every value above it reads as this one does
    if policy == "norm":
        most = float(f"{ReadOptions('norm', 1e300).factors(totals, size)[0] / unit:.6g}")
    value = now.value if policy == now.policy else read[0] / unit
    start = now
    if policy != now.policy and (policy == "number" or value > 0):
        said = replace(now, policy=policy, value=value)
        if all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(said.factors(totals, size), read, strict=True)):
            start = said
    if tuning.around is None and (value == 0 or (policy != "number" and value < 0)):
        raise Misconfigured(
            f"the scale in force is {now.scale}, around which there is nothing to search: say where with --around"
        )
    around = value if tuning.around is None else tuning.around
    return Range(start, tuning.candidates, policy, min(around, most), most, tuning.lines)


@contextmanager
def scratch_directory(work: str | Path | None) -> Iterator[Path]:
    """A directory for what is written meanwhile; gone afterwards, and what killed processes left there before. Its name
    begins with a dot, so no watched folder takes what is in it. Raises Retry where it cannot be made."""
    with ExitStack() as held:
        with environment("cannot make a scratch directory"):
            parent = Path(tempfile.gettempdir() if work is None else work).absolute()
            folder.clear_leftovers(parent, re.escape(_SCRATCH) + "[a-z0-9_]+")
            directory = held.enter_context(folder.marked(parent, _SCRATCH, mode=0o700))
        yield directory


@contextmanager
def evaluator(engine: Engine, evaluation: Evaluation, work: Path, progress: Progress) -> Iterator[Evaluate]:
    """What says how much a reading is worth. Raises Misconfigured where the evaluation cannot be used."""
    base, executor = engine.base, engine.executor
    if isinstance(evaluation, command.Command):
        model = work / "model"

        def export(reading: Reading) -> float:
            try:
                with environment(f"cannot write in {work}"):
                    model.mkdir()
                    folder.fill(base, reading, folder.Target(model), model, executor, progress)
                    return command.score(evaluation, model, work, str(reading.options))
            finally:
                shutil.rmtree(model, ignore_errors=True)

        yield export
        return
    objective = builtin.load(evaluation, base.checkpoint.directory, engine.device)
    held = find_parameters(objective.model, base.specs, base.aliases, elsewhere(base))
    yield scoring.OnRows(objective, held, base, executor)


def _record(engine: Engine, reading: Reading, entry: TuneEntry) -> Commit:
    """Records what was found. Raises Retry where the merged model is another one than the one that was tuned."""
    state = engine.state
    head = state.ledger.head
    if head.generation != reading.commit.generation:
        raise Retry(f"record {head.seq} changed the merge while it was tuned; nothing was recorded, tune again")
    return state.record(entry)
