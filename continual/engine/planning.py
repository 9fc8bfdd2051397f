"""What folding a candidate would take, and whether it would be let in: from headers alone."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from continual.engine import block_orders, blocks
from continual.engine.engine import Engine
from continual.engine.needs import need, state_bytes
from continual.engine.outcomes import OpenCandidate, Plan, known_as, tokens_said
from continual.engine.passes import seen_alone
from continual.engine.report import matched
from continual.errors import Refuse, Retry
from continual.executors.contract import Executor
from continual.tensors import Adapter, LayerVectors, Place, TaskVectors, candidate_of, open_model

Seen = Callable[[OpenCandidate, Plan], None]
"""Is given a model that would be folded, with its files open, and its plan."""


def plan(engine: Engine, place: Place, seen: Seen | None = None) -> Plan:
    """Says what folding the model at `place` would take. It reads nothing but headers, and makes no record.

    It never raises for a bad candidate: the plan then says why the model would be kept out. One that would be folded is
    given to `seen`.
    """
    try:
        with open_model(place) as model:
            candidate = candidate_of(model)
            if known := engine.settled(candidate.key):
                message = known_as(candidate.name, known).message
                return _kept_out(candidate.name, place, "known", message, form=candidate.form)
            fits = OpenCandidate.of(engine.gates.at_fold(engine.vet(candidate, model)))
            found = _fitting(engine, fits, place)
            if seen is not None:
                seen(fits, found)
            return found
    except (Refuse, Retry) as error:
        reason = error.reason if isinstance(error, Refuse) else "retry"
        return _kept_out(place.name, place, reason, str(error))


def peak(executor: Executor, needs: list[int]) -> int:
    """The most bytes that tasks of these needs take at a time on `executor`."""
    most = sorted(needs, reverse=True)[: executor.workers]
    return max([min(sum(most), executor.budget), *most[:1]], default=0)


def _kept_out(name: str, place: Place, reason: str, message: str, form: str = "?") -> Plan:
    return Plan(name=name, path=str(place), form=form, ok=False, reason=reason, message=message)


class _Costs(NamedTuple):
    """What a fold takes: how often the candidate is read, bytes read and written, bytes of each tensor in memory."""

    passes: float
    read: int
    disk: int
    needs: list[int]


def _costs(engine: Engine, opened: OpenCandidate) -> _Costs:
    """Of a fold into whole tensors."""
    candidate, model, lineage = opened.candidate, opened.model, opened.lineage
    rule = engine.rule
    specs = {spec.name: spec for spec in engine.base.specs}
    shipped = engine.shipped(model, lineage)
    if shipped is not None:
        shipped.close()
    vectors = TaskVectors(engine.base, model, lineage, shipped=shipped)
    passes = 1.0 + rule.needs.seeded + (rule.needs.measure.usual if rule.needs.measure else 0.0)
    once = candidate.nbytes + sum(specs[name].nbytes for name in lineage.folded)
    alone = sum(2 * specs[name].nbytes * seen_alone(rule, specs[name]) for name in lineage.folded)
    return _Costs(
        passes,
        int(passes * once + alone) + (shipped.nbytes if shipped else 0),
        state_bytes(rule, [specs[name] for name in lineage.folded]),
        [need(rule, specs[name], vectors) for name in lineage.folded],
    )


def _costs_of_blocks(engine: Engine, opened: OpenCandidate, width: int) -> tuple[_Costs, str]:
    """Of a fold beside other adapters, and what is to be said of cuts."""
    assert isinstance(opened.model, Adapter), "the gate on the form lets nothing else in"
    vectors = LayerVectors(engine.base, opened.model, opened.lineage, opened.weights)
    vectors.begin()
    folded = set(opened.lineage.folded)
    specs = [spec for spec in engine.base.specs if spec.name in folded]
    disk, cut = blocks.room(engine.state, vectors, specs)
    said = (
        f"; in {cut} of {sum(len(spec.layers) for spec in specs)} layers adapters are cut to the width of {width}"
        if cut
        else ""
    )
    needs = [block_orders.need(vectors, spec, width) for spec in specs]
    return _Costs(1.0, sum(vectors.nbytes(spec.name) for spec in specs), disk, needs), said


def _fitting(engine: Engine, opened: OpenCandidate, place: Place) -> Plan:
    candidate, lineage = opened.candidate, opened.lineage
    specs = {spec.name: spec for spec in engine.base.specs}
    form, said = engine.state.format.form, ""
    if form is None:
        costs = _costs(engine, opened)
    else:
        costs, said = _costs_of_blocks(engine, opened, form.width)
    kinds = [specs[name].kind for name in lineage.folded]
    return Plan(
        name=candidate.name,
        path=str(place),
        form=candidate.form,
        ok=True,
        reason=None,
        message=f"fits this base{said}",
        passes=costs.passes,
        read_bytes=costs.read,
        disk_bytes=costs.disk,
        memory_bytes=peak(engine.executor, costs.needs),
        folded=len(lineage.folded),
        matrices=kinds.count("matrix"),
        stacks=kinds.count("stack"),
        plain=kinds.count("plain"),
        unchanged=len(lineage.unchanged),
        prefix=lineage.prefix,
        extra=lineage.extra,
        narrowed=lineage.narrowed,
        renamings=(*lineage.repackings, *lineage.renamings),
        tokens=tuple(dict.fromkeys(tokens_said(matched(rows)) for rows in lineage.tokens)),
    )
