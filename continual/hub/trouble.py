"""What goes wrong with the Hub, as our errors: by the status and the headers of an answer, or by the exception of a
request. Pure functions. Headers come from outside: each is read strictly, and capped."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import NamedTuple
from urllib.parse import urljoin, urlsplit, urlunsplit

from continual.errors import Abandoned, Refuse, Retry
from continual.retrying import Fault, fault_of

LONGEST_WAIT = 3600.0
"""Seconds that a server can make us wait at most: the Hub's own windows are five minutes long."""
LONGEST_LINK = 8192
"""Characters of the address of a next page that is followed."""
_SECONDS = re.compile(r"[0-9]{1,12}(?:\.[0-9]{1,6})?")
_LIMIT = re.compile(r'"[\w-]{1,64}"\s*;\s*r\s*=\s*([0-9]{1,18})\s*;\s*t\s*=\s*([0-9]{1,12})')
_RANGE = re.compile(r"bytes ([0-9]{1,18})-([0-9]{1,18})/([0-9]{1,18})")
_NEXT = re.compile(r'<([^<>]*)>\s*;[^<>]*?\brel\s*=\s*"?next"?(?=[\s;,]|$)')


class Trouble(Retry):
    """The Hub could not answer, or would not; `fault` says why. Nothing is settled."""

    def __init__(self, message: str, fault: Fault, after: float = 0.0) -> None:
        super().__init__(message, after)
        self.fault = fault


class Failed(Exception):
    """One try of a request failed: `fault` and HTTP `status` (None: there was no answer), the seconds `after` which the
    server wants the next, and `why` in words where the fault alone would not say it."""

    def __init__(self, fault: Fault, status: int | None = None, after: float = 0.0, why: str = "") -> None:
        super().__init__(why or fault.value)
        self.fault = fault
        self.status = status
        self.after = after
        self.why = why


class Differs(Failed):
    """A file on the Hub is not what the Hub says of it; where that stays so, its repo is refused."""


class Span(NamedTuple):
    """The range of a file that an answer has: its first and last byte, and the size of the file."""

    first: int
    last: int
    size: int


def wait_of(headers: Mapping[str, str]) -> float:
    """Seconds that the header `Retry-After` or `RateLimit` asks us to wait, at most an hour; 0 where neither does, or
    in no form that is understood (a date is not: clocks differ)."""
    asked = headers.get("retry-after")
    if asked is None:
        limit = _LIMIT.search(headers.get("ratelimit", "")[:1000])
        asked = limit[2] if limit is not None and int(limit[1]) == 0 else ""
    asked = asked.strip()  # of more than float() strips by itself
    return min(float(asked), LONGEST_WAIT) if _SECONDS.fullmatch(asked) else 0.0


def span_of(text: str) -> Span | None:
    """The range that a `Content-Range` names; None for anything else."""
    found = _RANGE.fullmatch(text.strip())
    return None if found is None else Span(int(found[1]), int(found[2]), int(found[3]))


def next_of(link: str, page: str, endpoint: str) -> str | None:
    """The address of the next page that the header `Link` of a page names, None where it names none.

    A mirror passes on the links of the Hub itself, and a token is sent to the endpoint alone: so whatever host is
    named, the address is the endpoint's. Raises Failed for an address that cannot be used.
    """
    found = _NEXT.search(link)
    if found is None:
        return None
    try:
        there = urlsplit(urljoin(page, found[1]))
    except ValueError:
        raise Failed(Fault.SERVER, why="the Hub names a next page that is no address") from None
    if len(found[1]) > LONGEST_LINK or not there.path.startswith("/"):
        raise Failed(Fault.SERVER, why="the Hub names a next page that is no address")
    scheme, host = urlsplit(endpoint)[:2]
    return str(urlunsplit((scheme, host, there.path, there.query, "")))


def failure(error: Exception) -> Failed:
    """What an exception says of a request. One of an unknown kind counts as a failed connection: the package has
    several ways to say that."""
    from huggingface_hub import errors

    if isinstance(error, Failed):
        return error
    if isinstance(error, errors.HfHubHTTPError) and error.response is not None:
        status, headers = error.response.status_code, error.response.headers
        return Failed(fault_of(status, headers.get("x-error-code")), status, wait_of(headers))
    return Failed(Fault.REQUEST if isinstance(error, errors.HFValidationError) else Fault.TRANSPORT)


def said(what: str, found: Failed, host: str) -> Retry | Refuse:
    """The error that a failure is to whoever asked; `host` is the endpoint's, without credentials."""
    status = f" (HTTP {found.status})" if found.status else ""
    if isinstance(found, Differs):
        return Refuse("changed", f"{what}: {found.why}")
    if found.fault is Fault.GONE:
        return Refuse("gone", f"{what}: is not on the Hub, or not for this token{status}")
    if found.fault is Fault.GATED:
        return Refuse(
            "gated", f"{what}: is gated; ask its owner for access with the account of HF_TOKEN, then 'continual retry'"
        )
    told = (
        found.why
        or {
            Fault.RATE: "the Hub's rate limit is used up",
            Fault.SERVER: "the Hub has trouble",
            Fault.TRANSPORT: f"the connection to the Hub ({host}) failed",
            Fault.TOKEN: "the Hub does not accept the token: check HF_TOKEN",
            Fault.DENIED: "the Hub, or a proxy before it, does not allow it: check what the token HF_TOKEN may do",
            Fault.CONFLICT: "somebody else was there first",
            Fault.REQUEST: "the Hub does not understand the request",
        }[found.fault]
    )
    return Trouble(f"{what}: {told}{status}; nothing was settled", found.fault, found.after)


def differs(where: str, name: str) -> Trouble:
    """The same bytes of a file were read twice, and came otherwise; `where` names its repo and commit."""
    return Trouble(f"{where}/{name}: came with other bytes than before; nothing was settled", Fault.TRANSPORT)


def abandoned(what: str) -> Abandoned:
    """The error of work on `what` that is given up because continual is stopping."""
    return Abandoned(f"{what}: given up because continual is stopping; it will be taken up at the next start")
