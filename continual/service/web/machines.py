"""The JSON API: which address answers with what. Each route says for OpenAPI what it takes and gives."""

from __future__ import annotations

import json
from collections.abc import Awaitable, Callable
from functools import partial
from typing import NamedTuple

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route

from continual.service.web import openapi
from continual.service.web.looking import AskedWrongly, PageLook, in_path, number, wanted
from continual.service.web.openapi import Described
from continual.service.web.recalled import (
    AboutFold,
    AboutModel,
    FoldList,
    KeptGeneration,
    LayerPicture,
    RecalledEvaluation,
    RefusalList,
    SettingInForce,
)
from continual.service.web.view import Status
from continual.texts import jsonable

_RECORDS = 100
"""Records and rows, where nothing else is asked."""
_PICTURE = 40
"""Folds of the picture of layers, where nothing else is asked."""
_GONE = {404: "there is none"}
_LIST = ("q", "limit", "before")


class AsciiJson(JSONResponse):
    """JSON in ASCII: a name that is no Unicode can be in it, and a terminal that shows it is not steered."""

    def render(self, content: object) -> bytes:
        return json.dumps(content, allow_nan=False, separators=(",", ":")).encode("ascii")


class Answering(NamedTuple):
    """A route: how the document describes it, and what answers; None of which means that there is no such thing."""

    described: Described
    answer: Callable[[Request], Awaitable[object]]


class Machines:
    """Answers programs with what `look` sees."""

    def __init__(self, look: PageLook) -> None:
        self._look = look
        self._past = look.view.recalling

    def table(self) -> list[Answering]:
        """The routes that read."""
        return [
            Answering(Described("/api/status", "Everything there is to show of the present", Status), self._status),
            Answering(
                Described(
                    "/api/log", "Records of the ledger, the oldest first", list[dict[str, object]], ("limit", "before")
                ),
                self._log,
            ),
            Answering(Described("/api/folds", "Folds, the newest first", FoldList, _LIST), self._folds),
            Answering(
                Described("/api/folds/{seq}", "All that is told of a fold", AboutFold, ("seq", "part"), failures=_GONE),
                self._fold,
            ),
            Answering(
                Described(
                    "/api/models/{identity}", "All that is told of a model", AboutModel, ("identity",), failures=_GONE
                ),
                self._model,
            ),
            Answering(Described("/api/refusals", "Refusals, the newest first", RefusalList, _LIST), self._refusals),
            Answering(
                Described("/api/layers", "What the newest folds changed, by layers", LayerPicture, ("limit",)),
                self._layers,
            ),
            Answering(
                Described("/api/evaluations", "What the merge was worth, by folds", list[RecalledEvaluation]),
                lambda _: self._look.aside(self._past.evaluations),
            ),
            Answering(
                Described("/api/generations", "What is on the disk, the newest first", list[KeptGeneration]),
                lambda _: self._look.aside(self._past.generations),
            ),
            Answering(
                Described("/api/settings", "The settings in force; secrets are masked", list[SettingInForce]),
                lambda _: self._look.aside(self._past.settings),
            ),
        ]

    def routes(self) -> list[BaseRoute]:
        """The routes that read."""
        return [Route(row.described.path, partial(_told, row.answer)) for row in self.table()]

    async def _status(self, _request: Request) -> object:
        return (await self._look.status()).body()

    async def _log(self, request: Request) -> object:
        asked = wanted(request, _RECORDS)
        return await self._look.aside(lambda: self._look.view.log(asked.limit, asked.before))

    async def _folds(self, request: Request) -> object:
        asked = wanted(request, _RECORDS)
        return await self._look.aside(lambda: self._past.folds(asked))

    async def _fold(self, request: Request) -> object:
        seq, part = in_path(request, "seq"), number(request, "part", 0) or 0
        return await self._look.aside(lambda: self._past.fold(seq, part))

    async def _model(self, request: Request) -> object:
        return await self._look.aside(lambda: self._past.model(request.path_params["identity"]))

    async def _refusals(self, request: Request) -> object:
        asked = wanted(request, _RECORDS)
        return await self._look.aside(lambda: self._past.refusals(asked))

    async def _layers(self, request: Request) -> object:
        most = wanted(request, _PICTURE).limit
        return await self._look.aside(lambda: self._past.picture(most))


def description(described: list[Described]) -> Route:
    """The route of the document that describes the others and itself."""
    itself = Described("/api/openapi.json", "This document", dict[str, object])
    made: list[dict[str, object]] = []

    async def answer(_request: Request) -> Response:
        if not made:
            made.append(openapi.document([*described, itself]))
        return AsciiJson(made[0])

    return Route(itself.path, answer)


async def _told(answer: Callable[[Request], Awaitable[object]], request: Request) -> Response:
    try:
        found = await answer(request)
    except AskedWrongly as error:
        return AsciiJson({"error": str(error)}, 400)
    if found is None:
        return AsciiJson({"error": "there is none"}, 404)
    return AsciiJson(jsonable(found))
