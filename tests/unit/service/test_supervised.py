"""What the service manager hears, on a real socket of its kind."""

from __future__ import annotations

import os
import signal
import socket
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from continual import making
from continual.service.supervised import Supervisor
from tests.helpers import models
from tests.helpers.services import LIMIT, daemon, url


@pytest.fixture
def manager(tmp_path: Path) -> Iterator[socket.socket]:
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind(str(tmp_path / "n"))
        sock.settimeout(LIMIT)
        yield sock


def heard(manager: socket.socket, until: str) -> list[str]:
    """The datagrams up to one that has the line `until`."""
    found: list[str] = []
    while not found or until not in found[-1].splitlines():
        found.append(manager.recv(4096).decode())
    return found


def test_what_is_told_is_what_systemd_reads(manager: socket.socket) -> None:
    environment = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "4000000", "WATCHDOG_PID": str(os.getpid())}
    told = Supervisor.of(environment)
    assert environment == {}, "what the daemon starts does not speak for it"
    assert told.watchdog == 4.0
    told.ready()
    told.alive("folds a\nREADY=1")
    told.alive("folds a\nREADY=1")
    before = time.monotonic_ns() // 1000
    told.reloading()
    told.stopping(90.0)
    lines = heard(manager, "STOPPING=1")
    assert lines[:3] == ["READY=1", "WATCHDOG=1", r"STATUS=folds a\nREADY=1"], "a status is one line"
    reloading, clock = lines[3].split("\nMONOTONIC_USEC=")
    assert reloading == "RELOADING=1"
    assert before <= int(clock) <= time.monotonic_ns() // 1000
    assert lines[4:] == ["STOPPING=1\nEXTEND_TIMEOUT_USEC=90000000"]


def test_a_name_without_a_file_is_an_address(tmp_path: Path) -> None:
    name = f"@continual-{tmp_path.name}-{os.getpid()}"
    with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
        sock.bind("\0" + name[1:])
        sock.settimeout(LIMIT)
        Supervisor(name).ready()
        assert sock.recv(100) == b"READY=1"


@pytest.mark.parametrize(
    "environment",
    [{}, {"NOTIFY_SOCKET": ""}, {"NOTIFY_SOCKET": "/nowhere/at all"}, {"NOTIFY_SOCKET": "/" + "x" * 500},
     {"WATCHDOG_USEC": "5000000", "WATCHDOG_PID": "1"}, {"WATCHDOG_USEC": "soon"}],
)  # fmt: skip
def test_where_nobody_listens_nothing_happens(environment: dict[str, str]) -> None:
    told = Supervisor.of(environment)
    assert told.watchdog is None
    told.ready()
    told.alive("waits")
    told.stopping(1.0)


@pytest.mark.slow
def test_a_daemon_tells_its_manager_when_it_is_ready_lives_reloads_and_stops(
    tmp_path: Path, manager: socket.socket
) -> None:
    making.init(models.base(tmp_path / "base"), tmp_path / "state")
    (tmp_path / "in").mkdir()
    where = {"NOTIFY_SOCKET": manager.getsockname(), "WATCHDOG_USEC": "1000000"}
    with daemon(tmp_path / "state", tmp_path / "in", "--drain", "5", environment={**os.environ, **where}) as process:
        assert not any(line.startswith("STOPPING") for line in heard(manager, "READY=1"))
        assert url(process, tmp_path / "state")
        assert [line for line in heard(manager, "WATCHDOG=1") if "=" not in line] == []
        heard(manager, "WATCHDOG=1")
        process.send_signal(signal.SIGHUP)
        heard(manager, "RELOADING=1")
        heard(manager, "READY=1")
        process.send_signal(signal.SIGTERM)
        assert heard(manager, "STOPPING=1")[-1] == "STOPPING=1\nEXTEND_TIMEOUT_USEC=65000000"
        assert process.wait(LIMIT) == 0
