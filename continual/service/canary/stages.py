"""What goes out now where there are canaries, and what becomes of each: begun, out, promoted, taken back,
withdrawn. Each is a change of its file in the state or a record of the ledger, and done again after a kill it is done
once. Blocking; when it is done is decided by who calls."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Literal, NamedTuple

from continual.api import Merge
from continual.engine.views import check_read_at
from continual.errors import Misconfigured
from continual.outside import few
from continual.publish import folder, proposals
from continual.publish.hub import Released
from continual.records import Candidate
from continual.rules import ReadOptions
from continual.service import publishing
from continual.service import release as releasing
from continual.service.canary.verdicts import moment
from continual.service.outgoing import OutPlan, What, mark_of, models_in, outgoing
from continual.state.canaries import CanaryRecord, Phase
from continual.state.entries import CanaryEntry, RetryEntry, RollbackEntry, UnfoldEntry
from continual.state.parts import CanaryVerdict
from continual.state.software import software

_TAKES_OUT = ("rollback", "unfold", "repair")


class Step(NamedTuple):
    """What is to be put out: as `out` says, record `seq`; `after`: which hooks are told."""

    out: OutPlan
    seq: int
    after: Literal["candidate", "current"]


def step(merge: Merge, name: str | None, newest: int) -> Step | None:
    """What an outlet of a view, or of the merge, puts out now; None for nothing. Begins a canary where record
    `newest` reads as another model than what is promoted, and withdraws one that is not in force any more. Raises
    Misconfigured, Retry and Damaged."""
    out = outgoing(merge.settings, name)
    canaries = merge.state.canaries
    with canaries.turn:
        record = canaries.get(name)
        if record is not None and record.phase != "failed" and _is_stale(merge, out, record, newest):
            canaries.rest(name, promoted(merge, out))
            record = None
        if record is None:
            record = begin(merge, out, newest)
        if record is None:
            canaries.rest(name, promoted(merge, out))
    if record is None:
        return _at_rest(merge, out, newest)
    if record.phase == "failed":
        return None
    if record.phase == "promoted":
        return Step(out.as_promoted(record.request), record.seq, "current")
    return Step(out.as_candidate(), record.seq, "candidate")


def prepare(merge: Merge) -> None:
    """Before anything is folded: what is promoted is kept from expiring, and what has no canary any more is forgotten.
    Raises Retry and Damaged."""
    outs = [outgoing(merge.settings, name) for name in (None, *merge.settings.views)]
    wanted = [out for out in outs if out.canary is not None]
    merge.state.canaries.keep([out.name for out in wanted])
    for out in wanted:
        if merge.state.canaries.get(out.name) is None:
            merge.state.canaries.rest(out.name, promoted(merge, out))


def begin(merge: Merge, out: OutPlan, seq: int) -> CanaryRecord | None:
    """Record `seq` as a canary, on disk; None where it has no model, is what is promoted, or was taken back before.
    Raises Misconfigured, Retry and Damaged."""
    if not models_in(merge, out, seq) or is_promoted(merge, out, seq):
        return None
    mark = _mark(merge, out, seq)
    last = merge.state.publications.verdict(out.name)
    if last is not None and (last.canary.verdict, last.mark) == ("failed", mark):
        return None
    back = promoted(merge, out)
    return merge.state.canaries.put(CanaryRecord(view=out.name, seq=seq, mark=mark, back=back))


def promoted(merge: Merge, out: OutPlan) -> int | None:
    """The record that is out and no canary; None where nothing of this state is."""
    if out.current is not None:
        there = folder.provenance_in(out.current)
        seq = there.get("seq")
        if there.get("state") == merge.state.id and isinstance(seq, int) and seq <= merge.state.ledger.head.seq:
            return seq
    done = None if out.asked.repo is None else merge.state.publications.release(out.asked.repo, out.asked.branch)
    return None if done is None or done.view != out.name else done.of


def is_promoted(merge: Merge, out: OutPlan, seq: int) -> bool:
    """Whether record `seq` reads as what is out, by every way, and goes out in the same form."""
    if out.current is not None:
        there = folder.provenance_in(out.current)
        if (there.get("state"), there.get("mark")) != (merge.state.id, mark_of(merge, out, seq)):
            return False
    if out.asked.repo is None:
        return True
    done = merge.state.publications.release(out.asked.repo, out.asked.branch)
    return done is not None and (done.view, done.mark) == (out.name, _mark(merge, out, seq))


def _mark(merge: Merge, out: OutPlan, seq: int) -> str:
    return mark_of(merge, out, seq, folder.parse_dtype(out.asked.dtype))


def _is_stale(merge: Merge, out: OutPlan, record: CanaryRecord, newest: int) -> bool:
    """Whether a canary is not what it was: the settings say otherwise by now what goes out, or a model was taken out
    of the merge since, by a person or with the canary before."""
    if _mark(merge, out, record.seq) != record.mark:
        return True
    since = [commit for commit in merge.state.ledger.models if commit.seq > record.seq]
    return any(commit.kind in _TAKES_OUT for commit in since) and _mark(merge, out, newest) != record.mark


def _at_rest(merge: Merge, out: OutPlan, newest: int) -> Step | None:
    """Where no canary is on its way: the candidate's place has what is promoted, so that one which was taken back is
    out nowhere."""
    if not models_in(merge, out, newest):
        return None
    if is_promoted(merge, out, newest):
        return Step(out.as_candidate(), newest, "candidate")
    seq = promoted(merge, out)
    if seq is None or not models_in(merge, out, seq):
        return None
    return Step(out.as_candidate(backwards=True), seq, "candidate")


def done(merge: Merge, name: str | None, what: What, seq: int, phase: Phase) -> CanaryRecord | None:
    """Hears that an outlet is done with record `seq` in a phase. Returns the canary; one that is out by every way is
    watched from then on. Raises Retry and Damaged."""
    out = outgoing(merge.settings, name)

    def heard(before: CanaryRecord) -> CanaryRecord:
        if (before.seq, before.phase) != (seq, phase):
            return before
        after = replace(before, out=tuple(sorted({*before.out, what})))
        if phase == "goes out" and set(out.outlets) <= set(after.out):
            return replace(after, phase="watched", out=(), since=moment(datetime.now(UTC)))
        return after

    return merge.state.canaries.change(name, heard)


def is_everywhere(merge: Merge, record: CanaryRecord) -> bool:
    """Whether a canary that is promoted has come out by every way."""
    wanted = outgoing(merge.settings, record.view).outlets
    return record.phase == "promoted" and set(wanted) <= set(record.out)


def verdict(merge: Merge, record: CanaryRecord) -> CanaryEntry | None:
    """The record of what became of a canary; None where the ledger has it already. Raises Damaged and Retry."""
    assert record.phase in ("promoted", "failed")
    last = merge.state.publications.verdict(record.view)
    word: Literal["promoted", "failed"] = "promoted" if record.phase == "promoted" else "failed"
    if last is not None and (last.of, last.mark, last.canary.verdict) == (record.seq, record.mark, word):
        return None
    of = f" of the view {record.view}" if record.view else ""
    what = "promoted" if word == "promoted" else "taken back"
    values = record.measured[-1].values if record.measured else ()
    return CanaryEntry(
        message=f"the canary of record {record.seq}{of} was {what}: {record.why}",
        of=record.seq,
        canary=CanaryVerdict(
            verdict=word,
            by=record.by or "",
            why=record.why or "",
            measurements=record.measurements,
            values=values,
        ),
        view=record.view,
        mark=record.mark,
        software=software(),
    )


def promote(merge: Merge, name: str | None, seq: int | None, by: str, why: str) -> CanaryRecord:
    """Has the canary of a view, or of the merge, promoted; `seq`: the record that it has to be. On disk when it
    returns; the outlets do it. Raises Misconfigured where there is none that can be promoted, Retry and Damaged."""
    which = f"the view {name}" if name else "the merge"
    if outgoing(merge.settings, name).canary is None:
        where = f"views.{name}.canary" if name else "release.canary"
        raise Misconfigured(f"{where} is not set: {which} goes out without a canary")

    def decided(before: CanaryRecord) -> CanaryRecord:
        if seq is not None and before.seq != seq:
            raise Misconfigured(f"the canary of {which} is record {before.seq}, and not {seq}; nothing was promoted")
        if before.phase == "failed":
            raise Misconfigured(f"record {before.seq} of {which} is being taken back: {before.why}")
        if before.phase == "goes out":
            raise Misconfigured(f"record {before.seq} of {which} is not out as a canary yet; nothing was promoted")
        return before if before.phase == "promoted" else before.decided("promoted", by, why)

    found = merge.state.canaries.change(name, decided)
    if found is None:
        raise Misconfigured(f"no canary of {which} waits; 'continual status' says what is out")
    return found


def finish(merge: Merge, record: CanaryRecord) -> None:
    """Puts a promoted canary out and records it, where no daemon does. Raises Misconfigured, Trouble, Retry and
    Halt; what is done then is done, and the next call goes on."""
    out = outgoing(merge.settings, record.view).as_promoted(record.request)
    if out.current is not None:
        publishing.put(merge, out, record.seq)
    if out.asked.repo is not None:
        found = releasing.release_as(merge, out, record.seq)
        merge.record(releasing.entry(found, out.name))
    if (entry := verdict(merge, record)) is not None:
        merge.record(entry)
    merge.state.canaries.rest(record.view, record.seq)


def proposed(merge: Merge, record: CanaryRecord, found: Released) -> None:
    """Keeps the pull request that a canary waits in, where it does. Raises Retry and Damaged."""
    number = proposals.number_of(found.branch)

    def kept(before: CanaryRecord) -> CanaryRecord:
        same = number is not None and (before.seq, before.mark) == (record.seq, record.mark)
        return replace(before, request=number, commit=found.commit) if same else before

    merge.state.canaries.change(record.view, kept)


def ask_request(merge: Merge, record: CanaryRecord) -> CanaryRecord | None:
    """What somebody has decided of the pull request that a canary waits in, kept on disk; None where it is open. Raises
    Trouble, Retry and Damaged."""
    assert record.request is not None
    repo = outgoing(merge.settings, record.view).asked.repo or ""
    found = proposals.standing(merge.hub, repo, record.request)
    if found.status == "open":
        return None
    verdict: Literal["promoted", "failed"] = "promoted" if found.status == "merged" else "failed"
    why = f"pull request {record.request} of {repo} was {found.status}"

    def decided(before: CanaryRecord) -> CanaryRecord:
        same = (before.seq, before.request, before.phase) == (record.seq, record.request, "watched")
        return before.decided(verdict, "hub", why) if same else before

    return merge.state.canaries.change(record.view, decided)


def release_candidate(merge: Merge, name: str | None, at: int | None, report: str = "") -> Released:
    """Releases a record by hand where there is a canary: as the candidate. Raises Misconfigured where another one is
    watched, or this one was taken back, Trouble and Retry."""
    out = outgoing(merge.settings, name)
    seq = releasing.record_of(merge, out, at).seq
    with merge.state.canaries.turn:
        record = merge.state.canaries.get(name) or begin(merge, out, seq)
    if record is None and is_promoted(merge, out, seq):
        return releasing.release_as(merge, out, seq)
    if record is None or record.phase == "failed":
        last = merge.state.publications.verdict(name)
        why = record.why if record is not None else last.canary.why if last is not None else "it has no model in it"
        raise Misconfigured(f"record {seq} is no canary any more: {why}")
    if record.seq != seq:
        raise Misconfigured(f"record {record.seq} is the canary: promote it, or go back; nothing was released")
    found = releasing.release_as(merge, out.as_candidate(), seq, report=report)
    proposed(merge, record, found)
    done(merge, name, "release", seq, "goes out")
    return found


def put_link(merge: Merge, name: str | None) -> None:
    """Points the candidate's link at the canary, where no daemon does. Raises Misconfigured, Retry and Halt."""
    out = outgoing(merge.settings, name)
    record = None if out.canary is None or out.current is None else merge.state.canaries.get(name)
    if record is not None and record.phase == "goes out":
        publishing.put(merge, out.as_candidate(), record.seq)
        done(merge, name, "publish", record.seq, "goes out")


def take_back(merge: Merge, name: str | None) -> list[Candidate]:
    """Takes a canary back that failed: of the merge by a rollback to what is promoted, unless a person has taken its
    models out by now; of a view by a record that says so. Then nothing of it goes out any more. Returns the models that
    were folded after it and went with the rollback: they are to be looked at again. On the thread that writes the
    state. Raises Misconfigured where the record has expired, or has a model that was taken out since; Retry and
    Halt."""
    record = merge.state.canaries.get(name)
    if record is None or record.phase != "failed":
        return []
    again: list[Candidate] = []
    if name is None:
        again = _rolled_back(merge, record)
    if (entry := verdict(merge, record)) is not None:
        merge.record(entry)
    merge.state.canaries.rest(name, record.back)
    merge.expire()
    return again


def _rolled_back(merge: Merge, record: CanaryRecord) -> list[Candidate]:
    state, ledger = merge.state, merge.state.ledger
    because = f"the canary of record {record.seq} failed: {record.why}"
    to = record.back or 0
    after = (c for c in ledger.models if c.seq > record.seq)
    done = [c for c in after if isinstance(c.entry, RollbackEntry) and c.entry.to == to]
    if not done:
        if _is_gone(merge, record, to):
            return []
        now = ReadOptions.from_mapping(ledger.read_options(ledger.head.seq))
        check_read_at(state, merge.rule, now, to)
        done = [state.rollback(to, because)]
    later = [fold.entry.candidate for fold in ledger.folds(done[0].seq - 1) if fold.seq > record.seq]
    for candidate in later:
        fate = ledger.fate(candidate.key)  # None of those that a killed process has asked for already
        if fate is not None and fate.entry.fate == "rolled-back":
            said = f"it was folded after record {record.seq}, whose canary failed"
            merge.record(RetryEntry(candidate=candidate, message=said))
    return later


def _is_gone(merge: Merge, record: CanaryRecord, to: int) -> bool:
    """Whether a person took out by now what came with a canary, or the canary is that something was taken out: what a
    person took out stays out. Raises Misconfigured where a part of it is in the merge, and going back would put back
    what was taken out."""
    ledger = merge.state.ledger
    now, before, mine = (
        {fold.entry.candidate.key: fold.entry.candidate.name for fold in ledger.folds(seq)}
        for seq in (ledger.head.seq, to, record.seq)
    )
    new = mine.keys() - before.keys()
    if new and not new & now.keys():
        return True
    out = [c for c in ledger.models if c.seq > to and isinstance(c.entry, UnfoldEntry)]
    back = {c.entry.key: c for c in out if isinstance(c.entry, UnfoldEntry) and c.entry.key in before.keys() - now}
    if not back:
        return False
    if not new & now.keys():
        return True
    key, commit = next(iter(back.items()))
    raise Misconfigured(
        f"the canary of record {record.seq} failed ({record.why}), and is not taken back: to go back to record {to} "
        f"would put {before[key]} back, which record {commit.seq} took out; unfold {few(now[one] for one in new)}, or "
        "roll back by hand"
    )
