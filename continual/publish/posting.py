"""Posting JSON to another server, and what became of it in a line for people."""

from __future__ import annotations

import http.client
import json
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Mapping
from typing import NamedTuple

from continual.outside import Malformed, parse_fields
from continual.publish.plain_http import opener_for

MESSAGE = 300
"""Characters of a message at most."""
ANSWER = 64 << 10
"""Bytes of an answer or of a command's output that are looked at."""
_PASSING = (408, 409, 425, 429)
Signing = Callable[[bytes], dict[str, str]]
"""Gives the headers by which the bytes of a body are signed."""


class HookTry(NamedTuple):
    """What became of one try; `again`: whether the next one may do better."""

    ok: bool
    message: str
    again: bool = False


class Posted(NamedTuple):
    """The status and the text of an answer. Where there was none, the status is None and the text says why."""

    status: int | None
    text: str

    @property
    def passes(self) -> bool:
        """Whether there was none, or one that says nothing of what was asked: the next try may do better."""
        return self.status is None or self.status >= 500 or self.status in _PASSING


def post(url: str, body: Mapping[str, object], deadline: float, sign: Signing = lambda _: {}) -> Posted:
    """Posts JSON, with the headers that `sign` gives for its bytes; `deadline` is a time of `time.monotonic`."""
    data = json.dumps(body).encode()
    told = {"Content-Type": "application/json", "User-Agent": "continual"}
    return _sent(urllib.request.Request(url, data, told | sign(data)), deadline)


def get(url: str, deadline: float) -> Posted:
    """Asks for what lies at an address; `deadline` as of `post`."""
    return _sent(urllib.request.Request(url, headers={"User-Agent": "continual"}), deadline)


def _sent(request: urllib.request.Request, deadline: float) -> Posted:
    try:
        with opener_for(request.full_url).open(request, timeout=max(deadline - time.monotonic(), 0.001)) as response:
            return Posted(response.status, _read(response, deadline))
    except (OSError, http.client.HTTPException, ValueError) as error:
        reason = error.reason if isinstance(error, urllib.error.URLError) else error
        if isinstance(reason, TimeoutError):
            return Posted(None, "no answer in time")
        if isinstance(error, http.client.InvalidURL | ValueError):  # their messages quote the URL
            return Posted(None, "the URL cannot be used")
        return Posted(None, str(getattr(reason, "strerror", None) or reason) or type(reason).__name__)


def _read(response: http.client.HTTPResponse, deadline: float) -> str:
    """The beginning of an answer, as much of it as came in time. That there is an answer is known by then."""
    read = b""
    try:
        while len(read) < ANSWER and time.monotonic() < deadline and (part := response.read1(ANSWER - len(read))):
            read += part
    except (OSError, http.client.HTTPException):
        pass
    return read.decode("utf-8", "replace")


def tried_by(answer: Posted) -> HookTry:
    """What became of the try that had this answer."""
    if answer.status is None:
        return HookTry(False, answer.text, again=True)
    ok = 200 <= answer.status < 300
    said = "redirects are not followed" if 300 <= answer.status < 400 else said_in(answer.text)
    return HookTry(ok, joined(f"HTTP {answer.status}", said), again=answer.passes)


def fields(text: str) -> dict[str, object]:
    """The fields of a JSON object; none for any other text."""
    try:
        return parse_fields(text.encode("utf-8", "replace"))
    except Malformed:
        return {}


def said_in(text: str) -> str:
    """What an answer says: the text of the field in which such servers put it."""
    found = fields(text)
    inner = found.get("error")
    told = found.get("error_message") or found.get("detail")
    said = (inner if isinstance(inner, dict) else found).get("message") or told or inner or text
    return line(said if isinstance(said, str) else json.dumps(said))


def joined(what: str, said: str) -> str:
    """Both with a colon between; the one that is there where the other is empty."""
    return f"{what}: {said}" if what and said else what or said


def line(text: str) -> str:
    """A text on one line, printable and cut to MESSAGE characters."""
    one = " ".join("".join(c if c.isprintable() else " " for c in text[: 16 * MESSAGE]).split())
    return one if len(one) <= MESSAGE else f"{one[: MESSAGE - 1]}…"
