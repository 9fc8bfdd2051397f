"""Every command, at every call by which it changes a file, for the default rule, `opcm` and a state of adapters.

    python -m tests.campaigns.faults.steps              # the process is killed at the call
    python -m tests.campaigns.faults.steps --errors     # the call fails, in nine ways

The ways are EIO (before the call is done, and after), ENOSPC and EROFS (of one call, and of all from there on), EACCES,
EMFILE and ENAMETOOLONG. A process is forked for each run, in a copy of what the command begins with, and ended or made
to fail at call n, for every n. Of an error every call counts that can have it, those that only look too. Afterwards the
state opens and is whole, it is one of those that an undisturbed run goes through, and the command, given once more,
ends as that run did. A command that fails raises an error of ours; once the disk works again, the same open state does
the work, unless it was told to halt. With `--span 2` an excerpt of the ledger is of two records, so that each command
writes some, and goes by others.
"""

from __future__ import annotations

import argparse
import contextlib
import errno
import json
import logging
import os
import shutil
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch

from continual.errors import ContinualError, Halt, Misconfigured, Retry
from continual.state import State, excerpts
from tests.campaigns.faults.steps import commands, looking
from tests.campaigns.faults.steps.commands import Step, World
from tests.campaigns.faults.steps.looking import Facts
from tests.helpers import calls
from tests.helpers.calls import Counter
from tests.helpers.released import REPO, count
from tests.loopback import Hub, serving

LATE = ("rename", "replace", "link", "unlink", "fsync")
"""Calls that can be done and told as failed all the same."""


class Failure(NamedTuple):
    """A way for calls to fail: the `errno`; with `lasting` of each call from one on, as of a disk that is full; with
    `late` the call is done and told as failed."""

    number: int
    lasting: bool = False
    late: bool = False

    def __str__(self) -> str:
        return f"{errno.errorcode[self.number]}{' and on' * self.lasting}{' late' * self.late}"


FAILURES = (
    *(Failure(number) for number in calls.FAILS),
    Failure(errno.ENOSPC, lasting=True),
    Failure(errno.EROFS, lasting=True),
    Failure(errno.EIO, late=True),
)


class Straight(NamedTuple):
    """An undisturbed run: the states it goes through, and what it wrote beside the state."""

    states: list[Facts | None]
    written: dict[str, str]
    further: Facts | None = None
    """Where the command goes on if it is given once more and has something further to do."""


def campaign(
    work: Path,
    names: Sequence[str] | None = None,
    rules: Sequence[str] = commands.ALL,
    failures: Sequence[Failure] = (),
) -> dict[str, Any]:
    """Runs the campaign under `work`: kills, or these failures; returns how many runs there were of each command.
    Raises AssertionError with every broken promise."""
    torch.set_num_threads(1)  # no thread of torch's that a fork would leave behind
    logging.getLogger("continual.state").addHandler(logging.NullHandler())
    commands.make_models(work / "models")
    counts: dict[str, Any] = {}
    broken: list[str] = []
    for rule in rules:
        for step in commands.STEPS:
            if rule not in step.only or (names is not None and step.name not in names):
                continue
            begin = time.perf_counter()
            with contextlib.ExitStack() as stack:
                hub = stack.enter_context(serving()) if step.hub else None
                place = work / rule / step.name.replace(" ", "-")
                begun = World(work / "models", place / "begun", rule, None if hub is None else hub.endpoint)
                found = _Runs(step, begun, hub)
                ends = found.summed(failures) if failures else found.kills()
                broken += found.broken
            shutil.rmtree(place)
            counts[f"{rule}: {step.name}"] = {**ends, "seconds": round(time.perf_counter() - begin, 1)}
            print(f"{rule}: {step.name}: {ends}", file=sys.stderr, flush=True)
    assert not broken, "\n".join([f"{len(broken)} promises are broken:", *broken])
    return {"runs": sum(c["runs"] for c in counts.values()), "commands": counts}


class _Runs:
    """All runs of one command. `broken` has every promise that one of them broke."""

    def __init__(self, step: Step, begun: World, hub: Hub | None) -> None:
        self.step = step
        self.begun = begun
        self.hub = hub
        self.broken: list[str] = []
        begun.work.mkdir(parents=True)
        step.begin(begun)
        self.straight = _straight(step, begun, self.copy("straight"))

    def copy(self, name: str = "run") -> World:
        """What the command begins with, once more; on the Hub there is nothing."""
        world = self.begun.at(self.begun.work.with_name(name))
        shutil.rmtree(world.work, ignore_errors=True)
        shutil.copytree(self.begun.work, world.work, symlinks=True)
        if self.hub is not None and REPO in self.hub.state():
            self.hub.delete(REPO)
        return world

    def kills(self) -> dict[str, int]:
        """A kill at each call."""
        number = 0
        while True:
            number += 1
            world = self.copy()
            code = _forked(partial(_run, self.step, world, Counter(calls.changes, number, calls.kill)))
            if code == 0:
                return {"runs": number - 1}
            where = f"{self.step.name} ({world.rule}) killed at call {number}"
            self.broken += [f"{where}: exit code {code}"] if code != calls.KILLED else self.judge(world, where)

    def summed(self, failures: Sequence[Failure]) -> dict[str, int]:
        """A failure at each call, of each of these kinds."""
        found = {"runs": 0}
        for failure in failures:
            for key, value in self.failing(failure).items():
                found[key] = found.get(key, 0) + value
        return found

    def failing(self, failure: Failure) -> dict[str, int]:
        """A failure of one kind at each call that can have it."""
        ends, number = list[str](), 0
        kinds = LATE if failure.late else calls.FAILS[failure.number]
        then = (calls.fail_after if failure.late else calls.fail)(failure.number)
        while True:
            number += 1
            world = self.copy()
            counter = Counter(kinds.__contains__, number, then, lasting=failure.lasting)
            code = _forked(partial(_fail, self.step, world, counter))
            if code == DONE:
                return {"runs": len(ends), **{end: ends.count(end) for end in ends}}
            where = f"{self.step.name} ({world.rule}), {failure} at call {number}"
            ends.append(ENDS.get(code, f"exit code {code}"))
            self.broken += self.judge(world, where) if code in ENDS else [f"{where}: {ends[-1]}"]

    def judge(self, world: World, where: str) -> list[str]:
        """What does not hold after a run, and when the command is given again."""
        step, straight = self.step, self.straight
        try:
            seen = looking.look(world)
            assert seen in straight.states or _later(seen, straight), f"no state of an undisturbed run: {seen}"
            if step.name == "init":
                again(step, world, None)
            else:
                with world.opened(**dict(step.settings)) as merge:
                    again(step, world, merge)
            ended = looking.look(world)
            assert ended is not None
            assert straight.states[-1] is not None
            ends = [end.now for end in (straight.states[-1], straight.further) if end is not None]
            assert ended.now in ends, "the repeated command ends otherwise"
            assert looking.written(world, step) == straight.written, f"{looking.written(world, step)} were written"
            assert self.hub is None or count(self.hub) == 1, "it is not released, or twice"
            assert not (world.state / "staging").exists(), "what was on its way is still there"
        except Exception as error:
            return [f"{where}: {type(error).__name__}: {error}"]
        return []


def _forked(child: Callable[[], int]) -> int:
    """The exit code of `child` in a process of its own."""
    sys.stderr.flush()
    pid = os.fork()
    if pid == 0:
        code = 99
        try:
            code = child()
        except BaseException:
            traceback.print_exc()
            sys.stderr.flush()
        finally:
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])


def _run(step: Step, world: World, counter: Counter) -> int:
    with calls.watched(world.work, counter):
        do(step, world)
    return 0


def do(step: Step, world: World) -> None:
    """The command, from the opening of the state to its closing."""
    if step.name == "init":
        step.run(world, None)
        return
    with world.opened(**dict(step.settings)) as merge:
        step.run(world, merge)


DONE = 0
ENDS = {10: "done all the same", 11: "tried again and done", 12: "halted", 13: "not opened"}
"""How a run ended in which a call failed."""


def _fail(step: Step, world: World, counter: Counter) -> int:
    """Runs a command in which a call fails; where the state stays open, the command is given again."""
    before = _head(world)
    told = _Told()
    logging.getLogger("continual.state").addHandler(told)
    if step.name == "init":
        error = _error(counter, world, lambda: step.run(world, None))
        _is_told(error, told)
        return _end(counter, error, opened=False)
    merges: list[Any] = []
    error = _error(counter, world, lambda: merges.append(world.opened(**dict(step.settings))))
    if error is None:
        (merge,) = merges
        error = _error(counter, world, lambda: step.run(world, merge))
        if isinstance(error, Retry) and step.records == 1:
            assert len(merge.state.ledger.log) == before + 1, f"{error}: and there is a record"
        if error is not None and not isinstance(error, Halt):
            again(step, world, merge)
        if not isinstance(error, Halt) or isinstance(error, Misconfigured):
            _acknowledged(merge)
        merge.close()
        _is_told(error, told)
        return _end(counter, error, opened=True)
    _is_told(error, told)
    return _end(counter, error, opened=False)


def _acknowledged(merge: Any) -> None:
    """The next write makes up for what could not be done."""
    merge.state.begin().abandon()
    assert merge.state.behind is None


def _error(counter: Counter, world: World, act: Callable[[], object]) -> ContinualError | None:
    """The error of ours with which `act` ends, if it does. Any other ends this process."""
    with calls.watched(world.work, counter):
        try:
            act()
        except ContinualError as error:
            return error
    return None


def _end(counter: Counter, error: ContinualError | None, *, opened: bool) -> int:
    if counter.at is not None and counter.count < counter.at:
        assert error is None, error
        return DONE
    if error is None:
        return 10
    if not opened:
        return 13
    return 12 if isinstance(error, Halt) and not isinstance(error, Misconfigured) else 11


class _Told(logging.Handler):
    """Keeps what the state logs."""

    def __init__(self) -> None:
        super().__init__()
        self.lines: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(record.getMessage())


def _is_told(error: ContinualError | None, told: _Told) -> None:
    for line in (*told.lines, *([str(error)] if error else [])):
        assert not ("committed" in line and "settled" in line), line
        assert "\n" not in line, line


def _head(world: World) -> int:
    if not (world.state / "format.json").exists():
        return -1
    with State.open(world.state) as state:
        return state.ledger.head.seq


def again(step: Step, world: World, merge: Any) -> None:
    """The command once more; it may say that it stands already."""
    try:
        step.run(world, merge)
    except Misconfigured as error:
        if step.again is None or step.again not in str(error):
            raise


def _later(seen: Facts | None, straight: Straight) -> bool:
    """Whether a command was done twice, which is what trying again comes to where its record stood already, or went on
    to what it has further to do."""
    ends = [end.now for end in (straight.states[-1], straight.further) if end is not None]
    return seen is not None and seen.now in ends


def _straight(step: Step, begun: World, world: World) -> Straight:
    """Runs the command on a copy, undisturbed; the states are those after each of its records."""
    states: list[Facts | None] = [looking.look(begun)]

    def note() -> None:
        with State.open(world.state) as state:
            found = looking.facts(state)
        if found not in states:
            states.append(found)

    def noting(called: calls.Called) -> Any:
        found = called.do()
        if called.what in ("rename", "replace") and called.path.endswith("/HEAD") and step.name != "init":
            note()
        return found

    with calls.watched(world.work, noting):
        do(step, world)
    note()
    written, further = looking.written(world, step), None
    if step.further is not None:
        with world.opened(**dict(step.settings)) as merge:
            step.further(merge)
        further = looking.look(world)
    return Straight(states, written, further)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--errors", action="store_true", help="have calls fail; default: kill the process")
    parser.add_argument("--command", action="append", help="only this one; can be given several times")
    parser.add_argument("--rule", action="append", help="only this one; can be given several times")
    parser.add_argument("--dir", type=Path, help="where to work; default: a temporary directory in memory")
    parser.add_argument("--span", type=int, default=excerpts.SPAN, help="records that an excerpt is of")
    args = parser.parse_args()
    excerpts.SPAN = args.span
    memory = "/dev/shm" if Path("/dev/shm").is_dir() else None
    with tempfile.TemporaryDirectory(dir=memory) as temporary:
        work = args.dir or Path(temporary)
        result = campaign(work, args.command, tuple(args.rule or commands.ALL), FAILURES if args.errors else ())
    json.dump(result, sys.stdout, indent=2)
    print()


if __name__ == "__main__":
    main()
