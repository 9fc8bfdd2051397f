"""Rounds over the pool of waiting candidates: scored together by a calibration objective, the relevant ones folded, every member's fate recorded."""

from continual.rounds.asked import UNSUPERVISED, Asked, asked
from continual.rounds.fates import Row
from continual.rounds.run import Round, Told, clock, due, last_round, look, next_due, run
from continual.rounds.unfold import unfold
from continual.rounds.why import Why, why

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
