"""What `continual doctor` looks at on a cluster that does the work: every machine is asked what it sees."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING

from continual.api import Merge
from continual.config import Settings
from continual.errors import ContinualError
from continual.executors.asked_machines import FileSeen, LookBench, MachineLook, PlaceSeen, ask_machines, seen_here
from continual.executors.links import ClusterLink, link_to
from continual.executors.patience import cores, fits, no_room, total
from continual.outside import counted
from continual.service.findings import Finding, Level
from continual.stores import ObjectPath
from continual.tensors import Folder
from continual.texts import size

if TYPE_CHECKING:
    from continual.hub import Hub

SECONDS = 60.0
"""Seconds that machines have to answer: a worker has to be started on each, and loads torch."""
_MACHINES = 10
"""Machines that are told of by themselves, of those that have the same to be done."""
_ANYWAY = ("is not there", "cannot be")
"""How what is wrong begins that is so whatever changes in a folder meanwhile."""
_FULL = 0.05
"""The share of a disk below which it is nearly full: Ray gives up at that."""


def cluster(settings: Settings, client: Hub | None) -> Iterator[Finding]:
    """Whether the cluster is there, has what orders reserve, and each machine sees what orders need. Raises Retry and
    Misconfigured where there is none."""
    if settings.executor != "ray":
        return
    asked = settings.ray
    link = link_to(asked.address, lambda: None)
    has = f"{counted(len(link.nodes), 'machine')} alive with {counted(cores(link), 'core')}"
    has += f", {size(int(total(link, 'memory')))} and {total(link, 'GPU'):g} GPUs for orders"
    yield Finding("cluster", "ok", f"{asked.address}: {has}")
    options = {"num_cpus": 1, "num_gpus": asked.gpus, "memory": asked.memory or 0}
    if not any(fits(node["Resources"], options) for node in link.nodes):
        yield Finding("cluster", "fail", no_room(link, options), "set ray.gpus and ray.memory to what a machine has")
    yield from _machines(link, settings, client)


def _machines(link: ClusterLink, settings: Settings, client: Hub | None) -> Iterator[Finding]:
    needed, exports = _needed(settings, client), _exports(settings)
    wrong: dict[tuple[Level, str, str], set[str]] = {}
    good, bad = set[str](), set[str]()
    places = [*needed, *exports]
    looks = list(ask_machines(link, places, SECONDS))
    changed = {path for path, _ in LookBench(places).work(("look",))[0].wrong}  # since it was looked here
    for machine, look in looks:
        if not isinstance(look, str):
            wrong_there = [one for one in look.wrong if one[0] not in changed or one[1].startswith(_ANYWAY)]
            look = look._replace(wrong=tuple(wrong_there))
        found = list(_found(look, {str(place.path) for place in exports}))
        (bad if found else good).add(machine)
        for one in found:
            wrong.setdefault((one.level, one.told, one.todo), set()).add(machine)
    for (level, told, todo), machines in wrong.items():
        more = f" and {len(machines) - _MACHINES} more" if len(machines) > _MACHINES else ""
        names = f"{', '.join(sorted(machines)[:_MACHINES])}{more}"
        yield Finding("machines", level, f"{names}: {told}", todo)
    if good := good - bad:
        told = f"{counted(len(good), 'machine')} with the same software, the same files and room"
        yield Finding("machines", "ok", told if bad else f"all of them: {told}")


def _found(look: MachineLook | str, exports: set[str]) -> Iterator[Finding]:
    """What is wrong with one machine."""
    if isinstance(look, str):
        yield Finding("machines", "fail", look, "mend it, or take it out: what it fails, others have to do again")
        return
    for path, told in look.wrong:
        if str(path) in exports:
            todo = "share it with all machines; without it this one gets no orders of exports"
            yield Finding("machines", "warn", f"{path} {told}", todo)
        else:
            todo = "mount there what this machine has, at the same path"
            yield Finding("machines", "fail", f"{path} {told}", todo)
    if look.free < _FULL * look.whole:
        told = f"{look.temporary} is nearly full: {size(look.free)} of {size(look.whole)} free"
        yield Finding("machines", "warn", told, "free some: Ray and its workers write there")


def _needed(settings: Settings, client: Hub | None) -> list[PlaceSeen]:
    """What orders of folds need: the state, the base, and what is watched, as this machine sees it. What cannot be
    opened here is told of by other checks."""
    found: list[PlaceSeen] = []
    with suppress(ContinualError, OSError), Merge(settings, client=client) as merge:
        found.append(_of_state(settings, merge))
        base = merge.base.checkpoint
        if isinstance(base.place, Folder):
            files = tuple(FileSeen(file.name, file.size, file.mtime_ns) for file in base.files)
            root = base.place.path.absolute()
            found.append(PlaceSeen(root.parent if root.is_file() else root, files))
    return found + _folders([folder for folder in settings.watch if folder.is_dir()], written=False)


def _of_state(settings: Settings, merge: Merge) -> PlaceSeen:
    if isinstance(settings.state, ObjectPath):
        return PlaceSeen(settings.state)
    path, generation = settings.state.absolute(), merge.state.ledger.head.generation
    if generation is None:
        return PlaceSeen(path, written=True)
    inner = f"generations/{generation}"
    files = [file._replace(name=f"{inner}/{file.name}") for file in seen_here(path / inner) if file.name]
    return PlaceSeen(path, tuple(files), written=True)


def _exports(settings: Settings) -> list[PlaceSeen]:
    """The folders that exports are written to."""
    links = [settings.current, *(view.current for view in settings.views.values())]
    folders = {link.absolute().parent for link in links if link is not None}
    written = settings.ray.exports == "workers"
    return _folders([folder for folder in sorted(folders) if folder.is_dir()], written=True) if written else []


def _folders(folders: Sequence[Path], *, written: bool) -> list[PlaceSeen]:
    return [PlaceSeen(folder.absolute(), seen_here(folder.absolute()), written) for folder in folders]
