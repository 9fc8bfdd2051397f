"""Rounds over the pool of candidates that wait: a calibration objective scores them together, the relevant ones are
folded, and every member's fate is recorded."""

from continual.selection.due import clock, is_due, next_due
from continual.selection.round import Ground, HearRound, Round, last_round, look, run
from continual.selection.round_options import UNSUPERVISED, RoundOptions, options_of
from continual.selection.unfold import subtract
from continual.selection.why import Why, explain

__all__ = [
    "UNSUPERVISED",
    "Ground",
    "HearRound",
    "Round",
    "RoundOptions",
    "Why",
    "clock",
    "explain",
    "is_due",
    "last_round",
    "look",
    "next_due",
    "options_of",
    "run",
    "subtract",
]
