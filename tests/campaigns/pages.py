"""The pages of a daemon beside a long ledger, and in a real browser.

    python -m tests.campaigns.pages --records 10000 --requests 10000
    python -m tests.campaigns.pages --records 1334 --browser [--axe axe.min.js] [--pictures FOLDER]

Makes a state with so many records (three of four are folds), runs a daemon on it, and asks each page one at a time.
Printed are the processor milliseconds of the daemon for each (all of its threads, the mean of `--times` requests after
one that is not counted), and with `--requests` how its resident memory went over so many requests to all of them. With
`--browser` chromium opens each page at three widths in both themes, once it has opened one that is not counted: what
loading takes of its renderer's processor (`TaskDuration`), whether it is wider than the screen, what it wrote to the
console, whom it asked, and with `--axe` (a file of the package axe-core, which is not part of this repository) what
that finds. At the middle width the key Tab is to reach all that can be reached. The page of commands, and what has
buttons, are looked at as who has signed in sees them. It ends with 1 where something is wrong.
"""

from __future__ import annotations

import argparse
import json
import os
import tempfile
import urllib.request
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import continual
from continual.state import State
from tests.campaigns.bench.ledger import grown
from tests.campaigns.many_folders import spent
from tests.helpers import models
from tests.helpers.browsing import Browser, browser, walked
from tests.helpers.services import daemon, url

WIDTHS = (320, 800, 1200)
TOKEN = "the token of a campaign"
LATE = 200.0
"""Milliseconds of the processor that loading a page may take in the browser."""
AXE = """axe.run(document, {resultTypes: ['violations']}).then(found => found.violations
    .filter(one => one.impact === 'serious' || one.impact === 'critical')
    .map(one => [one.id, one.nodes.length, one.nodes[0].html.slice(0, 200)]))"""


def paths(address: str) -> list[str]:
    """Addresses of every kind of page, and of the API."""
    told: dict[str, Any] = json.loads(got(f"{address}/api/status"))
    fold, refusal = told["last_folds"][0], told["refusals"][0]
    pages = ["/", "/folds", f"/folds/{fold['seq']}", "/folds?q=m77", f"/models/{refusal['model_id']}", "/refusals"]
    pages += ["/evaluations", "/storage", "/settings", "/commands"]
    return [*pages, "/metrics", "/api/status", "/api/folds", f"/api/folds/{fold['seq']}", "/api/layers", "/api/log"]


def got(address: str) -> bytes:
    with urllib.request.urlopen(address, timeout=60) as answer:
        return bytes(answer.read())


def resident(pid: int) -> float:
    """Megabytes that are resident of a process."""
    line = next(line for line in Path(f"/proc/{pid}/status").read_text().splitlines() if line.startswith("VmRSS"))
    return int(line.split()[1]) / 1000


def costs(address: str, pid: int, times: int) -> None:
    """Prints what each page costs."""
    print("| address | processor ms | kB |\n|---|---|---|")
    for path in paths(address):
        size = len(got(address + path))
        before = spent(pid)
        for _ in range(times):
            got(address + path)
        print(f"| {path} | {1000 * (spent(pid) - before) / times:.1f} | {size / 1000:.0f} |", flush=True)


def memory(address: str, pid: int, requests: int) -> None:
    """Prints how the resident memory goes."""
    found, told = paths(address), []
    for number in range(requests + 1):
        if number % (requests // 10) == 0:
            told.append(f"{resident(pid):.0f}")
        got(address + found[number % len(found)])
    print(f"resident MB over {requests} requests: {', '.join(told)}", flush=True)


def looked(page: Browser, address: str, axe: str, pictures: Path | None) -> list[str]:
    """Opens every page in every way; what is wrong."""
    wrong: list[str] = []
    slowest = (0.0, "")
    page.open(f"{address}/commands")  # fonts, and what a browser does once
    wrong += entered(page, address, axe)
    for path in [path for path in paths(address) if not path.startswith(("/api", "/metrics"))]:
        for width in WIDTHS:
            for dark in (False, True):
                page.looks(width=width, dark=dark)
                before = busy(page)
                page.open(address + path)
                after = busy(page)
                took = 1000 * (after - before if after >= before else after)  # a new renderer counts from 0
                slowest = max(slowest, (took, path))
                where = f"{path} at {width}, {'dark' if dark else 'light'}"
                if took > LATE:
                    wrong.append(f"{where}: {took:.0f} ms")
                if page.say("document.documentElement.scrollWidth") > width:
                    wrong.append(f"{where}: wider than the screen")
                if pictures is not None:
                    name = path.strip("/").replace("/", "-").partition("?")[0] or "front"
                    page.picture(pictures / f"{name}-{width}-{'dark' if dark else 'light'}.png")
                wrong += [f"{where}: {found}" for found in violations(page, axe)]
                if width == WIDTHS[1] and not dark:
                    walked(page)
    print(f"slowest in the browser: {slowest[0]:.0f} ms of its processor, {slowest[1]}")
    others = {urlsplit(asked).netloc for asked in page.asked} - {urlsplit(address).netloc, ""}
    return [*wrong, *page.console, *(f"asked {other}" for other in sorted(others))]


def entered(page: Browser, address: str, axe: str) -> list[str]:
    """Signs in, as a person does, and asks for a look at going back; what is wrong with the pages before that."""
    wrong = [f"signing in: {found}" for found in violations(page, axe)]
    walked(page)
    page.say(f"document.getElementById('token').value = '{TOKEN}'; document.querySelector('main form').submit()")
    page.until("document.body.innerText.includes('What can be asked for') && document.readyState === 'complete'")
    fold = json.loads(got(f"{address}/api/status"))["last_folds"][0]["seq"]
    page.open(f"{address}/folds/{fold}")
    page.say("document.querySelector('.controls form').submit()")
    page.until("location.pathname === '/commands' && document.readyState === 'complete'", "what came of it")
    return wrong


def violations(page: Browser, axe: str) -> list[str]:
    """What axe-core finds on a page; nothing without it."""
    return [str(found) for found in page.say(f"{axe};0;{AXE}")] if axe else []


def busy(page: Browser) -> float:
    """Seconds of the processor that the page's renderer took."""
    found = page.call("Performance.getMetrics")["metrics"]
    return float(next(one["value"] for one in found if one["name"] == "TaskDuration"))


def main() -> None:
    """Does what the flags say."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--records", type=int, default=10_000)
    parser.add_argument("--times", type=int, default=50)
    parser.add_argument("--requests", type=int, default=0)
    parser.add_argument("--browser", action="store_true")
    parser.add_argument("--axe", type=Path)
    parser.add_argument("--pictures", type=Path)
    wanted = parser.parse_args()
    wrong: list[str] = []
    with tempfile.TemporaryDirectory() as made:
        folder = Path(made)
        base = models.base(folder / "base")
        state, watch = folder / "state", folder / "in"
        watch.mkdir()
        continual.init(base, state, continual.Recipe(rule="iso-c"))
        with continual.open(state, write=True) as merge:
            merge.fold(models.fine_tune(base, folder / "fine-tune", 1))
        grown(state, wanted.records)
        State.open(state, write=True).close()  # what a writer makes of it once
        with daemon(state, watch, environment={"CONTINUAL_ADMIN_TOKEN": TOKEN, "PATH": os.defpath}) as process:
            address = url(process, state)
            if wanted.browser:
                axe = "" if wanted.axe is None else wanted.axe.read_text()
                with browser() as page:
                    wrong = looked(page, address, axe, wanted.pictures)
            else:
                costs(address, process.pid, wanted.times)
                if wanted.requests:
                    memory(address, process.pid, wanted.requests)
    for line in wrong:
        print(f"wrong: {line}")
    raise SystemExit(1 if wrong else 0)


if __name__ == "__main__":
    main()
