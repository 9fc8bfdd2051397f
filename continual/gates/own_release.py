"""Keeps out what this state itself has exported: folding it would count every model twice."""

from __future__ import annotations

from dataclasses import dataclass

from continual.errors import Refuse
from continual.gates.contract import AtHeaders, Headers


@dataclass(frozen=True)
class OwnReleaseGate(AtHeaders):
    """Refuses an export of this state, known by the `continual.json` beside it."""

    name = "own-release"
    reasons = ("own-release",)

    def judge(self, seen: Headers) -> None:
        """Raises Refuse (`own-release`)."""
        if seen.release is not None and seen.release["state"] == seen.state:
            raise Refuse(
                "own-release",
                f"{seen.candidate.name}: this is the merged model of this state (record {seen.release.get('seq')}), "
                "no fine-tune",
            )
