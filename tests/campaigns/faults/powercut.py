"""The power-cut campaign: an ext4 image on a loop device, cut while real folds run on it. Needs root and a loop device.

    python -m tests.campaigns.faults.powercut --trials 20

A child folds models into a state on the mounted image and acknowledges each through a pipe. At a random instant it is
frozen, the image is copied as it is (what the file system had not yet written is lost, as in a power cut), the copy is
mounted (the journal is replayed) and the state in it opened: it must be at the last acknowledged fold or further by the
one in flight, and `verify` must be clean. The negative control is the same with fsync switched off in the child: if no
trial of it fails, the method proves nothing.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

from continual.errors import ContinualError
from continual.state import State
from continual.state.verify import verify

MEGABYTES = 512


def fold_loop(state: str, models: list[str], pipe: Connection, durable: bool) -> None:
    """The child: folds every model, says after each which record was acknowledged."""
    if not durable:
        os.fsync = os.fdatasync = lambda _fd: None
    from continual.api import Merge
    from continual.config import Settings

    with Merge(Settings(state=Path(state), workers=2), write=True) as merge:
        for model in models:
            pipe.send(merge.fold(model).commit.seq)


@contextlib.contextmanager
def mounted(image: Path, place: Path) -> Iterator[None]:
    """The image mounted at `place`."""
    place.mkdir(exist_ok=True)
    subprocess.run(["mount", "-o", "loop,commit=300", str(image), str(place)], check=True)
    try:
        yield
    finally:
        subprocess.run(["umount", str(place)], check=True)


def trial(work: Path, base: Path, fine_tunes: list[str], number: int, durable: bool) -> str:
    """One cut; returns what was found: `intact`, or what was wrong."""
    from continual import making

    draw = random.Random(number)
    image, place = work / f"disk-{number}-{durable}.img", work / "mnt"
    subprocess.run(["truncate", "-s", f"{MEGABYTES}M", str(image)], check=True)
    subprocess.run(["mkfs.ext4", "-q", "-F", str(image)], check=True)
    cut = image.with_suffix(".cut")
    with mounted(image, place):
        making.init(base, place / "state")
        os.sync()
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(["torch", "continual.api.merge"])  # what is lazy would be loaded in each
        ours, theirs = context.Pipe()
        child = context.Process(target=fold_loop, args=(str(place / "state"), fine_tunes, theirs, durable))
        child.start()
        theirs.close()
        ours.poll(60)
        time.sleep(draw.random() * 2.0)
        os.kill(child.pid or 0, signal.SIGSTOP)
        acknowledged = 0
        with contextlib.suppress(EOFError):
            while ours.poll(0):
                acknowledged = ours.recv()
        subprocess.run(["cp", "--sparse=always", str(image), str(cut)], check=True)
        os.kill(child.pid or 0, signal.SIGKILL)
        child.join()
    try:
        with mounted(cut, place):
            return _look(place / "state", acknowledged)
    except subprocess.CalledProcessError:
        return "the image does not mount"
    finally:
        image.unlink()
        cut.unlink()


def _look(state: Path, acknowledged: int) -> str:
    try:
        with State.open(state, write=True) as opened:
            if opened.ledger.head.seq not in (acknowledged, acknowledged + 1):
                return f"lost: at record {opened.ledger.head.seq}, acknowledged {acknowledged}"
            findings = verify(opened)
            return f"damaged: {findings[0]}" if findings else "intact"
    except ContinualError as error:
        return f"does not open: {error}"


def campaign(work: Path, trials: int) -> dict[str, dict[str, int]]:
    """`trials` cuts each with and without fsync; what was found and how often."""
    from tests.helpers import models

    base = models.base(work / "base")
    fine_tunes = [str(models.fine_tune(base, work / f"ft-{i:03d}", i)) for i in range(200)]
    found: dict[str, dict[str, int]] = {}
    for durable in (True, False):
        counted: Counter[str] = Counter()
        for number in range(trials):
            counted[trial(work, base, fine_tunes, number, durable).split(":")[0]] += 1
        found["fsync" if durable else "no fsync (negative control)"] = dict(counted)
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trials", type=int, default=20)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        found = campaign(Path(temporary), args.trials)
    json.dump(found, sys.stdout, indent=2)
    print()
    control = found["no fsync (negative control)"]
    if set(found["fsync"]) != {"intact"} or set(control) == {"intact"}:
        raise SystemExit(1)


if __name__ == "__main__":
    main()
