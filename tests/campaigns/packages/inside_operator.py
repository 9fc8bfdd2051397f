"""What `tests.campaigns.packages.operator` runs inside the container, as root: the page, block by block, and a Hub and
a Prometheus to try it with."""

from __future__ import annotations

import json
import re
import subprocess
import time
from pathlib import Path

from tests import loopback
from tests.campaigns.packages.inside import get, reported, row, run, shown, status, until
from tests.helpers import hubs
from tests.helpers.pages import DOCS, blocks

PAGE = DOCS / "install.md"
CONFIG = Path("/etc/continual/continual.toml")
CHECKOUT = "/opt/continual"


def typed(block: str) -> None:
    """Types the lines of a block. Where the page follows a log the campaign looks at it once."""
    block = re.sub(r"journalctl (.*) -f", r"journalctl \1 --no-pager -n 3", block)
    for line in re.sub(r"\\\n\s*", "", block).splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        began = time.monotonic()
        done = run("bash", "-c", f"cd {CHECKOUT}\n{line}")
        said = "" if done.returncode == 0 else f": {done.stdout[-300:]}{done.stderr[-600:]}"
        row(f"{time.monotonic() - began:4.1f} s  {line}", f"{done.returncode}{said}", "0")


def the_page() -> None:
    """Every block but the first, which was typed before the machine was booted."""
    row("seconds for the first block", seconds := Path(CHECKOUT, "installed").read_text(), seconds)
    (settings,) = blocks(PAGE, "toml")
    CONFIG.write_text(settings)
    _, *rest = blocks(PAGE, "")
    for block in rest:
        typed(block)
    until("the model of the page is folded", lambda: status()["folds"] == 1)
    row("and status says it", "alice" in run("continual", "status", "--config", str(CONFIG)).stdout, True)
    until("the link is put", lambda: Path("/srv/merged/current/continual.json").is_file())
    row("a unit that is enabled", run("systemctl", "is-enabled", "continual").stdout.strip(), "enabled")


def the_hub() -> None:
    """The words of the page about the Hub."""
    with loopback.serving() as hub:
        hubs.publish(hub, "org/base", Path("/srv/base"), hubs.card(None, license="apache-2.0"))
        hubs.publish(hub, "alice/hers", Path("/srv/of-the-hub"))
        secrets = CONFIG.with_name("secrets")
        secrets.write_text(f"HF_TOKEN={loopback.TOKEN}\nHF_ENDPOINT={hub.endpoint}\n")
        secrets.chmod(0o600)
        text = CONFIG.read_text().replace(
            "watch = false", 'watch = true\nbases = ["org/base"]\nsettle = 0\npoll = 1\n#'
        )
        CONFIG.write_text(text)
        (service,) = [block for block in blocks(PAGE, "") if "daemon-reload" in block]
        typed("cp ops/systemd/hub.conf /etc/systemd/system/continual.service.d/")
        typed(
            "\n".join(
                line for line in service.splitlines() if line.startswith(("continual config", "systemctl daemon"))
            )
        )
        typed("systemctl restart continual")
        until("a model of the Hub is folded", lambda: status()["folds"] == 2)
        row("the unit is active", shown("ActiveState"), "active")


def prometheus() -> None:
    """The page's files for Prometheus."""
    flags = ["--config.file=ops/prometheus/prometheus.yml", "--storage.tsdb.path=/tmp/series"]
    with subprocess.Popen(["prometheus", *flags], cwd=CHECKOUT, stderr=subprocess.DEVNULL) as server:
        try:

            def value(query: str) -> str:
                found = json.loads(get(f"http://127.0.0.1:9090/api/v1/query?query={query}"))["data"]["result"]
                return str(found[0]["value"][1]) if found else ""

            until("Prometheus has the folds of the ledger", lambda: value("continual_state_folds") == "2")
            until("and that it is up", lambda: value("up") == "1")
        finally:
            server.terminate()


if __name__ == "__main__":
    reported(the_page, the_hub, prometheus)
