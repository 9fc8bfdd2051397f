"""What of a systemd unit goes by the settings, as the text of a drop-in: what may be written and read, which mounts
have to be there, whether the network is needed, how long a stop may take. What holds for every installation is in
ops/systemd/continual.service. Pure but for one look at the base that the state names."""

from __future__ import annotations

import ipaddress
from collections.abc import Iterable, Iterator
from pathlib import Path
from urllib.parse import urlsplit

from continual.config import CanarySettings, Settings
from continual.errors import ContinualError, Misconfigured
from continual.state import opening

_HIDDEN = ("/home", "/root", "/run/user")
"""What ProtectHome= takes away."""
_OWN = ("/tmp", "/var/tmp")
"""What PrivateTmp= puts other directories in the place of."""
_ENDING = 60.0
"""Seconds that a stop may take after `drain`."""


def drop_in(settings: Settings, source: str = "the settings") -> str:
    """The drop-in for the unit, made from `source`. Raises Misconfigured for a path that is not absolute: a service
    does not start where the command was typed."""
    writes = sorted(set(_absolute(_written(settings))))
    reads = sorted(set(_absolute(_read(settings))) - set(writes))
    needed = [path for path in reads if not any(path.is_relative_to(other) for other in writes)]
    lines = [
        f"# Made by `continual config unit` from {source}: make it again when paths or addresses change.",
        "[Unit]",
    ]
    lines += [f"RequiresMountsFor={_quoted(path)}" for path in (*writes, *needed)]
    outside = sorted(_outside(settings))
    if outside:
        lines += ["Wants=network-online.target", "After=network-online.target"]
    lines += ["", "[Service]"]
    if any(_below(path, _HIDDEN) for path in (*writes, *needed)):
        lines.append("ProtectHome=tmpfs")
    for path in writes:
        lines.append(f"{'BindPaths' if _below(path, (*_HIDDEN, *_OWN)) else 'ReadWritePaths'}={_quoted(path)}")
    lines += [f"BindReadOnlyPaths={_quoted(path)}" for path in needed if _below(path, (*_HIDDEN, *_OWN))]
    lines.append(f"TimeoutStopSec={settings.drain + _ENDING:g}")
    if outside:
        lines += [f"# for {', '.join(outside)}", "IPAddressAllow=any"]
    return "\n".join(lines) + "\n"


def _written(settings: Settings) -> Iterator[tuple[str, Path]]:
    """The directories that the daemon writes in, with the settings that name them."""
    if isinstance(settings.state, Path):
        yield "state", settings.state
    if settings.current is not None:
        yield "current", settings.current.parent
    for name, view in settings.views.items():
        if view.current is not None:
            yield f"views.{name}.current", view.current.parent
    if settings.log_file is not None:
        yield "log_file", settings.log_file.parent
    if settings.evaluation.directory is not None:
        yield "evaluation.directory", settings.evaluation.directory


def _read(settings: Settings) -> Iterator[tuple[str, Path]]:
    """What the daemon only reads."""
    for folder in settings.watch:
        yield "watch", folder
    for rows in (*settings.rows, *settings.heads):
        yield "rows", rows
    if settings.base is not None:
        yield "base", settings.base
        return
    try:
        found, _ = opening.read_format(settings.state)
    except ContinualError:  # it is made later, or by somebody else
        return
    if found.base.repo is None:
        yield "base", Path(found.base.path)


def _outside(settings: Settings) -> Iterator[str]:
    """What of the settings needs other machines."""
    if settings.hub.watch or settings.release.repo or any(view.repo for view in settings.views.values()):
        yield "the Hub"
    if settings.allow_remote:
        yield "allow_remote"
    if settings.sources:
        yield "sources"
    if not isinstance(settings.state, Path):
        yield "the store of the state"
    if settings.notify.urls:
        yield "notify"
    addresses = [settings.otlp, *(hook.url for hook in settings.hooks)]
    canaries: list[CanarySettings | None] = [settings.release.canary, *(v.canary for v in settings.views.values())]
    addresses += [canary.prometheus for canary in canaries if canary is not None]
    for address in addresses:
        if address is not None and not _is_here(address):
            yield urlsplit(address).hostname or address


def _is_here(address: str) -> bool:
    host = urlsplit(address).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def _absolute(named: Iterable[tuple[str, Path]]) -> Iterator[Path]:
    for setting, path in named:
        if not path.is_absolute():
            raise Misconfigured(f"{setting} = {path}: a service does not start here; say the whole path")
        yield path


def _below(path: Path, places: tuple[str, ...]) -> bool:
    return any(path.is_relative_to(place) for place in places)


def _quoted(path: Path) -> str:
    """A path as a unit file has it: `%` begins a specifier there, and white space ends a word."""
    text = str(path)
    try:
        text.encode()
    except UnicodeEncodeError:
        raise Misconfigured(f"{path!r}: a unit file cannot name it, as it is no UTF-8") from None
    if any(ord(c) < 32 or ord(c) == 127 for c in text):
        raise Misconfigured(f"{path!r}: a unit file cannot name it")
    text = text.replace("\\", "\\\\").replace('"', '\\"').replace("%", "%%")
    return f'"{text}"' if text != str(path) or " " in text or "'" in text else text
