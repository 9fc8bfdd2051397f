"""`POST /promote`: a program that has the token says that a canary may be promoted. Without a token in the settings
there is no such page."""

from __future__ import annotations

import asyncio
import hmac
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from starlette.requests import Request
from starlette.responses import JSONResponse, Response

from continual.api import Merge
from continual.errors import Damaged, Misconfigured, Retry
from continual.service.canary import stages

if TYPE_CHECKING:
    from starlette.routing import BaseRoute


@dataclass(frozen=True, slots=True)
class Calling:
    """Takes calls for the open `merge`; `promoted` is called after one that was heard."""

    merge: Merge
    promoted: Callable[[], None]

    def routes(self) -> list[BaseRoute]:
        """`POST /promote`, where there is a token."""
        from starlette.routing import Route

        if self.merge.settings.promote_token is None:
            return []
        return [Route("/promote", self.answer, methods=["POST"])]

    async def answer(self, request: Request) -> Response:
        """202 when the promotion is on disk; 401 without the token, 400 for a record that is no number, 409 where no
        such canary waits, 503 where it cannot be kept. `view` names a view (default: the merge), `at` the record
        that the canary has to be."""
        token = self.merge.settings.promote_token
        assert token is not None
        given = request.headers.get("authorization", "").encode("latin-1")
        if not hmac.compare_digest(given, b"Bearer " + token.get_secret_value().encode()):
            return _said(401, "Authorization is not 'Bearer' and the token of this service")
        view = request.query_params.get("view") or None
        at = request.query_params.get("at")
        if at is not None and not (at.isascii() and at.isdecimal() and len(at) < 16):
            return _said(400, "at is the number of a record")
        seq = None if at is None else int(at)
        try:
            found = await asyncio.to_thread(stages.promote, self.merge, view, seq, "http", "called over HTTP")
        except (Misconfigured, Damaged) as error:
            return _said(409, str(error))
        except Retry as error:
            return _said(503, str(error))
        self.promoted()
        return JSONResponse({"message": "accepted", "seq": found.seq, "view": found.view}, 202)


def _said(status: int, message: str) -> Response:
    return JSONResponse({"message": message}, status)
