"""When a round over the pool is due. Pure: the time is an argument."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

from continual.selection import fates
from continual.selection.relevance import pending
from continual.selection.round_options import RoundOptions
from continual.state.ledger import Waiting


def is_due(pool: Mapping[str, Waiting], options: RoundOptions, now: str) -> bool:
    """Whether a round is due: enough candidates wait that no round has judged, or one of them has waited long enough,
    or one has grown too old, or a round chose one that is not folded yet."""
    s = options.settings
    fresh = [w for w in pool.values() if not w.last]
    if pending(pool) or len(fresh) >= s.size or any(fates.seconds(w.since, now) >= s.wait for w in fresh):
        return True
    return any(fates.seconds(w.since, now) >= s.age for w in pool.values())


def next_due(pool: Mapping[str, Waiting], options: RoundOptions, now: str) -> float | None:
    """Seconds until a round is due if nothing else comes; None where nothing waits."""
    s = options.settings
    left = [(s.age if w.last else min(s.wait, s.age)) - fates.seconds(w.since, now) for w in pool.values()]
    return max(0.0, min(left)) if left else None


def clock() -> str:
    """The time now, RFC 3339 to the millisecond, as the records have it."""
    return datetime.now(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")
