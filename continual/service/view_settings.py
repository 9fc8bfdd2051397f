"""The views of the settings: whether they can be read and put out, and what is to be said of them."""

from __future__ import annotations

from pathlib import Path

from continual.api import Merge
from continual.config import Settings
from continual.engine.views import view_of
from continual.errors import Misconfigured
from continual.publish import hub
from continual.rules import ReadOptions
from continual.service.canary import checking
from continual.service.outgoing import candidate_link, outgoing


def check(settings: Settings) -> None:
    """Raises Misconfigured for views of which two would go to one place, or that ask for what cannot be."""
    places: dict[str, str] = {}
    taken = [("current", settings.current), ("release.repo", settings.release.repo)]
    for name, view in settings.views.items():
        taken += [(f"views.{name}.current", view.current), (f"views.{name}.repo", view.repo)]
        if view.repo is not None:
            hub.check(outgoing(settings, name).asked, f"views.{name}.repo")
        if "format" in view.model_fields_set and view.as_lora is None:
            raise Misconfigured(f"views.{name}.format is the layout of an adapter: set as_lora, or leave format out")
    checking.check(settings)
    for which, out in [(name, outgoing(settings, name)) for name in (None, *settings.views)]:
        if out.canary is not None and out.current is not None:
            of = "the merge" if which is None else f"views.{which}"
            taken.append((f"the canary of {of}", candidate_link(out.current)))
    for called, place in taken:
        if place is None:
            continue
        where = str(place.parent.resolve() / place.name) if isinstance(place, Path) else place
        if where in places:
            raise Misconfigured(f"{called} = {place}: {places[where]} goes there already; every view has its own place")
        places[where] = called


def must_be_readable(merge: Merge, settings: Settings | None = None) -> None:
    """Raises Misconfigured where a view (of other `settings` than those of the merge) cannot be read from this state,
    whatever comes into it."""
    settings = settings or merge.settings
    ledger = merge.state.ledger
    now = ReadOptions.from_mapping(ledger.read_options(ledger.head.seq))
    for name, said in settings.views.items():
        view = view_of(settings, name).by(settings.reading)
        try:
            view.check_readable(merge.rule, now, merge.state)
            reader = view.read_by(merge.rule, now, merge.state)[0]
        except Misconfigured as error:
            raise Misconfigured(f"view {name}: {error}") from None
        if said.as_lora == "own" and (merge.state.format.form is None or reader.factored is None):
            raise Misconfigured(
                f"views.{name}.as_lora = own: what is read has no rank of its own (the state keeps a merge of whole "
                "tensors, or the rule looks at single elements); name a rank"
            )
