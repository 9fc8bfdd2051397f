"""States that the quality benchmark folds into, a process of its own for each, and the copies of them that stay.

The states of a campaign lie in one folder. `NAME` is folded into; `NAME-at-COUNT` is its copy with so many models,
where copies are wanted. A run that was stopped goes on with the state that has most of the models that are wanted, and
none besides.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import IO

import continual
from continual.errors import Damaged, Misconfigured
from continual.making import Recipe


class Folding:
    """A state in which models are folded one after the other, by a worker, and which can be read in between; a context
    manager. `begin` comes first. With `keep` the state stays at the end.

    Raises SystemExit for a model that is not folded.
    """

    def __init__(self, state: Path, base: Path, recipe: Recipe, keep: bool = False) -> None:
        self.state, self.base, self.recipe, self.keep = state, base, recipe, keep
        self.costs: list[dict[str, float]] = []
        """What the folds in the state took, oldest first; empty where one of them is not known."""
        self._merge: continual.Merge | None = None
        self._process: subprocess.Popen[str] | None = None

    def __enter__(self) -> Folding:
        return self

    def begin(self, tasks: Sequence[str], most: int) -> int:
        """Takes up the state, or its copy, with most of the first `most` models of `tasks`, or makes a new one; how
        many models it has."""
        self._close()
        copies = sorted(self.state.parent.glob(f"{self.state.name}-at-*"))
        found = {path: count for path in (self.state, *copies) if 0 < (count := _count(path, tasks)) <= most}
        best = max(found, key=found.__getitem__, default=None)
        if best != self.state:
            shutil.rmtree(self.state, ignore_errors=True)
            self.state.parent.mkdir(parents=True, exist_ok=True)
            if best is None:
                self._costs_file().unlink(missing_ok=True)
                continual.init(self.base, self.state, self.recipe)
            else:
                _copy(best, self.state)
        self.costs = json.loads(self._costs_file().read_text()) if self._costs_file().is_file() else []
        count = 0 if best is None else found[best]
        self.costs = self.costs[:count] if len(self.costs) >= count else []
        return count

    def fold(self, path: Path) -> None:
        """Folds a model. What `merge` gave out before is closed."""
        self._close()
        if self._process is None:
            command = [sys.executable, "-m", "tests.campaigns.bench.quality.worker", str(self.state)]
            self._process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        into, out = _pipes(self._process)
        into.write(f"{path}\n")
        into.flush()
        line = out.readline()
        if not line:
            raise SystemExit(f"{path}: was not folded with {self.recipe.rule}")
        self.costs.append(json.loads(line))
        self._costs_file().write_text(json.dumps(self.costs))

    def merge(self) -> continual.Merge:
        """The state as it is now, open until the next fold: what it has read stays in memory as long."""
        if self._merge is None:
            self._merge = continual.open(self.state, workers=1)
        return self._merge

    def copy(self, count: int) -> None:
        """With `keep`, keeps what is there now under its number of models."""
        target = self.state.with_name(f"{self.state.name}-at-{count}")
        if self.keep and not target.exists():
            _copy(self.state, target)

    def __exit__(self, *_: object) -> None:
        self._close()
        if self._process is not None:
            into, out = _pipes(self._process)
            into.close()
            self._process.wait()
            out.close()
        if not self.keep:
            shutil.rmtree(self.state, ignore_errors=True)
            self._costs_file().unlink(missing_ok=True)

    def _close(self) -> None:
        if self._merge is not None:
            self._merge.close()
            self._merge = None

    def _costs_file(self) -> Path:
        return self.state.with_name(f"{self.state.name}.json")


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _count(state: Path, tasks: Sequence[str]) -> int:
    """How many models the state has, where these are the first ones of `tasks` in their order; else, and where there is
    no whole state, 0."""
    if not state.is_dir():
        return 0
    try:
        with continual.open(state) as merge:
            names = [fold.entry.candidate.name for fold in merge.state.ledger.folds()]
    except (Misconfigured, Damaged):  # a kill while it was made
        return 0
    return len(names) if names == list(tasks[: len(names)]) else 0


def _copy(state: Path, target: Path) -> None:
    """Copies a state that nobody folds into at the moment."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    shutil.copytree(state, temporary)
    temporary.rename(target)
