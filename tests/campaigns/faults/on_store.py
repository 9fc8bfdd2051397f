"""A state on an object store whose answers do not come, and that several want to write.

    python -m tests.campaigns.faults.on_store --store moto --commits 200 --races 5

`cut`: so many folds and refusals through a proxy that cuts, halves, delays, repeats and drops: of every second record
the answer, of every twentieth other request. None may be lost, none be there twice. `races`: two processes fold the
same models into one state, one of which is stopped for longer than its lease in the middle of a fold: the other goes
on, and the first halts in words once it runs again. `damage`: every object of a small state is altered, cut and deleted
in turn, and found each time.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path

from continual.errors import ContinualError, Retry
from continual.records import Candidate
from continual.state import State, excerpts, storing
from continual.state.entries import RefuseEntry
from continual.state.strays import strays
from continual.state.verify import verify
from continual.stores import Where, where
from tests.helpers import object_stores, stores
from tests.helpers.cutting import Fault, cutting

FAULTS: tuple[Fault, ...] = ("cut", "half", "late", "twice", "again", "lost")
LEASE = 2.0


def cut(address: str, commits: int, seed: int) -> dict[str, object]:
    """Commits through the proxy. Raises AssertionError where one is lost, or there twice."""
    at = _at(address, "cut", 60.0)
    stores.make(at).close()
    draw, asked = random.Random(seed), Counter[str]()
    made: list[str] = []
    with cutting(address) as proxy:

        def decide(method: str, path: str) -> Fault:
            kind = "record" if method == "PUT" and "/commits/" in path else "other"
            asked[kind] += 1
            fault = draw.choice(FAULTS) if asked[kind] % (2 if kind == "record" else 20) == 0 else ""
            asked[f"{kind}: {fault or 'passed'}"] += 1
            return fault

        proxy.decide, proxy.late = decide, 0.02
        with State.open(_at(proxy.address, "cut", 60.0), write=True) as state:
            began = time.perf_counter()
            for number in range(1, commits + 1):
                while True:
                    try:
                        made.append(state.ledger.get(_commit(state, number)).crc)
                        break
                    except Retry:  # nothing was settled: as a daemon does
                        asked["tried again"] += 1
            seconds = time.perf_counter() - began
    at = _at(address, "cut", 60.0)
    with State.open(at) as state:
        found = [commit.crc for commit in state.ledger.log[1:]]
        keys = [commit.key for commit in state.ledger.log[1:]]
        assert found == made, "records are lost, or others are there"
        assert len(set(keys)) == commits, "a candidate is there twice"
        assert verify(state) == []
    told = {"commits": commits, "lost": 0, "doubled": 0, "seconds": round(seconds, 1)}
    return told | {"answers": dict(sorted(asked.items()))}


def _commit(state: State, number: int) -> int:
    if number % 4 == 0:
        seq = stores.fold(state, number)
        state.expire(2)
        return seq
    said = Candidate(f"k{number}", f"n{number}", "test", f"/o{number}", "full", 1)
    return state.record(RefuseEntry(candidate=said, reason="shape", message="does not fit")).seq


def writer(place: str, first: int, pipe: Connection) -> None:
    """A process that folds until it cannot; says each record, and at the end why."""
    try:
        with State.open(where(place, LEASE), write=True) as state:
            pipe.send(("open", state.ledger.head.seq))
            for number in range(first, first + 1000):
                pipe.send(("fold", stores.fold(state, number)))
                time.sleep(0.01)
    except ContinualError as error:
        pipe.send((type(error).__name__, str(error)))


def race(address: str, number: int, draw: random.Random) -> str:
    """Two writers; the one that holds the state is stopped. Returns what it says when it goes on."""
    at = _at(address, f"race-{number}")
    stores.make(at).close()
    context = multiprocessing.get_context("spawn")
    pipes, processes = [], []
    for first in (1, 5001):
        ours, theirs = context.Pipe()
        process = context.Process(target=writer, args=(str(at), first, theirs))
        process.start()
        pipes.append(ours)
        processes.append(process)
        while not first > 1 and ours.recv()[0] != "open":
            pass
    while pipes[0].recv()[1] < 3 + draw.randrange(5):
        pass
    kind, said = pipes[1].recv()
    assert (kind, "is being written by process" in said) == ("Busy", True), said
    processes[1].join()
    time.sleep(draw.random() * 0.05)
    os.kill(processes[0].pid or 0, signal.SIGSTOP)
    ours, theirs = context.Pipe()
    second = context.Process(target=writer, args=(str(at), 5001, theirs))
    second.start()
    kind, head = ours.recv()  # it waits for the lease
    assert kind == "open", head
    assert ours.recv()[0] == "fold"
    os.kill(processes[0].pid or 0, signal.SIGCONT)
    last = ("", "")
    while last[0] in ("", "open", "fold"):
        last = pipes[0].recv()
    processes[0].join()
    kind, seq = ours.recv()
    second.kill()
    second.join()
    assert kind == "fold", seq
    assert last[0] == "Halt", last
    with State.open(at) as state:
        assert verify(state) == []
        assert [c.seq for c in state.ledger.log] == list(range(len(state.ledger.log)))
    return last[1].partition(": ")[2][:60]


def damage(address: str) -> dict[str, int]:
    """Alters every object in turn. Raises AssertionError for what is not found."""
    excerpts.SPAN = 3
    at = _at(address, "damage")
    stores.history(at)
    missed, tried = [], 0
    for name in sorted(storing.sizes(at)):
        file = at / name
        if name.startswith("lock/"):
            continue
        data = file.read_bytes()
        middle = len(data) // 2
        harms: dict[str, bytes | None] = {"cut": data[:-1]}
        harms["flipped"] = data[:middle] + bytes([data[middle] ^ 0x10]) + data[middle + 1 :] if data else b"x"
        if not name.startswith("excerpts/"):  # one that is not there is made anew
            harms["deleted"] = None
        for kind, hurt in harms.items():
            tried += 1
            if hurt is None:
                storing.remove(file)
            else:
                storing.replace(file, hurt)
            try:
                with State.open(at) as state:
                    told = verify(state)
            except ContinualError as error:
                told = [str(error)]
            if not told:
                missed.append((name, kind))
            storing.replace(file, data)
    assert missed == [], missed
    with State.open(at) as state:
        assert verify(state) == []
        assert strays(at, state.format, state.ledger) == []
    return {"tried": tried, "missed": 0}


def _at(address: str, name: str, lease: float = LEASE) -> Where:
    os.environ.update(object_stores.environment(address))
    return where(f"s3://{object_stores.BUCKET}/{name}", lease)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--store", choices=("moto", "seaweedfs"), default="moto")
    parser.add_argument("--commits", type=int, default=200)
    parser.add_argument("--races", type=int, default=5)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    with (
        tempfile.TemporaryDirectory() as temporary,
        object_stores.serving(args.store, Path(temporary)) as address,
    ):
        result: dict[str, object] = {"store": args.store, "cut": cut(address, args.commits, args.seed)}
        draw = random.Random(args.seed)
        result["races"] = Counter(race(address, number, draw) for number in range(args.races))
        result["damage"] = damage(address)
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
