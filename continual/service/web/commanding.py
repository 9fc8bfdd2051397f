"""Commands over the web, where the settings have an `admin_token`: buttons for who has signed in, and `POST
/api/commands` for programs that bring the token. What can be asked for is what the control socket takes."""

from __future__ import annotations

import asyncio
import json
from collections.abc import Mapping
from urllib.parse import parse_qsl

import structlog
from starlette.requests import ClientDisconnect, Request
from starlette.responses import HTMLResponse, RedirectResponse, Response
from starlette.routing import BaseRoute, Route

from continual.service.control import requests
from continual.service.control.requests import parse
from continual.service.web.errands import Errand, Errands, Perform
from continual.service.web.looking import in_path
from continual.service.web.machines import AsciiJson
from continual.service.web.openapi import Described
from continual.service.web.pages import commands_page
from continual.service.web.pages.shell import Around
from continual.service.web.sessions import Session, Sessions, is_ours
from continual.texts import jsonable, plain

LONGEST = 64 << 10
"""Bytes of what is sent."""
_SHORTLY = 3.0
"""Seconds for which a form waits for what it asked, before the page is shown that says how far it is."""
_PATIENTLY = 20.0
"""Seconds for which a program waits."""
_PENALTY = 1.0
"""Seconds that a wrong token costs; one at a time."""
ENTRY = ("/commands", "Commands")
"""The page of commands in the navigation."""
_AROUND = Around("", "", (ENTRY,))
_NUMBERS = frozenset({"at", "seq", "expected"})
_FLAGS = frozenset({"dry_run", "force"})
_REFUSED = {401: "no admin_token", 403: "from another site", 409: "it cannot be done", 503: "not now: ask again later"}
_STATUS = {"Retry": 503, "Busy": 503, "Abandoned": 503, "Bug": 500}


class NoCommand(ValueError):
    """What was sent is no command."""


class Commanding:
    """Takes commands for a daemon whose token is `token`, and has them done by `perform`. `name` is of its cookie."""

    def __init__(self, token: str, name: str, perform: Perform) -> None:
        self.sessions = Sessions(token, name)
        self.errands = Errands(perform)
        self._guess = asyncio.Semaphore(1)
        self._log = structlog.get_logger("continual")

    def routes(self) -> list[BaseRoute]:
        """The routes by which something is changed. The page of commands is shown by `People`."""
        return [
            Route("/sign-in", self._sign_in, methods=["POST"]),
            Route("/sign-out", self._sign_out, methods=["POST"]),
            Route("/commands", self._form, methods=["POST"]),
            Route("/api/commands", self._program, methods=["POST"]),
            Route("/api/commands/{number}", self._asked, methods=["GET"]),
        ]

    def described(self) -> list[Described]:
        """How the document describes them."""
        waits = {202: "it is under way", **_REFUSED}
        return [
            Described(
                "/api/commands",
                "Have a command done",
                Errand,
                (),
                "post",
                requests.Request,
                {400: "malformed", **waits},
            ),
            Described(
                "/api/commands/{number}",
                "What came of a command",
                Errand,
                ("number",),
                failures={401: "no admin_token", 404: "it is not remembered"},
            ),
        ]

    def page(self, session: Session | None, around: Around) -> str:
        """The page of commands: a form to sign in, or what can be asked for and what came of it."""
        if session is None:
            return commands_page.sign_in(around)
        return commands_page.render(self.errands.newest, session.form, around)

    async def _sign_in(self, request: Request) -> Response:
        fields = await _fields(request)
        around = _AROUND
        if not is_ours(request):
            return HTMLResponse(commands_page.sign_in(around, "This form came from another site."), 403)
        async with self._guess:
            if not self.sessions.knows(fields.get("token", "")):
                self._log.warning("sign-in refused", client=_client(request))
                await asyncio.sleep(_PENALTY)
                return HTMLResponse(commands_page.sign_in(around, "That is not the admin_token."), 401)
        session = self.sessions.begin()
        self._log.info("signed in", client=_client(request))
        answer = RedirectResponse("/commands", 303)
        answer.set_cookie(self.sessions.cookie, session.word, httponly=True, samesite="strict", path="/")
        return answer

    async def _sign_out(self, request: Request) -> Response:
        session, fields = self.sessions.of(request), await _fields(request)
        if session is None or not _may(request, session, fields):
            return HTMLResponse(commands_page.sign_in(_AROUND, "You are not signed in."), 403)
        self.sessions.end(session)
        return RedirectResponse("/", 303)

    async def _form(self, request: Request) -> Response:
        """A button was pressed."""
        session, fields = self.sessions.of(request), await _fields(request)
        around = _AROUND
        if session is None:
            return HTMLResponse(commands_page.sign_in(around, "Sign in first, then ask again."), 401)
        if not _may(request, session, fields):
            return HTMLResponse(commands_page.sign_in(around, "This form is of no page that is open here."), 403)
        try:
            wanted = _request({key: value for key, value in fields.items() if key != "form" and value})
        except NoCommand as error:
            return HTMLResponse(commands_page.render(self.errands.newest, session.form, around, str(error)), 400)
        errand = self.errands.begin(wanted, f"page, {_client(request)}")
        await self.errands.settled(errand.number, _SHORTLY)
        return RedirectResponse(f"/commands#command-{errand.number}", 303)

    async def _program(self, request: Request) -> Response:
        """A program asks. A browser of another site cannot: it may not send the header."""
        if (refusal := await self._unknown(request)) is not None:
            return refusal
        try:
            wanted = parse(await _body(request))
        except ValueError as error:
            return AsciiJson({"error": f"this is no command: {plain(str(error), 500)}"}, 400)
        begun = self.errands.begin(wanted, f"api, {_client(request)}")
        errand = await self.errands.settled(begun.number, _PATIENTLY) or begun
        if errand.state == "failed":
            return AsciiJson({"error": errand.message, "errand": jsonable(errand)}, _STATUS.get(errand.kind, 409))
        return AsciiJson(jsonable(errand), 202 if errand.state == "waits" else 200)

    async def _asked(self, request: Request) -> Response:
        if (refusal := await self._unknown(request)) is not None:
            return refusal
        errand = self.errands.get(in_path(request, "number"))
        return AsciiJson({"error": "there is none"}, 404) if errand is None else AsciiJson(jsonable(errand))

    async def _unknown(self, request: Request) -> Response | None:
        """The refusal of a program that does not bring the token."""
        if "authorization" in request.headers:
            async with self._guess:
                if self.sessions.bearer(request):
                    return None
                self._log.warning("command refused", client=_client(request))
                await asyncio.sleep(_PENALTY)
        told = {"error": "Authorization is not 'Bearer' and the admin_token"}
        return AsciiJson(told, 401, {"www-authenticate": "Bearer"})


def _may(request: Request, session: Session, fields: Mapping[str, str]) -> bool:
    """Whether a form is of a page that this session was shown."""
    return is_ours(request) and Sessions.same(fields.get("form", ""), session.form)


def _request(fields: Mapping[str, str]) -> requests.Request:
    """The command that a form asks for. Raises NoCommand."""
    body: dict[str, object] = dict(fields)
    for key, value in fields.items():
        if key in _FLAGS:
            body[key] = value == "yes"
        elif key in _NUMBERS and value.isascii() and value.removeprefix("-").isdecimal() and len(value) < 17:
            body[key] = int(value)
    try:
        return parse(json.dumps(body).encode())
    except ValueError as error:
        raise NoCommand(f"This is no command: {plain(str(error), 300)}") from None


async def _body(request: Request) -> bytes:
    """What was sent. Raises NoCommand where it is too long, or was cut off."""
    found = b""
    try:
        async for part in request.stream():
            found += part
            if len(found) > LONGEST:
                raise NoCommand(f"more than {LONGEST} bytes")
    except ClientDisconnect:
        raise NoCommand("it was cut off") from None
    return found


async def _fields(request: Request) -> dict[str, str]:
    """The fields of a form; none where it is none."""
    try:
        return dict(parse_qsl((await _body(request)).decode("ascii"), max_num_fields=20))
    except ValueError:
        return {}


def _client(request: Request) -> str:
    return "" if request.client is None else request.client.host
