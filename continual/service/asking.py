"""What a running daemon answers when it is asked for its status over HTTP. It loads little, so that asking is quick."""

from __future__ import annotations

import json
import urllib.request

from continual.state import lock
from continual.stores import Where
from continual.texts import Json

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
"""Asks this machine itself: a proxy of the environment (`http_proxy`) is never used for that."""


def ask(state: Where) -> dict[str, Json] | None:
    """What the daemon on `state` answers; None if none runs or it does not answer."""
    url = lock.holder(state).url
    if not isinstance(url, str) or not url.startswith("http://"):
        return None
    try:
        with _DIRECT.open(f"{url}/api/status", timeout=5) as answer:
            body = json.loads(answer.read())
    except (OSError, ValueError):
        return None
    if not isinstance(body, dict) or "state_id" not in body:
        return None
    return body if str(body["state"]) == str(state.absolute()) else None
