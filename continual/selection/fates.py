"""What becomes of the members of a round that were not folded: pure decisions, and the rows that a `select` record
keeps of them."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime
from typing import Any

from continual.errors import Refuse
from continual.selection.asked import DAY, Asked
from continual.selection.judging import Judgement
from continual.selection.members import Member
from continual.state.ledger import Waiting


@dataclass(frozen=True, slots=True)
class Row:
    """A member at the end of a round. `score`: ⟨g, τ⟩ at the merge, without it where it is not in, in units of the
    loss; `change` and `error`: what a trial of it, or its being in the merge, does to the mean loss of held-out rows;
    `z` their ratio; None where it was not tried, as where its score already is not below zero. `weight`: what
    Frank-Wolfe gave it; `place`: of those chosen for a rule, which is folded first. `judged`: 1 if this round counts.
    """

    key: str
    name: str
    fate: str
    reason: str
    message: str
    judged: int = 0
    score: float | None = None
    change: float | None = None
    error: float | None = None
    z: float | None = None
    weight: float | None = None
    place: int | None = None

    def body(self) -> dict[str, Any]:
        """As the record holds it."""
        return asdict(self)


def seconds(earlier: str, later: str) -> float:
    """Between two times as the records have them."""
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def kept_out(
    member: Member, waiting: Waiting, score: float | None, judgement: Judgement | None, now: str, asked: Asked
) -> Row:
    """A member that was judged and not chosen: deferred, refused once patience is at its end, or expired."""
    found: dict[str, Any] = {
        "score": score,
        "change": judgement and judgement.change,
        "error": judgement and judgement.error,
        "z": judgement and judgement.z,
    }
    relevant = judgement is not None and judgement.z < -asked.sigmas
    old = seconds(waiting.since, now) >= asked.age
    rounds = waiting.rounds + 1
    if relevant and not old:
        why = (
            f"relevant (z {judgement.z:+.1f}), but the round had no place or no steps left for it" if judgement else ""
        )
        return Row(member.key, member.name, "deferred", "no-place", f"{member.name}: {why}", 0, **found)
    said = _said(score, judgement, asked)
    if rounds >= asked.patience and not relevant:
        message = f"{member.name}: irrelevant in {rounds} rounds: {said}; 'continual retry {member.name}' has it looked at again"
        return Row(member.key, member.name, "refused", "irrelevant", message, 1, **found)
    if old:
        message = f"{member.name}: waited {seconds(waiting.since, now) / DAY:.1f} days (rounds.age is {asked.age / DAY:g}): {said}"
        return Row(member.key, member.name, "expired", "age", message, 1, **found)
    message = f"{member.name}: not relevant to the merge as it is (round {rounds} of {asked.patience}): {said}"
    return Row(member.key, member.name, "deferred", "irrelevant", message, 1, **found)


def seen(member: Member, score: float, judgement: Judgement | None, asked: Asked) -> Row:
    """A member that was looked at and not judged: what a round would begin with."""
    found = (score, judgement and judgement.change, judgement and judgement.error, judgement and judgement.z)
    relevant = judgement is not None and judgement.z < -asked.sigmas
    return Row(
        member.key,
        member.name,
        "deferred",
        "relevant" if relevant else "irrelevant",
        f"{member.name}: {_said(score, judgement, asked)}",
        0,
        *found,
    )


def lost(member: Member, refusal: Refuse) -> Row:
    """A member that cannot be had any more, or that the gates on its numbers refuse."""
    fate = "expired" if refusal.reason == "gone" else "refused"
    return Row(member.key, member.name, fate, refusal.reason, str(refusal))


def crowded(rows: Sequence[Row], pool: Mapping[str, Waiting], asked: Asked) -> list[Row]:
    """The rows, with the oldest that would go on waiting expired where more than `most` do."""
    staying = sorted(
        (row for row in rows if row.fate == "deferred"),
        key=lambda row: (pool[row.key].since, row.key) if row.key in pool else ("", row.key),
    )
    beyond = {row.key for row in staying[: max(0, len(staying) - asked.most)]}
    return [_crowded(row, asked) if row.key in beyond else row for row in rows]


def _crowded(row: Row, asked: Asked) -> Row:
    body = row.body() | {
        "fate": "expired",
        "reason": "count",
        "message": f"{row.name}: more than rounds.most = {asked.most} candidates wait",
    }
    return Row(**body)


def _said(score: float | None, judgement: Judgement | None, asked: Asked) -> str:
    if judgement is not None:
        return (
            f"a trial of it changes the loss on held-out rows by {judgement.change:+.2g} ± {judgement.error:.1g} "
            f"(z {judgement.z:+.1f}, relevant below {-asked.sigmas:g})"
        )
    return (
        f"its score is {score:+.2g}, and the objective falls only below zero"
        if score is not None
        else "it was not scored"
    )


def names(rows: Iterable[Row], fate: str) -> list[str]:
    """Of the members with this fate."""
    return [row.name for row in rows if row.fate == fate]
