"""What the engine says of a candidate, and what the gates are told to let in: frozen records."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from continual.gates import safety, weight
from continual.gates.lineage import LineagePolicy
from continual.records import FoldReport
from continual.state import Commit


class Outcome(NamedTuple):
    """What became of a candidate. `known`: its fate was settled earlier, or it waits already; `commit` is then that
    earlier record."""

    fate: Literal["folded", "refused", "duplicate", "deferred", "known"]
    name: str
    message: str
    reason: str | None
    commit: Commit
    report: FoldReport | None = None

    @property
    def refused(self) -> bool:
        """Whether this model is kept out: refused now, or refused, rolled back or unfolded earlier."""
        return self.fate == "refused" or (
            self.fate == "known" and self.commit.entry.fate in ("refused", "expired", "rolled-back", "unfolded")
        )

    def line(self) -> str:
        """What happened, for people, in one line."""
        if self.report is None:
            return self.message
        n = self.report.numbers
        return f"{self.message}: norm {n['tau_norm']:.4g}, cosine {n['cosine']:+.3f}, {self.report.seconds.get('total', 0):.2f} s"

    def summary(self) -> dict[str, Any]:
        """What happened, for machines."""
        body: dict[str, Any] = {
            "model": self.name,
            "fate": self.fate,
            "reason": self.reason,
            "message": self.message,
            "seq": self.commit.seq,
        }
        if self.report is not None:
            body |= {
                "numbers": self.report.numbers,
                "seconds": self.report.seconds,
                "bytes_read": self.report.bytes_read,
            }
        return body


@dataclass(frozen=True, slots=True)
class Plan:
    """What folding a candidate would take and whether it would be let in, from headers alone. Sizes in bytes."""

    name: str
    path: str
    form: str
    ok: bool
    reason: str | None
    message: str
    passes: float = 1.0
    read_bytes: int = 0
    disk_bytes: int = 0
    memory_bytes: int = 0
    folded: int = 0
    matrices: int = 0
    plain: int = 0
    unchanged: int = 0
    prefix: tuple[str, str] = ("", "")
    extra: tuple[str, ...] = ()
    narrowed: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Policy:
    """What the gates let in."""

    lineage: LineagePolicy = field(default_factory=LineagePolicy)
    norms: safety.NormPolicy = field(default_factory=safety.NormPolicy)
    weights: weight.WeightPolicy = field(default_factory=weight.WeightPolicy)
    updates: Literal["refuse", "add"] = "refuse"


def known_as(name: str, known: Commit) -> Outcome:
    """The outcome of a candidate whose fate was settled earlier."""
    message = f"{name}: already settled as record {known.seq} ({known.entry.fate})"
    if known.entry.message and known.entry.fate != "folded":
        message += f": {known.entry.message}"
    return Outcome("known", name, message, known.entry.reason, known)
