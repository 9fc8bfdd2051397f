"""The real client against the Hub: in this process, or the environment of a subprocess."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx2
import huggingface_hub
from huggingface_hub.utils._http import default_client_factory

from tests.loopback.access import TOKEN
from tests.loopback.hub import Hub


def environment(hub: Hub, tmp: Path, *, token: str | None = TOKEN) -> dict[str, str]:
    """The environment for a subprocess whose client talks to this Hub, with its cache in `tmp`."""
    own = {
        "HF_ENDPOINT": hub.endpoint,
        "HF_HOME": str(tmp / "hf"),
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        "HF_HUB_OFFLINE": "0",
    }
    kept = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith("HF_") and name != "TRANSFORMERS_OFFLINE"
    }
    return kept | own | ({"HF_TOKEN": token} if token else {})


@contextmanager
def online() -> Iterator[None]:
    """Lets the client of this process reach loopback, and nothing else, even where HF_HUB_OFFLINE=1 was set as it was
    imported.

    Offline mode is enforced by a hook of the client's HTTP session, and `set_client_factory` is its public way to give
    another
    session: no patching. Pass `endpoint=` to HfApi and `cache_dir=` to downloads.
    """

    def check(request: httpx2.Request) -> None:
        if request.url.host not in ("127.0.0.1", "localhost"):
            raise AssertionError(f"a test reached for {request.url}")

    huggingface_hub.set_client_factory(
        lambda: httpx2.Client(event_hooks={"request": [check]}, follow_redirects=True, timeout=None)
    )
    try:
        yield
    finally:
        huggingface_hub.set_client_factory(default_client_factory)
