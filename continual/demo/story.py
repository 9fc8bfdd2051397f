"""The story: train, publish into the watched folder of a real daemon process, kill it while a fold is uncommitted,
start it again, compare."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track
from rich.table import Table
from safetensors.torch import load_file
from torch import Tensor

from continual import api, making
from continual.demo import digits
from continual.errors import Halt
from continual.publish.folder import Target
from continual.service import asking
from continual.state import State
from continual.state.verify import verify

_PATIENCE = 60.0


def run(directory: Path | None, *, json: bool, seed: int, console: Console) -> dict[str, Any]:
    """Plays the story in `directory` (default: a temporary one) and returns its figures; prints them as tables unless
    `json`.

    Raises Halt if something does not happen that should.
    """
    torch.set_num_threads(1)  # the model is so small that more threads only get in each other's way
    with contextlib.ExitStack() as stack:
        work = directory or Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="continual-demo-")))
        work.mkdir(parents=True, exist_ok=True)
        for name in ("base", "state", "published", "merged", "mean", "averaged"):
            if (work / name).exists():
                raise Halt(f"{work / name} exists: give the demonstration a directory of its own")
        (work / "published").mkdir()
        console.print(f"Working in {work}")
        weights = _train(work, seed, console)
        daemon = _daemon(work, weights, console)
        result = {"tasks": _compare(work, weights, seed), **daemon}
    result["mean"] = {
        key: sum(row[key] for row in result["tasks"].values()) / len(result["tasks"])
        for key in ("base", "averaged", "merged")
    }
    if not json:
        show(result, console)
    return result


def _train(work: Path, seed: int, console: Console) -> dict[str, Mapping[str, Tensor]]:
    """The base, saved, and every fine-tune, kept for later."""
    console.print(
        "\n[bold]1. Train[/bold] a small transformer on handwritten digits, and a fine-tune for each of "
        "several ways of seeing them"
    )
    base = digits.base(seed)
    digits.save(base, work / "base")
    weights: dict[str, Mapping[str, Tensor]] = {"base": base}
    for task in track(
        list(digits.TASKS), "fine-tuning", console=console, disable=not console.is_terminal, transient=True
    ):
        weights[task] = digits.fine_tune(base, task, seed)
    console.print(
        f"   the base and {len(digits.TASKS)} fine-tunes, {sum(t.numel() for t in base.values())} parameters each"
    )
    return weights


def _daemon(work: Path, weights: Mapping[str, Mapping[str, Tensor]], console: Console) -> dict[str, Any]:
    """Publishes one fine-tune after the other; the daemon is killed at the first fold of the second half that can be
    caught uncommitted."""
    state, tasks = work / "state", list(digits.TASKS)
    making.init(work / "base", state)
    console.print("\n[bold]2. Publish[/bold] them one by one into the watched folder of a daemon")
    half = len(tasks) // 2
    with _running(work) as process:
        for task in tasks[:half]:
            _publish(work, task, weights)
            _folded(state, process, tasks.index(task) + 1)
            console.print(f"   published and folded: {task}")
            if task == tasks[0]:
                first = _peak(process)
        console.print("\n[bold]3. Kill[/bold] it (SIGKILL) while a fold is uncommitted")
        caught = _kill(work, process, tasks, half, weights, console)
    with State.open(state) as opened:
        orphans = [{"generation": name, "bytes": _size(state / "generations" / name)} for name in opened.orphans]
        intact: dict[str, Any] = {
            "record": opened.ledger.head.seq,
            "folds": len(opened.ledger.folds()),
            "findings": verify(opened),
        }
    for orphan in orphans:
        console.print(
            f"   left behind: generation {orphan['generation']}, {orphan['bytes']} bytes, which no record names"
        )
    console.print(
        f"   the state is at record {intact['record']} with {intact['folds']} folds, "
        f"{len(intact['findings'])} findings by verify"
    )
    console.print(
        "\n[bold]4. Start[/bold] it again: the orphan goes, the interrupted fine-tune is folded, then the rest"
    )
    with _running(work) as process:
        for number, task in enumerate(tasks, 1):
            if not (work / "published" / task).exists():
                _publish(work, task, weights)
            _folded(state, process, number)
        last = _peak(process)
        process.send_signal(signal.SIGTERM)
        code = process.wait(_PATIENCE)
    with State.open(state) as opened:
        folded = [c.entry.candidate.name for c in opened.ledger.folds()]
        findings = verify(opened)
    if sorted(folded) != sorted(tasks) or findings or code != 0 or not orphans or intact["findings"]:
        raise Halt(
            f"the demonstration failed: folded {folded}, findings {findings}, exit code {code}, orphans {orphans}"
        )
    console.print(f"   folded, each exactly once: {', '.join(folded)}")
    return {
        "killed_while_folding": caught,
        "orphans": orphans,
        "after_kill": intact,
        "folded": folded,
        "peak_memory_bytes": {"first": first, "last": last},
    }


def _kill(
    work: Path,
    process: subprocess.Popen[bytes],
    tasks: list[str],
    begin: int,
    weights: Mapping[str, Mapping[str, Tensor]],
    console: Console,
) -> str:
    """Publishes one fine-tune after the other until the daemon can be killed in the middle of a fold: a generation is
    there, and no record names it. Returns the name of the fine-tune that was being folded."""
    generations, commits = work / "state" / "generations", work / "state" / "commits"
    for task in tasks[begin:]:
        before = set(_generations(generations))
        head = len(list(commits.glob("*.json")))
        _publish(work, task, weights)
        end = time.monotonic() + _PATIENCE
        while not any(
            _size(generations / name) for name in set(_generations(generations)) - before
        ):  # no pause: a fold of this model takes 0.03 s
            if time.monotonic() > end or process.poll() is not None:
                raise Halt(f"{task} was not taken up; see {work / 'daemon.log'}")
        process.send_signal(signal.SIGSTOP)  # it stands still while we look whether its fold is committed
        os.waitpid(process.pid, os.WUNTRACED)
        if len(list(commits.glob("*.json"))) > head:
            process.send_signal(signal.SIGCONT)
            continue
        process.kill()
        process.wait()
        with State.open(work / "state") as opened:
            if opened.orphans and len(opened.ledger.log) == head:
                console.print(f"   killed process {process.pid} while it was folding: {task}")
                return task
        break
    raise Halt("no fold was caught before its commit: the machine was too busy; run the demonstration again")


@contextlib.contextmanager
def _running(work: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A real daemon process on a free port, its log in daemon.log; killed at the end if it still runs."""
    command = [
        sys.executable,
        "-m",
        "continual",
        "run",
        "--state",
        str(work / "state"),
        "--watch",
        str(work / "published"),
    ]
    with open(work / "daemon.log", "ab") as log:
        process = subprocess.Popen([*command, "--port", "0", "--settle", "0.2"], stderr=log)
    try:
        _until(process, lambda: _ask(work / "state", process) is not None, "the daemon did not answer")
        yield process
    finally:
        if process.poll() is None:
            process.kill()
        process.wait()


def _publish(work: Path, task: str, weights: Mapping[str, Mapping[str, Tensor]]) -> None:
    digits.save(weights[task], work / "published" / task)


def _folded(state: Path, process: subprocess.Popen[bytes], number: int) -> None:
    _until(process, lambda: (_ask(state, process) or {}).get("folds", 0) >= number, f"fold {number} did not happen")


def _ask(state: Path, process: subprocess.Popen[bytes]) -> dict[str, Any] | None:
    body = asking.ask(state)
    return body if body is not None and body["pid"] == process.pid else None


def _until(process: subprocess.Popen[bytes], done: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _PATIENCE
    while not done():
        if process.poll() is not None or time.monotonic() > end:
            raise Halt(
                f"{what} within {_PATIENCE:.0f} s (exit code {process.poll()}); see daemon.log in the "
                "working directory (--dir keeps it)"
            )
        time.sleep(0.03)


def _peak(process: subprocess.Popen[bytes]) -> int:
    with open(f"/proc/{process.pid}/status", encoding="ascii") as lines:
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def _generations(directory: Path) -> list[str]:
    """The generations there; not those that are being deleted, which have names that begin with a dot."""
    return [name for name in os.listdir(directory) if not name.startswith(".")]


def _size(directory: Path) -> int:
    return sum(p.stat().st_size for p in directory.rglob("*") if p.is_file())


def _compare(work: Path, weights: Mapping[str, Mapping[str, Tensor]], seed: int) -> dict[str, dict[str, float]]:
    """Accuracy on held-out images, by task, of the base, the task's own fine-tune, the plain average and the merged
    model; both merges by our exports."""
    making.init(work / "base", work / "mean", making.Recipe(rule="mean"))
    with api.open(work / "mean", write=True) as merge:
        for task in digits.TASKS:
            merge.fold(work / "published" / task)
        merge.export(Target(work / "averaged"))
    with api.open(work / "state") as merge:
        merge.export(Target(work / "merged"))
    _, _, images, labels = digits.load(seed)
    models = {
        "base": weights["base"],
        **{name: load_file(work / name / "model.safetensors") for name in ("averaged", "merged")},
    }
    rows = {}
    for task, see in digits.TASKS.items():
        shown = see(images)
        rows[task] = {name: digits.accuracy(model, shown, labels) for name, model in models.items()}
        rows[task]["own"] = digits.accuracy(weights[task], shown, labels)
    return rows


def show(result: Mapping[str, Any], console: Console) -> None:
    """Prints the figures that `run` returns: accuracies as a table, and the daemon's memory."""
    table = Table(title="accuracy on held-out images, %", title_justify="left")
    table.add_column("task")
    for name in ("base", "own fine-tune", "plain average", "merged by the daemon"):
        table.add_column(name, justify="right")
    for task, row in result["tasks"].items():
        table.add_row(task, *(f"{100 * row[key]:.1f}" for key in ("base", "own", "averaged", "merged")))
    mean = result["mean"]
    table.add_section()
    table.add_row(
        "mean",
        f"{100 * mean['base']:.1f}",
        "",
        f"{100 * mean['averaged']:.1f}",
        f"[bold]{100 * mean['merged']:.1f}[/bold]",
    )
    console.print()
    console.print(table)
    first, last = (result["peak_memory_bytes"][key] / 1e6 for key in ("first", "last"))
    console.print(f"peak memory of the daemon: {first:.0f} MB at the first fold, {last:.0f} MB at the last")
