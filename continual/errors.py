"""Every error this package raises on purpose, grouped by what the caller does about it.

`Retry`: the environment got in the way; nothing is settled, try again later.
`Refuse`: this candidate will not be folded; its fate goes into the ledger and the next one is looked at.
`Halt`: going on would be wrong; the daemon stops loudly and a person has to look.
A message says what happened, to which candidate, tensor, file or setting, and what to do.
"""

from __future__ import annotations


class ContinualError(Exception):
    """Something continual can explain."""


class Retry(ContinualError):
    """The environment got in the way: nothing is settled, the same candidate can be tried again later, `after` so many
    seconds if a server said so."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Abandoned(Retry):
    """A fold was given up because the process was asked to stop: the state is as it was before it."""


class Skip(ContinualError):
    """The settings leave this repo out: it is no candidate, and no record is made of it."""


class Refuse(ContinualError):
    """This candidate will not be folded. `reason` is a short fixed word (a metric label), the message is for people."""

    def __init__(self, reason: str, message: str) -> None:
        super().__init__(message)
        self.reason = reason


class Halt(ContinualError):
    """Going on would be wrong: stop and let a person look."""


class Misconfigured(Halt):
    """A setting, a flag or a path given by the user cannot be used."""


class Damaged(Halt):
    """A file of the state is missing, altered or of a newer format."""


class Busy(Halt):
    """Another process has the state open for writing."""

    def __init__(self, message: str, pid: int | None = None, url: str | None = None) -> None:
        super().__init__(message)
        self.pid = pid
        self.url = url
