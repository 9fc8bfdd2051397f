"""`POST /webhook`: the Hub says that a repo changed. An accepted push is on disk before the answer. It is only a hint:
the Hub is asked what the repo is now.

Payload: https://huggingface.co/docs/hub/webhooks (version 3). The secret is sent as plain text in `X-Webhook-Secret`;
without one configured there is no such page.
"""

from __future__ import annotations

import asyncio
import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import ClientDisconnect, Request
from starlette.responses import JSONResponse, Response

from continual.errors import ContinualError
from continual.hub.names import is_repo, is_sha
from continual.state.inbox import Inbox, PushRecord, name_of

LARGEST = 64 << 10
"""Bytes of a body that is read."""


class _Loose(BaseModel):
    model_config = ConfigDict(extra="ignore")


class _Event(_Loose):
    action: str
    scope: str


class _Repo(_Loose):
    type: str
    name: str
    head_sha: str | None = Field(None, alias="headSha")


class _Ref(_Loose):
    ref: str
    new_sha: str | None = Field(None, alias="newSha")


class Payload(_Loose):
    """What is used of a delivery."""

    event: _Event
    repo: _Repo
    updated_refs: tuple[_Ref, ...] = Field((), alias="updatedRefs")


class Push(NamedTuple):
    """A repo that changed, and its newest commit where the delivery says so."""

    repo: str
    sha: str | None

    @property
    def name(self) -> str:
        """A name that two deliveries of one push share; a push that names no commit gets a new one each time."""
        return name_of(self.repo, self.sha or str(time.time_ns()))


def push_of(payload: Payload) -> Push | None:
    """The push that a delivery tells of; None if it is about something else: a dataset, a discussion, a deletion,
    another branch. Raises ValueError for a name that cannot be a repo's, and for a hash that is no commit's."""
    if (
        payload.repo.type != "model"
        or payload.event.scope not in ("repo", "repo.content")
        or payload.event.action == "delete"
    ):
        return None
    refs = [ref for ref in payload.updated_refs if ref.ref == "refs/heads/main"]
    if payload.updated_refs and not refs:
        return None
    sha = refs[-1].new_sha if refs else payload.repo.head_sha
    if not is_repo(payload.repo.name) or not (sha is None or is_sha(sha)):
        raise ValueError("repo.name or a commit is malformed")
    return Push(payload.repo.name, sha)


@dataclass(frozen=True, slots=True)
class Webhook:
    """Takes deliveries: `secret` is what the Hub has to send, `inbox` keeps the pushes, `told` is called for each new
    one, and `heard` with the repo of every delivery about a model, also of those that are no push."""

    secret: str
    inbox: Inbox
    told: Callable[[], None]
    heard: Callable[[str], None] = lambda _repo: None

    async def answer(self, request: Request) -> Response:
        """202 when the push is on disk, or there is nothing to do; 401 without the secret, 413 for a large body, 400
        for what is no delivery, 503 where the push cannot be kept."""
        given = request.headers.get("x-webhook-secret", "")
        if not hmac.compare_digest(given.encode("latin-1"), self.secret.encode()):
            return _said(401, "X-Webhook-Secret is not the secret of this service")
        try:
            body = await _body(request)
            if body is None:
                return _said(413, f"at most {LARGEST} bytes")
            payload = Payload.model_validate_json(body)
            push = push_of(payload)
        except (ValidationError, ValueError):
            return _said(400, "no payload of a webhook of version 3")
        except ClientDisconnect:
            return _said(400, "cut off")
        if payload.repo.type == "model":
            self.heard(payload.repo.name)
        if push is None:
            return _said(202, "nothing to do")
        record = PushRecord(push.repo, push.sha, time.time())
        try:
            new = await asyncio.to_thread(self.inbox.put, push.name, record)
        except ContinualError as error:
            return _said(503, str(error))
        if new:
            self.told()
        return _said(202, "accepted" if new else "known")


async def _body(request: Request) -> bytes | None:
    """The body; None if it is too large."""
    found = bytearray()
    async for part in request.stream():
        found += part
        if len(found) > LARGEST:
            return None
    return bytes(found)


def _said(status: int, message: str) -> Response:
    return JSONResponse({"message": message}, status)
