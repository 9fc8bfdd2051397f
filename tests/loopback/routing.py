"""The table of routes, and what a handler is given and gives. Handlers are plain functions in `listing`, `writing`,
`files` and `xet`."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any
from urllib.parse import quote, unquote

from tests.loopback import access
from tests.loopback.access import Account, Refusal
from tests.loopback.hub import Hub
from tests.loopback.journal import Request
from tests.loopback.repos import Commit, Repo


@dataclass(frozen=True)
class Answer:
    """A whole answer; the application sends it in pieces."""

    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes | memoryview = b""

    @classmethod
    def json(cls, content: Any, status: int = 200, headers: Mapping[str, str] | None = None) -> Answer:
        return cls(
            status, {"Content-Type": "application/json; charset=utf-8", **(headers or {})}, json.dumps(content).encode()
        )


@dataclass(frozen=True)
class Call:
    """A request on its way to a handler. `args` are the named parts of the path; `ago` is set by a `Stale` fault."""

    hub: Hub
    request: Request
    args: Mapping[str, str]
    body: bytes
    ago: int = 0

    @cached_property
    def who(self) -> Account | None:
        return access.account(self.hub.tokens, self.request.headers.get("authorization"))

    @property
    def json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body or b"{}")
        return found

    def params(self, name: str) -> list[str]:
        """All values of a query parameter, which may be written `name` or `name[]`."""
        return [value for key, value in self.request.params if key in (name, f"{name}[]")]

    def param(self, name: str, default: str = "") -> str:
        return next(iter(self.params(name)), default)

    def flag(self, name: str) -> bool:
        return self.param(name).lower() in ("true", "1")

    @property
    def repo(self) -> Repo:
        """The repository of the path, if they may know of it; an old name redirects."""
        name = self.args["repo"]
        found = self.hub.state().get(name)
        if found is None and name in self.hub.moved:
            path = self.request.path.replace(name, self.hub.moved[name], 1)
            raise Refusal(
                307, "moved", headers={"Location": path + ("?" + self.request.query if self.request.query else "")}
            )
        if found is None or not access.sees(self.who, found):
            raise access.missing(self.who)
        return found

    def commit(self, default: str = "main") -> Commit:
        """The commit of the path's revision."""
        revision = self.args.get("rev", default)
        found = self.repo.find(revision)
        if found is None:
            raise Refusal(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


Handler = Callable[[Call], Answer]
ROUTES: list[tuple[str, str, re.Pattern[str], Handler]] = []


def route(method: str, pattern: str, origin: str = "api") -> Callable[[Handler], Handler]:
    """Registers a handler. `{repo}` takes two parts of the path, `{name}` one and `{name*}` all the rest; GET serves
    HEAD too.

    It is matched before percent-decoding: the client encodes a slash that belongs to a revision or a file.
    """
    regex = pattern.replace(".", r"\.").replace("{repo}", r"(?P<repo>[^/]+/[^/]+)")
    regex = re.sub(r"\{(\w+)\*\}", r"(?P<\1>.+)", regex)
    regex = re.sub(r"\{(\w+)\}", r"(?P<\1>[^/]+)", regex)

    def register(handler: Handler) -> Handler:
        ROUTES.append((origin, method, re.compile(regex), handler))
        return handler

    return register


def answer(hub: Hub, request: Request, body: bytes, ago: int = 0) -> Answer:
    """Finds the handler and calls it; a refusal becomes an answer with the Hub's headers."""
    method = "GET" if request.method == "HEAD" else request.method
    try:
        with hub.lock:
            for origin, verb, pattern, handler in ROUTES:
                if (origin, verb) == (request.origin, method) and (match := pattern.fullmatch(request.path)):
                    args = {key: unquote(value) for key, value in match.groupdict().items()}
                    return handler(Call(hub, request, args, body, ago))
        raise Refusal(404, f"Cannot {request.method} {request.path}")
    except Refusal as refusal:
        headers = {"X-Error-Message": refusal.message, **refusal.headers}
        if refusal.code:
            headers["X-Error-Code"] = refusal.code
        return Answer.json({"error": refusal.message}, refusal.status, headers)


def page_link(call: Call, cursor: str) -> dict[str, str]:
    """The header that leads to the next page: the same query with another cursor."""
    params = [(key, value) for key, value in call.request.params if key != "cursor"] + [("cursor", cursor)]
    query = "&".join(f"{quote(key)}={quote(value, safe='')}" for key, value in params)
    return {"Link": f'<{call.hub.endpoint}{call.request.path}?{query}>; rel="next"'}
