"""A real daemon under hostile hands: what strangers publish, and what clients do to its port.

    python -m tests.campaigns.hostile --work W

It starts `continual run` on a watched folder with few descriptors, publishes one hostile model directory after the
other (`publications.py`), with a good fine-tune after every tenth, while another thread asks /healthz five times a
second, and while clients hold silent and slow connections. Then it checks, and writes W/report.json:

- the daemon is alive, and all good fine-tunes are folded (so are sound models under odd names, or with an odd README);
- each hostile one has a fate: a record, a line in the log, or a note on the page;
- /healthz was answered within a second each time, and the process stayed under 1 GB;
- the log has no trace of an exception and no control character; SIGTERM ends the daemon with exit code 0.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from continual import making
from continual.state import State
from tests.campaigns.hostile.publications import NAMES, PUBLICATIONS
from tests.helpers import models

_EVERY = 10
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class Pulse(threading.Thread):
    """Asks /healthz five times a second; keeps how long each answer took, and what went wrong."""

    def __init__(self, url: str) -> None:
        super().__init__(daemon=True)
        self.url = url
        self.seconds: list[float] = []
        self.wrong: list[str] = []
        self.ended = threading.Event()

    def run(self) -> None:
        """Asks until `ended` is set."""
        while not self.ended.wait(0.2):
            began = time.monotonic()
            try:
                with _DIRECT.open(f"{self.url}/healthz", timeout=10) as answer:
                    answer.read()
            except OSError as error:
                self.wrong.append(str(error))
            self.seconds.append(time.monotonic() - began)


@contextlib.contextmanager
def idle_connections(address: tuple[str, int], count: int) -> Iterator[None]:
    """Connections of which half say nothing and half begin a request and never end it."""
    held = []
    for number in range(count):
        with contextlib.suppress(OSError):
            sock = socket.create_connection(address, timeout=2)
            held.append(sock)
            if number % 2:
                sock.sendall(b"GET / HTTP/1.1\r\nHost: 127.0.0.1\r\nX: ")
    try:
        yield
    finally:
        for sock in held:
            sock.close()


def listening(state: Path, process: subprocess.Popen[bytes]) -> str:
    """The URL of the daemon, once it listens."""
    while process.poll() is None:
        with contextlib.suppress(OSError, ValueError):
            text = (state / "lock").read_text()
            body = json.loads(text[text.index("{") :])
            if body.get("pid") == process.pid and body.get("url"):
                return str(body["url"])
        time.sleep(0.1)
    raise SystemExit(f"the daemon ended with {process.returncode}")


def asked(url: str) -> dict[str, Any]:
    """What /api/status says; nothing where it cannot be asked."""
    body: dict[str, Any] = {}
    with contextlib.suppress(OSError), _DIRECT.open(f"{url}/api/status", timeout=30) as answer:
        body = json.load(answer)
    return body


def until_still(process: subprocess.Popen[bytes], url: str, good: int, patience: float) -> None:
    """Waits until every good one is folded and no record has come for ten seconds, at most `patience` seconds, or until
    the daemon has ended."""
    end, head, since = time.monotonic() + patience, -1, time.monotonic()
    while time.monotonic() < end and process.poll() is None:
        body = asked(url)
        if body.get("head") != head:
            head, since = body.get("head", head), time.monotonic()
        if body.get("folds", 0) >= good and time.monotonic() - since > 10:
            return
        time.sleep(0.5)


def fates(state: Path, log: str, notes: str, names: dict[str, str]) -> dict[str, str | None]:
    """By publication, what became of it; None of one that nobody said anything of."""
    with State.open(state) as opened:
        records = {
            Path(commit.entry.candidate.origin).name: commit.entry.fate or commit.entry.kind
            for commit in opened.ledger.log
            if commit.entry.candidate is not None
        }
    found: dict[str, str | None] = {}
    for publication, name in names.items():
        shown = name.encode("utf-8", "backslashreplace").decode()
        seen = [name, shown, repr(name)[1:-1], json.dumps(name)[1:-1], json.dumps(repr(name)[1:-1])[1:-1]]
        said = next((where for where in ("log", "note") if any(s in (log, notes)[where == "note"] for s in seen)), None)
        found[publication] = records.get(name) or said
    return found


def main() -> None:
    """Runs the campaign."""
    parser = argparse.ArgumentParser(prog="python -m tests.campaigns.hostile", description=__doc__)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--descriptors", type=int, default=200, help="how many files the daemon may have open")
    parser.add_argument("--connections", type=int, default=400, help="silent and slow connections")
    parser.add_argument("--patience", type=float, default=600.0, help="seconds until all has to be settled")
    given = parser.parse_args()
    work: Path = given.work.absolute()
    shutil.rmtree(work, ignore_errors=True)
    (work / "in").mkdir(parents=True)
    base = models.base(work / "base")
    making.init(base, work / "state")
    command = [sys.executable, "-m", "continual", "run", "--state", str(work / "state"), "--watch", str(work / "in")]
    limited = ["prlimit", f"--nofile={given.descriptors}:{given.descriptors}"]
    with open(work / "daemon.log", "wb") as log:
        process = subprocess.Popen([*limited, *command, "--port", "0", "--settle", "0.2"], stderr=log)
    url = listening(work / "state", process)
    pulse = Pulse(url)
    pulse.start()
    names, good = {}, 0
    with idle_connections(("127.0.0.1", int(url.rpartition(":")[2])), given.connections):
        for number, (name, make) in enumerate(PUBLICATIONS.items()):
            staged = work / name
            make(base, staged)
            inside = NAMES.get(name.removeprefix("name-"), name) if name.startswith("name-") else name
            names[name] = inside
            os.rename(work / inside, work / "in" / inside)
            if number % _EVERY == 0:
                models.fine_tune(base, work / "in" / f"good-{good}", 100 + good)
                good += 1
        until_still(process, url, good, given.patience)
    notes = json.dumps(asked(url))
    pulse.ended.set()
    peak = ""
    if process.poll() is None:
        lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
        peak = next(line for line in lines if "VmHWM" in line)
        process.send_signal(signal.SIGTERM)
    code = process.wait(60)
    text = (work / "daemon.log").read_bytes().decode("utf-8", "backslashreplace")
    found = fates(work / "state", text, notes, names)
    with State.open(work / "state") as opened:
        folded = [Path(commit.entry.candidate.origin).name for commit in opened.ledger.folds()]
    report = {
        "published": len(PUBLICATIONS),
        "good": good,
        "good_folded": sum(name.startswith("good-") for name in folded),
        "others_folded": [name for name in folded if not name.startswith("good-")],
        "without_fate": [name for name, fate in found.items() if fate is None],
        "healthz_asked": len(pulse.seconds),
        "healthz_slowest_s": round(max(pulse.seconds), 3),
        "healthz_wrong": pulse.wrong[:5],
        "peak_mb": int(peak.split()[1]) // 1024 if peak else None,
        "log_lines": text.count("\n"),
        "traces": text.count("Traceback"),
        "control_characters": sum(ord(c) < 32 and c != "\n" for c in text),
        "exit_code": code if peak else f"ended by itself with {code}",
    }
    (work / "report.json").write_text(json.dumps(report | {"fates": found}, indent=1))
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
