"""What to do with new files where an earlier model was folded from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from continual.errors import Refuse
from continual.gates.contract import AtHeaders, Headers


@dataclass(frozen=True)
class UpdatesGate(AtHeaders):
    """Refuses a candidate if other files from its origin are in the merge, unless `updates` is `add`."""

    name = "updates"
    reasons = ("update",)
    shared = ("updates",)

    updates: Literal["refuse", "add"] = "refuse"

    def judge(self, seen: Headers) -> None:
        """Raises Refuse (`update`)."""
        if self.updates == "refuse" and seen.earlier is not None:
            raise Refuse(
                "update",
                f"{seen.candidate.name}: other files at {seen.candidate.origin} were folded as record {seen.earlier}; "
                "set updates = add to fold these as well, or publish them under a new name",
                by=("updates",),
            )
