"""What folding a model into a state, and exporting it, will take; of a state that is there, or of one of a base of
which there may be no more than the headers."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from continual.api import Merge
from continual.config import Settings
from continual.engine import planning
from continual.engine.needs import need, state_bytes
from continual.engine.outcomes import OpenCandidate, Plan
from continual.engine.views import ReadView
from continual.errors import Misconfigured
from continual.executors.local import Local
from continual.forecast import machine, sample
from continual.forecast.forecast import Costs, Footprint, Forecast
from continual.forecast.machine import Machine
from continual.forecast.sample import How, Sample
from continual.making import Recipe, described, survey
from continual.records import ITEMSIZE, Lineage, TensorSpec
from continual.rules import ReadAs, ReadOptions, Rule, read_as, readings, rule
from continual.tensors import TaskVectors
from continual.texts import duration, size

if TYPE_CHECKING:
    from continual.hub import Hub

OTHERS = ("task-arithmetic", "iso-c")
"""Rules that cost little, against which another is held."""
_READINGS = 3


@dataclass(frozen=True, slots=True)
class Cheaper:
    """What would take less: what is to be changed, and what is then taken in place of what."""

    change: str
    gain: str


@dataclass(frozen=True, slots=True)
class Outlook:
    """What a fold and an export take. `state_bytes`: of a generation; `kept_bytes`: of as many as the settings keep,
    and the one that is written."""

    rule: str
    fold: Forecast
    export: Forecast
    state_bytes: int
    kept_bytes: int
    cheaper: tuple[Cheaper, ...]
    machine: Machine


class Job(NamedTuple):
    """What is asked about: the tensors of the base, and names of those that are folded; peak bytes of tensors in
    flight; bytes of the generation that is written and of a whole one; how many models are in the merge; the CPU
    seconds that a command takes to begin."""

    specs: Sequence[TensorSpec]
    folded: frozenset[str]
    memory: int
    writes: int
    generation: int
    merged: float
    opening: float


def planned(merge: Merge, model: str | Path, opening: float) -> tuple[Plan, Outlook | None]:
    """What `Merge.plan` says of a model; and the outlook where it would be folded, and is a full fine-tune for a state
    of whole tensors by a rule that weights are enough for. `opening`: CPU seconds that a command takes to begin. Raises
    Misconfigured if there is no such model, Retry."""
    found: list[Outlook] = []

    def seen(opened: OpenCandidate, plan: Plan) -> None:
        if merge.state.format.form is None and opened.candidate.form == "full" and _takes_weights(merge.rule):
            found.append(of_candidate(merge, opened, plan.memory_bytes, opening))

    plan = planning.plan(merge.engine, merge.places.named(model), seen)
    return plan, found[0] if found else None


def of_candidate(merge: Merge, opened: OpenCandidate, memory: int, opening: float) -> Outlook:
    """Of folding a full fine-tune that the gates let in; `memory` as its plan says. Raises Retry."""
    form, made = merge.state.format, merge.rule
    now = merge.scale()
    others = [name for name in readings(made) if name != (now.rule or made.name) and _reads(made, now, name)][
        :_READINGS
    ]
    views = [ReadView(rule=now.rule, scale=now.scale), *(ReadView(rule=name) for name in others)]
    job = Job(
        form.tensors,
        frozenset(opened.lineage.folded),
        memory,
        form.bytes_of(opened.lineage.folded),
        form.generation_bytes,
        merge.state.ledger.totals.count,
        opening,
    )
    taken, on, held = _tried(How(made, views, merge.settings), job)
    found = _outlook(made, taken, on, job, held, merge.settings)
    more = list(found.cheaper)
    for other, name in zip(taken.exports[1:], others, strict=True):
        export = _export(other, taken, on, job, held)
        if export.cpu_seconds < 0.8 * found.export.cpu_seconds:
            gain = f"an export of {_said(export.seconds)} in place of {_said(found.export.seconds)}"
            more.append(Cheaper(f"read by {name} (continual scale --rule {name}), another merge", gain))
    return replace(found, cheaper=tuple(more))


def of_base(base: str | Path, recipe: Recipe, settings: Settings, opening: float, client: Hub | None = None) -> Outlook:
    """Of a state that would be made of `base`, and a full fine-tune of all of it. Of the base headers are enough: a
    weight file may end behind its own. Raises as `continual.making.survey`, and Misconfigured for a rule that takes
    more than weights."""
    made = rule(recipe.rule_name, recipe.options)
    if not _takes_weights(made):
        raise Misconfigured(f"{made.name}: it takes more than the weights of fine-tunes, and no sample has that")
    with _shapes(base) as there:
        with described(there, recipe, client=client) as model:
            folded = [spec for spec in model.specs if spec.kind != "carried"]
            names = tuple(spec.name for spec in folded)
            vectors = TaskVectors(model, model.checkpoint, Lineage(names))
            budget = Local(settings.workers, settings.memory)
            specs = model.specs
            jobs = {
                one.name: Job(
                    specs,
                    frozenset(names),
                    planning.peak(budget, [need(one, spec, vectors) for spec in folded]),
                    state_bytes(one, specs),
                    state_bytes(one, specs),
                    1.0,
                    opening,
                )
                for one in (made, *(rule(name) for name in OTHERS if name != recipe.rule_name))
            }
        widths = {width: survey(there, replace(recipe, width=width), client=client).state_bytes for width in (256, 64)}
    view = ReadView(scale=recipe.scale, lines=recipe.lines)
    taken, on, held = _tried(How(made, [view], settings), jobs[made.name])
    found = _outlook(made, taken, on, jobs[made.name], held, settings)
    more = list(found.cheaper)
    for name, job in jobs.items():
        if name != made.name:
            other = rule(name)
            tried, _, _ = _tried(How(other, [ReadView()], settings), job, on)
            more += _against(found, _outlook(other, tried, on, job, held, settings))
    kept = " or ".join(f"{size(nbytes)} of width {width}" for width, nbytes in widths.items())
    gain = f"a generation of what they take, at most {kept}, in place of {size(found.state_bytes)}"
    more.append(Cheaper("where only adapters come: init --adapters", gain))
    return replace(found, cheaper=tuple(more))


def _takes_weights(made: Rule) -> bool:
    """Whether nothing but the weights of a fine-tune is folded, one after the other."""
    return made.needs.shipped is None and not made.needs.inputs and not made.laws.rounds


def _reads(made: Rule, now: ReadOptions, name: str) -> bool:
    """Whether a rule reads the state at the scale that is its default."""
    with contextlib.suppress(Misconfigured):
        read_as(made, now, ReadAs(rule=name))
        return True
    return False


def _tried(how: How, job: Job, on: Machine | None = None) -> tuple[Sample, Machine, int]:
    """A sample, what the machine can do (where that is not known), and the bytes that the process holds before."""
    held = _held()
    directory = machine.beside(how.settings.state)
    threads = Local(how.settings.workers, how.settings.memory).workers
    on = on or machine.measure(directory, threads)
    return sample.take(how, job.specs, directory), on, held


def _outlook(made: Rule, taken: Sample, on: Machine, job: Job, held: int, settings: Settings) -> Outlook:
    folds = Costs(taken, taken.later if job.merged else taken.first, made, on)
    folded = [spec for spec in job.specs if spec.name in job.folded]
    fold = folds.forecast(folded, Footprint(held + job.memory, job.writes), job.opening)
    export = _export(taken.exports[0], taken, on, job, held)
    kept = job.generation * settings.keep + job.writes
    cheaper = []
    cores = len(os.sched_getaffinity(0))
    if on.threads < cores:
        wide = replace(on, threads=cores)
        more = Costs(taken, taken.later, made, wide).forecast(folded, Footprint(0, 0), job.opening).seconds
        cheaper.append(Cheaper(f"workers = {cores} (each takes memory)", f"a fold of {_said(more)}"))
    if on.threads > 1:
        alone = held + job.memory // on.threads
        cheaper.append(
            Cheaper("workers = 1", f"about {size(alone)} of memory at a fold in place of {size(fold.memory_bytes)}")
        )
    if settings.keep > 1:
        cheaper.append(
            Cheaper(
                "keep = 1",
                f"at most {size(kept - job.generation * (settings.keep - 1))} of disk in place of {size(kept)}",
            )
        )
    if made.needs.seeded:
        cheaper.append(Cheaper("no transform that draws at random", "one pass less over each fine-tune"))
    return Outlook(made.name, fold, export, job.generation, kept, tuple(cheaper), on)


def _export(one: sample.ExportSample, taken: Sample, on: Machine, job: Job, held: int) -> Forecast:
    """An export of the whole model in the dtypes of the base."""
    nbytes = sum(spec.numel * ITEMSIZE[spec.dtype] for spec in job.specs)
    room = Footprint(held + one.memory, nbytes + one.scratch)
    return Costs(taken, one.work, one.rule, on).forecast(job.specs, room, job.opening)


def _against(found: Outlook, other: Outlook) -> Iterator[Cheaper]:
    """What another rule would save, if anything."""
    now, then = found.fold.cpu_seconds + found.export.cpu_seconds, other.fold.cpu_seconds + other.export.cpu_seconds
    if then < 0.8 * now or other.state_bytes < 0.8 * found.state_bytes:
        gain = (
            f"a fold of {_said(other.fold.seconds)} and an export of {_said(other.export.seconds)} in place of "
            f"{_said(found.fold.seconds)} and {_said(found.export.seconds)}"
        )
        if other.state_bytes != found.state_bytes:
            gain += f"; a generation of {size(other.state_bytes)} in place of {size(found.state_bytes)}"
        yield Cheaper(f"init --rule {other.rule}, another merge", gain)


def _said(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds < 60 else duration(seconds)


def _held() -> int:
    """Bytes of memory that this process has now."""
    with open("/proc/self/statm", encoding="ascii") as line:
        return int(line.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


@contextlib.contextmanager
def _shapes(base: str | Path) -> Iterator[str | Path]:
    """A base of which weight files end behind their headers: a copy, gone afterwards, whose files are as long as the
    headers say, and empty. Any other as it is."""
    place = Path(base)
    files = sorted(place.glob("*.safetensors")) if place.is_dir() else [place] if place.is_file() else []
    if not any(_is_header(file) for file in files):
        yield base
        return
    with tempfile.TemporaryDirectory(prefix="continual-") as made:
        beside = [file for file in place.glob("*.json") if file.is_file()] if place.is_dir() else []
        for file in beside:
            shutil.copyfile(file, Path(made) / file.name)
        if not (Path(made) / "config.json").exists():
            (Path(made) / "config.json").write_text("{}")
        for file in files:
            copy = Path(made) / (file.name if place.is_dir() else "model.safetensors")
            with file.open("rb") as source, copy.open("wb") as target:
                head = source.read(8 + _length(file))
                target.write(head)
                target.truncate(len(head) + _data(head[8:]))
        yield made


def _is_header(file: Path) -> bool:
    """Whether a safetensors file has a header and nothing else."""
    return file.stat().st_size > 8 and file.stat().st_size == 8 + _length(file)


def _length(file: Path) -> int:
    with file.open("rb") as source:
        return int.from_bytes(source.read(8), "little")


def _data(head: bytes) -> int:
    """Bytes of the tensors that a header tells of; what is wrong with it is said when the file is opened."""
    with contextlib.suppress(ValueError, TypeError, KeyError, AttributeError):
        body = json.loads(head)
        return max((int(one["data_offsets"][1]) for name, one in body.items() if name != "__metadata__"), default=0)
    return 0
