"""What is tried again, when, and when it is given up. All such decisions are made here; they are pure. Times are
seconds; chance is an argument.

There are three levels, and each begins where the one before ends. A request is tried a few times within seconds. A
candidate is put back into the queue, and parked when that did not help. Polling goes on for ever, more and more rarely.
"""

from __future__ import annotations

from enum import StrEnum

TRIES = 5
"""How often a request is made before whoever needs it is told."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 30.0
FIRST_RETRY, LONGEST_RETRY = 5.0, 300.0
PARKED_AFTER, PARKED = 20, 3600.0
"""After so many failures (an hour and a quarter) a candidate of the Hub is parked: it comes again only once an hour."""
FIRST_AVOIDED, LONGEST_AVOIDED = 300.0, 3600.0
SLOW, SLOWER, SLOWER_AGAIN = 1800.0, 10.0, 4.0
"""An order is ended that takes more than half an hour, and ten times as long as the slowest of its kind that is done;
one that was ended is given four times as long, since an honest one may be the largest by far."""
SLOWEST_READ = 2e6
"""Bytes a second with which an order reads at the least: who reads a file of the Hub for its hash reads all of it."""
FIRST_START = 180.0
"""Seconds in which a worker of a cluster begins with an order; it has Python and torch to load."""
LONGEST_POLL = 3600.0
REFUSALS = 3
"""When the Hub has refused the token so many times in a row, it is asked only once an hour."""


class Fault(StrEnum):
    """What went wrong with a request. Two faults are told apart where something else is done about them."""

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
"""The faults that pass by themselves."""


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
    """Seconds until a request that failed for the `attempt`-th time (from 1) is made again; None: it is not made again,
    and whoever needs it is told.

    The wait doubles from half a second, and is by `luck` (0 to 1) up to half shorter or longer. It is never shorter
    than the `after` seconds that the server asked for; where those are more than LONGEST_WAIT, the queue waits instead.
    """
    if fault not in PASSING or attempt >= TRIES or after > LONGEST_WAIT:
        return None
    return max(after, min(FIRST_WAIT * 2.0 ** (attempt - 1), LONGEST_WAIT) * (0.5 + luck))


def retry_delay(attempt: int, after: float = 0.0, *, parks: bool = False) -> float:
    """Seconds until a candidate, a round or a publication that failed for the `attempt`-th time (from 1) comes again.

    The delay doubles from five seconds to five minutes, and is never shorter than the `after` seconds that a server
    asked for. With `parks` (candidates of the Hub: there can be thousands) it is an hour after PARKED_AFTER failures.
    """
    if parks and attempt > PARKED_AFTER:
        return max(after, PARKED)
    return max(after, min(FIRST_RETRY * 2.0 ** min(attempt - 1, 16), LONGEST_RETRY))


def next_poll(interval: float, failures: int, luck: float, *, after: float = 0.0, refused: int = 0) -> float:
    """Seconds until the Hub is asked again what is new.

    After a success that is `interval`, by `luck` (0 to 1) up to a tenth shorter or longer. After `failures` in a row it
    doubles from a quarter of the interval up to an hour, and is by `luck` up to a quarter shorter or longer: many
    daemons do not come at once. Where the token was `refused` REFUSALS times in a row, only a person can mend it, and
    the Hub is asked once an hour.
    """
    if refused >= REFUSALS:
        return max(after, LONGEST_POLL)
    if failures == 0:
        return interval * (0.9 + 0.2 * luck)
    doubled = min(interval / 4 * 2.0 ** min(failures - 1, 16), max(interval, LONGEST_POLL))
    return max(after, doubled * (0.75 + 0.5 * luck))


def avoided_for(times: int) -> float:
    """Seconds for which a machine of a cluster gets no orders that failed one for the `times`-th time in a row: five
    minutes, then twice as long, up to an hour."""
    return min(FIRST_AVOIDED * 2.0 ** min(times - 1, 16), LONGEST_AVOIDED)


def order_bound(slowest: float, ended: int, nbytes: int = 0) -> float:
    """Seconds that a machine may work on an order that reads so many bytes, where the `slowest` that is done of the
    same work took so many, and this one was `ended` so often because of its time."""
    return max(SLOW, SLOWER * slowest, nbytes / SLOWEST_READ) * SLOWER_AGAIN ** min(ended, 16)


def start_bound(waits: int) -> float:
    """Seconds for which it is waited that a worker begins with an order that was sent out anew so often because none
    did."""
    return FIRST_START * 2.0 ** min(waits, 16)
