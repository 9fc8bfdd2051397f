"""The part of the front page about a cluster that does the work."""

from __future__ import annotations

from continual.outside import counted
from continual.service.web.pages.markup import Html, facts, join, name, paragraph, section, table
from continual.service.web.view import ShownCluster, ShownNode, ShownWork
from continual.texts import duration, size, when


def cluster(found: ShownCluster | None) -> Html:
    """The machines, and the orders under way; nothing where all is done on this machine."""
    if found is None:
        return Html()
    return section(
        "cluster",
        "Cluster",
        paragraph(f"The cluster {found.problem}.", "bad") if found.problem else "",
        paragraph(f"At {found.address}{f', as of {when(found.answered)}' if found.answered else ''}."),
        _avoided(found),
        facts([*_has(found), ("orders done", found.work.orders), *_failures(found)]),
        _orders(found),
        _nodes(found),
    )


def _failures(found: ShownCluster) -> list[tuple[str, object]]:
    failed = [("orders that a machine could not do", found.failed)] if found.failed else []
    return [("orders lost", found.lost), *failed]


def _avoided(found: ShownCluster) -> Html:
    """Machines that get no orders for a while, and why."""
    return join(
        paragraph(f"The machine {one.address} gets no orders until {when(one.until)}: {one.why}", "bad")
        for one in found.avoided
    )


def _has(found: ShownCluster) -> list[tuple[str, object]]:
    """The cards of what machines are alive; none while the cluster is not connected."""
    if not found.connected:
        return []
    return [
        ("machines alive", found.alive),
        ("cores", f"{found.cores:g}"),
        ("memory for orders", size(found.memory_bytes)),
        ("GPUs", f"{found.gpus:g}"),
    ]


def _orders(found: ShownCluster) -> Html:
    """How far the work under way is, and which orders are out."""
    if not found.total:
        return paragraph("No order is out.", "none")
    waiting = found.total - found.done - found.out
    told = paragraph(
        f"Now: {found.done} of {counted(found.total, 'order')} done, {found.out} out, {waiting} still to be sent."
    )
    rows = (
        (
            name(one.tensor),
            one.tensors,
            when(one.since),
            one.machine or "",
            when(one.began) if one.began else "waits for a core",
            one.lost or "",
        )
        for one in found.orders
    )
    more = found.out - len(found.orders)
    head = ("begins with", "tensors", "since", "machine", "at work since", "lost before")
    table_ = table(head, rows, "Orders that are out") if found.orders else ""
    return Html(told + table_ + (paragraph(f"and {more} more") if more > 0 else ""))


def _nodes(found: ShownCluster) -> Html:
    """What each machine has and did."""
    if not found.nodes:
        return paragraph("Which machines it has is asked when there is work for it.", "none")
    rows = [_node(one, found) for one in found.nodes]
    if found.others.orders:
        rows.append(("others", "", "", "", "", "", "", *_work(found.others), "", ""))
    return table(
        (
            "machine",
            "state",
            "cores",
            "memory",
            "GPUs",
            "orders now",
            "works on",
            "orders done",
            "read",
            "time of work",
            "last heard of",
            "its last order began with",
        ),
        rows,
        "Machines",
    )


def _node(one: ShownNode, found: ShownCluster) -> tuple[object, ...]:
    has = (f"{one.cores:g}", size(one.memory_bytes), f"{one.gpus:g}") if one.alive else ("", "", "")
    heard = (when(one.heard), name(one.last)) if one.heard else ("", "")
    avoided = one.address in {each.address for each in found.avoided}
    state = "gone" if not one.alive else "not known" if not found.connected else "avoided" if avoided else "alive"
    on = (one.working, name(one.on)) if one.on else ("", "")
    return (one.address, state, *has, *on, *_work(one.work), *heard)


def _work(work: ShownWork) -> tuple[object, ...]:
    return (work.orders, size(work.read_bytes), duration(work.seconds)) if work.orders else ("", "", "")
