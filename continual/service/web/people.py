"""The pages for people: which address shows what."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from functools import cache, partial
from importlib.resources import files

from starlette.requests import Request
from starlette.responses import HTMLResponse, Response
from starlette.routing import BaseRoute, Route

from continual.service.web.commanding import ENTRY, Commanding
from continual.service.web.looking import AskedWrongly, PageLook, in_path, number, wanted
from continual.service.web.pages import (
    about_fold,
    about_model,
    controls,
    evaluations,
    front,
    lists,
    pictures,
    settings_page,
    storage,
)
from continual.service.web.pages.markup import Html
from continual.service.web.pages.shell import Around, trouble
from continual.service.web.sessions import Session

FRONT_COLUMNS = 24
"""Folds in the picture of the front page."""
ASSETS = (("page.css", "text/css"), ("page.js", "text/javascript"), ("icon.svg", "image/svg+xml"))
Show = Callable[[Request, Around], Awaitable[str]]


class Missing(LookupError):
    """There is no such fold or model."""


class People:
    """Shows pages of what `look` sees, with buttons for who has signed in to give commands, by `commanding`."""

    def __init__(self, look: PageLook, commanding: Commanding | None = None) -> None:
        self._look = look
        self._commanding = commanding
        self._past = look.view.recalling

    def routes(self) -> list[BaseRoute]:
        """The pages, and what they are dressed in."""
        pages: tuple[tuple[str, Show], ...] = (
            ("/", self._front),
            ("/folds", self._folds),
            ("/folds/{seq}", self._fold),
            ("/models/{identity}", self._model),
            ("/refusals", self._refusals),
            ("/evaluations", self._evaluations),
            ("/storage", self._storage),
            ("/settings", self._settings),
            *([("/commands", self._commands)] if self._commanding is not None else []),
        )
        return [
            *(Route(path, partial(self._answer, show)) for path, show in pages),
            *(Route(f"/{name}", partial(_asset, name, kind)) for name, kind in ASSETS),
        ]

    def stamp(self) -> str:
        """A word that is another one when there is something new on a page."""
        asked = "" if self._commanding is None else f"-{self._commanding.errands.version}"
        return self._look.view.stamp() + asked

    @property
    def around(self) -> Around:
        """What all pages are given."""
        more = () if self._commanding is None else (ENTRY,)
        return Around(self._look.view.directory, self.stamp(), more)

    def _session(self, request: Request) -> Session | None:
        """Who gives commands by a request; None where nobody has signed in, or nobody can."""
        return None if self._commanding is None else self._commanding.sessions.of(request)

    async def _answer(self, show: Show, request: Request) -> Response:
        around = self.around
        try:
            return HTMLResponse(await show(request, around))
        except AskedWrongly as error:
            return HTMLResponse(trouble(400, str(error), around), 400)
        except Missing as error:
            return HTMLResponse(trouble(404, str(error), around), 404)

    async def _front(self, request: Request, around: Around) -> str:
        status = await self._look.status()
        picture = await self._look.aside(partial(self._past.picture, FRONT_COLUMNS))
        session = self._session(request)
        buttons = Html() if session is None else controls.front(status, session.form)
        return front.render(status, pictures.layers(picture), buttons, around)

    async def _folds(self, request: Request, around: Around) -> str:
        asked = wanted(request)
        found = await self._look.aside(partial(self._past.folds, asked))
        picture = await self._look.aside(partial(self._past.picture, pictures.COLUMNS))
        return lists.folds(found, picture, asked, around)

    async def _fold(self, request: Request, around: Around) -> str:
        seq, part = in_path(request, "seq"), number(request, "part", 0) or 0
        about = await self._look.aside(partial(self._past.fold, seq, part))
        if about is None:
            raise Missing("No record brought such a fold.")
        session = self._session(request)
        return about_fold.render(about, Html() if session is None else controls.fold(about, session.form), around)

    async def _model(self, request: Request, around: Around) -> str:
        about = await self._look.aside(partial(self._past.model, request.path_params["identity"]))
        if about is None:
            raise Missing("No record is about such a model.")
        session = self._session(request)
        return about_model.render(about, Html() if session is None else controls.model(about, session.form), around)

    async def _refusals(self, request: Request, around: Around) -> str:
        asked = wanted(request)
        return lists.refusals(await self._look.aside(partial(self._past.refusals, asked)), asked, around)

    async def _evaluations(self, _request: Request, around: Around) -> str:
        return evaluations.render(await self._look.aside(self._past.evaluations), around)

    async def _storage(self, _request: Request, around: Around) -> str:
        found = await self._look.aside(self._past.generations)
        free = await self._look.aside(self._look.view.free_bytes)
        return storage.render(found, free, around)

    async def _commands(self, request: Request, around: Around) -> str:
        assert self._commanding is not None
        return self._commanding.page(self._session(request), around)

    async def _settings(self, _request: Request, around: Around) -> str:
        return settings_page.render(await self._look.aside(self._past.settings), around)


@cache
def _bytes(name: str) -> bytes:
    return files("continual.service.web").joinpath("assets", name).read_bytes()


async def _asset(name: str, kind: str, _request: Request) -> Response:
    return Response(_bytes(name), media_type=kind)
