"""What the programs inside a container have in common: commands, questions to systemd and the daemon, the report."""

from __future__ import annotations

import json
import os
import subprocess
import time
import traceback
import urllib.request
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROWS: list[tuple[str, bool, str]] = []


def row(what: str, found: object, expected: object) -> None:
    """Notes whether something is as expected."""
    ROWS.append((what, found == expected, str(found) if found == expected else f"{found!r}, not {expected!r}"))


def run(*command: str, user: str | None = None) -> subprocess.CompletedProcess[str]:
    """Runs a command that knows nothing of the packages of this program."""
    bare = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    return subprocess.run(command, capture_output=True, text=True, check=False, user=user, timeout=300, env=bare)


def shown(name: str, unit: str = "continual") -> str:
    """A property of a unit."""
    return run("systemctl", "show", "--value", "-p", name, unit).stdout.strip()


def get(address: str) -> str:
    """What an address on this machine answers. Raises OSError."""
    with urllib.request.urlopen(address, timeout=10) as answer:
        return str(answer.read().decode())


def status() -> dict[str, Any]:
    """What the daemon says of itself."""
    body: dict[str, Any] = json.loads(get("http://127.0.0.1:8321/api/status"))
    return body


def until(what: str, found: Callable[[], object], seconds: float = 60.0) -> None:
    """Waits until it is so, and notes whether it came to that."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            if found():
                return row(what, "so", "so")
        except (OSError, ValueError, KeyError):
            pass
        time.sleep(0.1)
    return row(what, "not so", "so")


def journal(unit: str = "continual") -> str:
    """What a unit logged."""
    return run("journalctl", "-u", unit, "-o", "cat", "--no-pager").stdout


def reported(*parts: Callable[[], None]) -> None:
    """Does one part after the other, and writes the report whatever happens."""
    try:
        for part in parts:
            part()
    except Exception:
        row("it ran to its end", traceback.format_exc()[-1500:], "")
    Path("/campaign/journal").write_text(run("journalctl", "--no-pager").stdout)
    Path("/campaign/report.json").write_text(json.dumps(ROWS))
