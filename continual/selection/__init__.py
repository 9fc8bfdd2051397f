"""Rounds over the pool of candidates that wait: a calibration objective scores them together, the relevant ones are
folded, and every member's fate is recorded."""

from typing import TYPE_CHECKING

from continual.lazily import from_homes

if TYPE_CHECKING:
    from continual.selection.due import clock, is_due, next_due
    from continual.selection.newest import last_round
    from continual.selection.round import Ground, HearRound, Round, look, run
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

if not TYPE_CHECKING:  # else a checker would take any name for one of ours
    __getattr__ = from_homes(
        __name__,
        {
            "newest": ("last_round",),
            "due": ("clock", "is_due", "next_due"),
            "round": ("Ground", "HearRound", "Round", "look", "run"),
            "round_options": ("UNSUPERVISED", "RoundOptions", "options_of"),
            "unfold": ("subtract",),
            "why": ("Why", "explain"),
        },
    )
