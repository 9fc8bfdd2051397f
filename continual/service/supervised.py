"""What the service manager is told: that the daemon is ready, reloads, stops, and lives. The datagrams of systemd's
sd_notify(3); where nobody listens nothing is sent.

What is told is for a person who asks `systemctl status`, and for the watchdog. Whether the daemon works as it should is
not decided here.
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import MutableMapping

from continual.texts import plain

_SHOWN = 200
"""Characters of a status that are sent."""


class Supervisor:
    """Who started the daemon and wants to hear of it. All methods return at once, and none raises: a manager that does
    not listen is no reason to stop."""

    def __init__(self, address: str | None = None, watchdog: float | None = None) -> None:
        """`address`: of a datagram socket, a path, or a name after `@`; None where there is no manager. `watchdog`:
        seconds without a sign of life after which the manager kills the process; None where it does not."""
        self.watchdog = watchdog
        self._address = address
        self._status: str | None = None
        self._lived = float("-inf")

    @classmethod
    def of(cls, environment: MutableMapping[str, str]) -> Supervisor:
        """As the variables say that systemd sets. They are taken out: a program that the daemon starts is not to speak
        for it. The watchdog counts for the process that it names."""
        address = environment.pop("NOTIFY_SOCKET", None)
        micros, pid = environment.pop("WATCHDOG_USEC", ""), environment.pop("WATCHDOG_PID", str(os.getpid()))
        meant = micros.isdecimal() and int(micros) > 0 and pid == str(os.getpid())
        return cls(address or None, int(micros) / 1e6 if meant else None)

    def ready(self) -> None:
        """The daemon serves, or has read its settings again."""
        self._send("READY=1")

    def reloading(self) -> None:
        """Settings are read again, until `ready`."""
        self._send(f"RELOADING=1\nMONOTONIC_USEC={time.monotonic_ns() // 1000}")

    def stopping(self, within: float) -> None:
        """The daemon stops, in at most so many seconds: the manager waits that long, whatever its own limit says."""
        self._send(f"STOPPING=1\nEXTEND_TIMEOUT_USEC={int(within * 1e6)}")

    def alive(self, status: str) -> None:
        """A sign of life, as often as the watchdog wants one; `status` says in a line what is done now."""
        now = time.monotonic()
        if self.watchdog is not None and now - self._lived >= self.watchdog / 4:
            self._lived = now
            self._send("WATCHDOG=1")
        if status != self._status:
            self._status = status
            self._send(f"STATUS={plain(status, _SHOWN)}")

    def _send(self, text: str) -> None:
        if self._address is None:
            return
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM) as sock:
            sock.setblocking(False)
            sock.sendto(text.encode(), address)
