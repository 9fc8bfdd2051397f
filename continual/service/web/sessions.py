"""Who has signed in to give commands: sessions in memory, which a restart ends. A cookie alone gives no command: every
form also brings the word of its session, which no other site can read."""

from __future__ import annotations

import hmac
import secrets
import time
from collections.abc import Callable
from dataclasses import dataclass

from starlette.requests import Request

LIFE = 8 * 3600.0
"""Seconds of a session."""
MOST = 32
"""Sessions at a time: the oldest gives way."""


@dataclass(frozen=True, slots=True)
class Session:
    """Somebody who has signed in: the word of the cookie, that of forms, and until when."""

    word: str
    form: str
    until: float


class Sessions:
    """The sessions of a daemon whose token for commands is `token`; `name` tells its cookie from those of others on
    this host, whatever their ports."""

    def __init__(self, token: str, name: str, clock: Callable[[], float] = time.monotonic) -> None:
        self._token = token.encode()
        self.cookie = f"continual-{name}"
        self._clock = clock
        self._open: dict[str, Session] = {}

    def knows(self, given: str) -> bool:
        """Whether this is the token; takes as long for every wrong one."""
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), self._token)

    @staticmethod
    def same(given: str, word: str) -> bool:
        """Whether a form brings the word of its session; takes as long for every wrong one."""
        return hmac.compare_digest(given.encode("utf-8", "surrogatepass"), word.encode())

    def bearer(self, request: Request) -> bool:
        """Whether a program brings the token."""
        kind, _, given = request.headers.get("authorization", "").partition(" ")
        return kind.lower() == "bearer" and self.knows(given.strip())

    def begin(self) -> Session:
        """A new session, of somebody who brought the token."""
        while len(self._open) >= MOST:
            del self._open[next(iter(self._open))]
        session = Session(secrets.token_urlsafe(32), secrets.token_urlsafe(32), self._clock() + LIFE)
        self._open[session.word] = session
        return session

    def of(self, request: Request) -> Session | None:
        """The session of a request; None where it has none that is still open."""
        # cookies of other services on this host come, too, in whatever form: one that is odd does not hide ours
        session = self._open.get(request.cookies.get(self.cookie, ""))
        if session is not None and session.until < self._clock():
            self.end(session)
            return None
        return session

    def end(self, session: Session) -> None:
        """Ends a session."""
        self._open.pop(session.word, None)


def is_ours(request: Request) -> bool:
    """Whether a form comes from a page of this service, as far as the browser says it: `Origin` and `Sec-Fetch-Site`.
    What is no browser says neither."""
    origin, site = request.headers.get("origin"), request.headers.get("sec-fetch-site")
    if site is not None and site != "same-origin":
        return False
    return origin is None or origin.partition("://")[2] == request.headers.get("host")
