"""What is watched by an open merge: its sources, made of the settings."""

from __future__ import annotations

from continual.api import Merge
from continual.sources import roster
from continual.sources.contract import Source, Wiring


def sources_of(merge: Merge) -> list[Source]:
    """The sources that the settings ask for. Raises Misconfigured for one that cannot be made."""
    return roster.make(wiring_of(merge))


def wiring_of(merge: Merge) -> Wiring:
    """What sources of this merge are made from."""
    standing, retried = merge.standing, merge.state.ledger.retried()
    return Wiring(merge.settings, merge.places, merge.settings.state, standing.is_settled, retried, standing.reopened())
