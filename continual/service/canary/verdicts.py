"""When a canary is looked at, and what follows from what was seen. Pure: clocks and measurements are arguments."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime

from continual.config import CanarySettings
from continual.state.canaries import CanaryRecord, Measurement


def moment(now: datetime) -> str:
    """A time as the files of the state have it."""
    return now.astimezone(UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")


def seconds_since(time: str, now: datetime) -> float:
    """Seconds from a time of a file until `now`; none where the clock went back."""
    return max(0.0, (now - datetime.fromisoformat(time)).total_seconds())


def measures(canary: CanarySettings) -> bool:
    """Whether anything is measured."""
    return canary.query is not None or canary.evaluate


def wait(record: CanaryRecord, canary: CanarySettings, now: datetime) -> float | None:
    """Seconds until a canary is to be looked at; None where only a person decides. An alarm is looked at again after
    half of the interval: so two of them take it back within two intervals, whenever the first began."""
    if record.since is None:
        return None
    last = record.measured[-1] if record.measured else None
    pause = canary.interval / 2 if last is not None and last.verdict == "failed" else canary.interval
    looks = measures(canary) or record.request is not None
    every = [pause - seconds_since(last.time if last else record.since, now)] if looks else []
    if not every and canary.after is not None:
        every = [canary.after - seconds_since(record.since, now)]
    return max(0.0, *every) if every else None


def measured(record: CanaryRecord, found: Measurement | None, canary: CanarySettings, now: datetime) -> CanaryRecord:
    """What becomes of a watched canary after a measurement (None: nothing is measured)."""
    if record.phase != "watched" or record.since is None:
        return record
    if found is not None:
        kept = (*record.measured, found)[-canary.count :]
        passed = (record.passed or found.time) if found.verdict == "passed" else None
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


def inconclusive(record: CanaryRecord) -> int:
    """How many of the newest measurements said nothing, in a row."""
    verdicts = [one.verdict for one in reversed(record.measured)]
    return next((n for n, verdict in enumerate(verdicts) if verdict != "inconclusive"), len(verdicts))


def _values(failed: list[Measurement]) -> str:
    values = [f"{value:.6g}" for one in failed for value in one.values[:1]]
    return f" ({', '.join(values)})" if values else ""
