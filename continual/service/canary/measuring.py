"""One look at a canary: what Prometheus says of it, and what an evaluation says. What follows from it is
decided in `verdicts.py`."""

from __future__ import annotations

import http.client
import math
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NamedTuple
from urllib.parse import urlencode

from continual.config import CanarySettings
from continual.errors import ContinualError
from continual.evaluation import scores
from continual.evaluation.verdict import Drop, decide
from continual.outside import Malformed, few, parse_fields, shown
from continual.publish import folder
from continual.publish.plain_http import opener_for
from continual.service.canary.verdicts import moment
from continual.service.outgoing import OutPlan, candidate_link
from continual.state.canaries import CanaryRecord, Measurement
from continual.tensors import Folder
from continual.tuning.command import CommandFailed

if TYPE_CHECKING:
    from continual.api import Merge
    from continual.engine.reading import Reading

LARGEST = 1 << 20
"""Bytes of an answer of Prometheus that are read."""
MOST = 1000
"""Values that an answer may have."""
KEPT = 10
"""Values of a measurement that are kept, the worst first."""
_LONGEST = 400
Verdict = Literal["passed", "failed", "inconclusive"]


class Answered(NamedTuple):
    """What one of them says: the verdict, a sentence, and the values, the worst first."""

    verdict: Verdict
    said: str
    values: tuple[float, ...] = ()


class Unanswered(Exception):
    """Prometheus said nothing that can be used; the message says what came instead."""


def measure(merge: Merge, out: OutPlan, record: CanaryRecord) -> Measurement:
    """One look at the canary `record`; blocks as long as what is asked takes. An alarm of either counts; one that
    says nothing leaves it open, whatever the other says. Never raises for what the other side does."""
    canary = out.canary
    assert canary is not None
    seen = [queried(canary)] if canary.query is not None else []
    if canary.evaluate and not any(one.verdict == "failed" for one in seen):
        seen.append(_evaluated(merge, out, record))
    order: tuple[Verdict, ...] = ("failed", "inconclusive", "passed")
    worst = min(seen, key=lambda one: order.index(one.verdict))
    finite = tuple(value for value in worst.values if math.isfinite(value))
    return Measurement(
        time=moment(datetime.now(UTC)), verdict=worst.verdict, said=worst.said[:_LONGEST], values=finite[:KEPT]
    )


def queried(canary: CanarySettings) -> Answered:
    """What Prometheus says now, beside the limits."""
    what = f"query {canary.query}"
    try:
        values = ask(canary)
    except Unanswered as error:
        return Answered("inconclusive", f"{what}: {error}")
    if not values:
        return Answered("inconclusive", f"{what}: no data")
    worst = sorted((one for one in values if not math.isnan(one)), key=lambda one: -_beyond(one, canary))
    if worst and _beyond(worst[0], canary) > 0:  # whatever others are: a share of no requests is NaN
        limit = f"above max = {canary.max:g}" if _is_above(worst[0], canary) else f"below min = {canary.min:g}"
        return Answered("failed", f"{what}: {worst[0]:.6g} is {limit}", tuple(worst))
    if len(worst) < len(values):
        return Answered("inconclusive", f"{what}: {len(values)} values, and one of them is no number (NaN)")
    return Answered("passed", f"{what}: {few(f'{value:.6g}' for value in worst)}", tuple(worst))


def _is_above(value: float, canary: CanarySettings) -> bool:
    return canary.max is not None and value > canary.max


def _beyond(value: float, canary: CanarySettings) -> float:
    """By how much a value is beyond the limits; not above 0 where it keeps to them."""
    above = -math.inf if canary.max is None else value - canary.max
    below = -math.inf if canary.min is None else canary.min - value
    return max(above, below)


def ask(canary: CanarySettings) -> list[float]:
    """The values that Prometheus gives for the query now. Raises Unanswered."""
    body = _asked(canary)
    if body.get("status") != "success":
        raise Unanswered(f"Prometheus says: {shown(body.get('error') or body.get('status') or 'nothing')}")
    data = body.get("data")
    kind, result = (data.get("resultType"), data.get("result")) if isinstance(data, dict) else (None, None)
    if kind == "scalar" and isinstance(result, list):
        return [_value(result)]
    if kind == "vector" and isinstance(result, list):
        if len(result) > MOST:
            raise Unanswered(f"{len(result)} values are too many: aggregate them, as by max(…)")
        return [_value(row.get("value")) if isinstance(row, dict) else _value(None) for row in result]
    raise Unanswered(f"its result is a {shown(kind)}, and not one value for each series")


def _value(pair: object) -> float:
    """The value of a pair [time, "value"]. Raises Unanswered for what is none, as a histogram."""
    try:
        return float(pair[1]) if isinstance(pair, list) and len(pair) == 2 and isinstance(pair[1], str) else _no()
    except ValueError:
        return _no()


def _no() -> float:
    raise Unanswered("one of its values is no number")


def _asked(canary: CanarySettings) -> dict[str, object]:
    """The answer of Prometheus."""
    url = f"{canary.prometheus.rstrip('/')}/api/v1/query"
    data = urlencode({"query": canary.query or "", "timeout": f"{canary.timeout:g}"}).encode()
    request = urllib.request.Request(url, data, {"User-Agent": "continual"})
    until = time.monotonic() + canary.timeout
    try:
        with opener_for(url).open(request, timeout=canary.timeout) as answer:
            status, read = answer.status, bytearray()
            while part := answer.read1(LARGEST + 1 - len(read)):
                read += part
                if len(read) > LARGEST:
                    raise Unanswered(f"HTTP {status}, and more than {LARGEST} bytes")
                if time.monotonic() > until:
                    raise TimeoutError
    except TimeoutError:
        raise Unanswered(f"Prometheus did not answer within {canary.timeout:g} s") from None
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            raise Unanswered(f"Prometheus did not answer within {canary.timeout:g} s") from None
        said = getattr(reason, "strerror", None) or type(reason).__name__
        raise Unanswered(f"Prometheus cannot be asked ({said})") from None
    try:
        return parse_fields(bytes(read))
    except Malformed as error:
        raise Unanswered(f"HTTP {status}, and no JSON of Prometheus ({error})") from None


def _evaluated(merge: Merge, out: OutPlan, record: CanaryRecord) -> Answered:
    """What the evaluation says of the canary, beside what it is to replace (the base, where nothing was promoted
    yet)."""
    wanted = merge.settings.evaluation
    link = None if out.current is None else candidate_link(out.current)
    shown_now = (out.current, record.back) if record.back is not None else (None, 0)
    try:
        ask = merge.asker()
        if ask is None:
            return Answered("inconclusive", "evaluation: nothing is set in it any more")
        what = "what the canary is to replace"
        known = ask(_Shown(merge, out, *shown_now), what, wanted.max_rows)
        try:
            now = ask(_Shown(merge, out, link, record.seq), f"the canary, record {record.seq}", wanted.max_rows)
        except CommandFailed as error:
            return Answered("failed", f"evaluation: {error}")
    except (ContinualError, OSError) as error:
        return Answered("inconclusive", f"evaluation: {error}")
    assert now is not None, "it is in a directory"
    found = decide(now, known, None, wanted)
    if found.failed:
        return Answered("failed", f"evaluation: {_drops(found.failed)}", tuple(one.drop for one in found.failed))
    if found.unclear:
        return Answered("inconclusive", f"evaluation: {_drops(found.unclear)}, which may be chance")
    told = few(f"{key} {scores.mean(value):.4g}" for key, value in now.metrics.items())
    return Answered("passed", f"evaluation: {told}")


def _drops(found: Sequence[Drop]) -> str:
    told = [f"{one.name} is {'missing' if math.isinf(one.drop) else f'worse by {one.drop:.4g}'}" for one in found]
    return ", ".join(told)


@dataclass(frozen=True)
class _Shown:
    """The merge at a record that is out at `link`, or was to be, to be asked about; at record 0 the base."""

    merge: Merge
    out: OutPlan
    link: Path | None
    seq: int

    def directory(self, place: Path) -> Path:
        """What is out, where whole models are, else an export in `place` that goes again. Raises Misconfigured, Retry
        and Halt."""
        if self.seq == 0:
            with self.merge.weights() as whole:
                base = whole.checkpoint.place
                return base.path if isinstance(base, Folder) else self.merge.export(folder.Target(place / "base", at=0))
        there = {} if self.link is None else folder.provenance_in(self.link)
        if self.link is not None and self.out.as_lora is None and there.get("seq") == self.seq:
            return self.link.resolve()
        return self.merge.export(folder.Target(place / "model", at=self.seq), view=self.out.view)

    def reading(self) -> Reading:
        """How it is read. Raises Misconfigured where the record has expired."""
        return self.merge.reading(self.seq, view=self.out.view if self.seq else None)
