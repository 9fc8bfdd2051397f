"""Messages to people, by Apprise: what happened, in plain words, gathered so that a burst is one message. A task of its
own: a server that does not take them stops nothing."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import socket
from collections import deque
from collections.abc import Mapping, Sequence
from functools import partial
from importlib.util import find_spec
from typing import NamedTuple, Protocol

import structlog

from continual.config.notify import NotifySettings
from continual.errors import Misconfigured
from continual.retrying import retry_delay
from continual.service.aside import aside
from continual.service.failures import Failures
from continual.service.health import Shortfall
from continual.stores import Where
from continual.texts import plain

_SHOWN = 20
"""Lines of a message at most; of more the rest is counted."""
_LONGEST = 200
_KEPT = 1000
"""Lines that wait at most; the oldest go, and are counted."""
_LAST = 10.0
"""Seconds for which a service that ends tries to say so."""
_REASON = "notify"
_CALLS = str.maketrans({"@": "＠", "<": "‹", ">": "›"})
"""Signs by which chats call on everybody or hide an address: no name of a model is to do that."""


class Sends(Protocol):
    """Sends one message to one address; whether it was taken."""

    def __call__(self, title: str, body: str) -> bool: ...


class Address(NamedTuple):
    """An address: what it is called in messages, without what is secret in it, and what sends there."""

    name: str
    send: Sends


def check(settings: NotifySettings) -> None:
    """Raises Misconfigured for addresses that cannot be used, and where Apprise is not installed."""
    addresses(settings)


def addresses(settings: NotifySettings, environ: Mapping[str, str] = os.environ) -> list[Address]:
    """Where messages go. Raises Misconfigured, which never quotes an address."""
    if not settings.urls:
        return []
    if find_spec("apprise") is None:
        raise Misconfigured("notify.urls is set and Apprise is not installed: pip install 'continual[notify]'")
    import apprise

    logging.getLogger("apprise").disabled = True  # it may log what is secret in an address
    found = []
    for number, url in enumerate(settings.urls, 1):
        text = url.get_secret_value()
        if text.startswith("env:"):
            name = text.removeprefix("env:")
            if name not in environ:
                raise Misconfigured(f"notify.urls: env:{name}: there is no such variable in the environment")
            text = environ[name]
        server = apprise.Apprise.instantiate(text, suppress_exceptions=True)
        if server is None:
            raise Misconfigured(f"notify.urls: number {number} is no address that Apprise knows")
        found.append(Address(f"{server.service_name or 'address'} (number {number})", partial(_send, server)))
    return found


def _send(server: object, title: str, body: str) -> bool:
    import apprise

    sender = apprise.Apprise()
    sender.add(server)
    return bool(sender.notify(body=body, title=title, body_format=apprise.NotifyFormat.TEXT))


class Notifier:
    """Gathers what happened and sends it. On the event loop."""

    def __init__(self, settings: NotifySettings, state: Where, failures: Failures) -> None:
        """`state`: whose daemon speaks. Raises Misconfigured, as `check`."""
        self._settings = settings
        self._title = plain(f"continual on {socket.gethostname()}: {state.resolve().name}", _LONGEST).translate(_CALLS)
        self._addresses = addresses(settings)
        self._metrics = failures.metrics
        self._health = failures.health
        self._lines: deque[str] = deque(maxlen=_KEPT)
        self._heard = 0
        self._wrong: dict[str, str] = {}
        self._fresh = asyncio.Event()
        self._log = structlog.get_logger("continual")

    def hear(self, event: str, text: str) -> None:
        """Takes what happened, a sentence, where people want to know of such events."""
        if self._addresses and event in self._settings.events:
            self._lines.append(plain(text, _LONGEST).translate(_CALLS))
            self._heard += 1
            self._fresh.set()

    def degraded(self, shortfalls: Sequence[Shortfall]) -> None:
        """Takes what is wrong now; what was not, or is not any more, is told."""
        now = {short.reason: short.message for short in shortfalls if short.reason != _REASON}
        for reason in now.keys() - self._wrong.keys():
            self.hear("degraded", f"cannot do all of its work ({reason}): {now[reason]}")
        for reason in self._wrong.keys() - now.keys():
            self.hear("degraded", f"is well again ({reason})")
        self._wrong = now

    async def run(self) -> None:
        """Sends what was gathered, again and again; ends when it is cancelled."""
        while True:
            await self._fresh.wait()
            await asyncio.sleep(self._settings.gather)
            await self._send_all(self._settings.tries)

    async def last(self) -> None:
        """Sends what is left, once, and waits a while for it: the service ends."""
        if self._fresh.is_set():
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._send_all(1), _LAST)

    async def _send_all(self, tries: int) -> None:
        """Sends what is gathered to every address; what an address does not take after `tries` is lost to it."""
        body, self._heard = self._body(), 0
        self._lines.clear()
        self._fresh.clear()
        left = self._addresses
        for attempt in range(1, tries + 1):
            if attempt > 1:
                await asyncio.sleep(retry_delay(attempt - 1))
            left = [address for address in left if not await self._takes(address, body)]
            if not left:
                return
        for address in left:
            self._metrics.notified(ok=False)
            self._metrics.error(_REASON)
            self._health.fails(_REASON, address.name, f"a message was not taken, tried {tries} times")
            self._log.error("not notified", address=address.name, tries=tries)

    async def _takes(self, address: Address, body: str) -> bool:
        """Whether a message was taken. What Apprise raises counts as no."""
        try:
            taken = await aside(partial(address.send, self._title, body))
        except Exception as error:
            self._log.warning("notify failed", address=address.name, error=type(error).__name__)
            return False
        if taken:
            self._metrics.notified(ok=True)
            self._health.works(_REASON, address.name)
        return taken

    def _body(self) -> str:
        """The newest lines that are shown, the first of them first, and how many there were before."""
        shown = list(self._lines)[-_SHOWN:]
        more = self._heard - len(shown)
        return "\n".join([*([f"and {more} more before these: see continual log"] if more else []), *shown])
