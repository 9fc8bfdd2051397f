"""Every request the Hub got, in order, and what became of it."""

from __future__ import annotations

import re
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Literal
from urllib.parse import parse_qsl, unquote

if TYPE_CHECKING:
    from tests.loopback.faults import Fault

Origin = Literal["api", "cdn"]
REPO = re.compile(r"^/(?:api/models/|cdn/)?([^/]+/[^/]+?)(?:\.git)?(?:/|$)")


@dataclass
class Request:
    """One request. `status`, `sent` and `fault` are filled in as the answer goes out; a dropped one may have no
    status."""

    number: int
    origin: Origin
    method: str
    path: str
    query: str
    headers: Mapping[str, str]
    at: float = field(default_factory=time.monotonic)
    received: int = 0
    sent: int = 0
    status: int | None = None
    fault: Fault | None = None

    @property
    def range(self) -> str | None:
        return self.headers.get("range")

    @property
    def authorised(self) -> bool:
        """Whether it bore a token, good or bad."""
        return "authorization" in self.headers

    @property
    def params(self) -> list[tuple[str, str]]:
        return parse_qsl(self.query, keep_blank_values=True)

    @property
    def repo(self) -> str | None:
        """The repository in the path, if there is one."""
        found = REPO.match(self.path)
        return unquote(found[1]) if found and not found[1].startswith(("api/", "xet/", "lfs/")) else None

    @property
    def listing(self) -> bool:
        return self.path == "/api/models"


class Journal:
    """The requests since the start or the last `clear`, with the questions tests ask of them."""

    def __init__(self) -> None:
        self._entries: list[Request] = []

    def __iter__(self) -> Iterator[Request]:
        return iter(list(self._entries))

    def __len__(self) -> int:
        return len(self._entries)

    def add(self, request: Request) -> None:
        self._entries.append(request)

    def clear(self) -> None:
        self._entries.clear()

    def find(
        self,
        path: str = "",
        *,
        method: str = "",
        repo: str = "",
        origin: Origin | Literal[""] = "",
        status: int | None = None,
    ) -> list[Request]:
        """The requests of which all that is given holds; `path` is a regular expression found anywhere in it."""
        return [
            r
            for r in self
            if re.search(path, r.path)
            and method in ("", r.method)
            and repo in ("", r.repo)
            and origin in ("", r.origin)
            and status in (None, r.status)
        ]

    def sent(self, *, origin: Origin | Literal[""] = "cdn", repo: str = "") -> int:
        """Bytes of bodies sent, from the CDN unless told otherwise."""
        return sum(r.sent for r in self.find(origin=origin, repo=repo))

    def received(self, path: str = "") -> int:
        """Bytes of bodies received on paths like this."""
        return sum(r.received for r in self.find(path))

    def leaks(self) -> list[Request]:
        """CDN requests that bore a token: there must never be one."""
        return [r for r in self.find(origin="cdn") if r.authorised]

    def __str__(self) -> str:
        lines = (
            f"{r.number:4} {r.origin} {r.method:6} {r.status} {r.sent:9} {r.path} {r.range or ''} {r.fault or ''}"
            for r in self
        )
        return "\n".join(lines)
