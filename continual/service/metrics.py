"""The series of one process, fed by the engine's reports. Which there are, and what each means, stands in `series.py`.

A gauge is there from its first value on, and goes when there is none any more; a counter is there at 0 as soon as what
it counts is in use, so that an alert on an increase sees the first one, too.
"""

from __future__ import annotations

import threading
from collections.abc import Iterable, Iterator, Mapping
from collections.abc import Set as AbstractSet
from itertools import product

from prometheus_client import (
    CollectorRegistry,
    Counter,
    Gauge,
    GCCollector,
    Histogram,
    PlatformCollector,
    ProcessCollector,
    generate_latest,
)
from prometheus_client.metrics_core import Metric
from prometheus_client.registry import Collector

from continual.engine.outcomes import FoldReport
from continual.service.health import REASONS
from continual.service.series import BUCKETS, BY_NAME, OTHER, TABLE, Series
from continual.state.entries import SelectEntry

CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The series of one process, on a registry of their own. From any thread."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._made: dict[str, Counter | Gauge | Histogram] = {}
        self._before: dict[str, float] = {}
        self._lock = threading.Lock()
        self.uses("always")
        self._gauge("continual_peak_memory_bytes").set_function(peak_memory)

    def uses(self, *words: str) -> None:
        """Has the counters of these features (words of `series.FEATURES`) at 0, with every label that is known."""
        for row in TABLE:
            if row.there in words and row.kind != "gauge":
                self._begin(row, product(*(values for _, values in row.labels)))

    def hooks(self, kinds: Iterable[str]) -> None:
        """Has the counter of the hooks at 0 for these kinds of them."""
        self._begin(BY_NAME["continual_hooks_total"], product(kinds, ("ok", "failed")))

    def _begin(self, row: Series, labels: Iterable[tuple[str, ...]]) -> None:
        made = self._metric(row.name)
        for values in labels if row.labels else ():
            made.labels(*values)

    def _metric(self, name: str) -> Counter | Gauge | Histogram:
        with self._lock:
            if (made := self._made.get(name)) is None:
                row = BY_NAME[name]
                labels = [label for label, _ in row.labels]
                if row.kind == "histogram":
                    made = Histogram(name, row.help, labels, registry=self.registry, buckets=BUCKETS)
                else:
                    kind = Counter if row.kind == "counter" else Gauge
                    made = kind(name, row.help, labels, registry=self.registry)
                self._made[name] = made
            return made

    def _count(self, name: str, by: float, *labels: str) -> None:
        """Adds to a counter. A label that is none of those known counts as `other`: their number stays bounded."""
        made = self._metric(name)
        assert isinstance(made, Counter)
        known = [
            value if value in values else OTHER for value, (_, values) in zip(labels, BY_NAME[name].labels, strict=True)
        ]
        (made.labels(*known) if known else made).inc(by)

    def _gauge(self, name: str) -> Gauge:
        made = self._metric(name)
        assert isinstance(made, Gauge)
        return made

    def _set(self, name: str, value: float | None) -> None:
        """Sets a gauge; None: there is no such value, and so no series."""
        if value is not None:
            self._gauge(name).set(value)
            return
        with self._lock:
            if (made := self._made.pop(name, None)) is not None:
                self.registry.unregister(made)

    def _observe(self, name: str, seconds: float) -> None:
        made = self._metric(name)
        assert isinstance(made, Histogram)
        made.observe(seconds)

    def observe(self, report: FoldReport | None, now: float) -> None:
        """A committed fold, with its report where there is one; `now` in seconds since 1970."""
        self._count("continual_folds_total", 1)
        self._set("continual_last_fold_timestamp_seconds", now)
        if report is None:
            return
        self._count("continual_read_bytes_total", report.bytes_read)
        self._observe("continual_fold_seconds", report.seconds["total"])
        for stage, seconds in report.seconds.items():
            if stage != "total":
                self._count("continual_fold_stage_seconds_total", seconds, stage)
        if kept := (report.numbers.notes or {}).get("kept"):
            self._set("continual_energy_kept_ratio", kept.mean)

    def refused(self, reason: str) -> None:
        """A candidate that was kept out."""
        self._count("continual_refusals_total", 1, reason)

    def round(self, seconds: float, folds: int, now: float) -> None:
        """A round that has ended, and how many models it brought into the merge by itself; `now` in seconds since
        1970."""
        if folds:
            self._count("continual_folds_total", folds)
            self._set("continual_last_fold_timestamp_seconds", now)
        self._set("continual_last_round_timestamp_seconds", now)
        self._count("continual_rounds_total", 1)
        self._observe("continual_round_seconds", seconds)

    def last(self, fold: float | None, round_: float | None) -> None:
        """When a model was folded and a round ended last, by the ledger, in seconds since 1970; None: never."""
        self._set("continual_last_fold_timestamp_seconds", fold)
        self._set("continual_last_round_timestamp_seconds", round_)

    def pool(self, waiting: int, last: SelectEntry | None) -> None:
        """Who waits, and the figures of the last round."""
        self._set("continual_pool_candidates", waiting)
        self._set("continual_round_gap", last.gap if last else None)
        self._set("continual_round_loss", last.loss if last else None)
        self._set("continual_round_loss_before", last.before if last else None)

    def published(self, seq: int) -> None:
        """The link `current` has record `seq`."""
        self._set("continual_published_seq", seq)

    def released(self, uploaded: int) -> None:
        """A release that is out, and how many bytes were uploaded for it."""
        self._count("continual_releases_total", 1)
        self._count("continual_released_bytes_total", uploaded)

    def hook(self, kind: str, *, ok: bool) -> None:
        """A hook that was called, and whether it worked."""
        self._count("continual_hooks_total", 1, kind, "ok" if ok else "failed")

    def notified(self, *, ok: bool) -> None:
        """A message to people that an address took, or did not take after all tries."""
        self._count("continual_notifications_total", 1, "ok" if ok else "failed")

    def canaries(self, waiting: int | None) -> None:
        """How many canaries wait for a verdict; None where the settings have none."""
        self._set("continual_canaries", waiting)

    def canary_measured(self, verdict: str) -> None:
        """A look at a canary: `passed`, `failed` or `inconclusive`."""
        self._count("continual_canary_measurements_total", 1, verdict)

    def canary_ended(self, verdict: str) -> None:
        """A canary that was `promoted`, or taken back: `failed`."""
        self._count("continual_canary_verdicts_total", 1, verdict)

    def source(self, series: Mapping[str, float | None]) -> None:
        """What a source or a cluster measured, by the name of the series; a counter counts from its start."""
        for name, value in series.items():
            if BY_NAME[name].kind == "counter":
                self._count(name, self._more(name, value or 0.0))
            else:
                self._set(name, value)

    def labelled(self, name: str, label: str, value: float) -> None:
        """What a cluster measured by the label of a counter, from its start. Who gives the labels bounds them."""
        made = self._metric(name)
        assert isinstance(made, Counter)
        made.labels(label).inc(self._more(f"{name} {label}", value))

    def _more(self, what: str, value: float) -> float:
        """How much a value is above what it was before."""
        before, self._before[what] = self._before.get(what, 0.0), value
        return value - before

    def retried(self) -> None:
        """A candidate that was put back."""
        self._count("continual_retries_total", 1)

    def error(self, kind: str) -> None:
        """Something that went wrong, of a kind in `series.ERRORS`."""
        self._count("continual_errors_total", 1, kind)

    def degraded(self, reasons: AbstractSet[str]) -> None:
        """For which reasons the daemon calls itself degraded now."""
        for reason in REASONS:
            self._gauge("continual_degraded").labels(reason).set(reason in reasons)

    def room(self, free: int, needs: int) -> None:
        """How many bytes are free on the disk of the state, and how many the next fold needs."""
        self._set("continual_disk_free_bytes", free)
        self._set("continual_fold_needs_bytes", needs)

    def stored(self, nbytes: Mapping[str, int]) -> None:
        """What the files of the state take, by a word of `usage.KINDS`."""
        for what, taken in nbytes.items():
            self._gauge("continual_stored_bytes").labels(what).set(taken)

    def device(self, *, used: int, free: int, reserved: int) -> None:
        """The memory of the device on which tensors are computed, in bytes."""
        for what, nbytes in (("used", used), ("free", free), ("reserved", reserved)):
            self._set(f"continual_device_{what}_bytes", nbytes)

    def dropped(self, reason: str) -> None:
        """A connection that the service did not answer as asked, for a reason in `series.DROPPED`."""
        self._count("continual_http_dropped_total", 1, reason)

    def paused(self, *, paused: bool) -> None:
        """Whether folding is paused."""
        self._set("continual_paused", paused)

    def queue(self, waiting: int) -> None:
        """How many candidates wait."""
        self._set("continual_queue_candidates", waiting)

    def under_way(self, ratio: float | None) -> None:
        """How much of the fold or round under way is done; None where there is none."""
        self._set("continual_under_way_ratio", ratio)

    def state(self, nbytes: int, generations: int, head: int, folds: int) -> None:
        """What the state holds now."""
        for name, value in (("bytes", nbytes), ("generations", generations), ("head", head), ("folds", folds)):
            self._set(f"continual_state_{name}", value)

    def full(self, used: float, cut: float) -> None:
        """How full the fullest layer of a state of adapters is, and what share was cut off by now."""
        self._set("continual_width_used_ratio", used)
        self._set("continual_cut_ratio", cut)

    def gauges(self, gauges: Mapping[str, float]) -> None:
        """What the rule says of its totals."""
        self._set("continual_lambda_ratio", gauges.get("lambda"))

    def scale(self, ratio: float | None, tuned_folds: int | None) -> None:
        """How the merge is read; an unknown ratio leaves the last one that was known. `tuned_folds` is None where the
        scale was not tuned."""
        if ratio is not None:
            self._set("continual_scale_ratio", ratio)
        self._set("continual_scale_tuned_folds", tuned_folds)

    def build(self, *, rule: str, device: str, software: Mapping[str, str]) -> None:
        """What runs."""
        labels = (software["continual"], software["torch"], rule, device)
        self._gauge("continual_build_info").labels(*labels).set(1)

    def resources(self, *, workers: int, memory: int) -> None:
        """How many tensors are folded at a time, and the bytes that they may take."""
        self._set("continual_workers", workers)
        self._set("continual_memory_limit_bytes", memory)

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(_Untimed(self.registry))


class _Untimed(Collector):
    """A registry without the times at which its counters were made: two series for each that nobody asks for."""

    def __init__(self, registry: CollectorRegistry) -> None:
        self._registry = registry

    def collect(self) -> Iterator[Metric]:
        for family in self._registry.collect():
            family.samples = [sample for sample in family.samples if not sample.name.endswith("_created")]
            yield family


def peak_memory() -> float:
    """VmHWM of this process in bytes, 0 where /proc does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0.0)
    except OSError:
        return 0.0
