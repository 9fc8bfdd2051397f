"""What the status shows of a cluster, from what this process knows of it. The cluster is asked nothing here."""

from __future__ import annotations

from datetime import UTC, datetime
from textwrap import shorten

from continual.executors.cluster_figures import ClusterSeen, NodeSeen, OutOrder, WorkDone
from continual.service.web.view import ShownAvoided, ShownCluster, ShownNode, ShownOrder, ShownWork

NODES = 50
"""Machines that are shown by themselves."""
ORDERS = 12
"""Orders that are shown by themselves."""
WHY = 500
"""Characters of why a machine is avoided."""
SILENT = 30.0
"""Seconds without an answer, while there is work, after which a cluster is said to be silent."""


def shown(address: str, seen: ClusterSeen, now: float) -> ShownCluster:
    """The cluster at an address, as it was seen; `now` in seconds since 1970. Of more machines than are shown those
    come first that are alive, and that did the most."""
    alive = [node for node in seen.nodes.values() if node.alive]
    names = sorted({*seen.nodes, *seen.work}, key=lambda name: (not _seen(seen, name).alive, -_seconds(seen, name)))
    rows, rest = sorted(names[:NODES], key=_by_numbers), names[NODES:]
    others = seen.gone
    for name in rest:
        others = others.plus(_work(seen, name))
    return ShownCluster(
        address=address,
        answered=None if seen.answered is None else _time(seen.answered),
        connected=seen.answered is not None and seen.parted is None,
        problem=silence(seen, now),
        alive=len(alive),
        cores=sum(node.cores for node in alive),
        memory_bytes=sum(node.memory for node in alive),
        gpus=sum(node.gpus for node in alive),
        nodes=tuple(_node(seen, name) for name in rows),
        others=_shown(others),
        work=_shown(seen.all),
        lost=seen.lost,
        failed=seen.failed,
        avoided=tuple(
            ShownAvoided(name, shorten(one.why, WHY, placeholder=" …"), _time(one.since), _time(one.until))
            for name, one in sorted(seen.avoided.items(), key=lambda named: _by_numbers(named[0]))[:NODES]
        ),
        done=seen.done,
        total=seen.total,
        out=len(seen.out),
        orders=tuple(map(_order, seen.out[:ORDERS])),
    )


def silence(seen: ClusterSeen, now: float) -> str:
    """That the cluster is not connected any more, or does not answer where there is work for it; empty where neither is
    so."""
    if seen.parted is not None:
        return f"is not connected since {_time(seen.parted)}: the next work connects anew"
    if seen.since is None or now - max(seen.since, seen.answered or 0.0) <= SILENT:
        return ""
    since = "has not answered yet" if seen.answered is None else f"has not answered since {_time(seen.answered)}"
    return f"{since}, and there is work for it"


def _order(one: OutOrder) -> ShownOrder:
    began = None if one.began is None else _time(one.began)
    return ShownOrder(one.first, one.pieces, _time(one.since), one.lost, one.machine or None, began)


def _node(seen: ClusterSeen, name: str) -> ShownNode:
    node, work = _seen(seen, name), seen.work.get(name)
    on = sorted((one for one in seen.out if one.machine == name), key=lambda one: one.began or one.since)
    return ShownNode(
        address=name,
        alive=node.alive,
        cores=node.cores,
        memory_bytes=node.memory,
        gpus=node.gpus,
        work=_shown(_work(seen, name)),
        heard=None if work is None else _time(work.heard),
        last=None if work is None else work.last,
        working=len(on),
        on=on[0].first if on else None,
    )


def _by_numbers(address: str) -> tuple[list[int], str]:
    """10.0.0.9 comes before 10.0.0.10."""
    return [int(part) for part in address.split(".") if part.isdecimal()], address


def _seen(seen: ClusterSeen, name: str) -> NodeSeen:
    return seen.nodes.get(name, NodeSeen(alive=False))


def _work(seen: ClusterSeen, name: str) -> WorkDone:
    return seen.work[name].done if name in seen.work else WorkDone()


def _seconds(seen: ClusterSeen, name: str) -> float:
    return _work(seen, name).seconds


def _shown(done: WorkDone) -> ShownWork:
    return ShownWork(done.orders, done.nbytes, round(done.seconds, 3))


def _time(seconds: float) -> str:
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="seconds").replace("+00:00", "Z")
