"""Who is asked about a merge: a command of the user's, or lm-eval, which get it as a model directory. Whether what they
say is good enough is decided elsewhere."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import stat
import sys
import tempfile
import threading
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Protocol

from continual import outside
from continual.config.evaluating import EvaluationSettings
from continual.engine.reading import Reading
from continual.errors import Misconfigured
from continual.evaluation.scores import Metric, lower_of, parse
from continual.evaluation.verdict import Answers
from continual.state.durable import environment
from continual.tuning.choosing import scratch_directory
from continual.tuning.command import MODEL, Command, CommandFailed, last_line

ROWS = "{rows}"
"""Stands in a command for how many rows of each task are wanted."""
_SAMPLES = 1 << 30
"""Bytes of the largest file of samples that is read."""

_WRITTEN = 2
"""So often a file changes while the command runs that is not what it asks by."""

Files = tuple[tuple[str, int, int, int], ...]
"""Of each file that is there its name, inode, size, and nanoseconds of its last change."""


class AskedMerge(Protocol):
    """A merge that is asked about; without a fold it is the base."""

    def directory(self, place: Path) -> Path | None:
        """A model directory with it, below `place` where it is nowhere else; None of a base that is in no folder."""
        ...

    def reading(self) -> Reading:
        """How it is read."""
        ...


class Asker(Protocol):
    """Says what a merge is worth. `grows`: whether it can be asked with more rows."""

    grows: bool

    def asked_by(self) -> Files:
        """The files that it asks by, as they are now."""
        ...

    def __call__(self, merge: AskedMerge, what: str, rows: int) -> Answers | None:
        """What is said of `merge` (`what`, in messages), on so many rows of each task; None where it cannot be asked.
        Raises Retry where the environment got in the way, Misconfigured where nothing can be made of what is said,
        CommandFailed, Abandoned."""
        ...


class CommandAsker:
    """Asks the command of the settings about an export."""

    def __init__(self, settings: EvaluationSettings, stopping: threading.Event) -> None:
        """Raises Misconfigured for a command that does not name the model."""
        command_of(settings, settings.first_rows)
        self.grows = any(ROWS in part for part in settings.command)
        self._settings = settings
        self._changed: Counter[str] = Counter()
        """How often a file changed while the command ran."""
        self._stopping = stopping

    def asked_by(self) -> Files:
        """Those that the command names, as its program or `--rows=FILE`. One that changes each time that it runs is
        what it writes."""
        parts = {part for word in self._settings.command for part in (word, word.partition("=")[2])}
        return files_now(part for part in sorted(parts) if self._changed[part] < _WRITTEN)

    def __call__(self, merge: AskedMerge, what: str, rows: int) -> Answers | None:
        with _written(merge, self._settings) as (model, place):
            if model is None:
                return None
            asked = f"evaluation.command, asked about {what}"
            before = {*self.asked_by()}
            line = last_line(command_of(self._settings, rows), model, place, asked, self._stopping)
            self._changed.update({file for file, *_ in before.symmetric_difference(self.asked_by())})
            try:
                metrics = parse(line)
            except ValueError as error:
                raise CommandFailed(f"{asked}: {error}") from None
            return _answers(metrics, self._settings)


class HarnessAsker:
    """Asks lm-eval about its tasks. Of each document the row is the probability that the right choice was given among
    the choices, where lm-eval says how likely each is, and the first metric of the task otherwise."""

    grows = True

    def __init__(self, settings: EvaluationSettings, stopping: threading.Event) -> None:
        """Raises Misconfigured where lm-eval is not installed."""
        if importlib.util.find_spec("lm_eval") is None:
            raise Misconfigured("evaluation.lm_eval: pip install 'continual[lm-eval]'")
        self._settings = settings
        self._stopping = stopping

    def asked_by(self) -> Files:
        """None: which files a task reads only lm-eval knows."""
        return ()

    def __call__(self, merge: AskedMerge, what: str, rows: int) -> Answers | None:
        with _written(merge, self._settings) as (model, place):
            if model is None:
                return None
            with tempfile.TemporaryDirectory(dir=place) as found:
                argv = [sys.executable, "-m", "lm_eval", "--model", "hf", "--model_args", f"pretrained={MODEL}"]
                argv += ["--tasks", ",".join(self._settings.lm_eval), "--limit", str(rows), "--log_samples"]
                argv += ["--output_path", found, *self._settings.lm_eval_args]
                asked = f"evaluation.lm_eval, asked about {what}"
                last_line(Command(tuple(argv), timeout=self._settings.timeout), model, place, asked, self._stopping)
                metrics = samples_in(Path(found), what)
            return _answers(metrics, self._settings)


def files_now(names: Iterable[str | Path]) -> Files:
    """Those of these names that are regular files."""
    found = []
    for name in names:
        with contextlib.suppress(OSError, ValueError):  # a word that is no path
            seen = os.stat(name)
            if stat.S_ISREG(seen.st_mode):
                found.append((str(name), seen.st_ino, seen.st_size, seen.st_mtime_ns))
    return tuple(found)


@contextlib.contextmanager
def _written(merge: AskedMerge, settings: EvaluationSettings) -> Iterator[tuple[Path | None, Path]]:
    """The model directory of a merge while the block runs, and one for what is written meanwhile. Raises Retry,
    Misconfigured."""
    directory = settings.directory or Path(tempfile.gettempdir())
    if not directory.is_dir():
        raise Misconfigured(f"evaluation.directory = {directory}: no such directory; make it, or name another")
    with environment("cannot evaluate"), scratch_directory(directory) as place:
        yield merge.directory(place), place


def command_of(settings: EvaluationSettings, rows: int) -> Command:
    """The command of the settings, told how many rows are wanted. Raises Misconfigured where it names no model."""
    argv = tuple(part.replace(ROWS, str(rows)) for part in settings.command)
    return Command(argv, timeout=settings.timeout)


def _answers(metrics: Mapping[str, Metric], settings: EvaluationSettings) -> Answers:
    try:
        return Answers(metrics, lower_of(metrics, settings.lower))
    except ValueError as error:
        raise Misconfigured(str(error)) from None


def samples_in(directory: Path, what: str) -> dict[str, Metric]:
    """The metrics that lm-eval wrote into the files of samples in `directory`: of each task a number for each document,
    in order. Raises CommandFailed where there are none, or they are not as lm-eval writes them."""
    found: dict[str, dict[tuple[int, str], float]] = {}
    for file in sorted(directory.rglob("samples_*.jsonl")):
        task = file.stem.removeprefix("samples_").rsplit("_", 1)[0]
        for number, line in enumerate(outside.read_regular(file, _SAMPLES).decode("utf-8", "replace").split("\n"), 1):
            if line.strip():
                where = f"evaluation of {what}: {file.name}, line {number}"
                key, value = _row_of(line, where)
                found.setdefault(task, {})[key] = value
    if not found:
        raise CommandFailed(f"evaluation of {what}: lm-eval wrote no samples")
    return {task: tuple(rows[key] for key in sorted(rows)) for task, rows in found.items()}


def _row_of(line: str, where: str) -> tuple[tuple[int, str], float]:
    """The number of a document with the filter of its answer, and what it is worth."""
    try:
        body = json.loads(line)
    except (ValueError, RecursionError):
        raise CommandFailed(f"{where}: no JSON") from None
    document = body.get("doc_id") if isinstance(body, dict) else None
    if not isinstance(document, int):
        raise CommandFailed(f"{where}: no sample of lm-eval: it has no doc_id")
    value = _probability(body)
    if value is None:
        names = body.get("metrics")
        name = names[0] if isinstance(names, list) and names else "acc"
        value = body.get(name) if isinstance(name, str) else None
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise CommandFailed(f"{where}: no finite number for its metric")
    return (document, str(body.get("filter", ""))), float(value)


def _probability(body: Mapping[str, object]) -> float | None:
    """The probability of the right choice among all, where the answers are log-likelihoods of choices."""
    answers, target = body.get("filtered_resps"), body.get("target")
    if not isinstance(answers, list) or len(answers) < 2 or isinstance(target, bool):
        return None
    right = int(target) if isinstance(target, int) or (isinstance(target, str) and target.isdecimal()) else -1
    logs = [one[0] if isinstance(one, list) and one else None for one in answers]
    values = [float(one) for one in logs if isinstance(one, int | float | str) and _is_number(one)]
    if len(values) != len(answers) or not 0 <= right < len(values):
        return None
    most = max(values)
    return math.exp(values[right] - most) / math.fsum(math.exp(one - most) for one in values)


def _is_number(given: float | str) -> bool:
    try:
        return math.isfinite(float(given))
    except ValueError:
        return False
