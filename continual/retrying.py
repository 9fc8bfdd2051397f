"""What is tried again, when, and when it is given up: pure decisions, the only ones there are. Times are seconds;
chance is an argument.

Three levels, each taking over where the one before gives up: a request is tried a few times within seconds; a candidate
is put back into the queue, and parked when that did not help; polling goes on for ever, ever more rarely, unless the
Hub says that the token is no good.
"""

from __future__ import annotations

from enum import StrEnum

TRIES = 5
"""How often a request is made before whoever needs it is told."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
FIRST_RETRY, LONGEST_RETRY = 5.0, 300.0
PARKED_AFTER, PARKED = 20, 3600.0
"""After so many failures (an hour and a quarter) a candidate of the Hub is parked: it comes again only once an hour."""
LONGEST_POLL = 3600.0
REFUSALS = 3
"""So many times in a row the Hub may refuse the token before polling gives up."""


class Fault(StrEnum):
    """What went wrong with a request, by what can be done about it."""

    RATE = "rate limit"
    SERVER = "server error"
    TRANSPORT = "connection"
    GONE = "not there"
    GATED = "gated"
    TOKEN = "token"
    DENIED = "denied"
    CONFLICT = "conflict"
    REQUEST = "request"


PASSING = (Fault.RATE, Fault.SERVER, Fault.TRANSPORT)
"""What passes by itself."""


def fault_of(status: int | None, code: str | None = None) -> Fault:
    """The fault of an HTTP status (None: there was no answer) and the Hub's `X-Error-Code`."""
    if status is None:
        return Fault.TRANSPORT
    if code == "GatedRepo":
        return Fault.GATED
    if code in ("RepoNotFound", "RevisionNotFound", "EntryNotFound", "DisabledRepo") or status in (404, 410):
        return Fault.GONE
    if status == 429:
        return Fault.RATE
    if status in (408, 425) or status >= 500:
        return Fault.SERVER
    if status in (401, 403):
        return Fault.TOKEN if status == 401 else Fault.DENIED  # a proxy or a quota may deny what the token allows
    return Fault.CONFLICT if status in (409, 412) else Fault.REQUEST


def next_try(fault: Fault, attempt: int, luck: float, after: float = 0.0) -> float | None:
    """Seconds until a request that failed for the `attempt`-th time (from 1) is made again; None: whoever needs it is
    told.

    Doubling from half a second, half as much more or less by `luck` (0 to 1), never before the `after` seconds that the
    server asked for; what it asks beyond LONGEST_WAIT is left to the queue.
    """
    if fault not in PASSING or attempt >= TRIES or after > LONGEST_WAIT:
        return None
    return max(after, min(FIRST_WAIT * 2.0 ** (attempt - 1), LONGEST_WAIT) * (0.5 + luck))


def retry_delay(attempt: int, after: float = 0.0, *, parks: bool = False) -> float:
    """Seconds until a candidate, a round or a publication that failed for the `attempt`-th time (from 1) comes again.

    Doubling from five seconds to five minutes, never before the `after` seconds that a server asked for. What `parks`
    (a candidate of the Hub: there can be thousands) comes only once an hour in the end.
    """
    return max(
        after,
        PARKED if parks and attempt > PARKED_AFTER else min(FIRST_RETRY * 2.0 ** min(attempt - 1, 16), LONGEST_RETRY),
    )


def next_poll(interval: float, failures: int, luck: float, *, after: float = 0.0, refused: int = 0) -> float | None:
    """Seconds until the Hub is asked again what is new; None: polling gives up.

    `interval` after a success, a tenth more or less by `luck` so that many daemons do not ask at once; after `failures`
    in a row doubling from a quarter of it up to an hour. It gives up where the token was `refused` REFUSALS times in a
    row: that does not pass by itself.
    """
    if refused >= REFUSALS:
        return None
    if failures == 0:
        return interval * (0.9 + 0.2 * luck)
    return max(
        after, min(interval / 4 * 2.0 ** min(failures - 1, 16), max(interval, LONGEST_POLL)) * (0.75 + 0.5 * luck)
    )
