"""Keeps out what this state itself has exported: folding it would count every model twice."""

from __future__ import annotations

from dataclasses import dataclass

from continual.errors import Refuse
from continual.gates.contract import AtHeaders, Headers


@dataclass(frozen=True)
class OwnReleaseGate(AtHeaders):
    """Refuses an export of this state, known by the `continual.json` beside it; and of a state that has models in
    common with it, because one of the two is a clone of the other, or both of a third."""

    name = "own-release"
    reasons = ("own-release",)

    def judge(self, seen: Headers) -> None:
        """Raises Refuse (`own-release`)."""
        if seen.release is None:
            return
        if seen.release["state"] == seen.state:
            raise Refuse(
                "own-release",
                f"{seen.candidate.name}: this is the merged model of this state (record {seen.release.get('seq')}), "
                "no fine-tune",
            )
        cloned = seen.release.get("cloned")
        theirs = [seen.release["state"], *(cloned if isinstance(cloned, list) else ())]
        if any(state in (seen.state, *seen.cloned) for state in theirs):
            raise Refuse(
                "own-release",
                f"{seen.candidate.name}: this is the merged model of a clone of this state, or of a state that this "
                "one was cloned from: the models that they have in common would count twice",
            )
