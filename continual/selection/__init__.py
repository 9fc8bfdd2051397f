"""Rounds over the pool of waiting candidates: scored together by a calibration objective, the relevant ones folded,
every member's fate recorded."""

from continual.selection.asked import UNSUPERVISED, Asked, asked
from continual.selection.fates import Row
from continual.selection.round import Round, Told, clock, due, last_round, look, next_due, run
from continual.selection.unfold import unfold
from continual.selection.why import Why, why

__all__ = [
    "UNSUPERVISED",
    "Asked",
    "Round",
    "Row",
    "Told",
    "Why",
    "asked",
    "clock",
    "due",
    "last_round",
    "look",
    "next_due",
    "run",
    "unfold",
    "why",
]
