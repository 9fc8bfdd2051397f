"""What the status shows of the state: its form, its newest records, its views, and what each model has in what is
out."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, TypeVar

from continual.errors import ContinualError
from continual.outside import few
from continual.publish.share_columns import SHARES
from continual.service.outgoing import OutPlan, candidate_link, models_in, outgoing
from continual.service.web.view import (
    ShownCanary,
    ShownFold,
    ShownForm,
    ShownPublication,
    ShownRefusal,
    ShownRound,
    ShownShare,
    ShownShares,
    ShownView,
    ShownWaiting,
)
from continual.state import Commit, State
from continual.state.canaries import CanaryRecord
from continual.state.entries import SelectEntry
from continual.state.format import FoldCommit
from continual.state.ledger import Waiting
from continual.state.parts import ReleasedShare

if TYPE_CHECKING:
    from continual.api.looked_state import LookedState
    from continual.engine.fullness import Fullness

SHOWN = SHARES
"""Rows of each list that are shown."""
_RECENT = 2000
"""Records among which publications are looked for."""
C = TypeVar("C", bound=Commit)


def model_id(key: str) -> str:
    """What stands for a model's key in addresses of pages: a key can be long, and have any character."""
    return hashlib.blake2s(key.encode("utf-8", "surrogatepass"), digest_size=8).hexdigest()


def newest(commits: Sequence[C]) -> list[C]:
    """The newest of them, newest first."""
    return list(commits[-SHOWN:])[::-1]


def fullness_of(merge: LookedState) -> Fullness | None:
    """How full a state of adapters is; None also where that cannot be read, and `verify` says why."""
    try:
        return merge.fullness()
    except ContinualError:
        return None


def form_of(state: State, full: Fullness | None) -> ShownForm:
    """What the state keeps, and how full it is."""
    form = state.format.form
    if form is None:
        return ShownForm("whole tensors")
    return ShownForm("adapters", form.width, *((full.used, full.layers, full.cut) if full else ()))


def fold(commit: FoldCommit, full: Fullness | None) -> ShownFold:
    """A fold, and what of it was cut off when it came and by now."""
    candidate = commit.entry.candidate
    numbers = commit.entry.numbers
    return ShownFold(
        commit.seq,
        commit.time,
        model=candidate.name,
        form=candidate.form,
        tau_norm=numbers.tau_norm,
        cosine=numbers.cosine,
        weight=numbers.weight,
        left_out=few(numbers.extra or (), numbers.extra_count),
        warned=numbers.warned,
        cut=numbers.cut,
        cut_now=None if full is None else full.models.get(commit.entry.numbers.block or 0),
        model_id=model_id(candidate.key),
    )


def refusal(commit: Commit) -> ShownRefusal:
    """A refusal."""
    candidate = commit.entry.candidate
    return ShownRefusal(
        commit.seq,
        commit.time,
        candidate.name if candidate else None,
        reason=commit.entry.reason,
        message=commit.entry.message,
        model_id=model_id(candidate.key) if candidate else "",
    )


def publications(log: Sequence[Commit]) -> list[ShownPublication]:
    """The newest records of releases and hooks, among the last."""
    found = [commit for commit in log[-_RECENT:] if commit.kind == "publish"]
    return [ShownPublication(commit.seq, commit.time, commit.entry.message) for commit in newest(found)]


def ended(commit: Commit) -> ShownRound:
    """A round that has ended."""
    entry = commit.of_kind(SelectEntry)
    return ShownRound(commit.seq, commit.time, loss=entry.loss, before=entry.before, gap=entry.gap, steps=entry.steps)


def waiting(found: Waiting) -> ShownWaiting:
    """A candidate of the pool."""
    last = found.last
    return ShownWaiting(
        model=found.candidate.name,
        since=found.since,
        rounds=found.rounds,
        score=last.score if last else None,
        z=last.z if last else None,
        said=last.message if last else "waits for its first round",
        model_id=model_id(found.candidate.key),
    )


def views(merge: LookedState) -> tuple[ShownView, ...]:
    """What is to be said of every view."""
    return tuple(_view(merge, name) for name in merge.settings.views)


def _view(merge: LookedState, name: str) -> ShownView:
    state, said, out = merge.state, merge.settings.views[name], outgoing(merge.settings, name)
    models: list[str] = []
    rule, scale, problem = said.rule or "", "", ""
    try:
        read = merge.scale(view=out.view)
        rule, scale = read.rule or state.format.rule, read.scale
        models = models_in(merge, out, state.ledger.head.seq)
    except ContinualError as error:
        problem = str(error)
    there = _provenance(out)
    released = None if said.repo is None else state.publications.release(said.repo, out.asked.branch)
    return ShownView(
        name=name,
        rule=rule,
        scale=scale,
        count=len(models),
        models=few(models) or "nothing",
        problem=problem,
        form="a whole model" if out.as_lora is None else _adapter(out.as_lora, there),
        current=None if out.current is None else str(out.current),
        current_seq=_number(there.get("seq")),
        current_time=str(there["exported"]) if "exported" in there else None,
        repo=said.repo,
        released_seq=None if released is None else released.of,
    )


def canaries(merge: LookedState) -> tuple[ShownCanary, ...]:
    """The canaries; none where their files cannot be read, which the daemon says."""
    try:
        found = merge.state.canaries.all()
    except ContinualError:
        return ()
    return tuple(_canary(merge, record) for record in found)


def _canary(merge: LookedState, record: CanaryRecord) -> ShownCanary:
    places: list[str] = []
    if record.view is None or record.view in merge.settings.views:
        out = outgoing(merge.settings, record.view)
        places += [str(candidate_link(out.current))] if out.current is not None else []
        if out.asked.repo and out.canary:
            proposed = f"{out.asked.repo}/discussions/{record.request}" if record.request else "no pull request yet"
            places.append(proposed if out.canary.request else f"{out.asked.repo}@{out.canary.branch}")
    verdicts = [one.verdict for one in record.measured]
    return ShownCanary(
        view=record.view,
        seq=record.seq,
        back=record.back,
        phase=record.phase,
        since=record.since,
        places=tuple(places),
        measurements=record.measurements,
        kept=len(verdicts),
        failed=verdicts.count("failed"),
        inconclusive=verdicts.count("inconclusive"),
        said=record.why or (record.measured[-1].said if record.measured else ""),
    )


def _adapter(wanted: int | str, there: Mapping[str, object]) -> str:
    """As what kind of adapter a view goes out; where one is out, with its rank and how near it comes."""
    lora = there.get("lora")
    if not isinstance(lora, Mapping):
        return f"an adapter of {'its own rank' if wanted == 'own' else f'rank {wanted}'}"
    error = lora.get("error")
    near = f", {100 * error:.2g} % off" if isinstance(error, float) and error > 1e-6 else ""
    return f"an adapter of rank {lora.get('rank')}{near}"


def _provenance(out: OutPlan) -> Mapping[str, object]:
    """What `continual.json` of the export says that a link points at; nothing where there is none."""
    if out.current is None:
        return {}
    from continual.publish.folder import provenance_in

    return provenance_in(out.current)


def _shares_in(there: Mapping[str, object]) -> Sequence[ReleasedShare] | None:
    if not there:
        return None
    from continual.publish.provenance import shares_in

    return shares_in(there)


def shares(merge: LookedState) -> tuple[ShownShares, ...]:
    """What each model has in what is out: of the merge, and of each view. As `continual.json` says beside an export;
    else as the record of the newest release does."""
    outs = [outgoing(merge.settings, name) for name in (None, *merge.settings.views)]
    return tuple(one for one in (_shares(merge, out) for out in outs) if one is not None)


def _shares(merge: LookedState, out: OutPlan) -> ShownShares | None:
    there = _provenance(out)
    found, seq = _shares_in(there), _number(there.get("seq"))
    if found is not None and seq is not None and there.get("state") == merge.state.id:
        return _shown(out, seq, str(out.current), found, len(found))
    if found is not None or out.asked.repo is None:
        return None
    release = merge.state.publications.release(out.asked.repo, out.asked.branch)
    if release is None or release.shares is None or release.view != out.name:
        return None
    return _shown(out, release.of, release.repo, release.shares, release.models or len(release.shares))


def _shown(out: OutPlan, seq: int, place: str, found: Sequence[ReleasedShare], count: int) -> ShownShares:
    rows = [ShownShare(one.name, one.weight, one.norm, one.cosine, one.change) for one in found[:SHOWN]]
    return ShownShares(out.name, seq, place, tuple(rows), count)


def _number(value: object) -> int | None:
    return value if isinstance(value, int) else None
