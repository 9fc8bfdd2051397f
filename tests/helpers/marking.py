"""A job whose pieces leave marks in a directory: what is asked of every executor, whichever process does them."""

from __future__ import annotations

import contextlib
import errno
import os
import signal
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch

from continual.errors import NotHere, Refuse
from continual.executors.away import _here
from continual.executors.contract import Task
from continual.executors.orders import WorkJob, WorkPiece

UNTIL = 60.0


class Mark(NamedTuple):
    """What a piece gives back: its name, and the threads of torch where it ran."""

    name: str
    threads: int


@dataclass(frozen=True)
class MarkJob(WorkJob[Mark]):
    """Pieces named by what they do: `plain-N`, `broken-N` (fails), `together-N` (waits until as many have begun as the
    directory says in `wanted`), `after-X` (waits for the file X). Those of `BAD` do it on the machines that the
    directory names in `bad`, by default the first that one is begun on, and nothing elsewhere; `tried-NAME-MACHINE`
    says where one was begun."""

    directory: Path

    def open(self) -> Marking:
        (self.directory / f"opened-{time.time_ns()}").touch()
        return Marking(self.directory)


BAD = ("full", "apart", "dies", "stops")
"""What pieces meet on a bad machine: a full disk, a folder that is not there, a death, a process that stands still."""


class Marking:
    def __init__(self, directory: Path) -> None:
        self._directory = directory

    def work(self, names: Sequence[str]) -> list[Mark]:
        return [self._one(name) for name in names]

    def close(self) -> None:
        pass

    def _one(self, name: str) -> Mark:
        (self._directory / f"begun-{name}").touch()
        kind, _, rest = name.partition("-")
        if kind == "broken":
            raise Refuse("zero", f"{name} cannot be done", by=("x",))
        if kind == "together":
            wanted = int((self._directory / "wanted").read_text())
            self._wait(lambda: len(list(self._directory.glob("begun-together-*"))) >= wanted)
        if kind in BAD:
            self._on_bad_machine(kind, name)
        if kind == "after":
            self._wait((self._directory / rest).exists)
        (self._directory / f"ended-{name}").touch()
        return Mark(name, torch.get_num_threads())

    def _on_bad_machine(self, kind: str, name: str) -> None:
        machine = _here()[0]
        (self._directory / f"tried-{name}-{machine}").touch()
        mine = self._directory / f"mine-{os.getpid()}"
        mine.write_text(machine)
        with contextlib.suppress(FileExistsError):
            os.link(mine, self._directory / "bad")
        if machine not in (self._directory / "bad").read_text().split():
            return
        if kind == "full":
            raise OSError(errno.ENOSPC, "No space left on device", f"/scratch/{name}")
        if kind == "apart":
            raise NotHere(f"{self._directory} is not there")
        os.kill(os.getpid(), signal.SIGKILL if kind == "dies" else signal.SIGSTOP)

    @staticmethod
    def _wait(until: object) -> None:
        assert callable(until)
        began = time.monotonic()
        while not until():
            assert time.monotonic() < began + UNTIL
            time.sleep(0.005)


def tasks(job: MarkJob, names: Sequence[str]) -> list[Task[Mark]]:
    """A task for each, so large that each is an order of its own."""
    return [Task(name, 1, WorkPiece(job, name), reads=1 << 40) for name in names]
