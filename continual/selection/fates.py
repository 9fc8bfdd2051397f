"""What becomes of the members of a round: pure decisions, and what a `select` record keeps of each member."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from datetime import datetime
from typing import TypedDict

from continual.errors import Refuse
from continual.selection.judging import Judgement
from continual.selection.members import Member
from continual.selection.round_options import DAY, RoundOptions
from continual.state.ledger import Waiting
from continual.state.parts import MemberFate, RowFate


class Judged(TypedDict):
    """The figures of a member, as `MemberFate` has them."""

    score: float | None
    change: float | None
    error: float | None
    z: float | None


def figures(score: float | None, judgement: Judgement | None) -> Judged:
    """A score and a judgement, either of which may be missing."""
    change, error, z = judgement or (None, None, None)
    return {"score": score, "change": change, "error": error, "z": z}


def seconds(earlier: str, later: str) -> float:
    """Seconds from one time to another, both RFC 3339, as the records have them."""
    return (datetime.fromisoformat(later) - datetime.fromisoformat(earlier)).total_seconds()


def kept_out(
    member: Member, waiting: Waiting, score: float | None, judgement: Judgement | None, now: str, options: RoundOptions
) -> MemberFate:
    """The fate of a member that was not chosen: deferred, refused where patience is at its end, or expired. `now` is
    the time at which the round began."""
    found = figures(score, judgement)
    reasons = _reasons(score, judgement, options)
    if judgement is None or not _relevant(judgement, options):
        return irrelevant(member, waiting, found, reasons, now, options)
    if _is_old(waiting, now, options):
        return _expired(member, waiting, found, reasons, now, options)
    message = f"{member.name}: relevant (z {judgement.z:+.1f}), but the round had no place or no steps left for it"
    return MemberFate(member.key, member.name, "deferred", "no-place", message, **found)


def irrelevant(
    member: Member, waiting: Waiting, found: Judged, reasons: str, now: str, options: RoundOptions
) -> MemberFate:
    """The fate of a member that was found irrelevant, for these reasons: as `kept_out`."""
    key, name, s = member.key, member.name, options.settings
    rounds = waiting.rounds + 1
    if rounds >= s.patience:
        message = f"{name}: irrelevant in {rounds} rounds: {reasons}; 'continual retry {name}' has it looked at again"
        return MemberFate(key, name, "refused", "irrelevant", message, judged=1, **found)
    if _is_old(waiting, now, options):
        return _expired(member, waiting, found, reasons, now, options)
    message = f"{name}: not relevant to the merge as it is (round {rounds} of {s.patience}): {reasons}"
    return MemberFate(key, name, "deferred", "irrelevant", message, judged=1, **found)


def _is_old(waiting: Waiting, now: str, options: RoundOptions) -> bool:
    return seconds(waiting.since, now) >= options.settings.age


def _expired(
    member: Member, waiting: Waiting, found: Judged, reasons: str, now: str, options: RoundOptions
) -> MemberFate:
    waited = seconds(waiting.since, now) / DAY
    message = f"{member.name}: waited {waited:.1f} days (rounds.age is {options.settings.age / DAY:g}): {reasons}"
    return MemberFate(member.key, member.name, "expired", "age", message, judged=1, **found)


def seen(member: Member, score: float, judgement: Judgement | None, options: RoundOptions) -> MemberFate:
    """What a round would find of a member first; nothing is decided."""
    reason = "relevant" if _relevant(judgement, options) else "irrelevant"
    message = f"{member.name}: {_reasons(score, judgement, options)}"
    return MemberFate(member.key, member.name, "deferred", reason, message, **figures(score, judgement))


def lost(member: Member, refusal: Refuse) -> MemberFate:
    """The fate of a member whose files are gone, or that the gates on numbers refuse."""
    fate: RowFate = "expired" if refusal.reason == "gone" else "refused"
    settings = dict(refusal.settings) or None
    return MemberFate(member.key, member.name, fate, refusal.reason, str(refusal), settings=settings)


def crowded(rows: Sequence[MemberFate], pool: Mapping[str, Waiting], options: RoundOptions) -> list[MemberFate]:
    """The rows in their order; where more than `most` of them would go on waiting, the oldest of these expire."""
    most = options.settings.most
    staying = sorted(
        (row for row in rows if row.fate == "deferred"),
        key=lambda row: (pool[row.key].since if row.key in pool else "", row.key),
    )
    beyond = {row.key for row in staying[: max(0, len(staying) - most)]}

    def settled(row: MemberFate) -> MemberFate:
        if row.key not in beyond:
            return row
        message = f"{row.name}: more than rounds.most = {most} candidates wait"
        return dataclasses.replace(row, fate="expired", reason="count", message=message)

    return [settled(row) for row in rows]


def names(rows: Iterable[MemberFate], fate: RowFate) -> list[str]:
    """The names of the members with this fate."""
    return [row.name for row in rows if row.fate == fate]


def _relevant(judgement: Judgement | None, options: RoundOptions) -> bool:
    return judgement is not None and judgement.z < -options.settings.sigmas


def _reasons(score: float | None, judgement: Judgement | None, options: RoundOptions) -> str:
    """Why a member is irrelevant or not, in words."""
    if judgement is not None:
        return (
            f"a trial of it changes the loss on held-out rows by {judgement.change:+.2g} ± {judgement.error:.1g} "
            f"(z {judgement.z:+.1f}, relevant below {-options.settings.sigmas:g})"
        )
    if score is not None:
        return f"its score is {score:+.2g}, and the objective falls only below zero"
    return "it was not scored"
