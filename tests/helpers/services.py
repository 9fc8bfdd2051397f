"""The daemon as a real process, and asking it over HTTP."""

from __future__ import annotations

import json
import subprocess
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tests.helpers.preloaded import Process

LIMIT = 60.0


@contextmanager
def daemon(
    state: Path, watch: Path | None, *flags: str, environment: Mapping[str, str] | None = None
) -> Iterator[subprocess.Popen[str]]:
    """A running daemon; killed at the end if it still runs. Its log lines are in `state`'s parent, daemon.log."""
    watched = () if watch is None else ("--watch", watch)
    command = ("run", "--state", state, *watched, "--port", "0", "--settle", "0.2", *flags)
    with (
        open(state.parent / "daemon.log", "a") as log,
        Process(*command, stderr=log.fileno(), environment=environment) as process,
    ):
        try:
            yield process
        finally:
            process.kill()


def until(found: Callable[[], Any], what: str, limit: float = LIMIT) -> Any:
    """Polls `found` until it is true."""
    end = time.monotonic() + limit
    while time.monotonic() < end:
        try:
            if value := found():
                return value
        except OSError:
            pass  # not listening yet
        time.sleep(0.05)
    raise AssertionError(f"not within {limit:.0f} s: {what}")


def url(process: subprocess.Popen[str], state: Path) -> str:
    def listening() -> str | None:
        assert process.poll() is None, (state.parent / "daemon.log").read_text()
        held = (state / "lock").read_text()
        found = json.loads(held[held.index("{") :]) if "{" in held else {}
        return found.get("url") if found.get("pid") == process.pid else None

    return str(until(listening, "the daemon listens"))


def get(address: str) -> tuple[int, str]:
    try:
        with urllib.request.urlopen(address, timeout=20) as answer:
            return answer.status, answer.read().decode()
    except urllib.error.HTTPError as error:
        return error.code, error.read().decode()


def status(address: str) -> dict[str, Any]:
    body: dict[str, Any] = json.loads(get(f"{address}/api/status")[1])
    return body
