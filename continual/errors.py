"""Every error that this package raises on purpose, by what the caller does about it.

    ContinualError          something that continual can explain
        Retry               the environment got in the way: nothing is settled, try again later
            Abandoned       the process is stopping: the work was given up, the state is as it was before
            NotHere         what one piece of work needs is not on this machine of a cluster; another may have it
        Skip                the settings leave a repo out: it is no candidate, and nothing is recorded
        Refuse              this candidate is kept out: its fate goes into the ledger, and the next one is looked at
        Halt                going on would be wrong: the daemon stops, and a person has to look
            Misconfigured   a setting, a flag or a path that a user gave cannot be used
            Damaged         a file of the state is missing, altered, or of a newer format
            Busy            another process has the state open for writing

`continual.hub.trouble.Trouble` is a Retry too. A message says what happened, to which candidate, tensor, file or
setting, and what to do. Which exit code a command ends with for which error is in `continual.cli.main`.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

REFUSALS = (
    *("pickle", "no-weights", "no-file", "outside", "truncated", "header", "index", "missing-shard", "config", "dtype"),
    *("missing", "shape", "vocab", "prefix", "tied", "name", "adapter-kind", "adapter-target", "moments", "weight"),
    *("assembly", "non-finite", "zero", "norm-base", "norm-mean", "norm-layer", "duplicate", "update", "own-release"),
    *("gone", "gated", "superseded", "changed", "malformed", "irrelevant", "age", "count", "internal"),
    *("quantised", "foreign", "sharded-state", "lineage", "extra", "form", "cut", "inputs"),
    *("noise", "copy", "negated", "mixture", "evaluation", "unclear", "dropped", "signature", "interference"),
    *("locked", "permuted", "requantised", "card", "card-base", "card-kind", "other-config"),
    *("too-large", "licence", "author"),
)
"""Every reason for which continual keeps a candidate out; operations.md says what each means. A gate of somebody else
can have others."""


class ContinualError(Exception):
    """Something went wrong that continual can explain. It can be sent to another process whatever it is made with."""

    def __reduce__(self) -> tuple[object, ...]:
        return _again, (type(self), self.args), self.__dict__


def _again(kind: type[ContinualError], args: tuple[object, ...]) -> ContinualError:
    """An error as it was, without what has to be said to make a new one."""
    return kind.__new__(kind, *args)


class Retry(ContinualError):
    """The environment (disk, network, a file that changes) got in the way. Nothing is settled: the same candidate can
    be tried again, `after` so many seconds where a server said when; 0 where none did."""

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


class Abandoned(Retry):
    """The process was asked to stop, and gave up what it did. The state is as it was before."""


class NotHere(Retry):
    """What one job needs is not on this machine. Others may do its orders, and this one those of other jobs."""


class Skip(ContinualError):
    """The settings leave this repo out. It is no candidate, and no record is made of it."""


class Refuse(ContinualError):
    """This candidate is not folded. `reason` is one of a few fixed words (`REFUSALS`), which metrics use as a label;
    the message is for people.

    `by` names the settings of the gate that refused which let such a candidate in when they have another value; the
    message says which value. `settings` are these with the values that they had, by their whole names: `Gates` writes
    them down. The candidate is looked at again once one of them has another value.
    """

    def __init__(self, reason: str, message: str, *, by: Sequence[str] = ()) -> None:
        super().__init__(message)
        self.reason = reason
        self.by = tuple(by)
        self.settings: Mapping[str, object] = {}


class Halt(ContinualError):
    """Going on would be wrong. The daemon stops, and a person has to look."""


class Misconfigured(Halt):
    """A setting, a flag or a path that a user gave cannot be used."""


class Damaged(Halt):
    """A file of the state is missing, altered or of a newer format."""


class Busy(Halt):
    """Another process has the state open for writing: `pid`, and the `url` of its service, where they are known."""

    def __init__(self, message: str, pid: int | None = None, url: str | None = None) -> None:
        super().__init__(message)
        self.pid = pid
        self.url = url
