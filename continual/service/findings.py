"""What `continual doctor` says of one thing."""

from __future__ import annotations

from typing import Literal, NamedTuple

Level = Literal["ok", "warn", "fail"]


class Finding(NamedTuple):
    """What was found of one thing: `told` in a sentence, and `todo` where something is to be done."""

    about: str
    level: Level
    told: str
    todo: str = ""
