"""Whether who watches continual sees what there is to see: real daemons, a real Prometheus, every panel, every alert.

    python -m tests.campaigns.monitoring --folds 20

One daemon folds that many models, beside daemons of adapters, of rounds, of the Hub and on a small disk. The cause of
each alert is made, with the rules of ops/prometheus/alerts.yml and shorter times. At the end every query of the
dashboard and of the alerts is asked: it has data, or is said with the feature that it needs. Takes root, to mount the
small disk, and a minute or two.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shutil
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path

from continual import making
from continual.service.series import FEATURES
from tests.campaigns.dashboard import panels, silent
from tests.helpers import adapters, hubs, models, prometheus, quadratic
from tests.helpers.command import run
from tests.helpers.hooks import Served, serving_hooks
from tests.helpers.mounting import mounted
from tests.helpers.services import daemon, status, until, url
from tests.loopback import Hub, environment, faults, serving

OPS = Path(__file__).parents[2] / "ops"
NOT_HERE = {
    "ContinualDeviceShort": "no accelerator",
    "ContinualLosesOrders": "no cluster",
    "ContinualAvoidsMachines": "no cluster",
}
"""Alerts whose cause is not made here, and what is lacking: promtool tests their rules."""
LONGEST = 60.0
"""Seconds after its cause at which an alert that has not fired is missing."""


def shortened(rules: str) -> str:
    """The rules of alerts with seconds for minutes and hours."""
    rules = re.sub(r"for: \w+", "for: 1s", rules)
    return re.sub(r"\[(1h|6h|30m)\]", "[20s]", rules).replace("3 * 3600", "5")


def alert_names() -> list[str]:
    """Every alert of the file."""
    return re.findall(r"- alert: (\w+)", (OPS / "prometheus/alerts.yml").read_text())


class Scene:
    """Daemons that run, by name, and where they listen."""

    def __init__(self, place: Path, stack: ExitStack) -> None:
        self.place = place
        self.stack = stack
        self.addresses: dict[str, str] = {}

    def starts(self, name: str, *flags: str, settings: str = "", env: dict[str, str] | None = None) -> Path:
        """Starts the daemon of the state that lies in the folder of this name; the folder it watches."""
        room = self.place / name
        (room / "in").mkdir(exist_ok=True)
        file = room / "continual.toml"
        file.write_text(settings)
        state = room / "state"
        running = self.stack.enter_context(
            daemon(state, room / "in", "--config", str(file), "--rescan", "1", *flags, environment=env)
        )
        self.addresses[name] = url(running, state)
        self._tell()
        return room / "in"

    def _tell(self) -> None:
        """Tells Prometheus where the daemons are."""
        rows = [{"targets": [address.removeprefix("http://")]} for address in self.addresses.values()]
        (self.place / "new.json").write_text(json.dumps(rows))
        (self.place / "new.json").rename(self.place / "targets.json")

    def room(self, name: str) -> Path:
        """The folder of a daemon that does not run yet."""
        (self.place / name).mkdir()
        return self.place / name


def folds(scene: Scene, count: int, sink: Served) -> None:
    """A daemon that folds, publishes, tells a server and people, and one that nobody hears; then copies are refused."""
    room = scene.room("folds")
    base = models.base(room / "base")
    making.init(base, room / "state", making.Recipe(rule="opcm"))
    chat = sink.url.replace("http://", "json://")
    watched = scene.starts(
        "folds",
        settings=f'current = "{room}/current"\n[notify]\nurls = ["{chat}"]\ngather = 0.5\n'
        f'[[hooks]]\nkind = "http"\nurl = "{sink.url}/merged"\n'
        '[[hooks]]\nkind = "http"\nurl = "http://127.0.0.1:9/nobody"\ntries = 1\n',
    )
    for seed in range(count):
        models.fine_tune(base, watched / f"model-{seed}", seed)
    until(lambda: status(scene.addresses["folds"])["folds"] == count, f"{count} folds", 30.0 + 10.0 * count)
    time.sleep(22.0)  # the folds are to lie before the window of the rule about refusals
    for copy in range(12):
        models.fine_tune(base, watched / f"copy-{copy}", 0)


def cut(scene: Scene) -> None:
    """A daemon of adapters whose layers are full, and which is then paused."""
    room = scene.room("adapters")
    base = models.base(room / "base")
    making.init(base, room / "state", making.Recipe(rule="task-arithmetic", width=4))
    watched = scene.starts("adapters", "--gate", "cut.most=1.0", "--max-base-ratio", "100", "--max-mean-ratio", "1000")
    for seed in range(4):
        adapters.lora(watched / f"adapter-{seed}", base, seed)
    until(lambda: status(scene.addresses["adapters"])["folds"] >= 2, "adapters are folded")
    done = run("pause", "--state", str(room / "state"))
    assert done.returncode == 0, done.stderr


def rounds(scene: Scene) -> None:
    """A daemon with rounds: one is run, then somebody comes and none follows."""
    room = scene.room("rounds")
    base = quadratic.world(room)
    making.init(base, room / "state", making.Recipe(rule="mean"))
    shutil.rmtree(room / "in", ignore_errors=True)
    (room / "in").symlink_to(room / "pool")
    (room / "pool").mkdir(exist_ok=True)
    quadratic.good(base, 0)
    quadratic.good(base, 1)
    asked = ("--objective", "tests.helpers.quadratic:make", "--max-base-ratio", "10")
    scene.starts("rounds", *asked, "--select", "relevance", "--round", "size=2", "--round", "wait=9999")
    until(lambda: status(scene.addresses["rounds"])["last_round"], "a round has ended")
    time.sleep(22.0)
    quadratic.good(base, 2)


def hub(scene: Scene, server: Hub) -> None:
    """A daemon of the Hub, whose release is taken back; then the Hub is away."""
    room = scene.room("hub")
    base = hubs.made(room, server)
    hubs.publish(server, "org/tuned", models.fine_tune(base, room / "tuned", 1))
    alarm = f'prometheus = "{(scene.place / "where").read_text()}"\nquery = "vector(1)"\nmax = 0\ninterval = 1.0\n'
    scene.starts(
        "hub",
        settings="[hub]\nwatch = true\npoll = 2.0\nsettle = 0.0\n"
        f'bases = ["{hubs.BASE}"]\n[release]\nrepo = "org/merged"\n[release.canary]\n{alarm}',
        env=environment(server, room),
    )
    until(lambda: "taken back" in (room / "daemon.log").read_text(), "a release was taken back")
    server.faults = faults.Times(faults.Status(503), 10**9)


@contextmanager
def small(scene: Scene) -> Iterator[None]:
    """A daemon whose disk fills up while models come."""
    room = scene.room("small")
    base = models.base(room / "base", shapes={f"layer.{n}.weight": (512, 512) for n in range(8)})
    made = room / "made"
    for seed in range(9):
        models.fine_tune(base, made / f"model-{seed}", seed)
    (room / "disk").mkdir()
    with mounted(room / "disk", "-t", "tmpfs", "-o", "size=60m", "tmpfs"):
        making.init(base, room / "disk/state", making.Recipe(rule="task-arithmetic"))
        (room / "state").symlink_to(room / "disk/state")
        (room / "disk/ballast").write_bytes(bytes(45 << 20))
        kept = scene.stack
        with ExitStack() as own:
            scene.stack = own
            watched = scene.starts("small")
            scene.stack = kept
            for model in made.iterdir():
                model.rename(watched / model.name)
            yield


@contextmanager
def asked(place: Path) -> Iterator[str]:
    """A Prometheus that finds the daemons as they come."""
    targets = place / "targets.json"
    targets.write_text("[]")
    (place / "alerts.yml").write_text(shortened((OPS / "prometheus/alerts.yml").read_text()))
    (place / "prometheus.yml").write_text(
        "global: {scrape_interval: 1s, evaluation_interval: 1s}\nrule_files: [alerts.yml]\nscrape_configs:\n"
        "  - job_name: continual\n    file_sd_configs: [{files: [targets.json], refresh_interval: 1s}]\n"
    )
    with prometheus.started(place) as where:
        until(lambda: prometheus.ask(where, "vector(1)"), "Prometheus has started")
        (place / "where").write_text(where)
        yield where


def wait_for(where: str, wanted: set[str], begun: float) -> dict[str, float]:
    """When each alert fired first, by what Prometheus remembers, in seconds from `begun` (since 1970); waits a while
    until those that are wanted have."""
    fired: dict[str, float] = {}
    end = time.monotonic() + LONGEST
    while True:
        rows = prometheus.ask(where, 'min_over_time(timestamp(ALERTS{alertstate="firing"})[15m:1s])') or []
        for row in sorted(rows, key=lambda row: -float(row["value"][1])):
            fired[row["metric"]["alertname"]] = float(row["value"][1]) - begun
        if wanted <= fired.keys() or time.monotonic() > end:
            return fired
        time.sleep(0.5)


def main() -> int:
    given = argparse.ArgumentParser(description=__doc__)
    given.add_argument("--folds", type=int, default=20)
    count = given.parse_args().folds
    os.chdir(Path(__file__).parents[2])  # where the objective can be imported
    begun = time.time()
    with ExitStack() as stack:
        place = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        scene = Scene(place, stack)
        where = stack.enter_context(asked(place))
        sink, server = stack.enter_context(serving_hooks()), stack.enter_context(serving())
        with small(scene):
            hub(scene, server)
            cut(scene)
            rounds(scene)
            folds(scene, count, sink)
            wanted = set(alert_names()) - NOT_HERE.keys()
            wait_for(where, wanted - {"ContinualDown"}, begun)
            found = [one for panel in panels() for one in silent(where, panel)]
        fired = wait_for(where, wanted, begun)  # the daemon on the small disk has ended
    queries = sum(len(panel.queries) for panel in panels())
    print(f"{count} folds; {len(list(panels()))} panels, {queries} queries, {queries - len(found)} with data")
    for panel, query in found:
        why = "; ".join(FEATURES[word] for word in query.needs) or ("all is well" if panel.quiet else "NOTHING SAID")
        print(f"  no data: {panel.title}: {why}")
    for name in alert_names():
        at = f"not here: {NOT_HERE[name]}" if name in NOT_HERE else "MISSING"
        print(f"  {name}: {f'fired after {fired[name]:.0f} s' if name in fired else at}")
    wrong = [panel for panel, query in found if not query.needs and not panel.quiet]
    return 1 if wrong or wanted - fired.keys() else 0


if __name__ == "__main__":
    sys.exit(main())
