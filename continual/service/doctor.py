"""What `continual doctor` looks at: everything that the daemon will need, each with what to do where it is missing. It
changes nothing, and folds nothing."""

from __future__ import annotations

import os
import resource
import shutil
import time
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, requires, version
from pathlib import Path
from typing import TYPE_CHECKING

from continual.api import Merge
from continual.config import Settings
from continual.engine.needs import state_bytes
from continual.errors import ContinualError
from continual.hub.locate import Places
from continual.outside import counted
from continual.service import asking, daemon
from continual.service.doctor_cluster import cluster
from continual.service.findings import Finding, Level
from continual.service.web import listen
from continual.state import bucket_holds, heartbeat, lock
from continual.state.software import software
from continual.stores import ObjectPath
from continual.texts import size

if TYPE_CHECKING:
    from continual.hub import Hub

NETWORK = ("9p", "afs", "ceph", "cifs", "davfs", "fuse.sshfs", "glusterfs", "lustre", "nfs", "nfs4", "smb3", "smbfs")
"""File systems of which some ignore `flock` or answer before data is on a disk."""
_FILES = 1024
"""Open files that the daemon may need: one for each of a base's shards and of a model's, and connections."""
_SKEW = 60.0
"""Seconds by which clocks may differ."""
_SECONDS = 15.0
"""Seconds that the Hub may take to answer."""


Check = Callable[[Settings, "Hub | None"], Iterator[Finding]]


def look(settings: Settings, client: Hub | None = None) -> list[Finding]:
    """Everything that can be looked at without changing anything. `client` is asked in place of the Hub that the
    environment names. What keeps one check from being made is a finding of
    it, and the others go on."""
    found: list[Finding] = []
    for about, check in CHECKS.items():
        try:
            found += check(settings, client)
        except (ContinualError, OSError) as error:
            found.append(Finding(about, "fail", str(error)))
    return found


def _versions(_settings: Settings, _client: Hub | None) -> Iterator[Finding]:
    from packaging.requirements import Requirement

    wrong = []
    for line in requires("continual") or ():
        needed = Requirement(line)
        if needed.marker is not None and not needed.marker.evaluate({"extra": ""}):
            continue
        try:
            there = version(needed.name)
        except PackageNotFoundError:
            wrong.append(f"{needed.name} is missing")
            continue
        if not needed.specifier.contains(there, prereleases=True):
            wrong.append(f"{needed.name} {there} is not {needed.specifier}")
    told = ", ".join(f"{name} {there}" for name, there in software().items())
    if wrong:
        yield Finding("versions", "fail", f"{'; '.join(wrong)} ({told})", "install the package again: pip install -U")
    else:
        yield Finding("versions", "ok", told)


def _state(settings: Settings, client: Hub | None) -> Iterator[Finding]:
    path = settings.state
    with Merge(settings, client=client) as merge:
        ledger = merge.state.ledger
        yield Finding(
            "state",
            "ok",
            f"{path.absolute()}: record {ledger.head.seq}, {counted(len(ledger.folds()), 'model')} folded",
        )
        need = max(merge.state.generation_bytes(), _least(merge))
        last = datetime.fromisoformat(ledger.head.time)
    answered = asking.ask(path)
    if answered is not None:
        yield Finding("daemon", "ok", f"process {answered['pid']} at {answered['url']} says {answered['health']}")
    elif not isinstance(path, ObjectPath) and (holder := lock.held(path)) is not None:
        told = f"process {holder.said} has the state open for writing"
        yield Finding("daemon", "warn", told, "wait for it, or end it")
    yield from _on_store(path, answered) if isinstance(path, ObjectPath) else _on_disk(path, need)
    ahead = (last - datetime.now(UTC)).total_seconds()
    if ahead > _SKEW:
        yield Finding(
            "clock", "fail", f"the newest record is {ahead:.0f} s in the future", "set the clock (timedatectl)"
        )


def _least(merge: Merge) -> int:
    """Bytes that a generation takes at the least; 0 for a state of adapters, which begins empty."""
    made = merge.state.format
    return state_bytes(merge.rule, made.tensors) if made.form is None else 0


def _on_disk(path: Path, need: int) -> Iterator[Finding]:
    if not os.access(path, os.W_OK):
        yield Finding("state", "fail", f"{path}: this user may not write there", f"chown -R {_user()} {path}")
    yield from _room(path, need)


def _on_store(path: ObjectPath, answered: object = None) -> Iterator[Finding]:
    """Whether this user may write there, the store keeps two writers apart, and who writes, where its daemon has not
    `answered`."""
    begun, now = time.perf_counter(), None
    try:
        now = heartbeat.now(path)
    except PermissionError as error:
        yield Finding("state", "fail", f"{path}: {error.strerror}", "use credentials that may write there")
    else:
        took = (time.perf_counter() - begun) / 5 * 1000  # so many requests
        yield Finding("store", "ok", f"{path}: honours conditional writes, and answers in {took:.0f} ms")
    if answered is None and (holder := lock.held(path)) is not None:
        yield _holder(holder, *bucket_holds.heard(path), now or datetime.now(UTC))


def _holder(holder: lock.Holder, heard: datetime, lease: float, now: datetime) -> Finding:
    """Who writes to a state on a store, last heard of then, and whether the lease from then on is over."""
    told = f"process {holder.said} was last heard of {max(0.0, (now - heard).total_seconds()):.0f} s ago"
    if heartbeat.ran_out(heard, now, lease):
        told += f", and its lease of {lease:.0f} s ran out: it was killed, or does not reach the store"
        return Finding("daemon", "warn", told, "start 'continual run' again: it has the state at once")
    told += f", and has the state open for writing for {lease:.0f} s from then, or longer if it is heard of again"
    return Finding("daemon", "warn", told, "wait, or end it; where it was killed, the next writer waits by itself")


def _room(path: Path, need: int) -> Iterator[Finding]:
    """Whether the disk has room for two more generations, and what kind of disk it is."""
    free = shutil.disk_usage(path).free
    told = f"{size(free)} free beside {path}; a fold writes {size(need)} and more"
    if free < 2 * need:
        yield Finding("disk", "fail", told, "free some, or keep fewer generations (keep, keep_bytes)")
    else:
        yield Finding("disk", "ok", told)
    kind = _mounted(path)
    if kind in NETWORK:
        yield Finding(
            "disk",
            "warn",
            f"{path} lies on {kind}, a network file system; locks and fsync are as good as its server's",
            "keep the state on a local disk, and copies of it by 'continual backup'",
        )


def _base(settings: Settings, client: Hub | None) -> Iterator[Finding]:
    with Merge(settings, client=client) as merge:
        place = merge.base.checkpoint.place
        yield Finding("base", "ok", f"{place}: is the base that the state was made from")


def _folders(settings: Settings, _client: Hub | None) -> Iterator[Finding]:
    for folder in settings.watch:
        if not folder.is_dir():
            yield Finding("folders", "fail", f"watch = {folder}: is no directory", f"mkdir -p {folder}")
        elif not os.access(folder, os.R_OK | os.X_OK):
            yield Finding("folders", "fail", f"watch = {folder}: this user may not read it", f"chmod a+rx {folder}")
        else:
            yield Finding("folders", "ok", f"{folder}: can be read")
    outs = [settings.current, *(view.current for view in settings.views.values())]
    for link in [out for out in outs if out is not None]:
        parent = next(place for place in link.absolute().parents if place.exists())
        if not os.access(parent, os.W_OK | os.X_OK):
            told = f"current = {link}: this user may not write to {parent}"
            yield Finding("folders", "fail", told, f"chown {_user()} {parent}")
        else:
            yield Finding("folders", "ok", f"{link}: can be written")


def _service(settings: Settings, _client: Hub | None) -> Iterator[Finding]:
    """Whether `continual run` would begin."""
    daemon.check(settings)
    yield Finding("settings", "ok", "the daemon can be run with them ('continual config show' lists all)")
    if asking.ask(settings.state) is None:
        listen(settings.host, settings.port, allow_remote=settings.allow_remote).close()
        yield Finding("port", "ok", f"{settings.host}:{settings.port} is free")
    if settings.allow_remote and not settings.allowed_hosts:
        yield Finding("port", "warn", "other machines reach the page by its address alone", "name it in allowed_hosts")


def _device(settings: Settings, _client: Hub | None) -> Iterator[Finding]:
    from continual.executors.device import pick_device
    from continual.lazily import torch

    device = pick_device(settings.device)
    if device.type == "cuda":
        free, whole = torch.cuda.mem_get_info(device)
        name = torch.cuda.get_device_name(device)
        yield Finding("device", "ok", f"{device}, {name}: {size(free)} of {size(whole)} free")
    else:
        yield Finding("device", "ok", f"the CPU, {counted(len(os.sched_getaffinity(0)), 'core')}")


def _machine(settings: Settings, _client: Hub | None) -> Iterator[Finding]:
    memory = _memory()
    if settings.memory is not None and memory is not None and settings.memory > memory:
        told = f"memory = {size(settings.memory)}, and this process may have {size(memory)}"
        yield Finding("memory", "fail", told, "set memory lower")
    elif memory is not None:
        yield Finding("memory", "ok", f"this process may have {size(memory)}")
    files = resource.getrlimit(resource.RLIMIT_NOFILE)[0]
    if 0 <= files < _FILES:
        yield Finding("files", "warn", f"{files} files may be open at a time", f"ulimit -n {_FILES}, or LimitNOFILE=")
    programs = [settings.evaluation.command, *(hook.command for hook in settings.hooks)]
    for program in [command[0] for command in programs if command]:
        if shutil.which(program) is None:
            yield Finding("commands", "fail", f"{program}: no such program that this user may run", "install it")
        else:
            yield Finding("commands", "ok", f"{program}: is there")


def _hub(settings: Settings, client: Hub | None) -> Iterator[Finding]:
    """Access and rights on the Hub, where the settings want anything of it."""
    releases = [r for r in (settings.release.repo, *(view.repo for view in settings.views.values())) if r is not None]
    if not settings.hub.watch and not releases:
        return
    from huggingface_hub import get_session
    from huggingface_hub.errors import HfHubHTTPError

    hub = Places(settings, client=client).hub
    try:
        answer = get_session().head(hub.endpoint, timeout=_SECONDS)
    except Exception as error:  # of whichever HTTP package the client has
        yield Finding("hub", "fail", f"{hub.endpoint}: {type(error).__name__}: {error}", "is there a network, a proxy?")
        return
    yield Finding("hub", "ok", f"{hub.endpoint}: answers")
    if (skew := _skew(answer.headers.get("date"))) > _SKEW:
        told = f"this clock and that of {hub.endpoint} are {skew:.0f} s apart"
        yield Finding("clock", "warn", told, "set the clock (timedatectl)")
    try:
        me = hub.api.whoami()
    except (HfHubHTTPError, OSError, ValueError) as error:
        level: Level = "fail" if releases else "warn"
        yield Finding("token", level, f"nobody is logged in ({_first(error)})", "set HF_TOKEN, or 'hf auth login'")
        return
    role = str(me.get("auth", {}).get("accessToken", {}).get("role", "not said"))
    told = f"logged in as {me.get('name')}, the token's role is {role}"
    if releases and role == "read":
        yield Finding("token", "fail", f"{told}: it cannot release to {', '.join(releases)}", "make one that may write")
    else:
        yield Finding("token", "ok", told)


CHECKS: dict[str, Check] = {
    "versions": _versions,
    "settings": _service,
    "state": _state,
    "base": _base,
    "folders": _folders,
    "device": _device,
    "machine": _machine,
    "hub": _hub,
    "cluster": cluster,
}
"""Every check, by what it is about, in the order in which a person would look."""


def _first(error: BaseException) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _skew(date: str | None) -> float:
    """Seconds between this clock and the time of an answer (RFC 9110); 0 where it says none."""
    from email.utils import parsedate_to_datetime

    try:
        return abs((parsedate_to_datetime(date or "") - datetime.now(UTC)).total_seconds())
    except (TypeError, ValueError):
        return 0.0


def _user() -> str:
    return f"{os.geteuid()}:{os.getegid()}"


def _mounted(path: Path) -> str:
    """The kind of file system that `path` lies on; empty where /proc does not tell."""
    try:
        lines = Path("/proc/mounts").read_text("utf-8", "replace").splitlines()
    except OSError:
        return ""
    best = ("", "")
    for place, kind in ((words[1], words[2]) for line in lines if len(words := line.split(" ")) > 2):
        if path.absolute().is_relative_to(place) and len(place) >= len(best[0]):
            best = place, kind
    return best[1]


def _memory() -> int | None:
    """Bytes that this process may have: of the machine, or of its control group where that is less."""
    found = []
    for file in ("/sys/fs/cgroup/memory.max", "/proc/meminfo"):
        try:
            text = Path(file).read_text("ascii")
        except OSError:
            continue
        if file.endswith("max"):
            found += [int(text)] if text.strip().isdecimal() else []
        else:
            lines = [line.split() for line in text.splitlines()]
            found += [1024 * int(words[1]) for words in lines if words[:1] == ["MemAvailable:"]]
    return min(found, default=None)
