"""What is measured from time to time beside the folds: room on the disk and in the layers, the memory of the device.
The series that it is for are in `series.py`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable, Sequence
from datetime import datetime

from continual import selection, tuning
from continual.api import Merge
from continual.config import Settings
from continual.executors.cluster_figures import ClusterSeen
from continual.executors.device import pick_device
from continual.lazily import torch
from continual.service import showing, showing_cluster
from continual.service.failures import Failures, told
from continual.service.metrics import Metrics
from continual.service.status import Live
from continual.state import storing, usage
from continual.state.entries import SelectEntry, TuneEntry
from continual.state.format import Commit
from continual.state.transaction import MARGIN

_ROOM = 5.0
"""Seconds between two looks at how much room there is."""
_FILES = 60.0
"""Seconds between two looks at every file of the state."""


def in_use(settings: Settings, selects: str) -> list[str]:
    """The features that these settings use, as words of `series.FEATURES`. `selects`: who rounds choose by."""
    views = settings.views.values()
    found = {
        "rounds": selects != "none",
        "publish": settings.current is not None,
        "release": settings.release.repo is not None or any(view.repo for view in views),
        "notify": bool(settings.notify.urls),
        "ray": settings.executor == "ray",
        "canary": settings.release.canary is not None or any(view.canary for view in views),
    }
    return [word for word, used in found.items() if used]


def begin(metrics: Metrics, merge: Merge) -> None:
    """Has the counters of what the settings use at 0; called anew when they change."""
    settings = merge.settings
    words = in_use(settings, merge.selects)
    metrics.uses(*words)
    metrics.hooks(dict.fromkeys(hook.kind for hook in settings.hooks))
    if settings.executor == "local":  # a cluster is asked for nothing before there is work for it
        executor = merge.executor
        metrics.resources(workers=executor.workers, memory=executor.budget)
    if "canary" not in words:
        metrics.canaries(None)


def of_state(merge: Merge, live: Live, metrics: Metrics) -> None:
    """Sets the series of what the state holds now."""
    state = merge.state
    ledger = state.ledger
    metrics.paused(paused=live.paused is not None)
    metrics.state(state.generation_bytes(), len(state.generations()), ledger.head.seq, len(ledger.folds()))
    metrics.gauges(merge.rule.read.gauges(ledger.totals))
    if merge.selects != "none":
        last = selection.last_round(state)
        metrics.pool(len(ledger.pool), last.of_kind(SelectEntry) if last else None)
    tuned = tuning.in_force(state)
    metrics.scale(merge.reading().factor(), tuned.of_kind(TuneEntry).folds if tuned else None)


def last_times(log: Sequence[Commit]) -> tuple[float | None, float | None]:
    """When a model was folded and a round ended last, by these records, in seconds since 1970; None: never. Raises
    Damaged and Retry where a record cannot be read."""
    rounds = [commit for commit in log if commit.kind == "select"]
    brought = next((c for c in reversed(rounds) if c.of_kind(SelectEntry).folds), None)
    folds = next((c for c in reversed(log) if c.kind in ("fold", "combine")), None)
    times = [seconds(commit.time) for commit in (folds, brought) if commit is not None]
    return max(times, default=None), seconds(rounds[-1].time) if rounds else None


def seconds(time: str) -> float:
    """A time of a record as seconds since 1970."""
    return datetime.fromisoformat(time).timestamp()


def device_memory(device: torch.device) -> dict[str, int] | None:
    """Bytes of the memory of an accelerator that are `used` by any process, `free`, and `reserved` by this one for its
    tensors, as torch's module for it says; None for the CPU, and for a device whose module does not say it."""
    module = None if device.type == "cpu" else torch.get_device_module(device)
    ask: Callable[[torch.device], tuple[int, int]] | None = getattr(module, "mem_get_info", None)
    if module is None or ask is None:
        return None
    free, whole = ask(device)
    return {"used": whole - free, "free": free, "reserved": module.memory_reserved(device)}


async def measure(merge: Merge, live: Live, failures: Failures) -> None:
    """Looks again and again; ends when it is cancelled. What is raised is told of, and the next look may do better."""
    metrics = failures.metrics
    path, files, device = str(merge.state.path), 0.0, pick_device(merge.settings.device)
    while True:
        try:
            await asyncio.to_thread(_look, merge, live, metrics, device)
            if time.monotonic() >= files:
                metrics.stored(await asyncio.to_thread(usage.by_kind, merge.state.path))
                files = time.monotonic() + _FILES
        except OSError as error:
            live.health.fails("disk", path, told(error))
        except Exception as error:  # of a device, say: no reason to stop folding
            failures.tell(error, what="the look at room")
        else:
            live.health.works("disk", path)
        await asyncio.sleep(_ROOM)


def _look(merge: Merge, live: Live, metrics: Metrics, device: torch.device) -> None:
    """How much room there is on the disk, in the layers and on the device. Raises OSError."""
    state = merge.state
    # where adapters are kept a cut writes all that is there again
    needs = (state.generation_bytes() if state.format.sparse else state.format.generation_bytes) + MARGIN
    if (free := storing.free(state.path)) is not None:
        live.health.room(str(state.path), free, needs)
        metrics.room(free, needs)
    if (full := showing.fullness_of(merge)) is not None:
        metrics.full(full.used / full.width, full.cut)
    if (memory := device_memory(device)) is not None:
        metrics.device(**memory)
    _look_at_cluster(merge.settings, live, metrics)


def _look_at_cluster(settings: Settings, live: Live, metrics: Metrics) -> None:
    """What the cluster did for this process, and whether it answers. The settings can name another one by now, or
    none."""
    problem = ""
    if settings.executor == "ray":
        seen = live.figures.seen(settings.ray.address)
        cluster(seen, metrics)
        problem = showing_cluster.silence(seen, live.figures.clock())
    else:
        metrics.source(NO_CLUSTER)
    if problem:
        live.health.fails("cluster", "ray.address", f"{settings.ray.address} {problem}")
    else:
        live.health.works("cluster", "ray.address")


NO_CLUSTER: dict[str, float | None] = dict.fromkeys(
    (
        "continual_ray_nodes",
        "continual_ray_answered_timestamp_seconds",
        "continual_ray_orders_out",
        "continual_ray_avoided_nodes",
    )
)
"""The gauges of a cluster where none is used any more."""


def cluster(seen: ClusterSeen, metrics: Metrics) -> None:
    """Sets the series of a cluster: of all its machines together, and of each."""
    alive = None if seen.answered is None else sum(node.alive for node in seen.nodes.values()) * (not seen.parted)
    metrics.source(
        {
            "continual_ray_nodes": alive,
            "continual_ray_answered_timestamp_seconds": seen.answered,
            "continual_ray_orders_out": len(seen.out),
            "continual_ray_orders_total": seen.all.orders,
            "continual_ray_avoided_nodes": len(seen.avoided),
            "continual_ray_lost_total": seen.lost,
            "continual_ray_failed_total": seen.failed,
            "continual_ray_seconds_total": seen.all.seconds,
            "continual_ray_read_bytes_total": seen.all.nbytes,
        }
    )
    for label, done in seen.labelled.items():
        metrics.labelled("continual_ray_node_orders_total", label, done.orders)
        metrics.labelled("continual_ray_node_seconds_total", label, done.seconds)
        metrics.labelled("continual_ray_node_read_bytes_total", label, done.nbytes)
