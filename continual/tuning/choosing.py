"""Choosing how the merge is read by what it is worth: X once into a scratch file, a candidate after the other
evaluated, the best recorded. Folds nothing."""

from __future__ import annotations

import math
import shutil
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from continual.engine.engine import Engine
from continual.engine.reading import Reading
from continual.errors import Misconfigured, Retry
from continual.executors.contract import Progress
from continual.objectives import objectives
from continual.publish import folder
from continual.records import Entry
from continual.rules import ReadOptions, read_options
from continual.rules.scale import POLICIES, Policy
from continual.state import Commit
from continual.state.durable import environment
from continual.state.transaction import room
from continual.tensors import Folder
from continual.tensors.checkpoint import open_checkpoint
from continual.tuning import command, record, scratch
from continual.tuning import scoring as rows
from continual.tuning.search import LEAST, Space, Trial, best, search

Evaluation = command.Command | objectives.Ask
Evaluate = Callable[[Reading], float]


@dataclass(frozen=True, slots=True)
class Tuning:
    """What to try: so many candidates, over the value of `policy` (default: the one in force) around `around` (default:
    as it is read now), and over LiNeS' slope where `lines`. `work` is where the scratch file goes (default: the
    system's place for temporary files); `dry_run` records nothing."""

    candidates: int = 20
    policy: Policy | None = None
    around: float | None = None
    lines: bool = False
    work: Path | None = None
    dry_run: bool = False

    def __post_init__(self) -> None:
        if self.candidates < LEAST:
            raise Misconfigured(f"candidates = {self.candidates}: a search takes at least {LEAST}")
        if self.policy is not None and self.policy not in POLICIES:
            raise Misconfigured(f"policy = {self.policy}: use one of {', '.join(POLICIES)}")
        if self.work is not None and not self.work.is_dir():
            raise Misconfigured(f"work = {self.work}: no such directory")


@dataclass(frozen=True, slots=True)
class Tuned:
    """What came of it: `numbers` is what the record keeps (FORMAT.md), `commit` the record, None where nothing was
    recorded."""

    read: ReadOptions
    score: float
    before: float
    numbers: dict[str, Any]
    commit: Commit | None


Told = Callable[[ReadOptions, float], None]
"""Called with each candidate and its score when it is done."""


def tune(
    engine: Engine,
    reading: Reading,
    evaluation: Evaluation,
    tuning: Tuning,
    progress: Progress,
    told: Told | None = None,
) -> Tuned:
    """Finds how the merge that `reading` reads is worth most, and records it.

    Raises Misconfigured where nothing is folded or the evaluation cannot be used, Retry where the environment got in
    the way or the state moved on meanwhile; then nothing is recorded.
    """
    state, started = engine.state, time.perf_counter()
    folds = len(state.ledger.folds(at=reading.commit.seq))
    if not folds:
        raise Misconfigured(f"{state.path}: nothing is folded yet, so there is nothing to tune; fold a model first")
    if tuning.policy == "spread":
        read_options(engine.rule.name, "spread")  # not every rule knows it
    lower = isinstance(evaluation, command.Command) and evaluation.lower
    with _place(tuning.work) as place, _evaluator(engine, evaluation, place, progress) as evaluate:
        room(
            place,
            scratch.nbytes(reading) + (engine.base.checkpoint.nbytes if isinstance(evaluation, command.Command) else 0),
            "tuning",
        )
        kept = _kept(evaluation)
        file = place / "merged.safetensors"
        scratch.write(reading, file, engine.executor, progress)
        with open_checkpoint(Folder(file)) as opened:
            done = 0
            progress("tune", 0, tuning.candidates)

            def worth(options: ReadOptions) -> float:
                nonlocal done
                candidate = scratch.Scratch(reading, opened, options)
                candidate.settle(engine.executor, progress)
                score = evaluate(candidate)
                done += 1
                progress("tune", done, tuning.candidates)
                if told is not None and math.isfinite(score):
                    told(options, score)
                return -score if lower else score

            trials = search(worth, space_of(reading, tuning))
    top = best(trials)
    found = record.numbers(trials, kept, round(time.perf_counter() - started, 3), folds)
    score = record.row(top, lower=lower)["score"]
    commit = None if tuning.dry_run else _record(engine, reading, top, found, score)
    return Tuned(top.options, score, found["before"]["score"], found, commit)


def space_of(reading: Reading, tuning: Tuning) -> Space:
    """Where to look, once X was measured: around what is in force, said in the policy asked for where that reads the
    same."""
    now, size, totals = reading.options, reading.size(), reading.totals
    policy = tuning.policy or now.policy
    read = now.factors(totals, size)
    unit = ReadOptions(policy, 1.0).factors(totals, size)[0]
    if not unit:
        raise Misconfigured(
            f"there is nothing that the scale {policy} would make longer: the merged task vector is zero"
        )
    most = math.inf  # from where on a value reads as this one does
    if policy == "norm":
        most = float(f"{ReadOptions('norm', 1e300).factors(totals, size)[0] / unit:.6g}")
    value = now.value if policy == now.policy else read[0] / unit
    start = now
    if policy != now.policy and (policy == "number" or value > 0):
        said = ReadOptions(policy, value, now.lines)
        if all(math.isclose(a, b, rel_tol=1e-9) for a, b in zip(said.factors(totals, size), read, strict=True)):
            start = said
    if tuning.around is None and (value == 0 or (policy != "number" and value < 0)):
        raise Misconfigured(
            f"the scale in force is {now.scale}, around which there is nothing to search: say where with --around"
        )
    around = value if tuning.around is None else tuning.around
    return Space(start, tuning.candidates, policy, min(around, most), most, tuning.lines)


@contextmanager
def _place(work: Path | None) -> Iterator[Path]:
    """A directory for what is written meanwhile; gone afterwards. Its name begins with a dot, so no watched folder
    takes what is in it."""
    with environment("cannot make a scratch directory"):
        made = tempfile.TemporaryDirectory(
            prefix=".continual-tune-", dir=work and work.absolute(), ignore_cleanup_errors=True
        )
    with made as place:
        yield Path(place)


@contextmanager
def _evaluator(engine: Engine, evaluation: Evaluation, place: Path, progress: Progress) -> Iterator[Evaluate]:
    """What a reading is worth, by what was asked for."""
    base, executor = engine.base, engine.executor
    if isinstance(evaluation, command.Command):
        model = place / "model"

        def export(reading: Reading) -> float:
            try:
                with environment(f"cannot write in {place}"):
                    model.mkdir()
                    folder.fill(base, reading, folder.Target(model), model, executor, progress)
                    return command.score(evaluation, model, place, str(reading.options))
            finally:
                shutil.rmtree(model, ignore_errors=True)

        yield export
        return
    objective = objectives.load(evaluation, base.checkpoint.directory, engine.device)
    held = rows.places(objective.model, base)
    yield lambda reading: rows.score(objective, held, base, reading, executor)


def _kept(evaluation: Evaluation) -> dict[str, Any]:
    return evaluation.told() if isinstance(evaluation, command.Command) else rows.told(evaluation)


def _record(engine: Engine, reading: Reading, top: Trial, numbers: dict[str, Any], score: float) -> Commit:
    state = engine.state
    if state.ledger.head.generation != reading.commit.generation:
        raise Retry(
            f"record {state.ledger.head.seq} changed the merge while it was tuned; nothing was recorded, tune again"
        )
    before = numbers["before"]
    message = f"scale {top.options}: {score:.6g} against {before['score']:.6g} at {before['scale']}, {len(numbers['trials'])} candidates"
    return state.record(Entry(kind="tune", read=top.options.to_mapping(), numbers=numbers, message=message))
