"""Every series the daemon exposes, in one table, fed by the engine's reports. No label is a model's name: their number
must stay bounded."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from collections.abc import Set as AbstractSet
from itertools import product
from typing import NamedTuple

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

from continual.engine.outcomes import FoldReport
from continual.errors import REFUSALS
from continual.gates import GATES
from continual.service.health import REASONS
from continual.state.entries import SelectEntry


class Series(NamedTuple):
    """A row of the table; `kind` is the Prometheus type."""

    kind: type[Counter] | type[Gauge] | type[Histogram]
    name: str
    help: str
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


ERRORS = ("halt", "internal", "source", "publish", "release", "hook", "canary", "page")
"""The kinds of errors: a halt; an exception that nobody expected; a source, a publication, a hook or the watch over a
canary that failed; a page that could not be shown."""
DROPPED = ("full", "slow", "host", "malformed")
"""Why the service does not answer a connection as it was asked."""
STAGES = ("read", "rule", "write", "commit")
HOOKS = ("sglang", "sglang-lora", "vllm-lora", "http", "command")
_SECONDS = (0.1, 0.3, 1.0, 3.0, 10.0, 30.0, 100.0, 300.0, 1000.0, 3000.0)
TABLE: tuple[Series, ...] = (
    Series(Counter, "continual_folds_total", "Fine-tunes folded by this process."),
    Series(
        Counter, "continual_refusals_total", "Candidates refused by this process, duplicates included.", ("reason",)
    ),
    Series(
        Gauge,
        "continual_degraded",
        "1 for each reason for which the daemon is degraded, 0 for the others.",
        ("reason",),
    ),
    Series(Gauge, "continual_disk_free_bytes", "Bytes that are free on the disk of the state."),
    Series(Gauge, "continual_fold_needs_bytes", "Bytes that the next fold needs on the disk of the state."),
    Series(
        Counter, "continual_http_dropped_total", "Connections that the service did not answer as asked.", ("reason",)
    ),
    Series(
        Counter, "continual_retries_total", "Times a candidate was put back because the environment got in the way."
    ),
    Series(Counter, "continual_errors_total", "Things that went wrong outside any candidate.", ("kind",)),
    Series(Counter, "continual_read_bytes_total", "Bytes read from bases and fine-tunes."),
    Series(
        Counter,
        "continual_fold_stage_seconds_total",
        "Seconds spent in folds by stage, summed over workers.",
        ("stage",),
    ),
    Series(
        Histogram, "continual_fold_seconds", "Wall time of a fold from headers to acknowledged commit.", (), _SECONDS
    ),
    Series(Gauge, "continual_queue_candidates", "Candidates waiting."),
    Series(Gauge, "continual_paused", "1 while folding is paused by 'continual pause', else 0."),
    Series(
        Gauge,
        "continual_last_fold_timestamp_seconds",
        "When this process last folded, as seconds since 1970; 0 if it has not.",
    ),
    Series(Gauge, "continual_state_bytes", "Bytes of the accumulators in one generation."),
    Series(Gauge, "continual_state_generations", "Generations kept on disk."),
    Series(Gauge, "continual_state_head", "Number of the newest record."),
    Series(Gauge, "continual_state_folds", "Folds in force."),
    Series(
        Gauge,
        "continual_lambda_ratio",
        "The scaling factor of OPCM: norm of the merged direction over the mean task-vector norm.",
    ),
    Series(
        Gauge,
        "continual_energy_kept_ratio",
        "Share of the last task vector's energy that its projection kept, mean over matrices.",
    ),
    Series(
        Gauge,
        "continual_width_used_ratio",
        "Of a state of adapters: singular triplets of its fullest layer over the width; else 0.",
    ),
    Series(
        Gauge,
        "continual_cut_ratio",
        "Of a state of adapters: share of the sum of all squared task-vector norms that was cut off by now.",
    ),
    Series(
        Gauge,
        "continual_scale_ratio",
        "What the rule's own result is multiplied by when it is read, where known; 0 until then.",
    ),
    Series(Gauge, "continual_scale_tuned_folds", "Folds in force when the scale was tuned; 0 where it was not."),
    Series(Counter, "continual_rounds_total", "Rounds over the pool that this process ended."),
    Series(
        Histogram,
        "continual_round_seconds",
        "Wall time of a round, from loading the model to its record.",
        (),
        _SECONDS,
    ),
    Series(Gauge, "continual_pool_candidates", "Candidates waiting in the pool for a round."),
    Series(
        Gauge, "continual_round_gap", "Duality gap at the end of the last round, in units of the loss; 0 before any."
    ),
    Series(
        Gauge,
        "continual_round_loss",
        "Loss on the driving calibration rows at the end of the last round; 0 before any.",
    ),
    Series(Gauge, "continual_round_loss_before", "The same loss at its beginning."),
    Series(Counter, "continual_releases_total", "Releases on the Hub that this process made."),
    Series(Counter, "continual_released_bytes_total", "Bytes of files that were uploaded for them."),
    Series(Counter, "continual_hooks_total", "Hooks called after a publication.", ("kind", "result")),
    Series(Gauge, "continual_canaries", "Canaries that are not promoted or taken back yet."),
    Series(Counter, "continual_canary_measurements_total", "Looks at canaries, by what they said.", ("verdict",)),
    Series(Counter, "continual_canary_verdicts_total", "Canaries that were promoted or taken back.", ("verdict",)),
    Series(Counter, "continual_hub_requests_total", "Requests this process made to the Hub to look and to read."),
    Series(Counter, "continual_hub_received_bytes_total", "Bytes it received from there."),
    Series(
        Gauge,
        "continual_hub_last_poll_timestamp_seconds",
        "When the Hub was last asked what is new, as seconds since 1970; 0 if it was not.",
    ),
    Series(Gauge, "continual_peak_memory_bytes", "Largest resident set of the process so far (VmHWM)."),
    Series(
        Gauge, "continual_build_info", "Always 1; the labels say what runs.", ("version", "torch", "rule", "device")
    ),
)
CONTENT_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Metrics:
    """The series of one process, on a registry of their own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        for collector in (ProcessCollector, PlatformCollector, GCCollector):
            collector(registry=self.registry)
        self._counters: dict[str, Counter] = {}
        self._gauges: dict[str, Gauge] = {}
        self._histograms: dict[str, Histogram] = {}
        self._before: dict[str, float] = {}
        for row in TABLE:
            if row.kind is Histogram:
                self._histograms[row.name] = Histogram(
                    row.name, row.help, row.labels, registry=self.registry, buckets=row.buckets
                )
            elif row.kind is Counter:
                self._counters[row.name] = Counter(row.name, row.help, row.labels, registry=self.registry)
            else:
                self._gauges[row.name] = Gauge(row.name, row.help, row.labels, registry=self.registry)
        self._gauges["continual_peak_memory_bytes"].set_function(peak_memory)
        self._from_the_start()

    def _from_the_start(self) -> None:
        """Shows every label that is known, at 0: an alert on an increase sees the first one, too."""
        refusals = dict.fromkeys((*REFUSALS, *(reason for gate in GATES for reason in gate.reasons)))
        known: dict[str, Iterable[tuple[str, ...]]] = {
            "continual_refusals_total": [(reason,) for reason in refusals],
            "continual_errors_total": [(kind,) for kind in ERRORS],
            "continual_fold_stage_seconds_total": [(stage,) for stage in STAGES],
            "continual_hooks_total": product(HOOKS, ("ok", "failed")),
            "continual_canary_measurements_total": [("passed",), ("failed",), ("inconclusive",)],
            "continual_canary_verdicts_total": [("promoted",), ("failed",)],
            "continual_http_dropped_total": [(reason,) for reason in DROPPED],
            "continual_degraded": [(reason,) for reason in REASONS],
        }
        for name, rows in known.items():
            for labels in rows:
                (self._counters.get(name) or self._gauges[name]).labels(*labels)

    def observe(self, report: FoldReport | None, now: float) -> None:
        """A committed fold, with its report where there is one; `now` in seconds since 1970."""
        self._counters["continual_folds_total"].inc()
        self._gauges["continual_last_fold_timestamp_seconds"].set(now)
        if report is None:
            return
        self._counters["continual_read_bytes_total"].inc(report.bytes_read)
        self._histograms["continual_fold_seconds"].observe(report.seconds["total"])
        for stage, seconds in report.seconds.items():
            if stage != "total":
                self._counters["continual_fold_stage_seconds_total"].labels(stage).inc(seconds)
        if kept := (report.numbers.notes or {}).get("kept"):
            self._gauges["continual_energy_kept_ratio"].set(kept.mean)

    def refused(self, reason: str) -> None:
        """A candidate that was kept out."""
        self._counters["continual_refusals_total"].labels(reason).inc()

    def round(self, seconds: float, folds: int, now: float) -> None:
        """A round that has ended, and how many models it brought into the merge by itself; `now` in seconds since
        1970."""
        if folds:
            self._counters["continual_folds_total"].inc(folds)
            self._gauges["continual_last_fold_timestamp_seconds"].set(now)
        self._counters["continual_rounds_total"].inc()
        self._histograms["continual_round_seconds"].observe(seconds)

    def pool(self, waiting: int, last: SelectEntry | None) -> None:
        """Who waits, and the figures of the last round; zeros before the first."""
        self._gauges["continual_pool_candidates"].set(waiting)
        self._gauges["continual_round_gap"].set(last.gap if last else 0.0)
        self._gauges["continual_round_loss"].set(last.loss if last else 0.0)
        self._gauges["continual_round_loss_before"].set(last.before if last else 0.0)

    def released(self, uploaded: int) -> None:
        """A release that is out, and how many bytes were uploaded for it."""
        self._counters["continual_releases_total"].inc()
        self._counters["continual_released_bytes_total"].inc(uploaded)

    def hook(self, kind: str, *, ok: bool) -> None:
        """A hook that was called, and whether it worked."""
        self._counters["continual_hooks_total"].labels(kind, "ok" if ok else "failed").inc()

    def canaries(self, waiting: int) -> None:
        """How many canaries wait for a verdict."""
        self._gauges["continual_canaries"].set(waiting)

    def canary_measured(self, verdict: str) -> None:
        """A look at a canary: `passed`, `failed` or `inconclusive`."""
        self._counters["continual_canary_measurements_total"].labels(verdict).inc()

    def canary_ended(self, verdict: str) -> None:
        """A canary that was `promoted`, or taken back: `failed`."""
        self._counters["continual_canary_verdicts_total"].labels(verdict).inc()

    def source(self, series: Mapping[str, float]) -> None:
        """What a source measured, by the name of the series; a counter counts from the start of the source."""
        for name, value in series.items():
            if name in self._counters:
                self._counters[name].inc(value - self._before.get(name, 0.0))
                self._before[name] = value
            else:
                self._gauges[name].set(value)

    def retried(self) -> None:
        """A candidate that was put back."""
        self._counters["continual_retries_total"].inc()

    def error(self, kind: str) -> None:
        """Something that went wrong, of a kind in `ERRORS`."""
        self._counters["continual_errors_total"].labels(kind).inc()

    def degraded(self, reasons: AbstractSet[str]) -> None:
        """For which reasons the daemon calls itself degraded now."""
        for reason in REASONS:
            self._gauges["continual_degraded"].labels(reason).set(reason in reasons)

    def room(self, free: int, needs: int) -> None:
        """How many bytes are free on the disk of the state, and how many the next fold needs."""
        self._gauges["continual_disk_free_bytes"].set(free)
        self._gauges["continual_fold_needs_bytes"].set(needs)

    def dropped(self, reason: str) -> None:
        """A connection that the service did not answer as asked, for a reason in `DROPPED`."""
        self._counters["continual_http_dropped_total"].labels(reason).inc()

    def paused(self, *, paused: bool) -> None:
        """Whether folding is paused."""
        self._gauges["continual_paused"].set(paused)

    def queue(self, waiting: int) -> None:
        """How many candidates wait."""
        self._gauges["continual_queue_candidates"].set(waiting)

    def state(self, nbytes: int, generations: int, head: int, folds: int) -> None:
        """What the state holds now."""
        for name, value in (("bytes", nbytes), ("generations", generations), ("head", head), ("folds", folds)):
            self._gauges[f"continual_state_{name}"].set(value)

    def full(self, used: float, cut: float) -> None:
        """How full the fullest layer of a state of adapters is, and what share was cut off by now."""
        self._gauges["continual_width_used_ratio"].set(used)
        self._gauges["continual_cut_ratio"].set(cut)

    def gauges(self, gauges: Mapping[str, float]) -> None:
        """What the rule says of its totals."""
        if "lambda" in gauges:
            self._gauges["continual_lambda_ratio"].set(gauges["lambda"])

    def scale(self, ratio: float | None, tuned_folds: int) -> None:
        """How the merge is read; an unknown ratio leaves the last one that was known."""
        if ratio is not None:
            self._gauges["continual_scale_ratio"].set(ratio)
        self._gauges["continual_scale_tuned_folds"].set(tuned_folds)

    def build(self, *, rule: str, device: str, software: Mapping[str, str]) -> None:
        """What runs."""
        labels = (software["continual"], software["torch"], rule, device)
        self._gauges["continual_build_info"].labels(*labels).set(1)

    def text(self) -> bytes:
        """All series in Prometheus' text format."""
        return generate_latest(self.registry)


def peak_memory() -> float:
    """VmHWM of this process in bytes, 0 where /proc does not tell."""
    try:
        with open("/proc/self/status", encoding="ascii") as lines:
            return next((float(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")), 0.0)
    except OSError:
        return 0.0
