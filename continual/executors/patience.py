"""How long it is waited for the answers of a cluster, and what is said meanwhile."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Collection, Mapping
from typing import Any

from continual.errors import Retry
from continual.executors.links import SILENT, ClusterLink
from continual.outside import counted

QUIET = 20.0
"""Seconds without an answer after which the log says what is waited for; then after twice as many, and so on."""
ROOM_SAID = 5.0
"""Seconds after which it says that no machine can do an order."""
NO_ROOM = 600.0
"""Seconds for which it is waited that a machine comes that can do an order at all: a cluster that grows by itself takes
minutes."""
_log = logging.getLogger("continual.executors")


class Patience:
    """How long it was waited for an answer, and what is said about it. `clock` tells seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic) -> None:
        self._clock = clock
        self.renew()

    def renew(self) -> None:
        """Something came."""
        self._since, self._next = self._clock(), QUIET

    def look(self, link: ClusterLink, out: int, options: Mapping[str, Any], *, begun: bool = True) -> None:
        """Says in the log, more and more rarely, what is waited for: `out` orders, of which the oldest has these
        options, and whether a worker has begun with one of them. Raises Retry where no machine can do it for a long
        time."""
        waited = self._clock() - self._since
        room = any(fits(node["Resources"], options) for node in link.nodes)
        if not room and waited > NO_ROOM:
            raise Retry(f"{no_room(link, options)}; nothing was settled")
        if waited < self._next and (room or waited < ROOM_SAID or self._next > QUIET):
            return
        self._next = max(2 * waited, QUIET + 1)
        quiet = f"{counted(out, 'order')} out, none came back for {waited:.0f} s"
        if link.silent > SILENT:
            _log.warning("%s: the cluster at %s has not answered for %.0f s", quiet, link.address, link.silent)
        elif not room:
            _log.warning("%s: %s", quiet, no_room(link, options))
        elif not begun:
            _log.warning(
                "%s, and no worker began with one: %s alive; others have their cores, or their workers do not start: "
                "the logs of Ray on them (/tmp/ray/session_latest/logs) say why",
                quiet,
                counted(len(link.nodes), "machine"),
            )
        else:
            _log.info(
                "%s: %s alive; others may have their cores. A process 'ray::%s' that hangs can be killed",
                quiet,
                counted(len(link.nodes), "machine"),
                options["name"],
            )


def fits(has: Mapping[str, float], options: Mapping[str, Any]) -> bool:
    """Whether a machine with these resources can do an order with these options of Ray at all."""
    asked = {"CPU": options["num_cpus"], "GPU": options["num_gpus"], "memory": options["memory"]}
    return all(has.get(name, 0) >= least for name, least in asked.items())


def fitting(link: ClusterLink, options: Mapping[str, Any]) -> frozenset[str]:
    """The ids of machines that are alive and can do an order with these options."""
    return frozenset(str(node["NodeID"]) for node in link.nodes if fits(node["Resources"], options))


def ids_of(link: ClusterLink, machine: str, node: str = "") -> frozenset[str]:
    """Under which ids Ray knows the machine at an address; by its own words it is the node `node`."""
    known = [str(one["NodeID"]) for one in link.nodes if one["NodeManagerAddress"] == machine]
    return frozenset(known or ([node] if node else []))


def addresses(link: ClusterLink, ids: Collection[str]) -> set[str]:
    """Of the machines that Ray knows under these ids."""
    return {str(node["NodeManagerAddress"]) for node in link.nodes if node["NodeID"] in ids}


def no_room(link: ClusterLink, options: Mapping[str, Any]) -> str:
    """That no machine can."""
    gpus = f", {options['num_gpus']:g} GPU" if options["num_gpus"] else ""
    return (
        f"no machine of the cluster at {link.address} has what an order reserves (1 core{gpus} and "
        f"{options['memory'] / 1e9:.2f} GB of memory): it has {counted(len(link.nodes), 'machine')} with "
        f"{total(link, 'CPU'):g} cores and {total(link, 'GPU'):g} GPUs in all; look at ray.gpus and ray.memory, or "
        "let a machine join"
    )


def total(link: ClusterLink, name: str) -> float:
    """What all machines have of a resource, by Ray's name of it."""
    return float(sum(node["Resources"].get(name, 0) for node in link.nodes))


def cores(link: ClusterLink) -> int:
    """Of all machines, for orders; at least one."""
    return max(1, int(total(link, "CPU")))
