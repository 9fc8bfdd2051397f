"""Exports on a Ray cluster, ended in the middle.

    python -m tests.campaigns.faults.ray_exports --kills 20 --drivers 5 --stops 5

Two nodes on loopback. In each export one worker process that is doing an order gets SIGKILL at a random moment: the
export has to be byte for byte that of a process alone, with every other order done once. Then the driver gets SIGKILL
in the middle of an export, while workers may still write: no export is there, and the next one to the same place is
whole and removes what the killed one left. Then it gets SIGINT: it ends soon, and nothing is left. Then a daemon that
puts out its link gets SIGTERM: it ends well, and the next one puts out the same.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

from continual import api, making
from continual.config import Settings
from continual.executors.cluster_figures import FIGURES
from continual.publish.folder import Target
from tests.campaigns.faults.ray_kills import MARK, on_ray, two_nodes, working
from tests.helpers import models

SHARD = 8 << 20


def weights(directory: Path) -> dict[str, str]:
    """The weight files of an export, by their hashes."""
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in directory.glob("*.safetensors")}


def kill_a_writer(work: Path, mark: str, seed: int, killed: list[int], over: threading.Event) -> None:
    """Kills one worker that writes the export, whose files are there, after so many that were seen at work."""
    chance = random.Random(seed)
    left = chance.randrange(12)
    seen: set[tuple[int, bytes]] = set()
    while not over.is_set() and not killed:
        for worker in working(mark) if any(work.glob(".export.*.tmp/*.safetensors")) else ():
            with contextlib.suppress(OSError):
                title = Path(f"/proc/{worker}/cmdline").read_bytes()
                if (worker, title) in seen:
                    continue
                seen.add((worker, title))
                left -= 1
                if left < 0:
                    time.sleep(chance.random() * 0.05)
                    os.kill(worker, signal.SIGKILL)
                    killed.append(worker)
                    break
        time.sleep(0.002)


def worker_kills(work: Path, address: str, mark: str, kills: int) -> None:
    state, target = work / "state", work / "export"
    with api.Merge(Settings(state=state, workers=1)) as merge:
        expected = weights(merge.export(Target(work / "alone", shard_size=SHARD)))
    kind, good, orders = on_ray(address), 0, None
    for number in range(kills + 1):
        before = FIGURES.seen()
        killed: list[int] = []
        over = threading.Event()
        killer = threading.Thread(target=kill_a_writer, args=(work, mark, number, killed, over))
        began = time.perf_counter()
        if number:
            killer.start()
        with kind(Settings(state=state)) as merge:
            found = weights(merge.export(Target(target, shard_size=SHARD)))
        seconds = time.perf_counter() - began
        over.set()
        if number:
            killer.join()
        done, gone = FIGURES.seen().all.orders - before.all.orders, FIGURES.seen().lost - before.lost
        orders = done if orders is None else orders
        clean = [path.name for path in work.iterdir() if path.name.startswith(".")] == []
        fine = found == expected and clean and done == orders and gone <= len(killed) == bool(number)
        good += bool(number) and fine
        print(
            f"export {number}: {len(killed)} killed, {gone} orders lost, {done} done of {orders}, "
            f"{'the same bytes' if found == expected else 'OTHER BYTES'}, {seconds:.1f} s{'' if fine else ': WRONG'}",
            flush=True,
        )
        shutil.rmtree(target)
    print(f"{good} of {kills} kills cost the orders of the worker alone")
    assert good == kills


DRIVER = """
import sys
from functools import partial
from continual.api import opened_state
from continual.cli.main import main
from continual.executors.ray import RayAsked
from tests.campaigns.faults.ray_kills import ORDER
opened_state.RayAsked = partial(RayAsked, order=ORDER)
sys.argv[1:] = ["export", sys.argv[3], "--state", sys.argv[2], "--executor", "ray", "--ray", "address=" + sys.argv[1]]
main()
"""


def driver_ends(work: Path, address: str, times: int, number: signal.Signals) -> None:
    state, target = work / "state", work / "ended"
    expected = weights(work / "alone-whole")
    chance = random.Random(int(number))
    for turn in range(times):
        driver = subprocess.Popen(
            [sys.executable, "-c", DRIVER, address, str(state), str(target)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={name: value for name, value in os.environ.items() if name != MARK},
        )
        while not (files := list(work.glob(".ended.*.tmp/*.safetensors"))) and driver.poll() is None:
            time.sleep(0.005)
        while files and driver.poll() is None and files[0].exists() and not files[0].stat().st_blocks:
            time.sleep(0.002)
        time.sleep(chance.random() * 0.5)
        driver.send_signal(number)
        began = time.perf_counter()
        _, said = driver.communicate()
        seconds = time.perf_counter() - began
        whole = target.exists()
        left = [path.name for path in work.iterdir() if path.name.startswith(".")]
        told = said.strip().splitlines()[-1:] if number != signal.SIGKILL else []
        print(
            f"{number.name} {turn}: exit {driver.returncode} after {seconds:.1f} s, "
            f"{'it had ended' if whole else 'no export'}, {len(left)} temporary directories left {told}",
            flush=True,
        )
        assert whole or driver.returncode in (-number, 128 + number)
        assert number == signal.SIGKILL or left == []
        assert not whole or weights(target) == expected
        shutil.rmtree(target, ignore_errors=True)
        with api.Merge(Settings(state=state)) as merge:
            assert weights(merge.export(target)) == expected
        time.sleep(1.0)  # what strays of the killed one still write
        assert weights(target) == expected
        assert [path.name for path in work.iterdir() if path.name.startswith(".")] == []
        shutil.rmtree(target)


DAEMON = """
import sys
from functools import partial
from continual.api import opened_state
from continual.cli.main import main
from continual.executors.ray import RayAsked
from tests.campaigns.faults.ray_kills import ORDER
opened_state.RayAsked = partial(RayAsked, order=ORDER)
sys.argv[1:] = ["run", "--executor", "ray", "--ray", "address=" + sys.argv[1], "--port", "0", *sys.argv[2:]]
main()
"""


def daemon_stops(work: Path, address: str, times: int) -> None:
    """SIGTERM for a daemon in the middle of the export of its link; with time to end it, and without. Then the next
    daemon makes it, and the link names what a process alone makes."""
    state, out = work / "state", work / "published"
    expected = weights(work / "alone-whole")
    chance = random.Random(1)
    (work / "in").mkdir()
    flags = ("--state", str(state), "--current", str(out / "current"), "--watch", str(work / "in"))

    def started(drain: float) -> subprocess.Popen[str]:
        command = [sys.executable, "-c", DAEMON, address, *flags, "--drain", str(drain)]
        environment = {name: value for name, value in os.environ.items() if name != MARK}
        return subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, env=environment)

    for turn in range(2 * times):
        drain = 30.0 if turn % 2 else 0.0
        out.mkdir()
        daemon = started(drain)
        while not list(out.glob(".*.tmp/*.safetensors")) and not (out / "current").exists():
            assert daemon.poll() is None, daemon.communicate()
            time.sleep(0.005)
        time.sleep(chance.random() * 0.5)
        began = time.perf_counter()
        daemon.send_signal(signal.SIGTERM)
        _, said = daemon.communicate(timeout=90)
        seconds = time.perf_counter() - began
        left = sorted(path.name for path in out.iterdir())
        whole = (out / "current").exists()
        print(
            f"SIGTERM {turn}, drain {drain:g}: exit {daemon.returncode} after {seconds:.1f} s, "
            f"{'the link is there' if whole else 'no link'}, in its folder {left}",
            flush=True,
        )
        assert daemon.returncode == 0, said
        assert not [name for name in left if name.endswith(".tmp")], said
        assert not whole or weights(out / "current") == expected
        following = started(30.0)
        while not (out / "current").exists():
            assert following.poll() is None, following.communicate()
            time.sleep(0.05)
        following.send_signal(signal.SIGTERM)
        following.communicate(timeout=90)
        assert weights(out / "current") == expected
        assert len(list(out.iterdir())) == 2, "the link, and what it names"
        shutil.rmtree(out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--drivers", type=int, default=5)
    parser.add_argument("--stops", type=int, default=5)
    parser.add_argument("--daemons", type=int, default=3)
    parser.add_argument("--rule", default="tsv-m")
    args = parser.parse_args()
    with two_nodes() as (work, base, nodes, mark):
        making.init(base, work / "state", making.Recipe(args.rule))
        with api.Merge(Settings(state=work / "state"), write=True) as merge:
            assert merge.fold(models.fine_tune(base, work / "tune", 1)).fate == "folded"
            merge.export(work / "alone-whole")
        worker_kills(work, nodes.address, mark, args.kills)
        driver_ends(work, nodes.address, args.drivers, signal.SIGKILL)
        driver_ends(work, nodes.address, args.stops, signal.SIGINT)
        daemon_stops(work, nodes.address, args.daemons)


if __name__ == "__main__":
    main()
