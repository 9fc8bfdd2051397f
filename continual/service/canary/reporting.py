"""What the description of a pull request says of a canary: which models are new in it, and what the gates found of
each, beside the merge before it on the same rows."""

from __future__ import annotations

from collections.abc import Iterator

from continual.api import Merge
from continual.outside import counted
from continual.publish.hub import Released
from continual.service import release as releasing
from continual.service.canary import stages
from continual.service.outgoing import OutPlan, outgoing
from continual.state.canaries import CanaryRecord
from continual.state.format import FoldCommit
from continual.texts import plain

MOST = 50
"""Models that are described one by one."""


def report(merge: Merge, out: OutPlan, seq: int) -> str:
    """The description, as Markdown. Raises Misconfigured where the record has expired."""
    back = stages.promoted(merge, out)
    known = {fold.entry.candidate.key for fold in merge.state.ledger.folds(back)} if back is not None else set()
    folds = merge.state.ledger.folds(seq)
    new = [fold for fold in folds if fold.entry.candidate.key not in known]
    gone = known - {fold.entry.candidate.key for fold in folds}
    against = "the base" if back is None else f"record {back}"
    lines = [
        f"Record {seq} of this state, in place of {against}: {counted(len(new), 'model')} more, {len(gone)} fewer, "
        f"{len(folds)} in all. To merge this promotes it; to close it takes it back.",
        "",
    ]
    for fold in new[:MOST]:
        lines += [*_model(fold), ""]
    if len(new) > MOST:
        lines += [f"And {len(new) - MOST} more.", ""]
    return "\n".join(lines)


def propose(merge: Merge, record: CanaryRecord) -> Released:
    """Opens the pull request of a canary, unless it is open, and keeps its number. Raises Misconfigured, Trouble and
    Retry."""
    out = outgoing(merge.settings, record.view)
    said = report(merge, out, record.seq)
    found = releasing.release_as(merge, out.as_candidate(), record.seq, wait=True, report=said)
    stages.proposed(merge, record, found)
    return found


def release_candidate(merge: Merge, name: str | None, at: int | None) -> Released:
    """Releases a record by hand where there is a canary: as `stages.release_candidate`, with its report."""
    out = outgoing(merge.settings, name)
    seq = releasing.record_of(merge, out, at).seq
    return stages.release_candidate(merge, name, seq, report(merge, out, seq))


def _model(fold: FoldCommit) -> Iterator[str]:
    candidate, numbers = fold.entry.candidate, fold.entry.numbers
    at = f" at {candidate.revision}" if candidate.revision else ""
    yield f"### {_cell(candidate.name)}"
    yield ""
    cosine = "" if numbers.cosine is None else f"; cosine with the merge before it {numbers.cosine:+.3f}"
    norm = "" if numbers.tau_norm is None else f"; norm of its task vector {numbers.tau_norm:.4g}"
    yield f"`{candidate.form}`{at}, record {fold.seq}, licence {_cell(candidate.licence or 'unknown')}{norm}{cosine}."
    for warned in numbers.warnings or ():
        yield f"- {warned.gate} warned: {_cell(warned.message)}"
    if numbers.evaluated is not None:
        before = numbers.evaluated.before or {}
        yield ""
        yield "| metric | before | with it |"
        yield "|---|---|---|"
        for name, value in numbers.evaluated.after.items():
            was = f"{before[name]:.4g}" if name in before else ""
            yield f"| {_cell(name)} | {was} | {value:.4g} |"


def _cell(text: str) -> str:
    """A text of strangers in Markdown: on one line, and nothing of it is markup."""
    shown = plain(text, 200)
    return "".join(f"\\{letter}" if letter in "\\`*_{}[]()#+!|<>@~" else letter for letter in shown)
