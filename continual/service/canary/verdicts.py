"""When a canary is looked at, and what follows from what was seen. Pure: clocks and measurements are arguments."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from continual.config import CanarySettings
from continual.state.canaries import CanaryRecord, Measurement

_UNSEEN = 60.0
"""Seconds without a look, or five intervals, which do not count as quiet."""


def moment(now: datetime) -> str:
    """A time as the files of the state have it."""
    return now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_since(time: str, now: datetime) -> float:
    """Seconds from a time of a file until `now`; below 0 where the clock went back since."""
    return (now - datetime.fromisoformat(time)).total_seconds()


def measures(canary: CanarySettings) -> bool:
    """Whether anything is measured."""
    return canary.query is not None or canary.evaluate


def wait(record: CanaryRecord, canary: CanarySettings, now: datetime) -> float | None:
    """Seconds until a canary is to be looked at; None where only a person decides. An alarm is looked at again after
    half of the interval: so two of them take it back within two intervals, whenever the first began. At once where
    the clock went back since the last look: else nobody would look until it is as late again."""
    if record.since is None:
        return None
    last = record.measured[-1] if record.measured else None
    pause = canary.interval / 2 if last is not None and last.verdict == "failed" else canary.interval
    if not measures(canary) and record.request is None:
        if canary.after is None:
            return None
        pause, last = canary.after, None
    gone = seconds_since(last.time if last else record.since, now)
    return 0.0 if gone < 0.0 else max(0.0, pause - gone)


def measured(
    record: CanaryRecord, found: Measurement | None, canary: CanarySettings, now: datetime, took: float = 0.0
) -> CanaryRecord:
    """What becomes of a watched canary after a measurement (None: nothing is measured), which took so many seconds."""
    if record.phase != "watched" or record.since is None:
        return record
    record = _not_ahead(record, now)
    if found is not None:
        kept = (*record.measured, found)[-canary.count :]
        begun = None if _is_gap(record, canary, now, took) else record.passed
        passed = (begun or found.time) if found.verdict == "passed" else None
        count = record.measurements + 1
        record = replace(record, measured=kept, passed=passed, measurements=count)
        failed = [one for one in kept if one.verdict == "failed"]
        if len(failed) >= canary.failure_limit:
            why = f"{failed[-1].said}; {len(failed)} of the last {len(kept)} measurements were alarms{_values(failed)}"
            return record.decided("failed", "metric", why)
    quiet = record.passed if measures(canary) else record.since
    if canary.after is not None and quiet is not None and seconds_since(quiet, now) >= canary.after:
        return record.decided("promoted", "time", f"no alarm for {canary.after:g} s")
    return record


def _not_ahead(record: CanaryRecord, now: datetime) -> CanaryRecord:
    """The same where the clock went back: what was to come counts from now."""

    def here(time: str | None) -> str | None:
        return moment(now) if time is not None and seconds_since(time, now) < 0.0 else time

    return replace(record, since=here(record.since), passed=here(record.passed))


def _is_gap(record: CanaryRecord, canary: CanarySettings, now: datetime, took: float) -> bool:
    """Whether nobody looked for long, as when the daemon was down or the clock jumped: that was no quiet time."""
    if not record.measured:
        return False
    return seconds_since(record.measured[-1].time, now) - took > max(_UNSEEN, 5 * canary.interval)


def inconclusive(record: CanaryRecord) -> int:
    """How many of the newest measurements said nothing, in a row."""
    verdicts = [one.verdict for one in reversed(record.measured)]
    return next((n for n, verdict in enumerate(verdicts) if verdict != "inconclusive"), len(verdicts))


def _values(failed: list[Measurement]) -> str:
    values = [f"{value:.6g}" for one in failed for value in one.values[:1]]
    return f" ({', '.join(values)})" if values else ""
