"""The views of the settings: whether they can be read, where each is put out, and what is to be said of them. What a
view reads changes less often than the merge: it is put out again only when that is other than what is out."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from continual.api import Merge
from continual.config import Settings
from continual.engine.views import ReadView
from continual.errors import ContinualError, Misconfigured
from continual.outside import few
from continual.publish import folder, hub
from continual.publish.hub import newest_release
from continual.publish.lora import LoraTarget
from continual.rules import ReadOptions
from continual.service import release as releasing
from continual.service.web.view import ShownView


def check(settings: Settings) -> None:
    """Raises Misconfigured for views that have nowhere to go, or two of which would go to one place."""
    places: dict[str, str] = {}
    taken = [("current", settings.current), ("release.repo", settings.release.repo)]
    for name, view in settings.views.items():
        taken += [(f"views.{name}.current", view.current), (f"views.{name}.repo", view.repo)]
        if view.repo is not None:
            hub.check(releasing.outgoing(settings, name).asked, f"views.{name}.repo")
        if view.lora is not None and view.current is None:
            raise Misconfigured(f"views.{name}.lora is for current, which is not set: name a link, or leave lora out")
    for called, place in taken:
        if place is None:
            continue
        where = str(place.absolute()) if isinstance(place, Path) else place
        if where in places:
            raise Misconfigured(f"{called} = {place}: {places[where]} goes there already; every view has its own place")
        places[where] = called


def must_be_readable(merge: Merge) -> None:
    """Raises Misconfigured where a view cannot be read from this state, whatever comes into it."""
    ledger = merge.state.ledger
    now = ReadOptions.from_mapping(ledger.read_options(ledger.head.seq))
    for name in merge.settings.views:
        try:
            merge.view(name).by(merge.settings.reading).check_readable(merge.rule, now, merge.state)
        except Misconfigured as error:
            raise Misconfigured(f"view {name}: {error}") from None


def put(merge: Merge, name: str, seq: int) -> Path | None:
    """Points the link of a view at an export of what it reads at record `seq`, and returns that; None where the link
    has it already, or nothing is folded that it reads and there is no link. Raises Misconfigured, Retry and Halt."""
    said, view = merge.settings.views[name], merge.view(name)
    link = said.current
    assert link is not None
    if not _models(merge, view, seq) and not link.is_symlink():
        return None
    contents = merge.contents(view, at=seq)
    out = folder.provenance_in(link)
    if (out.get("state"), out.get("contents"), _is_lora(out)) == (merge.state.id, contents, said.lora is not None):
        return None

    def write(directory: Path) -> Path:
        if said.lora is None:
            return merge.export(folder.Target(directory, at=seq), view=view)
        rank = None if said.lora == "own" else said.lora
        return merge.export_lora(LoraTarget(directory, rank, at=seq), view).directory

    return folder.keep_current(link, seq, write, merge.state.ledger.get(seq).time, contents)


def is_out(merge: Merge, name: str, seq: int) -> bool:
    """Whether nothing of a view is to be released at record `seq`: what it reads there is what the newest release has,
    as far as the ledger knows, or no model is in it. Raises Misconfigured for a view that cannot be read."""
    out = releasing.outgoing(merge.settings, name)
    assert out.view is not None
    done = newest_release(merge.state.ledger.log, out.asked.repo or "", out.asked.branch)
    if done is None:
        return not _models(merge, out.view, seq)
    if done.of >= seq:
        return True
    try:
        before = merge.contents(out.view, at=done.of)
    except Misconfigured:  # its generation has expired, or the settings say otherwise by now: the Hub is asked
        return False
    return before == merge.contents(out.view, at=seq)


def shown(merge: Merge) -> tuple[ShownView, ...]:
    """What is to be said of every view."""
    return tuple(_shown(merge, name) for name in merge.settings.views)


def _shown(merge: Merge, name: str) -> ShownView:
    state, said = merge.state, merge.settings.views[name]
    models, rule, problem = [], said.rule or "", ""
    try:
        view = merge.view(name)
        rule = merge.scale(view=view).rule or state.format.rule
        models = _models(merge, view, state.ledger.head.seq)
    except ContinualError as error:
        problem = str(error)
    out = {} if said.current is None else folder.provenance_in(said.current)
    asked = releasing.outgoing(merge.settings, name).asked
    released = None if said.repo is None else newest_release(state.ledger.log, said.repo, asked.branch)
    return ShownView(
        name=name,
        rule=rule,
        count=len(models),
        models=few(models) or "nothing",
        problem=problem,
        current=None if said.current is None else str(said.current),
        current_seq=_seq(out),
        current_time=str(out["exported"]) if "exported" in out else None,
        repo=said.repo,
        released_seq=None if released is None else released.of,
    )


def _models(merge: Merge, view: ReadView, seq: int) -> list[str]:
    """The names of the models that a view reads, in the order of their folds. Raises Misconfigured."""
    folds = merge.state.ledger.folds(at=seq)
    if merge.state.format.form is None or not folds:
        return [fold.entry.candidate.name for fold in folds]
    kept = view.kept(folds)
    return [fold.entry.candidate.name for fold in folds if fold.entry.candidate.key in kept]


def _is_lora(out: Mapping[str, object]) -> bool:
    return "lora" in out


def _seq(out: Mapping[str, object]) -> int | None:
    seq = out.get("seq")
    return seq if isinstance(seq, int) else None
