"""What each request does to an open state: the same for the command that has the state to itself, and for the daemon
that does it between two folds. The answer is what the command prints, as JSON holds it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, overload

from continual import texts
from continual.engine.views import check_read_at
from continual.errors import Misconfigured, Retry
from continual.rules import ReadOptions
from continual.service import release as releasing
from continual.service.canary import reporting, stages
from continual.service.control.requests import (
    DrainRequest,
    DropRequest,
    PauseRequest,
    PromoteRequest,
    ReleaseRequest,
    Request,
    ResumeRequest,
    RetryRequest,
    RollbackRequest,
    RoundRequest,
    ScaleRequest,
    TagRequest,
    UnfoldRequest,
)
from continual.service.outgoing import outgoing
from continual.state import going_back, paused
from continual.state.fields import body_of
from continual.state.refs import must_be_named
from continual.texts import Json, jsonable

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.engine.outcomes import Outcome
    from continual.publish.hub import Released
    from continual.selection import Round
    from continual.selection.steps import Taken
    from continual.service.control.parley import Hearing
    from continual.state import Commit

Answer = dict[str, Json]


@dataclass(frozen=True, slots=True)
class ReleaseAnswer:
    """What a release came to, and the answer that says so."""

    released: Released
    answer: Answer


def act(merge: Merge, request: Request, hear: Hearing) -> Answer:
    """Does what `request` asks for, on the thread that writes the state. Raises what the method of `Merge` raises, and
    Retry where more would be undone or folded again than a person agreed to."""
    if isinstance(request, TagRequest):
        merge.state.tag(request.name, _seq(merge, request.at), force=request.force)
        return {"tags": jsonable(merge.state.ledger.tags)}
    if isinstance(request, RetryRequest):
        return {"records": _records(merge.retry(_word(merge, request), because=request.because, by=request.by))}
    if isinstance(request, DropRequest):
        return {"records": _records(merge.drop(_word(merge, request), because=request.because, by=request.by))}
    if isinstance(request, RollbackRequest):
        return _rollback(merge, request)
    if isinstance(request, UnfoldRequest):
        return _unfold(merge, request, hear)
    if isinstance(request, ScaleRequest):
        found = merge.rescale(request.value, request.lines, request.rule)
        return {"read": jsonable(found.to_mapping()), "scale": str(found)}
    if isinstance(request, RoundRequest):
        return _round(merge, request, hear)
    if isinstance(request, ReleaseRequest):
        if request.dry_run:
            return look_release(merge, request)
        found_release = release(merge, request)
        merge.record(releasing.entry(found_release.released, request.view))
        stages.put_link(merge, request.view)
        return found_release.answer
    if isinstance(request, PromoteRequest):
        return promote(merge, request, alone=True)
    assert not isinstance(request, DrainRequest), "the daemon alone does it"
    return _pausing(merge, request)


def look_release(merge: Merge, request: ReleaseRequest) -> Answer:
    """What a release would do; changes nothing, and only asks the Hub. From any thread. Raises Misconfigured and
    Trouble."""
    return {"look": jsonable(releasing.look(merge, _seq(merge, request.at), request.view)._asdict())}


def release(merge: Merge, request: ReleaseRequest) -> ReleaseAnswer:
    """Releases a record on the Hub, without the record of it in the ledger. From any thread. Raises Misconfigured,
    Trouble, Retry."""
    at = _seq(merge, request.at)
    if outgoing(merge.settings, request.view).canary is not None:
        out = reporting.release_candidate(merge, request.view, at)
    else:
        out = releasing.release(merge, at, view=request.view)
    return ReleaseAnswer(out, {"released": jsonable(out)})


def promote(merge: Merge, request: PromoteRequest, *, alone: bool) -> Answer:
    """Has a canary promoted; `alone`: where no daemon does it after this. From any thread. Raises Misconfigured,
    Trouble, Retry and Halt."""
    if request.dry_run:
        raise Misconfigured("promote has no dry run: 'continual status' shows the canaries")
    found = stages.promote(merge, request.view, _seq(merge, request.at), "command", "by 'continual promote'")
    if alone:
        stages.finish(merge, found)
    return {"promoted": {"view": found.view, "seq": found.seq, "done": alone}}


def told(what: Outcome | Taken) -> str:
    """A fold or a step of a round in a line."""
    from continual.engine.outcomes import Outcome

    if isinstance(what, Outcome):
        return what.line()
    return f"step {what.number + 1}: loss {what.loss:.6g}, gap before it {what.gap:.3g}"


def _records(commits: Sequence[Commit]) -> list[Json]:
    return [jsonable(texts.record(commit)) for commit in commits]


def _word(merge: Merge, request: RetryRequest | DropRequest | UnfoldRequest) -> str:
    """The word by which a person named a candidate: as it was typed, or the path that it was there, where only that
    names one."""
    ledger = merge.state.ledger
    seen = [found.entry.candidate for found in (*ledger.log, *ledger.folds())]
    if any(c.origin == request.here and request.model not in (c.name, c.key, c.origin) for c in seen if c is not None):
        return request.here or request.model
    return request.model


@overload
def _seq(merge: Merge, named: int | str) -> int: ...
@overload
def _seq(merge: Merge, named: int | str | None) -> int | None: ...
def _seq(merge: Merge, named: int | str | None) -> int | None:
    """The number of the record that was named. Raises Misconfigured where none is."""
    return must_be_named(merge.state.ledger, named) if isinstance(named, str) else named


def _rollback(merge: Merge, request: RollbackRequest) -> Answer:
    state, seq = merge.state, _seq(merge, request.seq)
    keep = merge.settings.keep, merge.settings.keep_bytes
    plan = going_back.look(state, seq, *keep)
    if request.expected is not None and len(plan.undone) != request.expected:
        raise Retry(
            f"the merge went on meanwhile: {len(plan.undone)} folds would be undone, and not {request.expected}; "
            "nothing was done, ask again"
        )
    now = ReadOptions.from_mapping(state.ledger.read_options(state.ledger.head.seq))
    check_read_at(state, merge.rule, now, plan.to)  # how the merge is read does not go back with it
    commit = None
    if not request.dry_run:
        commit = state.rollback(seq)
        state.expire(*keep)
    return {
        "to": plan.to,
        "record": None if commit is None else commit.seq,
        "undone": _records(plan.undone),
        "expires": list(plan.expires),
        "lost": list(plan.lost),
    }


def _unfold(merge: Merge, request: UnfoldRequest, hear: Hearing) -> Answer:
    plan = merge.look_unfold(_word(merge, request), None if request.at is None else Path(request.at))
    again = 0 if plan.exact else len(plan.again)
    if request.expected is not None and again != request.expected:
        raise Retry(
            f"the merge went on meanwhile: {again} models would be folded again, and not {request.expected}; "
            "nothing was done, ask again"
        )
    commit = None if request.dry_run else merge.unfold(plan, hear.progress)
    return {
        "plan": jsonable(plan),
        "line": plan.line(),
        "record": None if commit is None else jsonable(texts.record(commit)),
    }


def _round(merge: Merge, request: RoundRequest, hear: Hearing) -> Answer:
    from continual.selection import UNSUPERVISED

    def note(what: Outcome | Taken) -> None:
        hear.note(told(what))

    unsupervised = merge.asked().settings.unsupervised
    if unsupervised:
        hear.note(UNSUPERVISED)
    found = merge.look_round(hear.progress) if request.dry_run else merge.round(hear.progress, note)
    return {"round": round_body(found), "unsupervised": unsupervised}


def round_body(found: Round) -> Answer:
    """A round for machines."""
    record = found.commit.seq if found.commit else None
    figures = {"before": found.before, "loss": found.loss, "gap": found.gap, "pool_gap": found.pool_gap}
    return {
        "record": record,
        **{key: value for key, value in {**figures, "steps": found.steps}.items() if value is not None},
        "folds": found.folds,
        **({"cut": dict(found.cut)} if found.cut else {}),
        "seconds": round(found.seconds, 3),
        "members": [jsonable(body_of(row)) for row in found.rows],
    }


def _pausing(merge: Merge, request: PauseRequest | ResumeRequest) -> Answer:
    path = merge.state.path
    if request.dry_run:
        raise Misconfigured(f"{request.title} has no dry run")
    if isinstance(request, PauseRequest):
        return {"paused": paused.pause(path)}
    return {"paused": None, "was_paused": paused.resume(path)}
