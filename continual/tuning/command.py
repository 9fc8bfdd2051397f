"""A command that says what an exported model is worth. It is started without a shell, and its score is read from the
last line that it prints."""

from __future__ import annotations

import contextlib
import json
import math
import os
import shlex
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from continual import outside
from continual.errors import Abandoned, Misconfigured, Retry
from continual.state.parts import CommandEvaluation

MODEL = "{model}"
_TAIL = 16 << 20
"""So many bytes at the end of what a command printed are looked at."""
_ROOM = 1 << 20
"""Bytes: where the disk of what a command prints has fewer, it may have failed for that alone."""
_LOOK = 0.5
"""Seconds between two looks at whether continual is stopping."""


class CommandFailed(Misconfigured):
    """A command was run and ended with an exit code above 0, or said nothing that can be used."""


@dataclass(frozen=True, slots=True)
class Command:
    """An argument list in which `{model}` stands for the model directory. The last line that the command prints is a
    number, or a JSON object that has one under `key` (dots go into objects). Higher is better, unless `lower`. The
    command is stopped after `timeout` seconds.

    Raises Misconfigured for a command that does not name the model, and for a timeout that is none.
    """

    argv: tuple[str, ...]
    key: str | None = None
    lower: bool = False
    timeout: float | None = None

    def __post_init__(self) -> None:
        if not any(MODEL in part for part in self.argv):
            raise Misconfigured(f"command {shlex.join(self.argv)!r}: write {MODEL} where the model directory goes")
        if self.timeout is not None and not self.timeout > 0:
            raise Misconfigured(f"timeout = {self.timeout:g}: name seconds above 0")

    @staticmethod
    def split(text: str) -> tuple[str, ...]:
        """A command line as an argument list, by the rules of a shell's quotes and none of its others. Raises
        Misconfigured for an open quote."""
        try:
            return tuple(shlex.split(text))
        except ValueError as error:
            raise Misconfigured(f"command {text!r}: {error}") from None

    def told(self) -> CommandEvaluation:
        """What a record keeps of it."""
        return CommandEvaluation(tuple(self.argv), self.key, self.lower)


def score(command: Command, model: Path, logs: Path, candidate: str) -> float:
    """Runs `command` on the directory `model`; its output goes to files in `logs`. Returns the number that it printed.
    Raises as `last_line`, and Misconfigured where it ends in no number; all name `candidate`, which says how the model
    is read."""
    line = last_line(command, model, logs, f"candidate {candidate}")
    try:
        return parse(line, command.key)
    except ValueError as error:
        words = _last_words(logs / "stderr")
        where = f"candidate {candidate}: {shlex.join(_argv(command, model))}"
        raise Misconfigured(f"{where}: {error}; exit code 0{words}; nothing was recorded") from None


def last_line(command: Command, model: Path, logs: Path, what: str, stop: threading.Event | None = None) -> str:
    """Runs `command` on the directory `model`; its output goes to files in `logs`. Returns the last line that it
    printed. Raises Retry where it took too long, was killed or failed on a full disk, Abandoned once `stop` is set,
    Misconfigured where it cannot be started, CommandFailed where it fails; all name `what`."""
    argv = _argv(command, model)
    out, err = logs / "stdout", logs / "stderr"
    where = f"{what}: {shlex.join(argv)}"
    with out.open("wb") as stdout, err.open("wb") as stderr:
        try:
            process = subprocess.Popen(
                argv, stdin=subprocess.DEVNULL, stdout=stdout, stderr=stderr, start_new_session=True
            )
        except (OSError, ValueError) as error:
            raise Misconfigured(f"{where}: cannot be started ({error})") from None
        try:
            code = _waited(process, command.timeout, where, stop or threading.Event())
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # the whole group: what the command left running ends too
            process.wait()
    if code < 0:
        raise Retry(f"{where}: killed by signal {-code}{_last_words(err)}; nothing was recorded")
    if code > 0 and shutil.disk_usage(logs).free < _ROOM:
        raise Retry(f"{where}: exit code {code}, and the disk of {logs} is full: free some space; nothing was recorded")
    if code > 0:
        raise CommandFailed(f"{where}: exit code {code}{_last_words(err)}; nothing was recorded")
    return _last_line(out)


def _waited(process: subprocess.Popen[bytes], timeout: float | None, where: str, stop: threading.Event) -> int:
    """The exit code of a command, once it has one. Raises Retry where it took longer than `timeout`, Abandoned."""
    end = math.inf if timeout is None else time.monotonic() + timeout
    while (left := end - time.monotonic()) > 0 and not stop.is_set():
        with contextlib.suppress(subprocess.TimeoutExpired):
            return process.wait(min(_LOOK, left))
    if stop.is_set():
        raise Abandoned(f"{where}: ended, as continual is stopping; nothing was recorded")
    raise Retry(f"{where}: not done after {timeout:g} s, its timeout, and stopped; nothing was recorded")


def _argv(command: Command, model: Path) -> list[str]:
    return [part.replace(MODEL, str(model)) for part in command.argv]


def parse(line: str, key: str | None) -> float:
    """The finite number in the last line of an output, under `key` where there is one. Raises ValueError saying what is
    there instead."""
    shown = repr(line[:200])
    if key is None:
        try:
            found: object = float(line)
        except ValueError:
            hint = "; name the number in it with --key" if line.startswith("{") else ""
            raise ValueError(
                f"its last line is no number but {shown}{hint}" if line else "it printed nothing"
            ) from None
    else:
        try:
            found = json.loads(line)
        except (ValueError, RecursionError):
            raise ValueError(f"its last line is no JSON object but {shown}" if line else "it printed nothing") from None
        for part in key.split("."):
            if not isinstance(found, Mapping) or part not in found:
                raise ValueError(f"no {key} in its last line {shown}")
            found = found[part]
    if isinstance(found, bool) or not isinstance(found, int | float):
        raise ValueError(f"{key} in its last line is no number but {outside.shown(found)}")
    try:
        score = float(found)
    except OverflowError:  # an integer that no float holds
        score = math.inf
    if not math.isfinite(score):
        raise ValueError(f"its score is {score}, no finite number")
    return score


def _last_words(err: Path) -> str:
    """The last line of stderr, as a message ends with it."""
    line = _last_line(err)
    return f", last line of stderr: {line[:300]}" if line else ", nothing on stderr"


def _last_line(file: Path) -> str:
    """The last line at the end of a file that is not empty; of one that is longer than what is looked at its end."""
    with file.open("rb") as opened:
        opened.seek(max(0, file.stat().st_size - _TAIL))
        lines = opened.read().decode("utf-8", "replace").splitlines()
    return next((line.strip() for line in reversed(lines) if line.strip()), "")
