"""The Hub as a worker of a cluster reaches it: with the login of its own machine, by its own HF_ENDPOINT where it has
one. What it may not read, or does not find, says nothing about a candidate: who sent it to work has read of it."""

from __future__ import annotations

import os
from functools import cache
from urllib.parse import urlsplit, urlunsplit

from continual.errors import NotHere, Refuse
from continual.hub.client import Hub

_RIGHTS = ("gone", "gated")


class NotForWorker(NotHere):
    """A worker may not read a repo, or does not find it. Whether anybody can is for who sent it to ask."""


class WorkersHub(Hub):
    """A Hub whose refusals are those of this machine's login."""

    def _wait_or_raise(self, what: str, error: Exception, attempt: int, until: float | None = None) -> None:
        try:
            super()._wait_or_raise(what, error, attempt, until)
        except Refuse as refusal:
            if refusal.reason in _RIGHTS:
                raise NotForWorker(str(refusal)) from None
            raise


@cache
def hub_of_worker(endpoint: str) -> WorkersHub:
    """The Hub that this process asks, `endpoint` (empty: the Hub itself) where the environment names none. Raises
    Misconfigured if the package huggingface_hub is told to stay offline."""
    return WorkersHub(endpoint=os.environ.get("HF_ENDPOINT") or endpoint or None)


def without_login(endpoint: str) -> str:
    """An address without the name and password that it may have: these are no other machine's."""
    scheme, host, path, query, _ = urlsplit(endpoint)
    return str(urlunsplit((scheme, host.rpartition("@")[2], path, query, "")))
